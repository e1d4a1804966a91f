//! Not an aggregator where one is wanted.

use modl_core::{Bank, Context, ModularLayer, Result, Router, Routing, Signal, Weights};

#[derive(Debug)]
struct First;

impl Router for First {
    fn kind(&self) -> &'static str {
        "first"
    }

    fn route(&self, _x: &Signal, bank: &Bank, _cx: &Context) -> Result<Routing> {
        Ok(Routing::new(Weights::Fixed(vec![(0, 1.0)]), bank.len()))
    }
}

fn main() {
    let _ = ModularLayer::new(Bank::new(), First, First);
}
