//! Mixtral, OLMoE, Qwen2-MoE and DeepSeek-V3: their sites, what their routers say, how experts lie
//! on disk, and what a file may not lack. Generation is tested with that of the other decoders.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::standins::Scale;
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Base, Context, Device, Kind, Layers, Modular, Seed, SiteKind, Targets, Tensor,
    Tensors, no_grad,
};
use modl_models::{Generation, LoadOptions, generate, open};
use serde_json::{Value, json};

const BOTH: [&str; 2] = ["deterministic_mixtral", "deterministic_olmoe"];
/// A dense layer between two, a mixture in every second layer; both ways to make queries, experts
/// in groups, and `yarn` positions.
const TINY: [&str; 4] =
    ["tiny_qwen2_moe", "tiny_qwen2_moe_step", "tiny_deepseek_v3", "tiny_deepseek_v3_yarn"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn load(dir: &Path) -> Box<dyn Backbone> {
    open(dir, &LoadOptions::default()).unwrap()
}

fn logits(model: &dyn Backbone, inputs: &Tensors) -> Tensor {
    let layers = Layers::none(model.sites().len());
    no_grad(|| model.forward(inputs, &layers, &Context::eval()))
        .unwrap()
        .need("logits")
        .unwrap()
        .clone()
}

/// A copy of a fixture with other tensors, and with some settings changed.
fn copy(name: &str, tensors: &Tensors, settings: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in settings.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let path = dir.path().join("model.safetensors");
    checkpoint::save(path, tensors.iter(), Default::default()).unwrap();
    dir
}

fn run(model: &dyn Backbone, inputs: &Tensors) -> Tensors {
    let layers = Layers::none(model.sites().len());
    no_grad(|| model.forward(inputs, &layers, &Context::eval())).unwrap()
}

#[track_caller]
fn close(found: &Tensor, wanted: &Tensor, what: &str) {
    let apart = found.max_abs_diff(wanted).unwrap();
    assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{what}: {apart}");
}

/// Outputs, the logits of routers and the auxiliary loss, with a mask and without, against
/// transformers.
#[test]
fn outputs_and_what_routers_say_are_those_of_transformers() {
    let masked =
        [("deterministic_mixtral", "masked_mixtral"), ("deterministic_olmoe", "masked_olmoe")];
    let whole = BOTH.iter().chain(&TINY).map(|name| (*name, *name));
    for (model, golden) in whole.chain(masked) {
        let wanted = read(fixture(golden).join("outputs.safetensors"));
        let inputs = read(fixture(golden).join("inputs.safetensors"));
        let found = run(&*load(&fixture(model)), &inputs);
        for name in ["logits", "last_hidden_state"] {
            if let Some(wanted) = wanted.get(name) {
                close(found.need(name).unwrap(), wanted, &format!("{golden} {name}"));
            }
        }
        let routers = |t: &Tensors, start: &str| -> Vec<Tensor> {
            let own = t.iter().filter(|(n, _)| n.starts_with(start));
            own.map(|(_, t)| t.clone()).collect()
        };
        let (own, theirs) = (routers(&found, "router_logits."), routers(&wanted, "router_"));
        assert!(!own.is_empty() && own.len() == theirs.len(), "{golden}");
        for (own, theirs) in own.iter().zip(&theirs) {
            close(own, theirs, golden);
        }
        match (found.get("aux_loss"), wanted.get("aux_loss")) {
            (Some(found), Some(wanted)) => {
                close(found, &wanted.reshape(&[]).unwrap(), &format!("{golden} loss"));
            }
            (found, wanted) => {
                assert!(found.is_none() && wanted.is_none() && golden.contains("deepseek"));
            }
        }
    }
    // Layer 1 has no mixture.
    let inputs = read(fixture(TINY[0]).join("inputs.safetensors"));
    let model = load(&fixture(TINY[0]));
    let found = run(&*model, &inputs);
    let names: Vec<_> = found.names().filter(|n| n.starts_with("router")).collect();
    assert_eq!(names, ["router_logits.0", "router_logits.2"]);
}

/// What is recorded in training is transformers' loss with `config.json`'s weight, in evaluation
/// nothing, and nothing where `output_router_logits` or the options say so.
#[test]
fn the_auxiliary_loss_is_recorded_in_training() {
    for (name, weight) in [(BOTH[0], 0.001), (BOTH[1], 0.01), (TINY[0], 0.001)] {
        let inputs = read(fixture(name).join("inputs.safetensors"));
        let wanted = read(fixture(name).join("outputs.safetensors"));
        let model = Modular::from_box(load(&fixture(name)), Seed(1)).unwrap();
        assert_eq!(model.loss_weights(), [("aux_loss".to_owned(), weight)].into());
        let losses = |model: &Modular, cx: Context| {
            model.forward(&inputs, &cx).unwrap();
            cx.take_trace().losses().unwrap()
        };
        let found = losses(&model, Context::train(Seed(2), 0));
        let wanted = wanted.need("aux_loss").unwrap().reshape(&[]).unwrap();
        close(&found["aux_loss"], &wanted, name);
        assert_eq!((found.len(), losses(&model, Context::eval()).len()), (1, 0));
        let all = read(fixture(name).join("model.safetensors"));
        let off = copy(name, &all, json!({ "output_router_logits": false }));
        for (given, count) in [(None, 0), (Some(true), 1), (Some(false), 0)] {
            let options = LoadOptions { router_losses: given, ..LoadOptions::default() };
            let model = Modular::from_box(open(off.path(), &options).unwrap(), Seed(1)).unwrap();
            assert_eq!(losses(&model, Context::train(Seed(2), 0)).len(), count, "{given:?}");
        }
    }
    let wanted = LoadOptions { router_losses: Some(true), ..LoadOptions::default() };
    for without in [TINY[2], "deterministic_llama"] {
        let e = open(fixture(without), &wanted).unwrap_err().to_string();
        assert!(e.contains("router_losses"), "{e}");
    }
}

/// By hand: with equal loads the loss is k, and only real tokens count.
#[test]
fn the_auxiliary_loss_is_none_where_nobody_wants_it_and_moves_routers() {
    let name = BOTH[0];
    let all = read(fixture(name).join("model.safetensors"));
    let inputs = read(fixture(name).join("inputs.safetensors"));
    let quiet = copy(name, &all, json!({ "output_router_logits": false }));
    let outputs = run(&*load(quiet.path()), &inputs);
    assert_eq!(outputs.names().collect::<Vec<_>>(), ["last_hidden_state", "logits"]);
    // Equal logits everywhere: P = 1⁄E and Σ f = k, whatever is chosen.
    let zero = |(n, t): (&str, &Tensor)| {
        let t = if n.ends_with("gate.weight") { t.zeros_like().unwrap() } else { t.clone() };
        (n.to_owned(), t)
    };
    let flat = copy(name, &all.iter().map(zero).collect(), json!({}));
    let loss = run(&*load(flat.path()), &inputs).need("aux_loss").unwrap().item().unwrap();
    assert!((loss - 2.0).abs() < 1e-6, "{loss}");
    let model = load(&fixture(name));
    let gate = model.params().get("model.layers.1.mlp.gate.weight").unwrap();
    gate.set_requires_grad(true).unwrap();
    let layers = Layers::none(model.sites().len());
    let outputs = model.forward(&inputs, &layers, &Context::eval()).unwrap();
    let loss = outputs.need("aux_loss").unwrap();
    let gradient = loss.gradients(&[gate], false).unwrap().pop().flatten().unwrap();
    assert!(gradient.norm().unwrap().item().unwrap() > 1e-4);
}

/// The biases of DeepSeek-V3's routers count for the choice alone, and stay in f32.
#[test]
fn a_bias_chooses_and_does_not_weigh() {
    let name = TINY[2];
    let all = read(fixture(name).join("model.safetensors"));
    let inputs = read(fixture(name).join("inputs.safetensors"));
    let biased = |by: f64, one: bool| {
        let change = |(n, t): (&str, &Tensor)| {
            let t = match n.ends_with("e_score_correction_bias") {
                true if one => {
                    let first = Tensor::arange(8, Device::Cpu).unwrap().eq_scalar(0.0).unwrap();
                    t.masked_fill(&first, by).unwrap()
                }
                true => t.add_scalar(by).unwrap(),
                false => t.clone(),
            };
            (n.to_owned(), t)
        };
        let dir = copy(name, &all.iter().map(change).collect(), json!({}));
        logits(&*load(dir.path()), &inputs)
    };
    let plain = biased(0.0, false);
    assert!(biased(0.5, false).all_close(&plain, 1e-5, 1e-5).unwrap());
    assert!(biased(50.0, true).max_abs_diff(&plain).unwrap() > 1e-3);
    let options = LoadOptions { kind: Some(Kind::BFloat16), ..LoadOptions::default() };
    let model = open(fixture(name), &options).unwrap();
    let bias = model.params().get("model.layers.1.mlp.gate.e_score_correction_bias").unwrap();
    assert_eq!(bias.kind(), Kind::Float);
    let apart =
        logits(&*model, &inputs).to_kind(Kind::Float).unwrap().max_abs_diff(&plain).unwrap();
    assert!(apart < 0.3, "{apart}");
}

#[test]
fn sites_of_qwen2_moe_and_deepseek_v3_have_the_names_of_transformers() {
    let paths = |name: &str, n: usize| -> Vec<String> {
        let model = load(&fixture(name));
        let start = format!("model.layers.{n}.");
        let own = model.sites().iter().filter_map(|s| s.path.strip_prefix(&start));
        own.map(str::to_owned).collect()
    };
    let mlp = ["mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    let qwen = paths(TINY[0], 1);
    assert!(qwen.ends_with(&mlp.map(str::to_owned)), "{qwen:?}");
    let mlp = [
        "mlp",
        "mlp.gate",
        "mlp.experts",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert.down_proj",
        "mlp.shared_expert_gate",
    ];
    let qwen = paths(TINY[0], 2);
    assert!(qwen.ends_with(&mlp.map(str::to_owned)), "{qwen:?}");
    let deepseek = [
        "input_layernorm",
        "self_attn.q_a_proj",
        "self_attn.q_a_layernorm",
        "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_a_layernorm",
        "self_attn.kv_b_proj",
        "self_attn",
        "self_attn.output",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp",
        "mlp.gate",
        "mlp.experts",
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj",
    ];
    assert_eq!(paths(TINY[2], 1), deepseek);
}

/// A factor of 1 at every site but attention: the way through modules is another one, the result
/// is not.
#[test]
fn modules_that_change_nothing_change_nothing_at_any_site() {
    for name in TINY {
        let base = load(&fixture(name));
        let sites = base.sites().iter().filter(|s| s.kind != SiteKind::Attention);
        let targets = Targets::names(sites.map(|s| s.path.clone()));
        let mut model = Modular::from_box(base, Seed(1)).unwrap();
        model.attach("m", Box::new(Scale), &targets).unwrap();
        model.route(Given::only(0), false).unwrap();
        model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
        let inputs = read(fixture(name).join("inputs.safetensors"));
        let wanted = read(fixture(name).join("outputs.safetensors"));
        let found = no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
        for key in ["logits", "aux_loss"] {
            if let Some(wanted) = wanted.get(key) {
                close(found.need(key).unwrap(), wanted, &format!("{name} {key}"));
            }
        }
    }
}

#[test]
fn settings_that_would_change_the_result_are_refused_by_name() {
    for (name, key, value) in [
        (TINY[0], "use_sliding_window", json!(true)),
        (TINY[0], "layer_types", json!(["sliding_attention"])),
        (TINY[0], "decoder_sparse_step", json!("two")),
        (TINY[2], "scoring_func", json!("softmax")),
        (TINY[2], "topk_method", json!("greedy")),
        (TINY[2], "moe_layer_freq", json!(2)),
        (TINY[2], "n_group", json!(3)),
        (TINY[2], "topk_group", json!(9)),
        (TINY[2], "num_key_value_heads", json!(2)),
        (TINY[2], "num_experts_per_tok", json!(5)),
        (BOTH[0], "router_jitter_noise", json!(1.5)),
        (BOTH[0], "router_aux_loss_coef", json!(-1)),
    ] {
        let all = read(fixture(name).join("model.safetensors"));
        let dir = copy(name, &all, json!({ key: value }));
        let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
        assert!(e.contains(key), "{key}: {e}");
    }
}

/// Continued token by token with a cache, or each time from the start; rows of unequal length.
#[test]
fn a_cache_changes_nothing() {
    for name in TINY {
        let inputs = read(fixture(name).join("inputs.safetensors"));
        let model = Modular::from_box(load(&fixture(name)), Seed(1)).unwrap();
        let with = |cache| {
            let how = Generation { max_tokens: 6, cache, ..Generation::default() };
            generate(&model, &inputs, &Context::eval(), &how).unwrap()
        };
        let texts = with(true);
        assert_eq!(texts, with(false), "{name}");
        assert!(texts.iter().all(|t| t.len() == 6) && texts[0] != texts[1], "{name}");
    }
}

/// Layers after the last, as DeepSeek-V3 is published with them, are no part of the network.
#[test]
fn layers_that_predict_further_ahead_are_passed_over() {
    let name = TINY[2];
    let mut all = read(fixture(name).join("model.safetensors"));
    let inputs = read(fixture(name).join("inputs.safetensors"));
    let wanted = logits(&*load(&fixture(name)), &inputs);
    let extra = Tensor::ones(&[4, 4], Kind::Float, Device::Cpu).unwrap();
    all.set("model.layers.2.eh_proj.weight", extra.clone());
    let dir = copy(name, &all, json!({}));
    assert!(logits(&*load(dir.path()), &inputs).bit_equal(&wanted).unwrap());
    all.set("model.layers.3.eh_proj.weight", extra);
    let dir = copy(name, &all, json!({}));
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("layers.3.eh_proj"), "{e}");
}

/// In training Mixtral's router and experts see x times numbers near 1.
#[test]
fn jitter_is_in_training_alone_and_comes_from_the_seed() {
    let name = BOTH[0];
    let all = read(fixture(name).join("model.safetensors"));
    let inputs = read(fixture(name).join("inputs.safetensors"));
    let dir = copy(name, &all, json!({ "router_jitter_noise": 0.1 }));
    let model = load(dir.path());
    let layers = Layers::none(model.sites().len());
    let with = |cx: Context| {
        no_grad(|| model.forward(&inputs, &layers, &cx)).unwrap().need("logits").unwrap().clone()
    };
    let still = with(Context::eval());
    assert!(still.bit_equal(&logits(&*load(&fixture(name)), &inputs)).unwrap());
    let noisy = with(Context::train(Seed(1), 3));
    assert!(noisy.bit_equal(&with(Context::train(Seed(1), 3))).unwrap());
    assert!(!noisy.bit_equal(&with(Context::train(Seed(1), 4))).unwrap());
    assert!(noisy.max_abs_diff(&still).unwrap() > 1e-4);
}

#[test]
fn routers_and_experts_are_sites() {
    for name in BOTH {
        let model = load(&fixture(name));
        let of = |kind| -> Vec<_> {
            let own = model.sites().iter().filter(move |s| s.kind == kind);
            own.map(|s| (s.path.as_str(), s.input, s.output)).collect()
        };
        let routers = [("model.layers.0.mlp.gate", 32, 4), ("model.layers.1.mlp.gate", 32, 4)];
        assert_eq!(of(SiteKind::Router), routers);
        let experts =
            [("model.layers.0.mlp.experts", 32, 32), ("model.layers.1.mlp.experts", 32, 32)];
        assert_eq!(of(SiteKind::Experts), experts);
        let norms = of(SiteKind::Norm).iter().filter(|(path, ..)| path.contains("_norm")).count();
        assert_eq!(norms, if name == BOTH[1] { 4 } else { 0 });
        // As PEFT has it: neither is an `nn.Linear`.
        let linear = Targets::pattern("all-linear").select(model.sites()).unwrap().len();
        assert_eq!(linear, 8);
        let site = model.sites().iter().find(|s| s.kind == SiteKind::Experts).unwrap();
        let theta = model.theta(site).unwrap();
        assert_eq!(theta.need("gate_up_proj").unwrap().size(), [4, 48, 32]);
        assert_eq!(theta.need("down_proj").unwrap().size(), [4, 32, 24]);
    }
}

#[test]
fn experts_that_lie_in_one_tensor_are_read_too() {
    for name in BOTH.into_iter().chain(TINY) {
        let model = load(&fixture(name));
        let params = model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().clone()));
        let dir = copy(name, &params.collect(), json!({}));
        let again = load(dir.path());
        for (path, p) in model.params().iter() {
            assert!(again.params().get(path).unwrap().bit_equal(p.tensor()).unwrap(), "{path}");
        }
        assert_eq!(again.fingerprint().unwrap(), model.fingerprint().unwrap());
    }
}

