//! AdapterFusion: what AdapterHub's fusions compute, folders written again, the formula by hand, and
//! what the paper says of it.
#![allow(clippy::unwrap_used, clippy::panic)]

mod hub;

use std::collections::BTreeSet;

use hub::{Named, apart, fixture, json_of, model, tensors};
use modl_aggregate::{
    Falling, Fusion, QuerySource, Temperature, ValueStart, load_fusion, save_fusion,
};
use modl_compute::{Bottleneck, Lora, adapterhub};
use modl_core::testing::{Given, TinyBackbone, standins};
use modl_core::{
    Context, Device, Init, Kind, Modular, Registry, Seed, Select, Targets, Tensor, Weights,
    checkpoint, no_grad,
};
use serde_json::{Value, json};

const FUSIONS: [&str; 9] = [
    "fuse",
    "fuse_three",
    "fuse_static",
    "fuse_without_key",
    "fuse_query_before_ln",
    "fuse_residual_before",
    "fuse_value_after",
    "fuse_temperature",
    "fuse_houlsby",
];

const CONFIG: &str = "adapter_fusion_config.json";

fn fused(name: &str) -> Modular {
    let dir = fixture(name);
    let names = json_of(&dir.join(CONFIG))["adapter_names"].clone();
    let names: Vec<String> = serde_json::from_value(names).unwrap();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut model = model(&names);
    assert_eq!(load_fusion(&mut model, dir).unwrap(), names);
    model.route(Named::all(&names), false).unwrap();
    model
}

#[test]
fn outputs_are_those_of_adapterhub() {
    for name in FUSIONS {
        let d = apart(&fused(name), name);
        assert!(d < 1e-5, "{name}: {d}");
    }
}

#[test]
fn at_the_end_of_its_schedule_a_fusion_is_as_cold_as_that_of_adapterhub() {
    let model = fused("fuse_temperature");
    assert!(apart(&model, "fuse_temperature_cold") > 1e-3, "it starts at 50");
    model.after_step(&modl_core::Tensors::new(), 980, 2000).unwrap();
    let d = apart(&model, "fuse_temperature_cold");
    assert!(d < 1e-5, "{d}");
}

#[test]
fn what_is_written_again_is_what_was_read() {
    for name in FUSIONS {
        let (from, to) = (fixture(name), tempfile::tempdir().unwrap());
        let (mut theirs, model) = (json_of(&from.join(CONFIG)), fused(name));
        let names = theirs["adapter_names"].as_array().unwrap().clone();
        let names: Vec<&str> = names.iter().map(|n| n.as_str().unwrap()).collect();
        save_fusion(&model, &names, to.path()).unwrap();
        let ours = json_of(&to.path().join(CONFIG));
        // Where the model lay, and what is the same function.
        theirs["model_name"] = ours["model_name"].clone();
        theirs["config"]["value_before_softmax"] = json!(true);
        if !theirs["config"]["value"].as_bool().unwrap() {
            theirs["config"]["value_initialized"] = json!(false);
        }
        // Its own dropout is that of the base.
        if name == "fuse_houlsby" {
            theirs["config"]["dropout_prob"] = ours["config"]["dropout_prob"].clone();
        }
        assert_eq!(ours, theirs, "{name}");
        let (weights, pickled) =
            ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin");
        let ours = tensors(to.path().join(weights));
        // One of them is pickled.
        let theirs = checkpoint::open_first(from, &[weights, pickled]).unwrap();
        let theirs: modl_core::Tensors = theirs.tensors(Device::Cpu).unwrap().into_iter().collect();
        let keys = |t: &modl_core::Tensors| t.names().map(str::to_owned).collect::<BTreeSet<_>>();
        assert_eq!(keys(&ours), keys(&theirs), "{name}");
        assert!(theirs.iter().all(|(k, t)| ours.need(k).unwrap().bit_equal(t).unwrap()), "{name}");
    }
}

