//! DoRA, VeRA and AdaLoRA: the contract of every module, and their formulas in f64.
#![allow(clippy::unwrap_used)]

use modl_compute::low_rank::{AdaLora, AdapterHubDora, Dora, Vera};
use modl_compute::{Lora, register};
use modl_core::testing::{Given, Identity, ModuleClaims, Sum, TinyBackbone, check_module, perturb};
use modl_core::{
    Attachment, Context, Device, Host, Init, Kind, Modular, ModuleConfig, ParamStore, Registry,
    Result, Scope, Seed, Select, Signal, Site, SiteKind, Targets, Tensor, Tensors,
};

const QV: [&str; 2] = ["query", "value"];

fn check(make: &dyn Fn() -> Box<dyn ModuleConfig>, identity: Identity, parameters: usize) {
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims { identity, parameters, merges: true, smooth: true, task_vector: 0 };
    check_module(make, &Targets::names(QV), &claims, &registry);
}

#[test]
fn dora_keeps_the_contract() {
    let make = || Box::new(Dora(Lora { r: 3, ..Lora::default() })) as Box<dyn ModuleConfig>;
    // r (in + out) + out at each of two sites of width 8. The norm is a constant for gradients by
    // definition, so that they are not those of the function: see the test of gradients below.
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims {
        identity: Identity::Within(1e-6),
        parameters: 2 * (3 * 16 + 8),
        merges: true,
        smooth: false,
        task_vector: 0,
    };
    check_module(&make, &Targets::names(QV), &claims, &registry);
}

#[test]
fn vera_keeps_the_contract() {
    let make = || Box::new(Vera { r: 4, ..Vera::default() }) as Box<dyn ModuleConfig>;
    check(&make, Identity::Exact, 2 * (8 + 4));
    let full = Vera { r: 4, scaling: 1.5, full_matrices: true, ..Vera::default() };
    check(&|| Box::new(full.clone()), Identity::Exact, 2 * (8 * 8 + 4 * 4));
}

#[test]
fn adapterhubs_dora_keeps_the_contract() {
    let make = || Box::new(AdapterHubDora(Lora { r: 3, ..Lora::default() })) as Box<_>;
    check(&make, Identity::Within(1e-6), 2 * (3 * 16 + 8));
}

#[test]
fn adalora_keeps_the_contract() {
    let make = || Box::new(AdaLora { init_r: 3, target_r: 2, ..AdaLora::default() }) as Box<_>;
    check(&make, Identity::Exact, 2 * (3 * 16 + 3));
}

fn numbers(shape: &[i64], name: &str) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(5).child(name), Kind::Double, Device::Cpu).unwrap()
}

/// A linear layer of 5 inputs and 4 outputs in f64, and a module on it with random parameters.
struct Bench {
    site: Site,
    theta: Tensors,
    store: ParamStore,
    module: Box<dyn modl_core::Module>,
}

impl Bench {
    fn new(config: &dyn ModuleConfig) -> Self {
        let site = Site { path: "a".into(), kind: SiteKind::Linear, input: 5, output: 4, index: 0 };
        let theta =
            Tensors::new().with("weight", numbers(&[4, 5], "w")).with("bias", numbers(&[4], "b"));
        let mut store = ParamStore::new();
        let mut scope = Scope::new(&mut store, Seed(3)).on(Kind::Double, Device::Cpu);
        let module = config.build(&Attachment::alone(&site, &theta), &mut scope).unwrap();
        for (name, p) in store.iter().filter(|(_, p)| !p.is_buffer()) {
            let noise = numbers(&p.tensor().size(), name);
            modl_core::no_grad(|| p.tensor().clone().add_in_place(&noise)).unwrap();
        }
        Bench { site, theta, store, module }
    }

    fn forward(&self, x: &Tensor, cx: &Context) -> Tensor {
        let f = |theta: &Tensors, x: &Signal, _: &Context| -> Result<Signal> {
            Ok(x.replace(x.x.linear(theta.need("weight")?, theta.get("bias"))?))
        };
        let host = Host::new(&self.site, &self.theta, &f);
        self.module.forward(&host, &Signal::from(x.clone()), cx).unwrap().x
    }

    fn phi(&self, name: &str) -> Vec<f64> {
        self.store.get(name).unwrap().to_vec::<f64>().unwrap()
    }
}

/// a `[n, k]` times b `[k, m]`, by loops.
fn product(a: &[f64], b: &[f64], n: usize, k: usize, m: usize) -> Vec<f64> {
    let at = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * m + j]).sum();
    (0..n * m).map(|i| at(i / m, i % m)).collect()
}

