//! Routing and aggregation that are simply given, to test the rest with.

use serde_json::{Value, json};

use crate::{
    Aggregator, AggregatorConfig, Bank, Base, Context, Order, Outputs, Result, Router,
    RouterConfig, Routing, Scope, Signal, Site, Weights,
};

/// A router that always answers with the same α.
#[derive(Debug, Clone)]
pub struct Given(pub Weights);

impl Given {
    /// One module for everything.
    pub fn only(j: usize) -> Box<Self> {
        Box::new(Given(Weights::Fixed(vec![(j, 1.0)])))
    }

    /// One module for each row, or none.
    pub fn rows(rows: &[Option<usize>]) -> Box<Self> {
        let row = |r: &Option<usize>| r.iter().map(|j| (*j, 1.0)).collect();
        Box::new(Given(Weights::Rows(rows.iter().map(row).collect())))
    }
}

impl Router for Given {
    fn kind(&self) -> &'static str {
        "given"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        Ok(Routing::new(self.0.clone(), bank.len()))
    }
}

impl RouterConfig for Given {
    fn kind(&self) -> &'static str {
        "given"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(self.clone()))
    }
}

/// Σ αⱼ hⱼ by [`Outputs::weighted_sum`], the fast ways included.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum(pub Base);

/// Σ αⱼ hⱼ by [`Outputs::plain_sum`], which the fast ways are compared with.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlainSum(pub Base);

/// An aggregator of outputs that is its own recipe.
macro_rules! sum_of_outputs {
    ($type:ident, $kind:literal, $method:ident) => {
        impl Aggregator for $type {
            fn kind(&self) -> &'static str {
                $kind
            }

            fn order(&self) -> Order {
                Order::Outputs
            }

            fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
                h.$method(self.0)
            }
        }

        impl AggregatorConfig for $type {
            fn kind(&self) -> &'static str {
                $kind
            }

            fn to_json(&self) -> Result<Value> {
                Ok(json!({}))
            }

            fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
                Ok(Box::new(*self))
            }
        }
    };
}

sum_of_outputs!(Sum, "sum", weighted_sum);
sum_of_outputs!(PlainSum, "plain_sum", plain_sum);
