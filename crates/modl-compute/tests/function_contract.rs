//! Every method of function composition keeps the contract of modules.
#![allow(clippy::unwrap_used)]

use modl_compute::{
    AdapterDrop, Bottleneck, BottleneckInit, Compacter, ConditionalNorm, FeedForward, Film, Gated,
    Invertible, InvertibleBlock, Lora, Nested, Orthonormal, Part, Reft, ResidualAdapter,
    ResidualPlacement, Union, register,
};
use modl_core::testing::{Identity, ModuleClaims, check_module};
use modl_core::{ModuleConfig, Registry, Targets};

fn check(
    make: &dyn Fn() -> Box<dyn ModuleConfig>,
    targets: &str,
    identity: Identity,
    parameters: usize,
    merges: bool,
    task_vector: i64,
) {
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims { identity, parameters, merges, smooth: true, task_vector };
    check_module(make, &Targets::pattern(targets), &claims, &registry);
}

/// A bottleneck of width 4 beside 8, which changes nothing at the start: 2·4·8 + 4 + 8 numbers.
fn bottleneck() -> Bottleneck {
    Bottleneck {
        reduction_factor: 2.0,
        init_weights: BottleneckInit::MamAdapter,
        ..Bottleneck::houlsby()
    }
}

#[test]
fn compacter() {
    let make = || Box::new(Compacter { reduction_factor: 2.0, ..Compacter::default() }) as _;
    // The rule n³; for 8 → 4 and back n·(in ⁄ n + out ⁄ n)·rank and a bias.
    let layers = (4 * (2 + 1) + 4) + (4 * (1 + 2) + 8);
    check(&make, "all-sublayer", Identity::Within(1e-6), 64 + layers, false, 0);
    let plus =
        Compacter { reduction_factor: 2.0, original_ln_before: true, ..Compacter::default() };
    let plus = || Box::new(plus.clone()) as _;
    check(&plus, "all-sublayer", Identity::Within(1e-6), 64 + layers, false, 0);
}

#[test]
fn invertible_adapters() {
    let with = |block| Invertible {
        block,
        init_weights: BottleneckInit::MamAdapter,
        non_linearity: modl_core::Activation::Tanh,
        ..Invertible::default()
    };
    let nice = || Box::new(with(InvertibleBlock::Nice)) as _;
    check(&nice, "all-tokens", Identity::Exact, 2 * (2 * 4 + 2 + 4 * 2 + 4), false, 0);
    let glow = || Box::new(with(InvertibleBlock::Glow)) as _;
    check(&glow, "all-tokens", Identity::Exact, 2 * (2 * 4 + 2 + 8 * 2 + 8), false, 0);
}

#[test]
fn film() {
    let own = || Box::new(Film::default()) as _;
    check(&own, "all-linear", Identity::Exact, 2 * (4 * 8 + 5), true, 0);
    check(&own, "all-conv", Identity::Exact, 2 * 8, true, 0);
    check(&own, "all-norm", Identity::Exact, 2 * 8, true, 0);
    check(&own, "all-sublayer", Identity::Exact, 2 * 8, false, 0);
    let generated = || Box::new(Film { task_vector: 3 }) as _;
    check(&generated, "all-linear", Identity::Exact, 2 * 4 * (4 * 8 + 5), false, 3);
    check(&generated, "all-conv", Identity::Exact, 2 * 4 * 8, false, 3);
}

#[test]
fn conditional_norms() {
    let own = || Box::new(ConditionalNorm::default()) as _;
    check(&own, "all-norm", Identity::Exact, 2 * 8, true, 0);
    let generated = || Box::new(ConditionalNorm { task_vector: 3 }) as _;
    check(&generated, "all-norm", Identity::Exact, 2 * 4 * 8, false, 3);
}

