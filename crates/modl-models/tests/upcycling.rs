//! Dense models become mixtures: what copies compute, and gates from prompts against torch's.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::shards::ShardSize;
use modl_core::{Backbone, Context, Device, Init, Kind, Layers, Seed, Tensor, Tensors, no_grad};
use modl_models::{Dtype, ExpertSource, GateMode, LoadOptions, Upcycling, open, upcycle};
use serde_json::{Value, json};

const WHOLE: ShardSize = ShardSize::USUAL;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn load(dir: &Path) -> Box<dyn Backbone> {
    open(dir, &LoadOptions::default()).unwrap()
}

fn run(model: &dyn Backbone, inputs: &Tensors) -> Tensor {
    let none = Layers::none(model.sites().len());
    let outputs = no_grad(|| model.forward(inputs, &none, &Context::eval())).unwrap();
    outputs.need("logits").unwrap().clone()
}

/// A copy of `base_llama` with settings changed, each of its tensors moved by noise, and a tokenizer.
fn dense(dir: &Path, name: &str, settings: Value, noise: Option<u64>) -> PathBuf {
    let out = dir.join(name);
    std::fs::create_dir_all(&out).unwrap();
    let text = std::fs::read_to_string(fixture("base_llama/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in settings.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(out.join("config.json"), config.to_string()).unwrap();
    let all = read(fixture("base_llama/model.safetensors"));
    let moved = |(n, t): (&str, &Tensor)| {
        let noise = noise.map(|seed| {
            Init::Normal(0.3).tensor(&t.size(), Seed(seed).child(n), t.kind(), t.device()).unwrap()
        });
        (n.to_owned(), noise.map_or(t.clone(), |noise| t.add(&noise).unwrap()))
    };
    let all: Tensors = all.iter().map(moved).collect();
    checkpoint::save(out.join("model.safetensors"), all.iter(), Default::default()).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("upcycled_llama").join(file), out.join(file)).unwrap();
    }
    out
}

