//! LoRA against its formula, its laws, and the contract of every module.
#![allow(clippy::unwrap_used, clippy::panic)]

use modl_compute::{Lora, LoraInit, register};
use modl_core::testing::{Identity, ModuleClaims, TinyBackbone, check_module};
use modl_core::{
    Attachment, Backbone, Context, Device, Error, Host, Init, Kind, Module, ModuleConfig,
    ParamStore, Registry, Result, Scope, Seed, Signal, Site, SiteKind, Targets, Tensor, Tensors,
};
use proptest::prelude::*;

fn numbers(shape: &[i64], name: &str, kind: Kind) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(5).child(name), kind, Device::Cpu).unwrap()
}

/// A linear site with its frozen parameters.
struct Place {
    site: Site,
    theta: Tensors,
}

impl Place {
    fn new(input: i64, output: i64, kind: Kind) -> Self {
        let path = "layer.0.query".to_owned();
        let theta = Tensors::new()
            .with("weight", numbers(&[output, input], "weight", kind))
            .with("bias", numbers(&[output], "bias", kind));
        Place { site: Site { path, kind: SiteKind::Linear, input, output, index: 0 }, theta }
    }

    fn module(&self, config: &Lora) -> Result<Box<dyn Module>> {
        let mut store = ParamStore::new();
        let kind = if self.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let mut scope =
            Scope::at(&mut store, "modules.a.layer.0.query", Seed(9)).on(kind, Device::Cpu);
        config.build(&Attachment::alone(&self.site, &self.theta), &mut scope)
    }

    fn kind(&self) -> Kind {
        self.theta.need("weight").unwrap().kind()
    }

    fn x(&self) -> Signal {
        numbers(&[2, 3, self.site.input], "x", self.kind()).into()
    }

    fn run<T>(&self, work: impl FnOnce(&Host) -> Result<T>) -> T {
        let f = |theta: &Tensors, x: &Signal, _: &Context| {
            Ok(x.replace(x.x.linear(theta.need("weight")?, theta.get("bias"))?))
        };
        work(&Host::new(&self.site, &self.theta, &f)).unwrap()
    }

    fn forward(&self, module: &dyn Module, cx: &Context) -> Tensor {
        self.run(|host| module.forward(host, &self.x(), cx)).x
    }

    fn base(&self) -> Tensor {
        self.run(|host| host.call(&self.x(), &Context::eval())).x
    }
}

/// x Wᵀ + b + s·Σₖ B[o,k] Σᵢ A[k,i] x[t,i], in plain loops.
fn by_hand(place: &Place, phi: &Tensors, s: f64) -> Vec<f64> {
    let v = |t: &Tensor| t.to_vec::<f64>().unwrap();
    let (w, bias) = (v(place.theta.need("weight").unwrap()), v(place.theta.need("bias").unwrap()));
    let (a, b) = (v(phi.need("lora_A.weight").unwrap()), v(phi.need("lora_B.weight").unwrap()));
    let (n, m) = (place.site.input as usize, place.site.output as usize);
    let r = a.len() / n;
    let x = v(&place.x().x);
    let mut y = Vec::new();
    for token in x.chunks(n) {
        for o in 0..m {
            let base: f64 = (0..n).map(|i| w[o * n + i] * token[i]).sum();
            let inner = |k: usize| (0..n).map(|i| a[k * n + i] * token[i]).sum::<f64>();
            let change: f64 = (0..r).map(|k| b[o * r + k] * inner(k)).sum();
            y.push(bias[o] + base + s * change);
        }
    }
    y
}

fn close(a: &[f64], b: &[f64], within: f64) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| (x - y).abs() <= within * (1.0 + y.abs()))
}

