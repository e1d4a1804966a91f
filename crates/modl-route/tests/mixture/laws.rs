//! The laws of routing.

use modl_core::testing::{RouterClaims, check_router};
use modl_core::{Registry, Result};
use serde_json::{Value, json};

fn check(config: Value, claims: RouterClaims) -> Result<()> {
    let registry = Registry::new().with(modl_route::register)?;
    registry.routers.parse(&config)?;
    check_router(&|| registry.routers.parse(&config).unwrap(), &claims, &registry);
    Ok(())
}

/// Choices that may be dropped, or weights that are no shares.
fn raw(k: usize) -> RouterClaims {
    RouterClaims { sums_to_one: false, ..RouterClaims::top_k(k) }
}

#[test]
fn noisy_top_k() -> Result<()> {
    let drawn = |claims| RouterClaims { draws: true, ..claims };
    let tokens = json!({"type": "noisy_top_k", "k": 2, "input": "tokens"});
    check(tokens, drawn(RouterClaims::top_k(2)))?;
    check(json!({"type": "noisy_top_k", "k": 3}), drawn(RouterClaims::top_k(3)))?;
    check(json!({"type": "noisy_top_k", "variant": "v_moe", "input": "tokens"}), drawn(raw(2)))
}

#[test]
fn gshard_and_st_moe() -> Result<()> {
    for kind in ["gshard", "st_moe"] {
        let claims = || RouterClaims { draws: true, ..raw(2) };
        let limited = json!({"type": kind, "input": "tokens", "eval_capacity_factor": 0.5});
        check(limited, RouterClaims { looks_ahead: true, ..claims() })?;
        let over_batch = RouterClaims { looks_ahead: true, looks_at_batch: true, ..claims() };
        check(json!({"type": kind, "eval_capacity_factor": 0.5}), over_batch)?;
        let free = json!({"type": kind, "input": "tokens", "capacity_factor": 0.0,
            "eval_capacity_factor": 0.0});
        check(free, RouterClaims { draws: true, ..RouterClaims::top_k(2) })?;
    }
    Ok(())
}

#[test]
fn switch() -> Result<()> {
    let drawn = || RouterClaims { draws: true, ..raw(1) };
    check(json!({"type": "switch", "input": "tokens"}), drawn())?;
    // With a tight capacity earlier tokens still know nothing of later ones.
    let tight = json!({"type": "switch", "input": "tokens", "eval_capacity_factor": 0.6});
    check(tight, drawn())?;
    let by_score = json!({"type": "switch", "input": "tokens", "eval_capacity_factor": 0.6,
        "fill": "score"});
    check(by_score, RouterClaims { looks_ahead: true, ..drawn() })?;
    check(json!({"type": "switch", "jitter": 0.0, "eval_capacity_factor": 0.0}), raw(1))
}

#[test]
fn deepseek() -> Result<()> {
    check(json!({"type": "deepseek", "input": "tokens"}), RouterClaims::top_k(2))?;
    let grouped = json!({"type": "deepseek", "k": 1, "n_group": 3, "topk_group": 2,
        "renormalise": false, "routed_scaling_factor": 2.5});
    check(grouped, raw(1))?;
    check(json!({"type": "deepseek", "k": 1, "shared": ["b"], "renormalise": false}), raw(2))?;
    let balanced = json!({"type": "deepseek", "input": "tokens", "scoring": "softmax",
        "sequence_balance": true});
    check(balanced, RouterClaims::top_k(2))
}

#[test]
fn expert_choice() -> Result<()> {
    let ahead = || RouterClaims { looks_ahead: true, at_most: None, ..raw(3) };
    let tokens = json!({"type": "expert_choice", "input": "tokens", "capacity_factor": 1.0});
    check(tokens, ahead())?;
    let batch = json!({"type": "expert_choice", "input": "tokens", "over": "batch"});
    check(batch, RouterClaims { looks_at_batch: true, ..ahead() })?;
    let rows = json!({"type": "expert_choice", "capacity_factor": 1.5});
    check(rows, RouterClaims { looks_at_batch: true, ..ahead() })
}

#[test]
fn product_key() -> Result<()> {
    check(json!({"type": "product_key", "input": "tokens"}), RouterClaims::top_k(2))?;
    let heads = json!({"type": "product_key", "heads": 3, "k": 1, "query": 8});
    // Each head's only module weighs 1.
    check(heads, RouterClaims { learns: false, ..raw(3) })?;
    let shared = json!({"type": "product_key", "heads": 2, "shared_keys": true});
    check(shared, raw(3))
}

#[test]
fn hierarchical() -> Result<()> {
    check(json!({"type": "hierarchical", "groups": 3, "k_groups": 2}), raw(2))?;
    let tokens = json!({"type": "hierarchical", "k": 2, "input": "tokens"});
    check(tokens, raw(2))?;
    let whole = json!({"type": "hierarchical", "groups": 3, "k_groups": 2, "renormalise": true});
    check(whole, RouterClaims::top_k(2))
}

#[test]
fn soft_moe() -> Result<()> {
    let ahead = || RouterClaims { looks_ahead: true, ..RouterClaims::soft() };
    check(json!({"type": "soft_moe"}), ahead())?;
    check(json!({"type": "soft_moe", "slots": 3, "normalise": false}), ahead())
}