fn norms(rows: &[f64], width: usize) -> Vec<f64> {
    rows.chunks(width).map(|r| r.iter().map(|v| v * v).sum::<f64>().sqrt()).collect()
}

#[test]
fn dora_is_the_formula_with_the_full_product_and_its_rows_have_norm_m() {
    let t = Bench::new(&Dora(Lora { r: 2, alpha: 3.0, ..Lora::default() }));
    let w = t.theta.need("weight").unwrap().to_vec::<f64>().unwrap();
    let bias = t.theta.need("bias").unwrap().to_vec::<f64>().unwrap();
    let ba = product(&t.phi("lora_B.weight"), &t.phi("lora_A.weight"), 4, 2, 5);
    let v: Vec<f64> = w.iter().zip(&ba).map(|(w, d)| w + 1.5 * d).collect();
    let (m, n) = (t.phi("lora_magnitude_vector"), norms(&v, 5));
    let wanted: Vec<f64> = (0..20).map(|i| m[i / 5] / n[i / 5] * v[i]).collect();
    let composed = t.module.compose(&t.theta).unwrap().unwrap();
    let found = composed.need("weight").unwrap().to_vec::<f64>().unwrap();
    assert!(found.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?} {wanted:?}");
    assert!(norms(&found, 5).iter().zip(&m).all(|(a, b)| (a - b.abs()).abs() < 1e-12));

    let x = numbers(&[3, 5], "x");
    let y = t.forward(&x, &Context::eval()).to_vec::<f64>().unwrap();
    let x = x.to_vec::<f64>().unwrap();
    for (row, out) in (0..3).flat_map(|r| (0..4).map(move |o| (r, o))) {
        let sum: f64 = (0..5).map(|i| wanted[out * 5 + i] * x[row * 5 + i]).sum();
        assert!((y[row * 4 + out] - sum - bias[out]).abs() < 1e-12);
    }
}

#[test]
fn doras_gradients_take_the_norm_as_a_constant() {
    let t = Bench::new(&Dora(Lora { r: 2, ..Lora::default() }));
    let b = t.store.get("lora_B.weight").unwrap();
    let g = numbers(&[3, 4], "g");
    let loss = t.forward(&numbers(&[3, 5], "x"), &Context::eval()).mul(&g).unwrap().sum().unwrap();
    let found = loss.gradients(&[b], false).unwrap().remove(0).unwrap().to_vec::<f64>().unwrap();
    // ∂(Σ g ⊙ y) ⁄ ∂B = s·(c ⊙ g)ᵀ (x Aᵀ) with c held fixed.
    let (m, s) = (t.phi("lora_magnitude_vector"), 4.0);
    let ba = product(&t.phi("lora_B.weight"), &t.phi("lora_A.weight"), 4, 2, 5);
    let w = t.theta.need("weight").unwrap().to_vec::<f64>().unwrap();
    let n = norms(&w.iter().zip(&ba).map(|(w, d)| w + s * d).collect::<Vec<_>>(), 5);
    let (x, g) = (numbers(&[3, 5], "x").to_vec::<f64>().unwrap(), g.to_vec::<f64>().unwrap());
    let a = t.phi("lora_A.weight");
    for (o, r) in (0..4).flat_map(|o| (0..2).map(move |r| (o, r))) {
        let inner = |row: usize| (0..5).map(|i| x[row * 5 + i] * a[r * 5 + i]).sum::<f64>();
        let wanted: f64 = (0..3).map(|row| s * m[o] / n[o] * g[row * 4 + o] * inner(row)).sum();
        assert!((found[o * 2 + r] - wanted).abs() < 1e-10, "{} {wanted}", found[o * 2 + r]);
    }
}

#[test]
fn vera_is_its_formula() {
    let t = Bench::new(&Vera { r: 3, ..Vera::default() });
    let (b, d) = (t.phi("vera_lambda_b"), t.phi("vera_lambda_d"));
    let (up, down) = (t.phi("vera_B"), t.phi("vera_A"));
    let x = numbers(&[1, 5], "x");
    let base = x.linear(t.theta.need("weight").unwrap(), t.theta.get("bias")).unwrap();
    let found = t.forward(&x, &Context::eval()).sub(&base).unwrap().to_vec::<f64>().unwrap();
    let inner = product(&down, &x.to_vec::<f64>().unwrap(), 3, 5, 1);
    let inner: Vec<f64> = inner.iter().zip(&d).map(|(h, d)| h * d).collect();
    let outer = product(&up, &inner, 4, 3, 1);
    for i in 0..4 {
        assert!((found[i] - b[i] * outer[i]).abs() < 1e-12);
    }
}

