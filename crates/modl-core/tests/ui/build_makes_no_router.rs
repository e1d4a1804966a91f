//! A configuration that makes something else than a router.

use modl_core::{Bank, Result, Router, RouterConfig, Scope, Site};
use serde_json::Value;

#[derive(Debug)]
struct Prototypes;

#[derive(Debug)]
struct Nearest;

impl RouterConfig for Nearest {
    fn kind(&self) -> &'static str {
        "nearest"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(Value::Null)
    }

    fn build(&self, _site: &Site, _bank: &Bank, _scope: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(Prototypes))
    }
}

fn main() {}
