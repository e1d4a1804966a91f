//! Switch Transformers against transformers' outputs, and what its routers and experts promise.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::standins::Scale;
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Base, Context, Device, Layers, Modular, Seed, SiteKind, Targets, Tensor, Tensors,
    no_grad,
};
use modl_models::{LoadOptions, open};
use serde_json::{Value, json};

/// The second without experts in all but one layer, with biases and an output layer of its own.
const BOTH: [&str; 2] = ["tiny_switch", "tiny_switch_untied"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn inputs(name: &str) -> Tensors {
    read(fixture(name).join("inputs.safetensors"))
}

/// A copy of a fixture with other tensors and settings.
fn copy(name: &str, tensors: &Tensors, settings: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in settings.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    checkpoint::save(dir.path().join("model.safetensors"), tensors.iter(), Default::default())
        .unwrap();
    dir
}

fn changed(name: &str, settings: Value) -> modl_core::Result<Box<dyn Backbone>> {
    let dir = copy(name, &read(fixture(name).join("model.safetensors")), settings);
    open(dir.path(), &LoadOptions::default())
}

fn run_in(model: &dyn Backbone, inputs: &Tensors, cx: &Context) -> Tensors {
    no_grad(|| model.forward(inputs, &Layers::none(model.sites().len()), cx)).unwrap()
}

fn run(model: &dyn Backbone, inputs: &Tensors) -> Tensors {
    run_in(model, inputs, &Context::eval())
}

fn logits(model: &dyn Backbone, inputs: &Tensors) -> Tensor {
    run(model, inputs).need("logits").unwrap().clone()
}

#[track_caller]
fn close(found: &Tensor, wanted: &Tensor, what: &str) {
    let apart = found.max_abs_diff(wanted).unwrap();
    assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{what}: {apart}");
}

#[test]
fn outputs_router_logits_and_losses_are_those_of_transformers() {
    for name in BOTH {
        let model = changed(name, json!({ "output_router_logits": true })).unwrap();
        let found = run(&*model, &inputs(name));
        let wanted = read(fixture(name).join("outputs.safetensors"));
        let mut routers = 0;
        for (key, wanted) in wanted.iter() {
            // transformers counts routers, modl layers: those with experts are the odd ones.
            let key = match key.split_once("_router_") {
                Some((stack, n)) => {
                    routers += 1;
                    let layer = 2 * n.parse::<i64>().unwrap() + 1;
                    format!("{stack}_router_logits.{layer}")
                }
                None => key.to_owned(),
            };
            let found = found.need(&key).unwrap();
            assert_eq!(found.size(), wanted.size(), "{name} {key}");
            close(found, wanted, &format!("{name} {key}"));
        }
        assert_eq!((routers, found.len()), (wanted.len() - 6, wanted.len()), "{name}");
        let quiet = open(fixture(name), &LoadOptions::default()).unwrap();
        let quiet = run(&*quiet, &inputs(name));
        let names: Vec<_> = quiet.names().collect();
        assert_eq!(names, ["logits", "encoder_last_hidden_state"]);
    }
}

/// 0.001 of both stacks' losses together, each, as transformers adds them.
#[test]
fn both_stacks_losses_are_added_in_training() {
    let name = BOTH[0];
    let settings = json!({ "output_router_logits": true, "router_jitter_noise": 0.0, "router_z_loss_coef": 0.5 });
    let all = read(fixture(name).join("model.safetensors"));
    let options = LoadOptions { dropout: Some(0.0), ..LoadOptions::default() };
    let backbone = open(copy(name, &all, settings).path(), &options).unwrap();
    let model = Modular::from_box(backbone, Seed(1)).unwrap();
    let weights = [("aux_loss".to_owned(), 0.001), ("z_loss".to_owned(), 0.5)];
    assert_eq!(model.loss_weights(), weights.into());
    let cx = Context::train(Seed(2), 0);
    model.forward(&inputs(name), &cx).unwrap();
    let found = cx.take_trace().losses().unwrap();
    let wanted = read(fixture(name).join("outputs.safetensors"));
    for loss in ["aux_loss", "z_loss"] {
        let of = |stack: &str| wanted.need(&format!("{stack}_{loss}")).unwrap();
        close(&found[loss], &of("encoder").add(of("decoder")).unwrap(), loss);
    }
}

/// With a capacity of 1 each expert answers the first token of a sequence that wants it; the others
/// pass the layer by.
#[test]
fn an_expert_that_is_full_gives_nothing() {
    let name = BOTH[0];
    let plain = logits(&*open(fixture(name), &LoadOptions::default()).unwrap(), &inputs(name));
    let wide = logits(&*changed(name, json!({ "expert_capacity": 64 })).unwrap(), &inputs(name));
    let all = logits(&*changed(name, json!({ "expert_capacity": 9 })).unwrap(), &inputs(name));
    assert!(wide.bit_equal(&all).unwrap());
    assert!(wide.max_abs_diff(&plain).unwrap() > 1e-4, "nothing was dropped");
    // A router of zeros likes the first expert best: with room for 2 tokens the third and later
    // ones are as without experts.
    let zeroed = |experts: bool, capacity: i64| {
        let change = |(n, t): (&str, &Tensor)| {
            let none = n.contains("router") || (!experts && n.contains("expert_"));
            (n.to_owned(), if none { t.zeros_like().unwrap() } else { t.clone() })
        };
        let tensors = read(fixture(name).join("model.safetensors"));
        let settings = json!({ "expert_capacity": capacity, "num_layers": 4 });
        let dir = copy(name, &tensors.iter().map(change).collect(), settings);
        let model = open(dir.path(), &LoadOptions::default()).unwrap();
        let given = inputs(name);
        // The decoder alone, whose tokens do not look ahead.
        let hidden = Tensor::zeros(&[2, 3, 32], modl_core::Kind::Float, Device::Cpu).unwrap();
        let ids = given.need("decoder_input_ids").unwrap().clone();
        let given =
            Tensors::new().with("encoder_last_hidden_state", hidden).with("decoder_input_ids", ids);
        logits(&*model, &given)
    };
    // Only the last block of the decoder has experts: what was dropped there is seen by nobody.
    let (with, without) = (zeroed(true, 2), zeroed(false, 2));
    let part = |t: &Tensor, from, len| t.narrow(1, from, len).unwrap();
    assert!(part(&with, 2, 5).bit_equal(&part(&without, 2, 5)).unwrap());
    for token in 0..2 {
        let apart = part(&with, token, 1).max_abs_diff(&part(&without, token, 1)).unwrap();
        assert!(apart > 1e-3, "{token}");
    }
}

#[test]
fn sites_are_there_and_change_nothing_with_a_factor_of_one() {
    for name in BOTH {
        let base = open(fixture(name), &LoadOptions::default()).unwrap();
        let of = |kind| -> Vec<String> {
            base.sites().iter().filter(|s| s.kind == kind).map(|s| s.path.clone()).collect()
        };
        let routers = of(SiteKind::Router);
        assert!(routers.contains(&"decoder.block.1.layer.2.mlp.router.classifier".to_owned()));
        assert!(of(SiteKind::Experts).contains(&"encoder.block.1.layer.1.mlp.experts".to_owned()));
        assert!(of(SiteKind::Linear).contains(&"encoder.block.0.layer.1.mlp.wi".to_owned()));
        let site = base.sites().iter().find(|s| s.kind == SiteKind::Experts).unwrap();
        let theta = base.theta(site).unwrap();
        assert_eq!(theta.need("wi").unwrap().size(), [4, 20, 32]);
        assert_eq!(theta.need("wo").unwrap().size(), [4, 32, 20]);
        let sites = base.sites().iter().filter(|s| s.kind != SiteKind::Attention);
        let targets = Targets::names(sites.map(|s| s.path.clone()));
        let mut model = Modular::from_box(base, Seed(1)).unwrap();
        model.attach("m", Box::new(Scale), &targets).unwrap();
        model.route(Given::only(0), false).unwrap();
        model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
        let found = no_grad(|| model.forward(&inputs(name), &Context::eval())).unwrap();
        let wanted = read(fixture(name).join("outputs.safetensors"));
        close(found.need("logits").unwrap(), wanted.need("logits").unwrap(), name);
    }
}

/// Jitter and dropout are in training alone and come from the seed.
#[test]
fn noise_is_in_training_alone() {
    let name = BOTH[0];
    let noisy = json!({ "router_jitter_noise": 0.5, "dropout_rate": 0.0 });
    let model = changed(name, noisy).unwrap();
    let with = |cx: Context| run_in(&*model, &inputs(name), &cx).need("logits").unwrap().clone();
    let still = logits(&*open(fixture(name), &LoadOptions::default()).unwrap(), &inputs(name));
    assert!(with(Context::eval()).bit_equal(&still).unwrap());
    let once = with(Context::train(Seed(1), 0));
    assert!(once.bit_equal(&with(Context::train(Seed(1), 0))).unwrap());
    assert!(once.max_abs_diff(&still).unwrap() > 1e-3);
}

#[test]
fn what_does_not_fit_is_named() {
    let name = BOTH[0];
    for (key, value, words) in [
        ("router_dtype", json!("bfloat16"), "router_dtype"),
        ("router_jitter_noise", json!(1.0), "router_jitter_noise"),
        ("expert_capacity", json!(0), "expert_capacity"),
        ("num_experts", json!(5), "mlp.experts.wi"),
        ("decoder_sparse_step", json!(1), "decoder.block.0.layer.2.mlp.experts"),
        ("dense_act_fn", json!("gated-gelu"), "wi_0"),
    ] {
        let e = changed(name, json!({ key: value })).unwrap_err().to_string();
        assert!(e.contains(words), "{key}: {e}");
    }
    let tensors = read(fixture(name).join("model.safetensors"));
    let gone = "decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight";
    let rest = tensors.iter().filter(|(n, _)| *n != gone).map(|(n, t)| (n.to_owned(), t.clone()));
    let dir = copy(name, &rest.collect(), json!({}));
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("decoder.block.1.layer.2.mlp.experts.wo"), "{e}");
}
