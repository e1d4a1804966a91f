//! The router is registered where its configuration is wanted.

use modl_core::{Bank, Context, Registry, Result, Router, Routing, Signal, Weights};
use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
struct First;

impl Router for First {
    fn kind(&self) -> &'static str {
        "first"
    }

    fn route(&self, _x: &Signal, bank: &Bank, _cx: &Context) -> Result<Routing> {
        Ok(Routing::new(Weights::Fixed(vec![(0, 1.0)]), bank.len()))
    }
}

fn main() -> Result<()> {
    Registry::new().routers.register::<First>("The first module", "", "4.1")
}