#[test]
fn a_missing_or_misshapen_expert_is_named() {
    let all = read(fixture(BOTH[0]).join("model.safetensors"));
    let gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight";
    let rest = all.iter().filter(|(n, _)| *n != gone).map(|(n, t)| (n.to_owned(), t.clone()));
    let dir = copy(BOTH[0], &rest.collect(), json!({}));
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("model.layers.1.mlp.experts.gate_up_proj"), "{e}");
    assert!(e.contains("experts.2.w1") && !e.contains("layers.0"), "{e}");
    let mut wrong = all.clone();
    wrong.set(gone, all.need(gone).unwrap().narrow(0, 0, 20).unwrap());
    let dir = copy(BOTH[0], &wrong, json!({}));
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("gate_up_proj") && e.contains("44"), "{e}");
    let dir = copy(BOTH[0], &all, json!({ "num_local_experts": 5 }));
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("[5, 48, 32]") && e.contains("[4, 48, 32]"), "{e}");
    for (key, value) in [("num_experts_per_tok", json!(5)), ("num_local_experts", json!("many"))] {
        let dir = copy(BOTH[0], &all, json!({ key: value }));
        let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
        assert!(e.contains(key), "{e}");
    }
}

/// OLMoE's two settings, against the formula: gates that sum to 1 make up for those that do not
/// where the router leaves no choice, and a wide limit limits nothing.
#[test]
fn settings_of_olmoe_count() {
    let name = BOTH[1];
    let all = read(fixture(name).join("model.safetensors"));
    let inputs = read(fixture(name).join("inputs.safetensors"));
    let with = |settings| logits(&*load(copy(name, &all, settings).path()), &inputs);
    let plain = with(json!({}));
    assert!(with(json!({ "clip_qkv": 1e3 })).bit_equal(&plain).unwrap());
    assert!(with(json!({ "clip_qkv": 0.1 })).max_abs_diff(&plain).unwrap() > 1e-4);
    assert!(with(json!({ "norm_topk_prob": true })).max_abs_diff(&plain).unwrap() > 1e-3);
    // With all experts the probabilities sum to 1 as they are.
    let (free, normed) = (
        json!({ "num_experts_per_tok": 4 }),
        json!({ "num_experts_per_tok": 4, "norm_topk_prob": true }),
    );
    assert!(with(free).all_close(&with(normed), 1e-5, 1e-5).unwrap());
}

#[test]
fn rows_may_have_modules_of_their_own_at_routers_and_experts() {
    for name in BOTH {
        let inputs = read(fixture(name).join("inputs.safetensors"));
        let mut model = Modular::from_box(load(&fixture(name)), Seed(1)).unwrap();
        let targets = Targets::pattern("all-router|all-experts");
        for module in ["a", "b"] {
            model.attach(module, Box::new(Scale), &targets).unwrap();
        }
        modl_core::testing::perturb(&model, &modl_core::Select::all(), 0.3, Seed(2)).unwrap();
        model.aggregate(Box::new(Sum::default())).unwrap();
        let mut run = |router| {
            model.route(router, false).unwrap();
            model.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().clone()
        };
        let (a, b) = (run(Given::only(0)), run(Given::only(1)));
        let mixed = run(Given::rows(&[Some(1), Some(0)]));
        for (row, alone) in [(0, b), (1, a)] {
            let (found, wanted) = (mixed.select(0, row).unwrap(), alone.select(0, row).unwrap());
            assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{name} {row}");
        }
    }
}
