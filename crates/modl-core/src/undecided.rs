//! What stands at a modular site until a router and an aggregator have been chosen.

use crate::{
    Active, Aggregator, Bank, Context, Error, Module, Order, Outputs, Result, Router, Routing,
    Signal, Tensors,
};

/// Refuses to route and to aggregate, and says what is missing.
#[derive(Debug)]
pub(crate) struct Undecided;

impl Router for Undecided {
    fn kind(&self) -> &'static str {
        "undecided"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        Err(Error::invalid(
            "router",
            format!(
                "modules {} are attached, but nothing says which are active; call Modular::route",
                bank.names().join(", ")
            ),
        ))
    }
}

impl Aggregator for Undecided {
    fn kind(&self) -> &'static str {
        "undecided"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, _: &Outputs) -> Result<Signal> {
        Err(Error::invalid("aggregator", "none has been chosen; call Modular::aggregate"))
    }

    fn parameters(&self, _: &Active, _: &Tensors) -> Result<Box<dyn Module>> {
        Err(Error::invalid("aggregator", "none has been chosen; call Modular::aggregate"))
    }
}