#[test]
fn the_contract_of_every_module_holds() {
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims {
        identity: Identity::Exact,
        // r·(in + out) at `query` and `value` of width 8.
        parameters: 2 * 3 * (8 + 8),
        merges: true,
        smooth: true,
        task_vector: 0,
    };
    let make = || Box::new(Lora { r: 3, alpha: 5.0, ..Lora::default() }) as Box<dyn ModuleConfig>;
    check_module(&make, &Targets::names(["query", "value"]), &claims, &registry);
}

#[test]
fn the_scale_is_alpha_over_r_or_over_its_root_for_each_site() {
    let place = Place::new(5, 4, Kind::Double);
    let random = Lora { r: 4, alpha: 6.0, init: LoraInit::Random, ..Lora::default() };
    let rank = [("query", 9)].into_iter().collect();
    let alpha = [("0.query", 3.0)].into_iter().collect();
    let cases = [
        (random.clone(), 1.5),
        (Lora { use_rslora: true, ..random.clone() }, 3.0),
        (Lora { rank_pattern: rank, ..random.clone() }, 6.0 / 9.0),
        (Lora { alpha_pattern: alpha, ..random.clone() }, 0.75),
        (
            Lora {
                rank_pattern: [("query", 9)].into_iter().collect(),
                alpha_pattern: [("query", 6.0)].into_iter().collect(),
                use_rslora: true,
                ..random
            },
            2.0,
        ),
    ];
    for (config, s) in cases {
        let module = place.module(&config).unwrap();
        let y = place.forward(module.as_ref(), &Context::eval()).to_vec::<f64>().unwrap();
        assert!(close(&y, &by_hand(&place, &module.phi(), s), 1e-12), "{config:?}");
        assert!(!close(&y, &by_hand(&place, &module.phi(), s * 1.1), 1e-3), "the test can fail");
    }
}

#[test]
fn forward_delta_low_rank_and_compose_say_the_same() {
    let place = Place::new(6, 4, Kind::Double);
    let config = Lora { r: 2, alpha: 3.0, init: LoraInit::Random, ..Lora::default() };
    let module = place.module(&config).unwrap();
    let cx = Context::eval();
    let y = place.forward(module.as_ref(), &cx);
    let x = place.x();
    let delta = place.run(|h| module.delta(h, &x, &cx)).unwrap();
    assert!(place.base().add(&delta).unwrap().all_close(&y, 1e-12, 1e-12).unwrap());
    let low = module.low_rank(&cx).unwrap().apply(&x.x).unwrap();
    assert!(low.all_close(&delta, 1e-12, 1e-12).unwrap());
    let theta = module.compose(&place.theta).unwrap().unwrap();
    let merged = place.run(|h| h.call_with(&theta, &x, &Context::eval())).x;
    assert!(merged.all_close(&y, 1e-12, 1e-12).unwrap());
}

#[test]
fn at_the_start_only_b_has_a_gradient() {
    let place = Place::new(6, 4, Kind::Float);
    let module = place.module(&Lora::default()).unwrap();
    let phi = module.phi();
    let leaves: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
    let y = place.forward(module.as_ref(), &Context::eval());
    let grads = y.square().unwrap().sum().unwrap().gradients(&leaves, false).unwrap();
    let size = |g: &Option<Tensor>| g.as_ref().unwrap().norm().unwrap().item().unwrap();
    assert_eq!(size(&grads[0]), 0.0, "dA");
    assert!(size(&grads[1]) > 0.1, "dB");
}