/// Gates sum to 1, so that copies compute what the dense model does, whatever the gates are. The
/// base has settings that Mixtral has other defaults for.
#[test]
fn copies_compute_what_the_dense_model_does() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = read(fixture("base_llama/inputs.safetensors"));
    for (n, settings) in [
        json!({}),
        json!({"rms_norm_eps": 1e-2, "rope_parameters": null, "rope_theta": 100.0}),
        json!({"rope_parameters": null, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ]
    .into_iter()
    .enumerate()
    {
        let base = dense(dir.path(), &format!("dense{n}"), settings, None);
        let wanted = run(&*load(&base), &inputs);
        let mut seen = Vec::new();
        for (experts, top_k, seed) in [(8, 2, 1), (3, 3, 1), (8, 2, 2), (8, 2, 1)] {
            let out = dir.path().join(format!("moe{n}.{}", seen.len()));
            let made = upcycle(&Upcycling::copies(&base, experts, top_k), &out, Seed(seed), WHOLE)
                .unwrap();
            assert_eq!((made.layers, made.experts), (2, experts));
            let model = load(&out);
            let count: usize = model.params().iter().map(|(_, p)| p.tensor().numel()).sum();
            assert_eq!(made.parameters, count);
            let found = run(&*model, &inputs);
            let apart = found.max_abs_diff(&wanted).unwrap();
            assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{n} {experts}: {apart}");
            let gate = model.params().get("model.layers.1.mlp.gate.weight").unwrap().clone();
            let std = gate.square().unwrap().mean().unwrap().item().unwrap().sqrt();
            assert!((std - 0.02).abs() < 0.006, "{std}");
            seen.push(gate);
            assert!(out.join("tokenizer.json").is_file());
        }
        assert!(seen[0].bit_equal(&seen[3]).unwrap() && !seen[0].bit_equal(&seen[2]).unwrap());
    }
}

/// The recipe that the golden file has, with the folders of `dir`.
fn recipe(dir: &Path, gate_mode: GateMode) -> Upcycling {
    let base_model = dense(dir, "base", json!({}), None);
    let texts = |all: &[&str]| Some(all.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>());
    let expert = |n: u64, positive: &[&str], negative: Option<&[&str]>| ExpertSource {
        source_model: dense(dir, &format!("expert{n}"), json!({}), Some(n)),
        positive_prompts: texts(positive),
        negative_prompts: negative.and_then(texts),
        ..ExpertSource::default()
    };
    let experts = vec![
        expert(0, &["w5 w6 w7", "w8 w9"], Some(&["w20 w21 w22 w23"])),
        expert(1, &["w30 w31 w32 w33 w34"], None),
        expert(2, &["w40", "w41 w42", "w43 w44 w45"], Some(&["w5 w6", "w50"])),
    ];
    let copies = Upcycling::copies(&base_model, 1, 1);
    Upcycling { experts, gate_mode, experts_per_token: 2, ..copies }
}

#[test]
fn gates_from_prompts_are_those_of_torch_and_experts_those_of_their_models() {
    let dir = tempfile::tempdir().unwrap();
    let golden = read(fixture("upcycled_llama/gates.safetensors"));
    for (mode, name) in [(GateMode::Hidden, "hidden"), (GateMode::CheapEmbed, "cheap_embed")] {
        let out = dir.path().join(name);
        let recipe = recipe(dir.path(), mode);
        let made = upcycle(&recipe, &out, Seed(1), WHOLE).unwrap();
        let all = read(out.join("model.safetensors"));
        for layer in 0..2 {
            let path = format!("model.layers.{layer}.block_sparse_moe");
            let found = all.need(&format!("{path}.gate.weight")).unwrap();
            let wanted = golden.need(name).unwrap().select(0, layer).unwrap();
            let apart = found.max_abs_diff(&wanted).unwrap();
            assert!(apart < 1e-5, "{name} {layer}: {apart}");
            assert!(made.condition[layer as usize] >= 1.0);
            for (e, expert) in recipe.experts.iter().enumerate() {
                let own = read(expert.source_model.join("model.safetensors"));
                for (matrix, part) in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")]
                {
                    let found = all.need(&format!("{path}.experts.{e}.{matrix}.weight")).unwrap();
                    let wanted = format!("model.layers.{layer}.mlp.{part}.weight");
                    assert!(found.bit_equal(own.need(&wanted).unwrap()).unwrap());
                }
            }
        }
        // All else is the base model's.
        let base = read(recipe.base_model.join("model.safetensors"));
        let rest: Vec<_> = base.iter().filter(|(n, _)| !n.contains(".mlp.")).collect();
        assert_eq!(rest.len(), 15);
        assert!(rest.iter().all(|(n, t)| all.need(n).unwrap().bit_equal(t).unwrap()));
        assert_eq!(all.len(), rest.len() + 2 * (1 + 3 * 3));
    }
}

#[test]
fn kinds_noise_and_scales_are_as_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = recipe(dir.path(), GateMode::UniformRandom);
    recipe.dtype = Some(Dtype::Bfloat16);
    recipe.experts[0].residual_scale = Some(0.5);
    recipe.experts[1].noise_scale = Some(0.25);
    let out = dir.path().join("out");
    upcycle(&recipe, &out, Seed(3), WHOLE).unwrap();
    let all = read(out.join("model.safetensors"));
    assert!(all.iter().all(|(_, t)| t.kind() == Kind::BFloat16));
    let text = std::fs::read_to_string(out.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&config["dtype"], &config["num_local_experts"]), (&json!("bfloat16"), &json!(3)));
    let own = |e: usize, part: &str| {
        let own = read(recipe.experts[e].source_model.join("model.safetensors"));
        own.need(&format!("model.layers.0.mlp.{part}.weight")).unwrap().clone()
    };
    let found = |e: usize, matrix: &str| {
        let name = format!("model.layers.0.block_sparse_moe.experts.{e}.{matrix}.weight");
        all.need(&name).unwrap().to_kind(Kind::Float).unwrap()
    };
    let half = own(0, "down_proj").mul_scalar(0.5).unwrap();
    assert!(found(0, "w2").all_close(&half, 0.0, 0.01).unwrap());
    assert!(found(0, "w1").all_close(&own(0, "gate_proj"), 0.0, 0.01).unwrap());
    // 2048 numbers: four standard errors of their deviation are 0.016.
    let noise = found(1, "w1").sub(&own(1, "gate_proj")).unwrap();
    let std = noise.square().unwrap().mean().unwrap().item().unwrap().sqrt();
    assert!((std - 0.25).abs() < 0.02, "{std}");
    let gate = all.need("model.layers.0.block_sparse_moe.gate.weight").unwrap();
    let most = gate.to_kind(Kind::Float).unwrap().abs().unwrap().largest().unwrap().item().unwrap();
    assert!(most <= 32f64.sqrt().recip() * 1.01 && most > 0.15, "{most}");
}

