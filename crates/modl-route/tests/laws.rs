//! Every router of the registry under the laws of routing.

#![allow(clippy::unwrap_used, clippy::panic)]

use modl_core::testing::{RouterClaims, check_router};
use modl_core::{Registry, Result};
use serde_json::{Value, json};

fn check(config: Value, claims: RouterClaims) -> Result<()> {
    let registry = Registry::new().with(modl_route::register)?;
    registry.routers.parse(&config)?;
    check_router(&|| registry.routers.parse(&config).unwrap(), &claims, &registry);
    Ok(())
}

#[test]
fn fixed() -> Result<()> {
    let tasks = |names: &[&str]| RouterClaims {
        tasks: names.iter().map(|n| n.to_string()).collect(),
        at_most: Some(2),
        ..RouterClaims::fixed()
    };
    check(json!({"type": "fixed"}), tasks(&["a", "b", "c"]))?;
    check(json!({"type": "fixed", "table": {"x": "b", "y": ["a", "c"]}}), tasks(&["x", "y"]))?;
    check(json!({"type": "fixed", "modules": ["a", "c"]}), tasks(&[]))
}

#[test]
fn uniform() -> Result<()> {
    check(json!({"type": "uniform"}), RouterClaims::fixed())
}

#[test]
fn soft() -> Result<()> {
    check(json!({"type": "soft"}), RouterClaims::soft())?;
    check(json!({"type": "soft", "input": "tokens", "temperature": 0.3}), RouterClaims::soft())?;
    check(json!({"type": "soft", "init_std": 0.5, "bias": false}), RouterClaims::soft())
}

#[test]
fn top_k() -> Result<()> {
    let raw = |k| RouterClaims { sums_to_one: false, ..RouterClaims::top_k(k) };
    check(json!({"type": "top_k", "k": 1}), raw(1))?;
    check(json!({"type": "top_k", "k": 2}), RouterClaims::top_k(2))?;
    check(json!({"type": "top_k", "k": 2, "renormalise": false, "input": "tokens"}), raw(2))?;
    check(json!({"type": "top_k", "k": 1, "straight_through": true}), RouterClaims::top_k(1))?;
    // Renormalised over one module the weight is 1 whatever the scores are.
    let constant = RouterClaims { learns: false, ..RouterClaims::top_k(1) };
    check(json!({"type": "top_k", "k": 1, "renormalise": true}), constant)
}

#[test]
fn prompt_pool() -> Result<()> {
    // Keys learn by a loss: α has no gradient.
    let claims = |k| RouterClaims { learns: false, ..RouterClaims::top_k(k) };
    check(json!({"type": "prompt_pool", "k": 1}), claims(1))?;
    check(json!({"type": "prompt_pool", "k": 2, "diversity": true}), claims(2))?;
    let by_label = RouterClaims { tasks: ["a", "b", "c"].map(str::to_owned).to_vec(), ..claims(1) };
    check(json!({"type": "prompt_pool", "k": 1, "label": "task"}), by_label)
}

#[test]
fn every_router_is_documented_and_reads_back_what_it_wrote() -> Result<()> {
    let registry = Registry::new().with(modl_route::register)?;
    assert_eq!(registry.routers.entries().len(), 35);
    for entry in registry.routers.entries() {
        assert!(!entry.title.is_empty() && !entry.citation.is_empty() && !entry.section.is_empty());
        let config = registry.routers.parse(&json!({"type": entry.name}))?;
        assert_eq!(config.kind(), entry.name);
        let written = config.to_json()?;
        assert_eq!((entry.parse)(written.clone())?.to_json()?, written);
        let typo = registry.routers.parse(&json!({"type": entry.name, "tempreature": 1.0}));
        assert!(typo.unwrap_err().to_string().contains("tempreature"), "{}", entry.name);
    }
    Ok(())
}