#[test]
fn what_would_compute_something_else_is_refused_and_changes_nothing() {
    let copy = |edit: &dyn Fn(&mut Value)| {
        let to = tempfile::tempdir().unwrap();
        for file in [CONFIG, "model_adapter_fusion.safetensors"] {
            std::fs::copy(fixture("fuse").join(file), to.path().join(file)).unwrap();
        }
        let mut config = json_of(&to.path().join(CONFIG));
        edit(&mut config);
        std::fs::write(to.path().join(CONFIG), config.to_string()).unwrap();
        to
    };
    type Edit = fn(&mut Value);
    let edits: [(Edit, &str); 6] = [
        (|c| c["hidden_size"] = json!(48), "width 48"),
        (|c| c["adapter_names"] = json!(["a", "d"]), "`d`"),
        (|c| c["config"]["made_up"] = json!(1), "made_up"),
        (|c| c["config"]["value"] = json!(false), "value.weight"),
        (|c| c["name"] = json!("b,a"), "adapter_fusion_layer.b,a"),
        (|c| c["config"] = json!(null), "config"),
    ];
    for (edit, says) in edits {
        let dir = copy(&edit);
        let mut model = model(&["a", "b"]);
        let e = load_fusion(&mut model, dir.path()).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
        assert!(model.aggregator_recipe().is_none());
        assert!(model.params().iter().all(|(n, _)| !n.starts_with("aggregators.")));
    }
    // Parallel adapters, and what is none.
    let mut beside = model(&["a"]);
    beside.attach("b", Box::new(Bottleneck::parallel()), &Bottleneck::parallel_sites()).unwrap();
    let e = load_fusion(&mut beside, fixture("fuse")).unwrap_err().to_string();
    assert!(e.contains("residual twice"), "{e}");
    let mut lora = model(&["a"]);
    lora.attach("b", Box::<Lora>::default(), &Targets::names(["query"])).unwrap();
    assert!(load_fusion(&mut lora, fixture("fuse")).unwrap_err().to_string().contains("`lora`"));
    let mut mixed = model(&["h1", "a"]);
    adapterhub::load(&mut mixed, fixture("b"), Some("b")).unwrap();
    mixed.aggregate(Box::<Fusion>::default()).unwrap();
    let e = save_fusion(&mixed, &["h1", "a"], tempfile::tempdir().unwrap().path()).unwrap_err();
    assert!(e.to_string().contains("original_ln_before"), "{e}");
}

/// Two modules that scale what `query` gives, under a fusion, and both as they are by themselves.
fn scales(config: Fusion, alpha: Weights) -> Modular {
    let mut model =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Double).unwrap(), Seed(2)).unwrap();
    for (name, by) in [("a", 1.5), ("b", -0.5)] {
        model.attach(name, Box::new(standins::Scale), &Targets::names(["query"])).unwrap();
        for (_, t) in model.params().select(&Select::new(format!("modules.{name}.*"))) {
            let seed = Seed(u64::from(by > 0.0));
            let noise =
                Init::Normal(0.4).tensor(&t.size(), seed, Kind::Double, Device::Cpu).unwrap();
            no_grad(|| t.clone().copy_from(&noise.add_scalar(by).unwrap())).unwrap();
        }
    }
    model.aggregate(Box::new(config)).unwrap();
    let drawn =
        |(n, p): &(&str, &modl_core::Param)| n.starts_with("aggregators.") && !p.is_buffer();
    for (i, (_, p)) in (0..).zip(model.params().iter().filter(drawn)) {
        let t = p.tensor();
        let noise =
            Init::Normal(0.5).tensor(&t.size(), Seed(90 + i), Kind::Double, Device::Cpu).unwrap();
        no_grad(|| t.clone().copy_from(&t.add(&noise).unwrap())).unwrap();
    }
    model.route(Box::new(Given(alpha)), false).unwrap();
    model
}

fn logits(model: &Modular) -> Tensor {
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    model.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().detach().unwrap()
}