#[test]
fn a_seed_draws_veras_matrices_and_sites_share_them() {
    let draw = |seed: u64| {
        let backbone = TinyBackbone::new(Seed(7), Kind::Float).unwrap();
        let mut model = Modular::new(backbone, Seed(seed)).unwrap();
        let targets = Targets::names(["query", "value", "head"]);
        model.attach("a", Box::new(Vera { r: 4, ..Vera::default() }), &targets).unwrap();
        let get = |n: &str| model.params().get(&format!("modules.a.{n}")).unwrap().clone();
        assert_eq!((get("vera_A").size(), get("vera_B").size()), (vec![4, 8], vec![8, 4]));
        assert_eq!(get("head.vera_lambda_b").size(), [5]);
        get("vera_A")
    };
    assert!(draw(1).bit_equal(&draw(1)).unwrap() && !draw(1).bit_equal(&draw(2)).unwrap());
}

fn adalora_on_tiny(config: AdaLora) -> Modular {
    let backbone = TinyBackbone::new(Seed(7), Kind::Float).unwrap();
    let mut model = Modular::new(backbone, Seed(1)).unwrap();
    model.attach("a", Box::new(config), &Targets::names(QV)).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

#[test]
fn the_budget_falls_to_the_target_and_the_most_important_triplets_stay() {
    let total = 12;
    let model = adalora_on_tiny(AdaLora {
        init_r: 4,
        target_r: 2,
        tinit: 2,
        tfinal: 3,
        ..AdaLora::default()
    });
    perturb(&model, &Select::new("modules.*"), 0.3, Seed(4)).unwrap();
    model.train_only(&Select::new("modules.*")).unwrap();
    let inputs = TinyBackbone::inputs(3, 6, Seed(2)).unwrap();
    let left = |model: &Modular| -> usize {
        let all = model.params().iter().filter(|(n, _)| n.ends_with("lora_E"));
        let nonzero = |t: &Tensor| t.to_vec::<f64>().unwrap().iter().filter(|v| **v != 0.0).count();
        all.map(|(_, p)| nonzero(p.tensor())).sum()
    };
    let mut counts = Vec::new();
    for done in 1..=total {
        let y = model.forward(&inputs, &Context::train(Seed(1), done)).unwrap();
        let loss = y.need("logits").unwrap().square().unwrap().sum().unwrap();
        let params = model.trainable();
        let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
        let grads = loss.gradients(&leaves, false).unwrap();
        let named: Tensors =
            params.iter().zip(grads).filter_map(|((n, _), g)| Some((n.clone(), g?))).collect();
        model.after_step(&named, done, total).unwrap();
        counts.push(left(&model));
    }
    assert_eq!(counts[..2], [8, 8], "nothing before tinit");
    assert!(counts.windows(2).all(|w| w[1] <= w[0]), "{counts:?}");
    assert_eq!(counts[8..], [4, 4, 4, 4], "exactly the target from total − tfinal on");
}

#[test]
fn adaloras_scores_are_those_of_the_paper() {
    // One site, one step from zero averages: Ī = 0.15·|w g|, Ū = 0.15·|I − Ī| = 0.15·0.85·|w g|.
    let model = adalora_on_tiny(AdaLora { init_r: 2, target_r: 1, ..AdaLora::default() });
    perturb(&model, &Select::new("modules.*"), 0.5, Seed(6)).unwrap();
    let values = |model: &Modular, n: &str| {
        model.params().get(&format!("modules.a.{n}")).unwrap().to_vec::<f64>().unwrap()
    };
    let mut grads = Tensors::new();
    let mut scores = Vec::new();
    for site in ["layer.0.query", "layer.0.value"] {
        let square = |v: f64| 0.15 * 0.15 * 0.85 * v * v;
        let mut of = |name: &str| {
            let full = format!("{site}.{name}");
            let w = model.params().get(&format!("modules.a.{full}")).unwrap();
            let g = Init::Normal(1.0)
                .tensor(&w.size(), Seed(8).child(&full), Kind::Float, Device::Cpu)
                .unwrap();
            let both: Vec<f64> = w
                .to_vec::<f64>()
                .unwrap()
                .iter()
                .zip(g.to_vec::<f64>().unwrap())
                .map(|(w, g)| square(w * g))
                .collect();
            grads.set(format!("modules.a.{full}"), g);
            both
        };
        let (a, b, e) = (of("lora_A"), of("lora_B"), of("lora_E"));
        for r in 0..2 {
            let row = a[r * 8..][..8].iter().sum::<f64>() / 8.0;
            let column = (0..8).map(|o| b[o * 2 + r]).sum::<f64>() / 8.0;
            scores.push((e[r] + row + column, site, r));
        }
    }
    // Step 1 of 2: budget 2 + ⌊2·(1 − ½)³⌋ = 2 of 4.
    model.after_step(&grads, 1, 2).unwrap();
    scores.sort_by(|x, y| y.0.total_cmp(&x.0));
    for (i, (_, site, r)) in scores.iter().enumerate() {
        assert_eq!(values(&model, &format!("{site}.lora_E"))[*r] != 0.0, i < 2, "{site} {r}");
    }
}

#[test]
fn adaloras_penalty_is_the_mean_distance_from_orthogonal() {
    let model = adalora_on_tiny(AdaLora { init_r: 3, target_r: 2, ..AdaLora::default() });
    perturb(&model, &Select::new("modules.*"), 0.5, Seed(6)).unwrap();
    let mut sum = 0.0;
    for site in ["layer.0.query", "layer.0.value"] {
        let get = |n: &str| {
            let name = format!("modules.a.{site}.{n}");
            model.params().get(&name).unwrap().to_vec::<f64>().unwrap()
        };
        let (a, b) = (get("lora_A"), get("lora_B"));
        let far = |dot: &dyn Fn(usize, usize) -> f64| {
            let gap = |i: usize, j: usize| dot(i, j) - f64::from(u8::from(i == j));
            (0..9).map(|k| gap(k / 3, k % 3).powi(2)).sum::<f64>().sqrt()
        };
        sum += far(&|i, j| (0..8).map(|k| a[i * 8 + k] * a[j * 8 + k]).sum());
        sum += far(&|i, j| (0..8).map(|k| b[k * 3 + i] * b[k * 3 + j]).sum());
    }
    let found = model.penalty(&Context::eval()).unwrap().unwrap().item().unwrap();
    assert!((found - 0.5 * sum / 4.0).abs() < 1e-5, "{found} {sum}");
}

#[test]
fn a_fresh_adalora_keeps_all_triplets_in_pefts_file_and_a_pruned_one_those_that_are_on() {
    let dir = tempfile::tempdir().unwrap();
    let config = AdaLora { init_r: 3, target_r: 2, total_step: Some(9), ..AdaLora::default() };
    let model = adalora_on_tiny(config);
    let rows = |model: &Modular, name: &str| -> Vec<i64> {
        modl_compute::peft::save(model, "a", dir.path().join(name)).unwrap();
        let file = dir.path().join(name).join("adapter_model.safetensors");
        let file = modl_core::checkpoint::Checkpoint::open(file).unwrap();
        let names = file.names().into_iter().filter(|n| n.ends_with("lora_E"));
        names.map(|n| file.info(&n).unwrap().0[0]).collect()
    };
    assert_eq!(rows(&model, "fresh"), [3, 3]);
    perturb(&model, &Select::new("modules.*"), 0.3, Seed(4)).unwrap();
    let mut e = model.params().get("modules.a.layer.0.query.lora_E").unwrap().clone();
    let one = Tensor::from_slice(&[0.5f32, 0.0, 0.7], &[3, 1], Device::Cpu).unwrap();
    modl_core::no_grad(|| e.copy_from(&one)).unwrap();
    assert_eq!(rows(&model, "pruned"), [2, 3]);
    // What was pruned computes the same when it is read again, and is written as it was.
    let backbone = TinyBackbone::new(Seed(7), Kind::Float).unwrap();
    let mut again = Modular::new(backbone, Seed(9)).unwrap();
    modl_compute::peft::load(&mut again, dir.path().join("pruned"), Some("a")).unwrap();
    again.aggregate(Box::new(Sum::default())).unwrap();
    again.route(Given::only(0), false).unwrap();
    let inputs = TinyBackbone::inputs(3, 6, Seed(2)).unwrap();
    let run =
        |m: &Modular| m.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().clone();
    assert!(run(&again).all_close(&run(&model), 1e-5, 1e-5).unwrap());
    assert_eq!(rows(&again, "again"), [2, 3]);
}