#[test]
fn what_cannot_be_is_refused_by_name_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let good = recipe(dir.path(), GateMode::Hidden);
    let out = dir.path().join("out");
    let refused = |change: &dyn Fn(&mut Upcycling), words: &str| {
        let mut recipe = good.clone();
        change(&mut recipe);
        let e = upcycle(&recipe, &out, Seed(1), WHOLE).unwrap_err().to_string();
        assert!(e.contains(words), "{e}\n  does not say: {words}");
        assert!(!out.exists());
    };
    let bare_expert = || ExpertSource { positive_prompts: None, ..good.experts[0].clone() };
    let shared = |r: &mut Upcycling, all: Vec<ExpertSource>, name: &str| {
        r.shared_experts = Some(all);
        r.architecture = Some(name.into());
    };
    refused(&|r| shared(r, vec![bare_expert()], "mixtral"), "mixtral has none");
    refused(&|r| shared(r, vec![good.experts[0].clone()], "deep"), "is to have no prompts");
    refused(&|r| shared(r, vec![bare_expert()], "qwen"), "to have positive prompts");
    refused(&|r| shared(r, vec![], "qwen"), "qwen has exactly one");
    refused(&|r| shared(r, vec![good.experts[0].clone(); 2], ""), "deepseek has one at most; qwen");
    let loud = ExpertSource { noise_scale: Some(f64::NAN), ..good.experts[0].clone() };
    refused(&|r| r.shared_experts = Some(vec![loud.clone()]), "shared_experts.0.noise_scale");
    refused(&|r| r.architecture = Some("llama".into()), "architecture");
    refused(&|r| r.experts_per_token = 4, "experts_per_token: 4");
    refused(&|r| r.experts[2].positive_prompts = None, "experts.2.positive_prompts");
    refused(&|r| r.experts[1].noise_scale = Some(-1.0), "experts.1.noise_scale");
    refused(&|r| r.base_model = "model+lora".into(), "with an adapter");
    let same = |r: &mut Upcycling| {
        let first = r.experts[0].clone();
        r.experts.iter_mut().for_each(|e| *e = first.clone());
    };
    refused(&same, "the same for all experts");
    let wide = dense(dir.path(), "eps", json!({"hidden_act": "gelu"}), None);
    refused(&|r| r.experts[1].source_model = wide.clone(), "hidden_act: is \"gelu\" here");
    refused(&|r| r.experts[1].source_model = fixture("base_gpt2"), "type `gpt2`");
    refused(&|r| r.base_model = fixture("variant_llama"), "attention_bias");
    let bare = dir.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(good.base_model.join(file), bare.join(file)).unwrap();
    }
    refused(&|r| r.base_model = bare.clone(), "tokenizer.json");
    for (field, value, words) in [
        ("gate_mod", json!("hidden"), "gate_mod"),
        ("gate_mode", json!("hidden_avg"), "hidden_avg"),
        ("dtype", json!("float8"), "float8"),
    ] {
        let mut file = json!({"base_model": "a", "experts": []});
        file[field] = value;
        let e = serde_json::from_value::<Upcycling>(file).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}

