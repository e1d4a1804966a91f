//! The router under modl's laws of routing.

use modl_core::testing::{RouterClaims, check_router};
use modl_core::{Registry, Result};
use serde_json::json;

#[test]
fn it_keeps_the_laws_of_routing() -> Result<()> {
    let registry = Registry::new().with(modl_router_prototype::register)?;
    let make =
        || registry.routers.parse(&json!({ "type": "prototype", "temperature": 0.5 })).unwrap();
    check_router(&make, &RouterClaims::soft(), &registry);
    Ok(())
}