#[test]
fn reft() {
    let unit = |r: usize| 2 * r * 8 + r;
    let loreft = || Box::new(Reft { r: 2, suffix_positions: 2, ..Reft::loreft() }) as _;
    check(&loreft, "all-block", Identity::No, 2 * unit(2), false, 0);
    let reflected = Reft { parametrization: Orthonormal::Householder, r: 2, ..Reft::loreft() };
    check(&|| Box::new(reflected.clone()) as _, "all-block", Identity::No, unit(2), false, 0);
    let tied = || {
        let tied = Reft { tied_weights: true, suffix_positions: 1, ..Reft::noreft() };
        Box::new(Reft { prefix_positions: 1, ..tied }) as _
    };
    check(&tied, "all-block", Identity::No, unit(1), false, 0);
    check(&|| Box::new(Reft::direft()) as _, "all-block", Identity::No, unit(1), false, 0);
}

#[test]
fn residual_adapters() {
    let parallel = || Box::new(ResidualAdapter::default()) as _;
    check(&parallel, "all-conv", Identity::Exact, 64, true, 0);
    let series = || Box::new(ResidualAdapter { placement: ResidualPlacement::Series }) as _;
    check(&series, "all-conv", Identity::Exact, 64 + 2 * 8, false, 0);
}

#[test]
fn feed_forward_networks() {
    let swiglu = || Box::new(FeedForward { inner: Some(6), ..FeedForward::default() }) as _;
    check(&swiglu, "all-sublayer", Identity::No, 3 * 6 * 8, false, 0);
    let plain = || Box::new(FeedForward { init_std: Some(0.3), ..FeedForward::plain() }) as _;
    // Four times the output wide, with two biases.
    let network = |out: usize| 4 * out * (8 + out) + 4 * out + out;
    check(&plain, r"layer\.0\.query|head", Identity::No, network(8) + network(5), false, 0);
    let network = FeedForward { inner: Some(0), ..FeedForward::default() };
    let params = &mut modl_core::ParamStore::new();
    let site = modl_core::Site {
        path: "mlp".into(),
        kind: modl_core::SiteKind::Sublayer,
        input: 8,
        output: 8,
        index: 0,
    };
    let theta = modl_core::Tensors::new();
    let mut scope = modl_core::Scope::new(params, modl_core::Seed(0));
    let e = network.build(&modl_core::Attachment::alone(&site, &theta), &mut scope).unwrap_err();
    assert!(e.to_string().contains("feed_forward.inner"), "{e}");
}

#[test]
fn adapter_drop() {
    let make = |first, random| AdapterDrop { config: Nested::new(Lora::default()), first, random };
    let all = 8 * (4 * 16 + 13);
    let robust = || Box::new(make(0, 1)) as _;
    check(&robust, "all-linear", Identity::Exact, all, true, 0);
    // Only the head is in no layer.
    let specialised = || Box::new(make(1, 0)) as _;
    check(&specialised, "all-linear", Identity::Exact, 8 * 13, true, 0);
}

#[test]
fn gates() {
    let network = 2 * 4 * 8 + 4 + 8;
    let adapter = || Box::new(Gated::new(bottleneck())) as _;
    check(&adapter, "all-sublayer", Identity::Exact, network + 8 + 1, false, 0);
    let lora = || Box::new(Gated::new(Lora { r: 2, ..Lora::default() })) as _;
    check(&lora, "all-linear", Identity::Exact, 2 * (4 * 16 + 13) + 5 * (8 + 1), false, 0);
}

#[test]
fn unions() {
    let make = || {
        let lora = Part::new(Targets::names(["query", "value"]), Lora { r: 2, ..Lora::default() });
        let adapter = Part::new(Targets::pattern("all-sublayer"), bottleneck());
        let film = Part::new(Targets::pattern("head"), Film::default());
        Box::new(Union::new([lora, adapter, film])) as _
    };
    let parameters = 2 * 2 * 16 + (2 * 4 * 8 + 4 + 8) + 2 * 5;
    // Sites within one another need a router that knows its rows; these are side by side.
    let sites = r"layer\.0\.(query|value|output)|head";
    check(&make, sites, Identity::Exact, parameters, false, 0);
    let mergeable = || {
        let lora = Part::new(Targets::names(["query"]), Lora { r: 2, ..Lora::default() });
        Box::new(Union::new([lora, Part::new(Targets::pattern("all-norm"), Film::default())])) as _
    };
    let sites = r"layer\.0\.(query|output\.norm)";
    check(&mergeable, sites, Identity::Exact, 2 * 16 + 2 * 8, true, 0);
}
