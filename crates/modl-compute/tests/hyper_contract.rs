//! Every hypernetwork keeps the contract of modules, with rows of two tasks in each batch, and has
//! as many parameters as its formula says.
#![allow(clippy::unwrap_used)]

use modl_compute::{
    Bottleneck, BottleneckInit, Condition, Cpg, Form, Full, HyperFormer, HyperFormerPlusPlus,
    HyperLora, HyperNetwork, HyperX, Lora, MadG, Nested, register,
};
use modl_core::testing::{Identity, ModuleClaims, check_module};
use modl_core::{ModuleConfig, Registry, Targets};

fn check<C: ModuleConfig + 'static>(
    make: impl Fn() -> C,
    targets: &str,
    identity: Identity,
    parameters: usize,
    merges: bool,
    task_vector: i64,
) {
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims { identity, parameters, merges, smooth: true, task_vector };
    check_module(&|| Box::new(make()), &Targets::pattern(targets), &claims, &registry);
}

/// A bottleneck of width 4 beside 8, which changes nothing at the start: 2·4·8 + 4 + 8 numbers.
fn bottleneck() -> Nested {
    let config = Bottleneck { init_weights: BottleneckInit::MamAdapter, ..Bottleneck::houlsby() };
    Nested::new(Bottleneck { reduction_factor: 2.0, ..config })
}

/// 2 (8 + 8) numbers at four linear sites of `TinyBackbone`, 2 (8 + 5) at the head.
fn lora() -> Nested {
    Nested::new(Lora { r: 2, alpha: 1.0, ..Lora::default() })
}

fn tasks() -> Condition {
    Condition::names(["one", "two"])
}

fn vector() -> Condition {
    Condition::feature("task_vector", 3)
}

/// From `inputs` over `hidden` to `out`, with biases.
const fn projector(inputs: usize, hidden: usize, out: usize) -> usize {
    hidden * (inputs + 1) + out * (hidden + 1)
}

const BOTTLENECK: usize = 2 * 4 * 8 + 4 + 8;

#[test]
fn hyperformer() {
    let make = || HyperFormer {
        config: Nested::new(Bottleneck { reduction_factor: 2.0, ..HyperFormer::adapter() }),
        tasks: tasks(),
        task_dim: 3,
        hidden_dim: 5,
        projected_dim: 4,
    };
    // The adapter has a norm.
    let heads = (BOTTLENECK + 2 * 8) * (4 + 1);
    let parameters = 2 * 3 + projector(3, 5, 4) + heads;
    check(make, "all-sublayer", Identity::Exact, parameters, false, 0);
}

#[test]
fn hyperformer_plus_plus_shares_its_heads_among_sites_of_one_size() {
    let make = || HyperFormerPlusPlus {
        config: lora(),
        tasks: tasks(),
        task_dim: 3,
        hidden_dim: 5,
        projected_dim: 4,
    };
    // Two layers (one is none), five positions; A is 2 × 8 at all sites, B 8 × 2 and 5 × 2.
    let tables = (2 + 2 + 5) * 3;
    let heads = (16 + 16 + 10) * (4 + 1);
    let parameters = tables + projector(9, 5, 4) + 2 * 4 + heads;
    check(make, "all-linear", Identity::Exact, parameters, false, 0);
}

#[test]
fn hyper_x() {
    let make = || HyperX {
        config: bottleneck(),
        tasks: tasks(),
        languages: vector(),
        source_dim: 3,
        hidden_dim: 5,
        projected_dim: 4,
    };
    let parameters = (2 + 1) * 3 + projector(9, 5, 4) + BOTTLENECK * (4 + 1);
    check(make, "all-sublayer", Identity::Exact, parameters, false, 3);
}

#[test]
fn mad_g() {
    let make =
        || MadG { config: bottleneck(), languages: vector(), language_dim: 7, projected_dim: 4 };
    let parameters = 4 * (3 + 1) + BOTTLENECK * 4;
    check(make, "all-sublayer", Identity::Exact, parameters, false, 3);
}

#[test]
fn hyper_lora() {
    let make = || HyperLora { config: lora(), tasks: tasks(), skills: 3 };
    let heads = 2 * (4 * 16 + 13) * 3;
    let parameters = 2 * 3 + 3 * (3 + 1) + heads;
    check(make, "all-linear", Identity::Exact, parameters, false, 0);
}

#[test]
fn contextual_parameter_generator() {
    let grouped = || Cpg {
        config: Nested::new(Full { form: Form::Delta }),
        languages: vector(),
        language_dim: 7,
        group_dim: Some(2),
    };
    // The gain and the bias of a norm are two groups.
    check(grouped, "all-norm", Identity::Exact, 2 * (2 * 3 + 8 * 2), false, 3);
    let whole = || Cpg { languages: vector(), ..Cpg::default() };
    check(whole, "layer.0.query|head", Identity::No, (64 + 8 + 40 + 5) * 3, false, 3);
}

#[test]
fn static_hypernetwork() {
    let make = || HyperNetwork { tile: 4, embedding_dim: 3, ..HyperNetwork::default() };
    // 8 × 8 and, cut, 5 × 8 in 2 × 2 tiles; biases are trained as they are.
    let shared = |kernel: usize| 4 * 3 * (3 + 1) + 4 * kernel * (3 + 1);
    let own = 2 * (4 * 3) + 8 + 5;
    check(make, "layer.0.query|head", Identity::No, own + shared(1), true, 0);
    let change = || HyperNetwork { config: Nested::new(Full { form: Form::Delta }), ..make() };
    check(change, "all-conv", Identity::Exact, 4 * 3 + 8 + shared(3), true, 0);
    // LoRA's factors can be generated so, too.
    let lora = || HyperNetwork { config: lora(), ..make() };
    let own = 2 * 3 + 2 * 3;
    check(lora, "layer.0.query", Identity::Exact, own + 2 * shared(1), true, 0);
}
