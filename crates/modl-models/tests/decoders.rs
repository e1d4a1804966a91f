//! GPT-2 and Llama against transformers' outputs, and what their inputs and sites promise.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::standins::{Prompt, Scale, WeightMask};
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Base, Context, Device, Kind, Layers, Modular, ModuleConfig, Seed, Select, SiteKind,
    Targets, Tensor, Tensors, no_grad,
};
use modl_models::{LoadOptions, open};
use serde_json::{Value, json};

/// The variants have what the others have not: biases, one group of heads, heads of another width,
/// `llama3` positions and a tied output layer; and an untied one, scores by layer and another width
/// within.
const ALL: [&str; 8] = [
    "base_gpt2",
    "base_llama",
    "deterministic_gpt2",
    "deterministic_llama",
    "deterministic_mixtral",
    "deterministic_olmoe",
    "variant_gpt2",
    "variant_llama",
];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: &str) -> Tensors {
    let file = Checkpoint::open(fixture(path)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn decoder(name: &str) -> Box<dyn Backbone> {
    open(fixture(name), &LoadOptions::default()).unwrap()
}

fn run(model: &dyn Backbone, inputs: &Tensors) -> Tensors {
    no_grad(|| model.forward(inputs, &Layers::none(model.sites().len()), &Context::eval())).unwrap()
}

#[track_caller]
fn close(found: &Tensor, wanted: &Tensor, what: &str) {
    let apart = found.max_abs_diff(wanted).unwrap();
    assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{what}: {apart}");
}

#[test]
fn outputs_are_those_of_transformers() {
    for name in ALL {
        let wanted = read(&format!("{name}/outputs.safetensors"));
        let found = run(&*decoder(name), &read(&format!("{name}/inputs.safetensors")));
        close(found.need("logits").unwrap(), wanted.need("logits").unwrap(), name);
        if let Some(last) = wanted.get("hidden_2") {
            close(found.need("last_hidden_state").unwrap(), last, name);
        }
        // Mixtures also say what their routers did.
        assert_eq!(found.names().filter(|n| !n.contains("router") && *n != "aux_loss").count(), 2);
    }
}

fn ids(rows: &[&[i64]]) -> Tensor {
    let shape = [rows.len() as i64, rows[0].len() as i64];
    Tensor::from_slice(&rows.concat(), &shape, Device::Cpu).unwrap()
}

fn tokens(rows: &[&[i64]]) -> Tensors {
    Tensors::new().with("input_ids", ids(rows))
}

/// A copy of a fixture with some settings changed and tensors renamed; those that become `None` are
/// left out.
fn changed(
    name: &str,
    settings: Value,
    rename: impl Fn(&str) -> Option<String>,
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (name, value) in settings.as_object().unwrap() {
        config[name] = value.clone();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let all = read(&format!("{name}/model.safetensors"));
    let all: Vec<_> = all.iter().filter_map(|(n, t)| Some((rename(n)?, t))).collect();
    let path = dir.path().join("model.safetensors");
    let all = all.iter().map(|(n, t)| (n.as_str(), *t));
    modl_core::checkpoint::save(path, all, Default::default()).unwrap();
    dir
}

#[test]
fn sites_have_the_names_of_transformers_in_the_order_of_a_forward_pass() {
    use SiteKind::{Attention, Block, Embedding, Linear, Norm, Sublayer, Tokens};
    let found = |name: &str| -> Vec<_> {
        let model = decoder(name);
        assert!(model.sites().iter().enumerate().all(|(i, s)| s.index == i));
        model.sites().iter().map(|s| (s.path.clone(), s.kind, s.input, s.output)).collect()
    };
    let layers = |of: &str, sites: &[(&str, SiteKind, i64, i64)]| -> Vec<_> {
        let site = |n: usize, (end, kind, i, o): &(&str, SiteKind, i64, i64)| {
            (format!("{of}.{n}{end}"), *kind, *i, *o)
        };
        (0..2).flat_map(|n| sites.iter().map(move |s| site(n, s))).collect()
    };
    let gpt2 = [
        ("", Block, 32, 32),
        (".ln_1", Norm, 32, 32),
        (".attn.c_attn", Linear, 32, 96),
        (".attn", Attention, 32, 32),
        (".attn.output", Sublayer, 32, 32),
        (".attn.c_proj", Linear, 32, 32),
        (".ln_2", Norm, 32, 32),
        (".mlp", Sublayer, 32, 32),
        (".mlp.c_fc", Linear, 32, 128),
        (".mlp.c_proj", Linear, 128, 32),
    ];
    let mut wanted = vec![
        ("transformer.wte".to_owned(), Embedding, 96, 32),
        ("transformer.wpe".to_owned(), Tokens, 32, 32),
    ];
    wanted.extend(layers("transformer.h", &gpt2));
    wanted.push(("transformer.ln_f".to_owned(), Norm, 32, 32));
    wanted.push(("lm_head".to_owned(), Linear, 32, 96));
    assert_eq!(found("base_gpt2"), wanted);
    let llama = [
        ("", Block, 32, 32),
        (".input_layernorm", Norm, 32, 32),
        (".self_attn.q_proj", Linear, 32, 32),
        (".self_attn.k_proj", Linear, 32, 16),
        (".self_attn.v_proj", Linear, 32, 16),
        (".self_attn", Attention, 16, 32),
        (".self_attn.output", Sublayer, 32, 32),
        (".self_attn.o_proj", Linear, 32, 32),
        (".post_attention_layernorm", Norm, 32, 32),
        (".mlp", Sublayer, 32, 32),
        (".mlp.gate_proj", Linear, 32, 64),
        (".mlp.up_proj", Linear, 32, 64),
        (".mlp.down_proj", Linear, 64, 32),
    ];
    let mut wanted = vec![
        ("model.embed_tokens".to_owned(), Embedding, 96, 32),
        ("model.rotary_emb".to_owned(), Tokens, 32, 32),
    ];
    wanted.extend(layers("model.layers", &llama));
    wanted.push(("model.norm".to_owned(), Norm, 32, 32));
    wanted.push(("lm_head".to_owned(), Linear, 32, 96));
    assert_eq!(found("base_llama"), wanted);
}

#[test]
fn theta_of_a_linear_site_is_a_view_that_is_as_wide_as_the_site() {
    for name in ["base_gpt2", "base_llama"] {
        let model = decoder(name);
        for site in model.sites().iter().filter(|s| s.kind == SiteKind::Linear) {
            let theta = model.theta(site).unwrap();
            assert_eq!(theta.need("weight").unwrap().size(), [site.output, site.input]);
        }
        let params: Vec<_> = model.params().iter().map(|(n, _)| n.to_owned()).collect();
        let stored = read(&format!("{name}/model.safetensors"));
        assert_eq!(params, stored.names().collect::<Vec<_>>(), "as in the file");
    }
    let model = decoder("base_gpt2");
    let site = model.sites().iter().find(|s| s.path.ends_with("h.1.mlp.c_fc")).unwrap();
    let mut weight = model.theta(site).unwrap().need("weight").unwrap().clone();
    no_grad(|| weight.zero_in_place()).unwrap();
    let stored = model.params().get("transformer.h.1.mlp.c_fc.weight").unwrap();
    assert_eq!(stored.norm().unwrap().item().unwrap(), 0.0);
}

#[test]
fn weights_that_are_stored_the_other_way_round_can_be_trained() {
    let model = decoder("base_gpt2");
    let name = "transformer.h.0.attn.c_attn.weight";
    model.params().train_only(&Select::new(name)).unwrap();
    let none = Layers::none(model.sites().len());
    let logits = |model: &dyn Backbone| {
        let out = model.forward(&tokens(&[&[5, 6, 7]]), &none, &Context::eval()).unwrap();
        out.need("logits").unwrap().sum().unwrap()
    };
    let mut w = model.params().get(name).unwrap().clone();
    let gradient = logits(&*model).gradients(&[&w], false).unwrap().pop().flatten().unwrap();
    assert_eq!(gradient.size(), [32, 96]);
    // Against the slope along the gradient itself.
    let square = gradient.norm().unwrap().item().unwrap().powi(2);
    let before = logits(&*model).item().unwrap();
    let step = 1e-2 / square;
    no_grad(|| w.add_in_place(&gradient.mul_scalar(step).unwrap())).unwrap();
    let slope = (logits(&*model).item().unwrap() - before) / step / square;
    assert!((slope - 1.0).abs() < 0.02, "{slope}");
}

#[test]
fn the_network_with_and_without_its_head_answers_to_both_names() {
    for (name, class, prefix, site) in [
        ("base_gpt2", "GPT2Model", "transformer.", "h.0.attn.c_attn"),
        ("base_llama", "LlamaModel", "model.", "layers.0.self_attn.q_proj"),
    ] {
        let inputs = read(&format!("{name}/inputs.safetensors"));
        let whole = decoder(name);
        let wanted = run(&*whole, &inputs);
        // A file of the network alone, read with and without a head.
        let strip = |n: &str| Some(n.strip_prefix(prefix).unwrap_or(n).to_owned());
        let bare = changed(name, json!({"architectures": [class]}), strip);
        let bare = open(bare.path(), &LoadOptions::default()).unwrap();
        let found = run(&*bare, &inputs);
        assert_eq!(found.names().collect::<Vec<_>>(), ["last_hidden_state"]);
        let last = found.need("last_hidden_state").unwrap();
        assert!(last.bit_equal(wanted.need("last_hidden_state").unwrap()).unwrap());
        let headed = changed(name, json!({}), strip);
        let headed = open(headed.path(), &LoadOptions::default()).unwrap();
        assert_eq!(headed.sites(), whole.sites());
        let long = format!("{prefix}{site}");
        for path in [site, long.as_str()] {
            assert_eq!(whole.canonical(path), long);
            assert_eq!(bare.canonical(path), site);
        }
        assert_eq!(whole.canonical("lm_head.lora_A.weight"), "lm_head.lora_A.weight");
        let e = open(
            changed(name, json!({"architectures": ["OtherModel"]}), strip).path(),
            &LoadOptions::default(),
        );
        assert!(e.unwrap_err().to_string().contains("OtherModel"));
    }
}

#[test]
fn padding_changes_nothing_on_either_side() {
    for name in ["base_gpt2", "base_llama"] {
        let model = decoder(name);
        let logits = |inputs: Tensors| run(&*model, &inputs).need("logits").unwrap().clone();
        let short = logits(tokens(&[&[5, 6, 7]]));
        let right = tokens(&[&[5, 6, 7, 9, 9]]).with("attention_mask", ids(&[&[1, 1, 1, 0, 0]]));
        close(&logits(right).narrow(1, 0, 3).unwrap(), &short, name);
        let left = tokens(&[&[9, 9, 5, 6, 7]]).with("attention_mask", ids(&[&[0, 0, 1, 1, 1]]));
        let placed = left.clone().with("position_ids", ids(&[&[0, 0, 0, 1, 2]]));
        close(&logits(placed).narrow(1, 2, 3).unwrap(), &short, name);
        let ahead = logits(tokens(&[&[5, 6, 7, 8]])).narrow(1, 0, 3).unwrap();
        close(&ahead, &short, name);
    }
    // Absolute positions matter to GPT-2; distances are all that matters to Llama.
    for (name, same) in [("base_gpt2", false), ("base_llama", true)] {
        let model = decoder(name);
        let at = |p: &[i64]| {
            let inputs = tokens(&[&[5, 6, 7]]).with("position_ids", ids(&[p]));
            run(&*model, &inputs).need("logits").unwrap().clone()
        };
        let (a, b, wide) = (at(&[0, 1, 2]), at(&[9, 10, 11]), at(&[0, 1, 9]));
        assert_eq!(a.all_close(&b, 2e-5, 1e-5).unwrap(), same, "{name}");
        assert!(!a.all_close(&wide, 1e-3, 1e-3).unwrap(), "{name}");
    }
}

#[test]
fn inputs_and_settings_that_do_not_fit_are_refused_in_words() {
    for (name, inputs, words) in [
        ("base_gpt2", Tensors::new(), "unknown tensor `input_ids`"),
        ("base_gpt2", tokens(&[&[1, 96]]), "input_ids: 96 is not in 0..96"),
        ("base_gpt2", tokens(&[&[1; 41]]), "reaches position 41, but n_positions is 40"),
        (
            "base_llama",
            tokens(&[&[1, 2]]).with("position_ids", ids(&[&[0, -1]])),
            "position_ids: -1 is not in",
        ),
        (
            "base_llama",
            tokens(&[&[1, 2]]).with("position_ids", ids(&[&[0]])),
            "position_ids: i64[1, 1] for input_ids",
        ),
    ] {
        let model = decoder(name);
        let none = Layers::none(model.sites().len());
        let e = model.forward(&inputs, &none, &Context::eval()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}\n  does not say: {words}");
    }
    for (name, settings, words) in [
        ("base_llama", json!({"rope_parameters": {"rope_type": "longrope"}}), "type \"longrope\""),
        ("base_llama", json!({"rope_parameters": {"rope_type": "linear"}}), "factor: "),
        ("base_llama", json!({"num_key_value_heads": 3}), "num_key_value_heads: 3 has to divide"),
        ("base_llama", json!({"head_dim": 7}), "head_dim: 7 is to be even"),
        ("base_llama", json!({"attention_bias": true}), "8 missing"),
        ("base_llama", json!({"mlp_bias": true}), "6 missing"),
        ("base_gpt2", json!({"n_head": 5}), "n_head: 5 has to divide"),
        ("base_gpt2", json!({"reorder_and_upcast_attn": true}), "reorder_and_upcast_attn"),
        ("base_gpt2", json!({"tie_word_embeddings": false}), "missing    lm_head.weight"),
    ] {
        let dir = changed(name, settings, |n| Some(n.to_owned()));
        let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}\n  does not say: {words}");
    }
}

fn attached(name: &str, module: Box<dyn ModuleConfig>, targets: &Targets) -> Modular {
    let mut model = Modular::from_box(decoder(name), Seed(1)).unwrap();
    model.attach("m", module, targets).unwrap();
    model.route(Given::only(0), false).unwrap();
    model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
    model
}

/// A factor of 1 for every output, at every site whose output is that wide: the way through the
/// modules is another one, the result is not.
#[test]
fn modules_that_change_nothing_change_nothing_at_any_site() {
    for name in ["base_gpt2", "base_llama"] {
        let sites = decoder(name).sites().to_vec();
        let sites = sites.iter().filter(|s| s.kind != SiteKind::Attention);
        let targets = Targets::names(sites.map(|s| s.path.as_str()));
        let model = attached(name, Box::new(Scale), &targets);
        let inputs = read(&format!("{name}/inputs.safetensors"));
        let wanted = read(&format!("{name}/outputs.safetensors"));
        let found = no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
        close(found.need("logits").unwrap(), wanted.need("logits").unwrap(), name);
    }
}

#[test]
fn a_longer_sequence_comes_back_with_its_mask_and_shifted_positions() {
    for (name, site) in [("base_gpt2", "wpe"), ("base_llama", "rotary_emb")] {
        let model = attached(name, Box::new(Prompt), &Targets::names([site]));
        let inputs = tokens(&[&[5, 6, 7], &[8, 9, 0]])
            .with("attention_mask", ids(&[&[1, 1, 1], &[1, 1, 0]]));
        let found = no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
        assert_eq!(found.need("logits").unwrap().size(), [2, 5, 96]);
        let mask = found.need("attention_mask").unwrap();
        assert_eq!(mask.to_vec::<i64>().unwrap(), [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
    }
    let model = attached("base_gpt2", Box::new(Prompt), &Targets::names(["wpe"]));
    let e = model.forward(&tokens(&[&[1; 39]]), &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("position 41"), "{e}");
}

#[test]
fn merging_writes_through_views_and_never_into_a_table_that_another_site_reads() {
    let inputs = tokens(&[&[5, 6, 7]]);
    let cx = Context::eval();
    let logits = |t: Tensors| t.need("logits").unwrap().clone();
    let snapshot = |m: &Modular| -> Vec<Vec<u8>> {
        m.backbone().params().iter().map(|(_, p)| p.tensor().to_bytes().unwrap()).collect()
    };
    let with_scores = |targets: &[&str]| {
        let model = attached("base_gpt2", Box::new(WeightMask), &Targets::names(targets.to_vec()));
        for (n, (_, p)) in model.params().iter().enumerate() {
            let shape = p.tensor().size();
            let init = modl_core::Init::Normal(1.0);
            let value = init.tensor(&shape, Seed(n as u64), Kind::Float, Device::Cpu).unwrap();
            no_grad(|| p.tensor().clone().copy_from(&value)).unwrap();
        }
        model
    };
    let mut model = with_scores(&["c_attn", "c_fc"]);
    let (before, wanted) = (snapshot(&model), logits(model.forward(&inputs, &cx).unwrap()));
    model.merge("m").unwrap();
    let merged = logits(model.forward_base(&inputs, &cx).unwrap());
    close(&merged, &wanted, "merged");
    assert_ne!(snapshot(&model), before);
    model.unmerge().unwrap();
    assert_eq!(snapshot(&model), before);

    let mut tied = with_scores(&["c_fc", "lm_head"]);
    let e = tied.merge("m").unwrap_err().to_string();
    assert!(e.contains("merging at `lm_head`, whose weight `transformer.wte` shares"), "{e}");
    assert_eq!(snapshot(&tied), before, "nothing has been changed");
    let all = Targets::pattern("all-linear");
    let all = all.select(tied.backbone().sites()).unwrap();
    assert!(all.iter().all(|s| s.path != "lm_head") && all.len() == 8);
}
