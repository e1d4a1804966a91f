//! The stand-ins of every family pass the contract, and so do the kit's own laws.

#![allow(clippy::unwrap_used)]

use modl_core::testing::standins::{self, BalancedHalves, Generated, Prompt, Scale, WeightMask};
use modl_core::testing::{
    AggregatorClaims, Identity, ModuleClaims, RouterClaims, Sum, check_aggregator, check_module,
    check_router,
};
use modl_core::{ModuleConfig, Registry, Targets};

fn registry() -> Registry {
    Registry::new().with(standins::register).unwrap()
}

fn claims(identity: Identity, parameters: usize) -> ModuleClaims {
    ModuleClaims { identity, parameters, merges: false, smooth: true, task_vector: 0 }
}

fn check(make: &dyn Fn() -> Box<dyn ModuleConfig>, sites: &[&str], claims: ModuleClaims) {
    check_module(make, &Targets::names(sites.iter().copied()), &claims, &registry());
}

#[test]
fn a_prompt_composes_the_input() {
    check(&|| Box::new(Prompt), &["embeddings"], claims(Identity::No, 2 * 8));
}

#[test]
fn a_weight_mask_composes_parameters() {
    let claims = ModuleClaims { merges: true, ..claims(Identity::Exact, 2 * 64) };
    check(&|| Box::new(WeightMask), &["query", "output.dense"], claims);
}

#[test]
fn a_scale_composes_functions_at_every_kind_of_site_that_ends_in_vectors() {
    for site in ["value", "layer.0.output", "output.norm", "layer.0", "embeddings"] {
        check(&|| Box::new(Scale), &[site], claims(Identity::Exact, 8));
    }
}

#[test]
fn a_hypernetwork_generates_from_the_task_vector_of_each_row() {
    let claims = ModuleClaims { task_vector: 3, ..claims(Identity::Exact, 24) };
    check(&|| Box::new(Generated), &["value"], claims);
}

#[test]
fn a_router_may_look_at_the_whole_batch() {
    let claims =
        RouterClaims { sums_to_one: false, looks_at_batch: true, ..RouterClaims::top_k(1) };
    check_router(&|| Box::new(BalancedHalves), &claims, &registry());
}

#[test]
fn a_weighted_sum_keeps_the_laws_of_aggregation() {
    check_aggregator(
        &|| Box::new(Sum::default()),
        &|| Box::new(WeightMask),
        AggregatorClaims::default(),
    );
    check_aggregator(
        &|| Box::new(Sum::default()),
        &|| Box::new(Scale),
        AggregatorClaims::default(),
    );
}