fn row_major(t: &Tensor) -> Vec<f64> {
    t.detach().unwrap().to_vec().unwrap()
}

/// y of one token by the formula, in f64 and with nothing but loops.
fn by_hand(model: &Modular, site: &str, h: &[f64], alpha: &[f64], residual: bool) -> Vec<f64> {
    let d = h.len();
    let p =
        |name: &str| row_major(model.params().get(&format!("aggregators.{site}.{name}")).unwrap());
    let times = |w: &[f64], x: &[f64]| -> Vec<f64> {
        (0..d).map(|o| (0..d).map(|i| w[o * d + i] * x[i]).sum()).collect()
    };
    let (wq, bq, wk, bk, wv) =
        (p("query.weight"), p("query.bias"), p("key.weight"), p("key.bias"), p("value.weight"));
    let q: Vec<f64> = times(&wq, h).iter().zip(&bq).map(|(a, b)| a + b).collect();
    let (mut z, mut w) = (Vec::new(), Vec::new());
    for (name, alpha) in ["a", "b"].iter().zip(alpha) {
        let factor =
            row_major(model.params().get(&format!("modules.{name}.{site}.factor")).unwrap());
        let own: Vec<f64> =
            h.iter().zip(&factor).map(|(h, f)| h * f - if residual { 0.0 } else { *h }).collect();
        let k: Vec<f64> = times(&wk, &own).iter().zip(&bk).map(|(a, b)| a + b).collect();
        w.push(alpha * q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>().exp());
        z.push(times(&wv, &own));
    }
    let total: f64 = w.iter().sum();
    let start = if residual { 0.0 } else { 1.0 };
    (0..d)
        .map(|i| start * h[i] + z.iter().zip(&w).map(|(z, w)| w / total * z[i]).sum::<f64>())
        .collect()
}

#[test]
fn each_token_is_what_the_formula_says() {
    for residual_before in [false, true] {
        let alpha = [0.3, 0.7];
        let weights = Weights::Fixed(vec![(0, alpha[0]), (1, alpha[1])]);
        let model = scales(Fusion { residual_before, ..Fusion::default() }, weights);
        let site = model.modular_sites().remove(0);
        let layer = model.layer(&site).unwrap();
        let theta = model.backbone().theta(&site).unwrap();
        let f = |theta: &modl_core::Tensors, s: &modl_core::Signal, _: &Context| {
            Ok(s.replace(s.x.linear(theta.need("weight")?, theta.get("bias"))?))
        };
        let x = Init::Normal(1.0)
            .tensor(&[2, 3, site.input], Seed(5), Kind::Double, Device::Cpu)
            .unwrap();
        let host = modl_core::Host::new(&site, &theta, &f);
        let y = layer.forward(&host, &x.clone().into(), &Context::eval()).unwrap().x;
        let h = x.linear(theta.need("weight").unwrap(), theta.get("bias")).unwrap();
        let d = site.output as usize;
        for (y, h) in row_major(&y).chunks(d).zip(row_major(&h).chunks(d)) {
            for (y, hand) in y.iter().zip(by_hand(&model, &site.path, h, &alpha, residual_before)) {
                assert!((y - hand).abs() < 1e-10, "{y} {hand}");
            }
        }
    }
}

