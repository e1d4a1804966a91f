//! The multilayer perceptron against loops over its numbers, and as a folder.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use modl_core::shards::ShardSize;
use modl_core::{Backbone, Context, Device, Kind, Layers, Registry, Seed, Tensor, Tensors};
use modl_models::{ExpertNames, LoadOptions, Mlp, MlpConfig, open, register, save};
use serde_json::json;
use standing::passes;

mod standing {
    use modl_core::testing::{Given, Sum, standins};
    use modl_core::{Context, Modular, Registry, Seed, Targets, Tensors};

    /// Whether a stand-in for a module can be attached to every layer of a network and is computed.
    pub(super) fn passes(network: modl_models::Mlp, inputs: &Tensors) -> usize {
        let registry = Registry::new().with(standins::register).unwrap();
        let mut model = Modular::new(network, Seed(3)).unwrap();
        let config = registry.modules.parse(&serde_json::json!({ "type": "scale" })).unwrap();
        model.attach("one", config, &Targets::names(["linear"])).unwrap();
        model.route(Given::only(0), false).unwrap();
        model.aggregate(Box::new(Sum::default())).unwrap();
        let outputs = model.forward(inputs, &Context::eval()).unwrap();
        assert_eq!(outputs.need("last_hidden_state").unwrap().size(), [2, 1, 2]);
        model.modular_sites().len()
    }
}

fn config() -> MlpConfig {
    MlpConfig { inputs: 6, hidden: vec![5, 4, 2], ..MlpConfig::default() }
}

fn wide() -> LoadOptions {
    LoadOptions { kind: Some(Kind::Double), ..LoadOptions::default() }
}

fn inputs() -> Tensors {
    let x: Vec<f64> = (0..12).map(|i| (f64::from(i) * 0.7).sin()).collect();
    Tensors::new().with("pixel_values", Tensor::from_slice(&x, &[2, 1, 2, 3], Device::Cpu).unwrap())
}

fn run(net: &dyn Backbone, inputs: &Tensors, cx: &Context) -> Tensor {
    let outputs = net.forward(inputs, &Layers::none(net.sites().len()), cx).unwrap();
    outputs.need("last_hidden_state").unwrap().clone()
}

#[test]
fn a_pass_is_the_formula() {
    for bias in [true, false] {
        let net = Mlp::new(MlpConfig { bias, ..config() }, Seed(4), &wide()).unwrap();
        let paths: Vec<&str> = net.sites().iter().map(|s| s.path.as_str()).collect();
        assert_eq!(paths, ["layers.0.linear", "layers.1.linear", "layers.2.linear"]);
        let y = run(&net, &inputs(), &Context::eval());
        assert_eq!(y.size(), [2, 1, 2]);
        let x = inputs().need("pixel_values").unwrap().to_vec::<f64>().unwrap();
        let mut expected = Vec::new();
        for row in x.chunks(6) {
            let mut h = row.to_vec();
            for (n, width) in [5, 4, 2].into_iter().enumerate() {
                let get = |part: &str| {
                    let found = net.params().find(&format!("layers.{n}.linear.{part}"));
                    found.map(|t| t.to_vec::<f64>().unwrap())
                };
                let (w, b) = (get("weight").unwrap(), get("bias"));
                assert_eq!(b.is_some(), bias);
                h = (0..width)
                    .map(|o| {
                        let dot: f64 =
                            h.iter().enumerate().map(|(i, x)| w[o * h.len() + i] * x).sum();
                        (dot + b.as_ref().map_or(0.0, |b| b[o])).max(0.0)
                    })
                    .collect();
            }
            expected.extend(h);
        }
        for (a, b) in y.to_vec::<f64>().unwrap().iter().zip(&expected) {
            assert!((a - b).abs() < 1e-14, "{a} {b}");
        }
        assert_eq!(passes(net, &inputs()), 3);
    }
}