#[test]
fn the_starts_have_the_spread_they_claim() {
    let place = Place::new(400, 30, Kind::Double);
    let start = |init: LoraInit| {
        let module = place.module(&Lora { r: 25, init, ..Lora::default() }).unwrap();
        let phi = module.phi();
        let v = |n: &str| phi.need(n).unwrap().to_vec::<f64>().unwrap();
        (v("lora_A.weight"), v("lora_B.weight"))
    };
    let largest = |v: &[f64]| v.iter().fold(0f64, |m, x| m.max(x.abs()));
    let std = |v: &[f64]| (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt();
    let (a, b) = start(LoraInit::Kaiming);
    assert!(largest(&a) <= 0.05 && largest(&a) > 0.0499 && largest(&b) == 0.0);
    assert!((std(&a) - 0.05 / 3f64.sqrt()).abs() < 1e-3);
    let (a, b) = start(LoraInit::Gaussian);
    assert!((std(&a) - 1.0 / 25.0).abs() < 1e-3 && largest(&a) > 0.1 && largest(&b) == 0.0);
    let (a, b) = start(LoraInit::Random);
    assert!(largest(&a) > 0.0 && largest(&b) > 0.0);
}

#[test]
fn dropout_is_on_the_low_rank_path_alone_and_in_training_alone() {
    let place = Place::new(64, 4, Kind::Double);
    let config = Lora { dropout: 0.5, init: LoraInit::Random, ..Lora::default() };
    let module = place.module(&config).unwrap();
    let train = |step| Context::train(Seed(3), step);
    let (a, b) = (train(0), train(1));
    let plain = place.forward(module.as_ref(), &Context::eval());
    let dropped = place.forward(module.as_ref(), &a);
    assert!(plain.max_abs_diff(&dropped).unwrap() > 1e-3);
    assert!(
        dropped.bit_equal(&place.forward(module.as_ref(), &a)).unwrap(),
        "same seed, same mask"
    );
    assert!(dropped.max_abs_diff(&place.forward(module.as_ref(), &b)).unwrap() > 1e-3);
    assert!(module.low_rank(&a).is_none() && module.low_rank(&Context::eval()).is_some());
    // The same path by hand, with the same numbers.
    let x = modl_core::dropout(&place.x().x, 0.5, a.draw("modules.a.layer.0.query")).unwrap();
    let low = module.low_rank(&Context::eval()).unwrap().apply(&x).unwrap();
    assert!(place.base().add(&low).unwrap().all_close(&dropped, 1e-12, 1e-12).unwrap());
}

#[test]
fn in_bf16_the_merge_is_rounded_once() {
    let place = Place::new(16, 16, Kind::BFloat16);
    let config = Lora { init: LoraInit::Random, ..Lora::default() };
    let module = place.module(&config).unwrap();
    assert_eq!(module.phi().need("lora_A.weight").unwrap().kind(), Kind::Float);
    assert_eq!(place.forward(module.as_ref(), &Context::eval()).kind(), Kind::BFloat16);
    let merged = module.compose(&place.theta).unwrap().unwrap();
    let merged = merged.need("weight").unwrap();
    let w = place.theta.need("weight").unwrap().to_kind(Kind::Float).unwrap();
    let delta = module.low_rank(&Context::eval()).unwrap().weight().unwrap();
    let exact = w.add(&delta).unwrap().to_kind(Kind::BFloat16).unwrap();
    assert!(merged.bit_equal(&exact).unwrap());
}

#[test]
fn modules_of_another_scale_are_not_averaged() {
    let place = Place::new(6, 4, Kind::Float);
    let signature = |config: Lora| place.module(&config).unwrap().signature();
    let plain = signature(Lora::default());
    assert_eq!(plain, signature(Lora { dropout: 0.1, ..Lora::default() }));
    assert_ne!(plain, signature(Lora { alpha: 16.0, ..Lora::default() }));
    assert_ne!(plain, signature(Lora { use_rslora: true, ..Lora::default() }));
    assert_ne!(plain, signature(Lora { r: 4, alpha: 4.0, ..Lora::default() }));
}

#[test]
fn what_cannot_be_is_refused_with_its_name() {
    let place = Place::new(6, 4, Kind::Float);
    let nan = [("query", f64::NAN)].into_iter().collect();
    let cases = [
        (Lora { r: 0, ..Lora::default() }, "lora.r"),
        (Lora { r: -3, ..Lora::default() }, "-3"),
        (Lora { rank_pattern: [("query", 0)].into_iter().collect(), ..Lora::default() }, "lora.r"),
        (Lora { alpha: f64::INFINITY, ..Lora::default() }, "lora.alpha"),
        (Lora { alpha_pattern: nan, ..Lora::default() }, "lora.alpha"),
        (Lora { dropout: 1.0, ..Lora::default() }, "lora.dropout"),
        (Lora { dropout: -0.1, ..Lora::default() }, "lora.dropout"),
        (Lora { rank_pattern: [("(", 1)].into_iter().collect(), ..Lora::default() }, "pattern `(`"),
    ];
    for (config, named) in cases {
        let e = place.module(&config).unwrap_err().to_string();
        assert!(e.contains(named), "{e}");
    }
    let tiny = TinyBackbone::new(Seed(1), Kind::Float).unwrap();
    let tokens = tiny.sites().iter().find(|s| s.kind == SiteKind::Tokens).unwrap();
    let mut store = ParamStore::new();
    let e = Lora::default()
        .build(
            &Attachment::alone(tokens, &tiny.theta(tokens).unwrap()),
            &mut Scope::new(&mut store, Seed(1)),
        )
        .unwrap_err();
    assert!(matches!(&e, Error::Unsupported { what, .. } if what.contains("Tokens")), "{e}");
    assert!(store.iter().next().is_none(), "nothing was made");
}

#[test]
fn recipes_are_strict_and_survive_a_round_trip() {
    let registry = Registry::new().with(register).unwrap();
    let recipe = serde_json::json!({
        "type": "lora", "r": 4, "use_rslora": true, "rank_pattern": {"b": 2, "a": 3}
    });
    let config = registry.modules.parse(&recipe).unwrap();
    let text = config.to_json().unwrap().to_string();
    assert!(text.contains(r#""rank_pattern":{"b":2,"a":3}"#), "{text}");
    let e = registry.modules.parse(&serde_json::json!({"type": "lora", "rank": 4})).unwrap_err();
    assert!(e.to_string().contains("rank"), "{e}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn laws(r in 1i64..6, input in 1i64..9, output in 1i64..9, alpha in -4.0f64..16.0, rs: bool) {
        let place = Place::new(input, output, Kind::Double);
        let fresh = Lora { r, alpha, use_rslora: rs, ..Lora::default() };
        let cx = Context::eval();
        // A fresh module changes nothing, bit for bit.
        let module = place.module(&fresh).unwrap();
        prop_assert!(place.forward(module.as_ref(), &cx).bit_equal(&place.base()).unwrap());
        let count: usize = module.phi().iter().map(|(_, t)| t.numel()).sum();
        prop_assert_eq!(count as i64, r * (input + output));
        // ΔW has at most r singular values.
        let random = Lora { init: LoraInit::Random, ..fresh };
        let module = place.module(&random).unwrap();
        let delta = module.low_rank(&cx).unwrap().weight().unwrap();
        let values = delta.svd().unwrap().1.to_vec::<f64>().unwrap();
        let beyond = values.iter().skip(r as usize).all(|s| *s <= 1e-12 * (1.0 + values[0]));
        prop_assert!(beyond, "{:?}", values);
        // The change is linear in the scale: twice α, twice the change.
        let twice = place.module(&Lora { alpha: 2.0 * alpha, ..random }).unwrap();
        let change = |m: &dyn Module| place.forward(m, &cx).sub(&place.base()).unwrap();
        let expected = change(module.as_ref()).mul_scalar(2.0).unwrap();
        prop_assert!(change(twice.as_ref()).all_close(&expected, 1e-11, 1e-11).unwrap());
        // Merged and attached agree.
        let theta = module.compose(&place.theta).unwrap().unwrap();
        let merged = place.run(|h| h.call_with(&theta, &place.x(), &Context::eval())).x;
        prop_assert!(merged.all_close(&place.forward(module.as_ref(), &cx), 1e-11, 1e-11).unwrap());
    }
}