#[test]
fn one_module_is_asked_whatever_the_query_is_and_equal_ones_are_one() {
    let model = scales(Fusion::default(), Weights::Fixed(vec![(1, 1.0)]));
    let one = logits(&model);
    // Other queries and keys: the softmax of one score, or of equal scores, is what it is.
    let shake = |model: &Modular| {
        for name in ["query.weight", "query.bias", "key.weight", "key.bias"] {
            for (_, t) in model.params().select(&Select::new(format!("aggregators.*.{name}"))) {
                no_grad(|| t.clone().copy_from(&t.mul_scalar(-3.0).unwrap())).unwrap();
            }
        }
    };
    shake(&model);
    assert!(logits(&model).all_close(&one, 1e-12, 1e-12).unwrap());
    let twins = scales(Fusion::default(), Weights::Fixed(vec![(0, 0.5), (1, 0.5)]));
    let different = logits(&twins);
    shake(&twins);
    assert!(logits(&twins).max_abs_diff(&different).unwrap() > 1e-3);
    for (name, t) in twins.params().select(&Select::new("modules.a.*")) {
        let twin = twins.params().get(&name.replace("modules.a.", "modules.b.")).unwrap();
        no_grad(|| t.clone().copy_from(twin)).unwrap();
    }
    let same = logits(&twins);
    assert!(same.all_close(&one, 1e-12, 1e-12).unwrap());
    shake(&twins);
    assert!(logits(&twins).all_close(&same, 1e-12, 1e-12).unwrap());
}

#[test]
fn the_exact_identity_is_exact_and_a_row_without_a_module_is_the_base() {
    let mut exact =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap();
    exact.attach("a", Box::new(standins::Scale), &Targets::names(["query"])).unwrap();
    for (_, t) in exact.params().select(&Select::new("modules.*")) {
        no_grad(|| t.clone().copy_from(&t.mul_scalar(1.5).unwrap())).unwrap();
    }
    let alone = |model: &mut Modular, value: Option<ValueStart>| {
        let none = Fusion { value: value.unwrap_or_default(), ..Fusion::default() };
        match value {
            Some(_) => model.aggregate(Box::new(none)).unwrap(),
            None => model.aggregate(Box::<modl_aggregate::WeightedSum>::default()).unwrap(),
        }
        model.route(Given::only(0), false).unwrap();
        logits(model)
    };
    let wanted = alone(&mut exact, None);
    let near = alone(&mut exact, Some(ValueStart::NearIdentity)).max_abs_diff(&wanted).unwrap();
    for value in [ValueStart::Identity, ValueStart::None] {
        let d = alone(&mut exact, Some(value)).max_abs_diff(&wanted).unwrap();
        assert!(d < 2e-7 && d < near / 4.0, "{value:?}: {d}, {near}");
    }
    for residual_before in [false, true] {
        let config = Fusion { residual_before, ..Fusion::default() };
        let rows = vec![vec![(0, 1.0)], vec![], vec![(0, 0.5), (1, 0.5)]];
        let model = scales(config, Weights::Rows(rows));
        let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
        let base = model.forward_base(&inputs, &Context::eval()).unwrap();
        let base = base.need("logits").unwrap().select(0, 1).unwrap();
        assert!(logits(&model).select(0, 1).unwrap().all_close(&base, 1e-12, 1e-12).unwrap());
    }
}

#[test]
fn a_fusion_is_larger_than_an_adapter_and_is_held_to_the_identity() {
    let mut model = model(&["a", "b"]);
    model.aggregate(Box::<Fusion>::default()).unwrap();
    let count = |of: &str| -> usize {
        model.params().select(&Select::new(of)).map(|(_, t)| t.numel()).sum()
    };
    // Two layers of width 32; the adapter has a bottleneck of 8.
    assert_eq!(count("aggregators.*"), 2 * (3 * 32 * 32 + 2 * 32));
    assert!(count("aggregators.*") > count("modules.a.*"));
    // Nobody trains V: nothing is to hold it.
    model.train_only(&Select::none()).unwrap();
    assert!(model.penalty(&Context::eval()).unwrap().is_none());
    model.train_only(&Select::new("aggregators.*")).unwrap();
    let penalty = || model.penalty(&Context::eval()).unwrap().unwrap().item().unwrap();
    let off = 32.0 * 31.0 * 1e-12;
    assert!((penalty() - 2.0 * 0.01 * off).abs() < 1e-14, "{}", penalty());
    for (_, v) in model.params().select(&Select::new("aggregators.*.value.weight")) {
        no_grad(|| v.clone().copy_from(&v.add_scalar(0.5).unwrap())).unwrap();
    }
    let wanted = 2.0 * 0.01 * (32.0 * 0.25 + 32.0 * 31.0 * 0.500001f64.powi(2));
    assert!((penalty() - wanted).abs() < 1e-4 * wanted, "{} {wanted}", penalty());
}