#[test]
fn an_output_layer_is_linear_on_the_last_hidden_one_and_a_site() {
    let settings = MlpConfig { outputs: Some(3), ..config() };
    let net = Mlp::new(settings, Seed(4), &wide()).unwrap();
    let bare = Mlp::new(config(), Seed(4), &wide()).unwrap();
    let none = Layers::none(net.sites().len());
    let outputs = net.forward(&inputs(), &none, &Context::eval()).unwrap();
    let hidden = outputs.need("last_hidden_state").unwrap();
    // What is below is as without it, and drawn as without it.
    assert!(hidden.bit_equal(&run(&bare, &inputs(), &Context::eval())).unwrap());
    let numbers = |name: &str| net.params().get(name).unwrap().to_vec::<f64>().unwrap();
    let (w, b) = (numbers("output.linear.weight"), numbers("output.linear.bias"));
    let logits = outputs.need("logits").unwrap();
    assert_eq!((logits.size(), w.len()), (vec![2, 3], 6));
    let said = logits.to_vec::<f64>().unwrap();
    let mut negative = 0;
    for (h, said) in hidden.to_vec::<f64>().unwrap().chunks(2).zip(said.chunks(3)) {
        for (k, found) in said.iter().enumerate() {
            let wanted = w[2 * k] * h[0] + w[2 * k + 1] * h[1] + b[k];
            assert!((found - wanted).abs() < 1e-14, "{found} {wanted}");
            negative += usize::from(wanted < 0.0);
        }
    }
    assert!(negative > 0, "there is no activation to take them away");
    assert_eq!(passes(net, &inputs()), 4);
    let dir = tempfile::tempdir().unwrap();
    let net = Mlp::new(MlpConfig { outputs: Some(3), ..config() }, Seed(4), &wide()).unwrap();
    save(&net, dir.path().join("net"), ExpertNames::Each, ShardSize::USUAL).unwrap();
    let again = open(dir.path().join("net"), &LoadOptions::default()).unwrap();
    let said = again.forward(&inputs(), &none, &Context::eval()).unwrap();
    assert!(said.need("logits").unwrap().bit_equal(logits).unwrap());
    let refused = Mlp::new(MlpConfig { outputs: Some(0), ..config() }, Seed(4), &wide());
    assert!(refused.unwrap_err().to_string().contains("outputs"));
}

#[test]
fn it_starts_as_pytorch_does_and_by_its_seed() {
    let wide_layer = MlpConfig { inputs: 400, hidden: vec![300], ..MlpConfig::default() };
    let make = |seed| Mlp::new(wide_layer.clone(), Seed(seed), &LoadOptions::default()).unwrap();
    let net = make(1);
    for part in ["weight", "bias"] {
        let name = format!("layers.0.linear.{part}");
        let get = |net: &Mlp| net.params().get(&name).unwrap().to_vec::<f64>().unwrap();
        let (all, bound) = (get(&net), 1.0 / 20.0);
        assert!(all.iter().all(|v| v.abs() <= bound));
        // A uniform distribution in ±b has the variance b²⁄3; its estimate from n numbers a relative
        // standard error of √(0.8⁄n).
        let n = all.len() as f64;
        let variance = all.iter().map(|v| v * v).sum::<f64>() / n;
        let apart = (variance / (bound * bound / 3.0) - 1.0).abs();
        assert!(apart < 4.0 * (0.8 / n).sqrt(), "{part}: {apart}");
        assert_eq!(all, get(&make(1)));
        assert_ne!(all, get(&make(2)));
    }
}