/// `base_llama` with the matrices of its feed-forward networks times a factor, as the script that made
/// the fixtures has it.
fn scaled(dir: &Path, n: usize) -> PathBuf {
    let out = dense(dir, &format!("expert{n}"), json!({}), None);
    let all = read(out.join("model.safetensors"));
    let factor = 1.0 + n as f64 / 2.0;
    let own = |(name, t): (&str, &Tensor)| {
        let t = if name.contains(".mlp.") { t.mul_scalar(factor).unwrap() } else { t.clone() };
        (name.to_owned(), t)
    };
    let all: Tensors = all.iter().map(own).collect();
    checkpoint::save(out.join("model.safetensors"), all.iter(), Default::default()).unwrap();
    out
}

/// What mergekit-moe 0.1.5 wrote of the same models: the names and shapes of all tensors, the gates
/// and biases, its settings, and in f64 what its checkpoint computes.
#[test]
fn mixtures_with_a_shared_expert_are_those_of_mergekit() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..3).map(|n| scaled(dir.path(), n)).collect();
    for (name, more) in
        [("deepseek", json!({})), ("qwen", json!({"positive_prompts": ["w50 w51"]}))]
    {
        let mut shared = json!({"source_model": paths[1], "residual_scale": 0.25});
        for (key, value) in more.as_object().unwrap() {
            shared[key] = value.clone();
        }
        let recipe = json!({
            "base_model": paths[0], "gate_mode": "cheap_embed", "dtype": "float32",
            "experts": [
                {
                    "source_model": paths[0], "positive_prompts": ["w5 w6 w7", "w8 w9"],
                    "negative_prompts": ["w20 w21 w22 w23"]
                },
                {
                    "source_model": paths[1], "positive_prompts": ["w30 w31 w32"],
                    "residual_scale": 0.5
                },
                {"source_model": paths[2], "positive_prompts": ["w40", "w41 w42"]}
            ],
            "shared_experts": [shared],
            // Where the shared expert has no prompts it is found without it.
            "architecture": if name == "qwen" { json!("Qwen") } else { Value::Null }
        });
        let recipe: Upcycling = serde_json::from_value(recipe).unwrap();
        let out = dir.path().join(name);
        upcycle(&recipe, &out, Seed(1), WHOLE).unwrap();
        let golden = fixture(&format!("mergekit_{name}"));
        let json = |path: PathBuf| -> Value {
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
        };
        let shapes = json(golden.join("shapes.json"));
        let found = read(out.join("model.safetensors"));
        let own: serde_json::Map<String, Value> =
            found.iter().map(|(n, t)| (n.to_owned(), json!(t.size()))).collect();
        assert_eq!(Value::Object(own), shapes, "{name}");
        let wanted = read(golden.join("golden.safetensors"));
        for (key, t) in wanted.iter().filter(|(n, _)| n.contains("layers")) {
            let apart = found.need(key).unwrap().max_abs_diff(t).unwrap();
            assert!(apart < 1e-6, "{name} {key}: {apart}");
        }
        // Of the settings that modl writes all are mergekit's, but for what only one of them says.
        let (ours, theirs) = (json(out.join("config.json")), json(golden.join("config.json")));
        for (key, value) in ours.as_object().unwrap() {
            match theirs.get(key) {
                Some(other) => assert_eq!(value, other, "{name} {key}"),
                None => assert!(key == "rope_theta", "{name} {key}"),
            }
        }
        let wide = LoadOptions { kind: Some(Kind::Double), ..LoadOptions::default() };
        let model = open(&out, &wide).unwrap();
        let ids = wanted.need("input_ids").unwrap().clone();
        let logits = run(&*model, &Tensors::new().with("input_ids", ids));
        let apart = logits.max_abs_diff(wanted.need("logits").unwrap()).unwrap();
        // Gates are sums of f32 in another order.
        assert!(apart < 1e-5, "{name}: {apart}");
    }
}