#[test]
fn settings_that_fit_nowhere_are_refused_by_name() {
    let with = |config: Fusion| {
        let mut model = model(&["a"]);
        model.attach("l", Box::<Lora>::default(), &Targets::names(["query"])).unwrap();
        model.aggregate(Box::new(config)).unwrap_err().to_string()
    };
    let usual = Fusion::default;
    let falling = |from, to, steps| Temperature::Falling(Falling { from, to, steps });
    for (config, says) in [
        (Fusion { query_source: QuerySource::Norm, ..usual() }, "query_source"),
        (Fusion { regularisation: -1.0, ..usual() }, "regularisation"),
        (Fusion { dropout: 1.0, ..usual() }, "dropout"),
        (Fusion { temperature: Temperature::Constant(0.0), ..usual() }, "temperature"),
        (Fusion { temperature: falling(2.0, 1.0, 0), ..usual() }, "temperature"),
        (Fusion { temperature: falling(f64::NAN, 1.0, 3), ..usual() }, "temperature"),
    ] {
        let e = with(config);
        assert!(e.contains(says), "{e}");
    }
    let wide = {
        let mut model = model(&["a"]);
        let source = Fusion { query_source: QuerySource::Input, ..usual() };
        // `output.dense` is wider before than behind.
        model.aggregate(Box::new(source)).unwrap_err().to_string()
    };
    assert!(wide.contains("query_source"), "{wide}");
    let negative = scales(usual(), Weights::Fixed(vec![(0, -0.5), (1, 1.5)]));
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    let e = negative.forward(&inputs, &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("below 0"), "{e}");
}

#[test]
fn where_the_temperature_has_got_to_is_in_the_file() {
    let line = Falling { from: 10.0, to: 1.0, steps: 9 };
    let config = Fusion { temperature: Temperature::Falling(line), ..Fusion::default() };
    let equal = || Weights::Fixed(vec![(0, 0.5), (1, 0.5)]);
    let model = scales(config, equal());
    let (hot, none) = (logits(&model), modl_core::Tensors::new());
    model.after_step(&none, 6, 20).unwrap();
    let warm = logits(&model);
    // T = 4, where scores are as they are at 4 for ever.
    let constant = Fusion { temperature: Temperature::Constant(4.0), ..Fusion::default() };
    assert!(logits(&scales(constant, equal())).all_close(&warm, 1e-12, 1e-12).unwrap());
    assert!(hot.max_abs_diff(&warm).unwrap() > 1e-3);
    model.after_step(&none, 15, 20).unwrap();
    let cold = logits(&model);
    assert!(logits(&scales(Fusion::default(), equal())).all_close(&cold, 1e-12, 1e-12).unwrap());
    model.after_step(&none, 6, 20).unwrap();

    let registry = Registry::new().with(standins::register).unwrap();
    let registry = registry.with(modl_aggregate::register).unwrap();
    let registry = registry.with(modl_route::register).unwrap();
    let mut model = model;
    model.route(Box::new(modl_route::Fixed::modules(["a", "b"])), false).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("routing.safetensors");
    model.save_routing(&file).unwrap();
    let mut again = scales(Fusion::default(), equal());
    again.load_routing(&file, &registry).unwrap();
    assert!(logits(&again).bit_equal(&warm).unwrap());
}

#[test]
fn without_modules_it_is_the_base() {
    let model = scales(Fusion::default(), Weights::Fixed(vec![]));
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    let base = model.forward_base(&inputs, &Context::eval()).unwrap();
    assert!(logits(&model).bit_equal(base.need("logits").unwrap()).unwrap());
}