#[test]
fn a_folder_holds_it_whole() {
    let dir = tempfile::tempdir().unwrap();
    let settings = MlpConfig { hidden_dropout_prob: 0.25, ..config() };
    let net = Mlp::new(settings.clone(), Seed(4), &LoadOptions::default()).unwrap();
    let folder = dir.path().join("net");
    save(&net, &folder, ExpertNames::Each, ShardSize::USUAL).unwrap();
    let again = open(&folder, &LoadOptions::default()).unwrap();
    assert_eq!(again.config(), net.config());
    assert_eq!(
        *net.config(),
        json!({
            "inputs": 6, "hidden": [5, 4, 2], "bias": true, "hidden_act": "relu",
            "hidden_dropout_prob": 0.25, "model_type": "mlp", "hidden_size": 2
        })
    );
    for (name, p) in net.params().iter() {
        assert!(p.tensor().bit_equal(again.params().get(name).unwrap()).unwrap(), "{name}");
    }
    // Dropout is there in training alone, and `LoadOptions` has the last word.
    let (x, train) = (inputs(), Context::train(Seed(1), 0));
    let float = Tensors::new()
        .with("input_values", x.need("pixel_values").unwrap().to_kind(Kind::Float).unwrap());
    assert!(
        run(&*again, &x, &Context::eval()).bit_equal(&run(&net, &float, &Context::eval())).unwrap()
    );
    assert!(!run(&*again, &x, &train).bit_equal(&run(&net, &x, &Context::eval())).unwrap());
    let none = LoadOptions { dropout: Some(0.0), ..LoadOptions::default() };
    let none = open(&folder, &none).unwrap();
    assert!(run(&*none, &x, &train).bit_equal(&run(&net, &x, &Context::eval())).unwrap());
    // A width that is not that of the tensors.
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    for (from, to, words) in [
        ("\"hidden_size\": 2", "\"hidden_size\": 3", "the last of `hidden` is 2"),
        ("\"inputs\": 6", "\"inputs\": 7", "layers.0.linear.weight"),
        ("\"inputs\": 6", "\"inputs\": \"6\"", "invalid type"),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(folder.join("config.json"), text.replace(from, to)).unwrap();
        let e = open(&folder, &LoadOptions::default()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let refused = |settings: MlpConfig| {
        Mlp::new(settings, Seed(0), &LoadOptions::default()).unwrap_err().to_string()
    };
    assert!(refused(MlpConfig { hidden: vec![], ..config() }).contains("hidden"));
    assert!(refused(MlpConfig { hidden: vec![3, 0], ..config() }).contains("positive"));
    assert!(refused(MlpConfig { inputs: -1, ..config() }).contains("inputs"));
    assert!(refused(MlpConfig { inputs: i64::MAX, ..config() }).contains("too many weights"));
    assert!(refused(MlpConfig { hidden_dropout_prob: 1.0, ..config() }).contains("[0, 1)"));
    let net = Mlp::new(config(), Seed(0), &wide()).unwrap();
    let refused = |inputs: Tensors| {
        let none = Layers::none(net.sites().len());
        net.forward(&inputs, &none, &Context::eval()).unwrap_err().to_string()
    };
    let zeros = |shape: &[i64], kind| Tensor::zeros(shape, kind, Device::Cpu).unwrap();
    let with = |name: &'static str, t| Tensors::new().with(name, t);
    let e = refused(with("input_ids", zeros(&[1, 6], Kind::Int64)));
    assert!(e.contains("(input_ids)") && e.contains("rows of 6 numbers"), "{e}");
    assert!(refused(with("pixel_values", zeros(&[2, 5], Kind::Float))).contains("6 for each row"));
    assert!(refused(with("pixel_values", zeros(&[2, 6], Kind::Uint8))).contains("floats"));
    assert!(refused(with("pixel_values", zeros(&[0, 6], Kind::Float))).contains("floats"));
    let registry = Registry::new().with(register).unwrap();
    let parse = |v| registry.backbones.parse(&v).unwrap_err().to_string();
    assert!(parse(json!({"type": "mlp", "inputs": 4})).contains("missing field `hidden`"));
    assert!(parse(json!({"type": "mpl"})).contains("did you mean `mlp`"));
}
