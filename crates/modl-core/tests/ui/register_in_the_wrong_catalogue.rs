//! A router among the modules.

use modl_core::{Bank, Error, Registry, Result, Router, RouterConfig, Scope, Site};
use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Default, Deserialize)]
struct Nearest {
    temperature: f64,
}

impl RouterConfig for Nearest {
    fn kind(&self) -> &'static str {
        "nearest"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(Value::Null)
    }

    fn build(&self, _site: &Site, _bank: &Bank, _scope: &mut Scope) -> Result<Box<dyn Router>> {
        Err(Error::unsupported("nearest", ""))
    }
}

fn main() -> Result<()> {
    Registry::new().modules.register::<Nearest>("Nearest prototype", "", "4.2.3")
}
