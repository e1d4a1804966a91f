//! Every aggregator of the registry under the laws of aggregation.

#![allow(clippy::unwrap_used, clippy::panic)]

mod low_rank;

use low_rank::Lora;
use modl_core::testing::{AggregatorClaims, check_aggregator, standins};
use modl_core::{ModuleConfig, Registry, Result};
use serde_json::{Value, json};

fn check(config: Value, module: Box<dyn Fn() -> Box<dyn ModuleConfig>>, claims: AggregatorClaims) {
    let registry = Registry::new().with(modl_aggregate::register).unwrap();
    check_aggregator(&|| registry.aggregators.parse(&config).unwrap(), module.as_ref(), claims);
}

fn lora() -> Box<dyn Fn() -> Box<dyn ModuleConfig>> {
    Box::new(|| Box::new(Lora { rank: 2, scale: 0.75 }))
}

#[test]
fn weighted_sum() {
    for base in ["kept", "replaced"] {
        let config = json!({"type": "weighted_sum", "base": base});
        check(config.clone(), lora(), AggregatorClaims::default());
        check(config, Box::new(|| Box::new(standins::Scale)), AggregatorClaims::default());
    }
}

#[test]
fn average() {
    check(json!({"type": "average"}), lora(), AggregatorClaims::default());
    check(json!({"type": "average", "normalise": false}), lora(), AggregatorClaims::default());
}

#[test]
fn concat() {
    check(json!({"type": "concat"}), lora(), AggregatorClaims::default());
}

#[test]
fn multi_head() {
    check(json!({"type": "multi_head"}), lora(), AggregatorClaims::default());
    check(json!({"type": "factors"}), lora(), AggregatorClaims::default());
}

#[test]
fn fusion() {
    for config in [
        json!({"type": "fusion", "value": "identity"}),
        json!({"type": "fusion", "value": "none", "query_source": "input"}),
        json!({"type": "fusion", "value": "identity", "residual_before": true, "temperature": 2.0}),
    ] {
        check(config.clone(), lora(), AggregatorClaims::default());
        check(config, Box::new(|| Box::new(standins::Scale)), AggregatorClaims::default());
    }
}

#[test]
fn learned_weights_over_outputs() {
    for config in [
        json!({"type": "scalar_mix"}),
        json!({"type": "scalar_mix", "gamma": false}),
        json!({"type": "gated"}),
        json!({"type": "module_attention"}),
        json!({"type": "module_attention", "asks": "token", "rank": 3}),
    ] {
        check(config.clone(), lora(), AggregatorClaims::default());
        check(config, Box::new(|| Box::new(standins::Scale)), AggregatorClaims::default());
    }
    // Each change is let through by itself, half of it at first.
    let by_itself = AggregatorClaims {
        single_is_identity: false,
        idempotent: false,
        ..AggregatorClaims::default()
    };
    check(json!({"type": "gated", "gate": "sigmoid"}), lora(), by_itself);
}

#[test]
fn stack() -> Result<()> {
    // It has no weights; by rows it is tested with its order in `multi_head.rs`.
    let registry = Registry::new().with(modl_aggregate::register)?;
    let mut model = modl_core::Modular::new(
        modl_core::testing::TinyBackbone::new(modl_core::Seed(1), modl_core::Kind::Float)?,
        modl_core::Seed(2),
    )?;
    model.attach("a", lora()(), &modl_core::Targets::names(["query"]))?;
    model.route(modl_core::testing::Given::only(0), false)?;
    let mut outputs = Vec::new();
    for kind in ["stack", "weighted_sum"] {
        model.aggregate(registry.aggregators.parse(&json!({"type": kind}))?)?;
        let inputs = modl_core::testing::TinyBackbone::inputs(2, 5, modl_core::Seed(3))?;
        outputs.push(model.forward(&inputs, &modl_core::Context::eval())?.need("logits")?.copy()?);
    }
    assert!(outputs[0].bit_equal(&outputs[1])?, "one module of a stack is itself");
    Ok(())
}

#[test]
fn every_aggregator_is_documented_and_reads_back_what_it_wrote() -> Result<()> {
    let registry = Registry::new().with(modl_aggregate::register)?;
    assert_eq!(registry.aggregators.entries().len(), 14);
    for entry in registry.aggregators.entries() {
        assert!(!entry.title.is_empty() && !entry.citation.is_empty() && !entry.section.is_empty());
        let config = registry.aggregators.parse(&json!({"type": entry.name}))?;
        assert_eq!(config.kind(), entry.name);
        let written = config.to_json()?;
        assert_eq!((entry.parse)(written.clone())?.to_json()?, written);
        let typo = registry.aggregators.parse(&json!({"type": entry.name, "normalize": true}));
        assert!(typo.unwrap_err().to_string().contains("normalize"), "{}", entry.name);
    }
    Ok(())
}
