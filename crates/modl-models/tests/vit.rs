//! ViT against transformers' outputs, its names in all versions of transformers, tokens that modules
//! put in, and what is refused.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use modl_core::checkpoint::{Checkpoint, save};
use modl_core::testing::standins::{Prompt, Scale};
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Base, Context, Device, Kind, Layers, Modular, ModuleConfig, Seed, Site, SiteKind,
    Targets, Tensor, Tensors, no_grad,
};
use modl_models::{LoadOptions, Vit, open};
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: &str) -> Tensors {
    let file = Checkpoint::open(fixture(path)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

#[track_caller]
fn same(name: &str, outputs: &[&str], found: &Tensors) {
    let wanted = read(&format!("{name}/outputs.safetensors"));
    for output in outputs {
        let (f, w) = (found.need(output).unwrap(), wanted.need(output).unwrap());
        let apart = f.to_kind(Kind::Float).unwrap().max_abs_diff(w).unwrap();
        let close = f.to_kind(Kind::Float).unwrap().all_close(w, 1e-5, 1e-5).unwrap();
        assert!(close, "{name}: {output}: {apart}");
    }
}

#[test]
fn outputs_are_those_of_transformers_with_and_without_modules_on_the_way() {
    for (name, outputs) in [
        ("base_vit", &["last_hidden_state", "pooler_output"][..]),
        ("deterministic_vit", &["logits"]),
    ] {
        let inputs = read(&format!("{name}/inputs.safetensors"));
        for kind in [Kind::Float, Kind::Double] {
            let options = LoadOptions { kind: Some(kind), ..LoadOptions::default() };
            let model = open(fixture(name), &options).unwrap();
            let none = Layers::none(model.sites().len());
            let found = no_grad(|| model.forward(&inputs, &none, &Context::eval())).unwrap();
            same(name, outputs, &found);
        }
        let model = open(fixture(name), &LoadOptions::default()).unwrap();
        // The stand-in is a factor of the last dimension.
        let fits = |s: &&Site| !matches!(s.kind, SiteKind::Attention | SiteKind::Conv);
        let sites = model.sites().iter().filter(fits);
        let targets = Targets::names(sites.map(|s| s.path.clone()).collect::<Vec<_>>());
        let mut model = Modular::from_box(model, Seed(1)).unwrap();
        model.attach("m", Box::new(Scale), &targets).unwrap();
        model.route(Given::only(0), false).unwrap();
        model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
        let found = no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
        same(name, outputs, &found);
    }
}

/// Parameters' names of transformers 5 and of versions before.
fn names() -> BTreeMap<String, String> {
    serde_json::from_str(&fs::read_to_string(fixture("base_vit/names.json")).unwrap()).unwrap()
}

fn vit(dir: impl AsRef<Path>) -> Result<Vit, modl_core::Error> {
    Vit::load(dir, &LoadOptions::default())
}

#[test]
fn former_names_are_those_of_today_in_paths_and_in_files() {
    let (bare, headed) = (vit(fixture("base_vit")).unwrap(), vit(fixture("deterministic_vit")));
    let headed = headed.unwrap();
    let all = names();
    assert_eq!(bare.params().iter().map(|(n, _)| n).collect::<Vec<_>>(), {
        all.keys().collect::<Vec<_>>()
    });
    for (today, before) in &all {
        for path in [today, before] {
            for prefix in ["", "vit."] {
                let path = format!("{prefix}{path}");
                assert_eq!(&bare.canonical(&path), today);
                assert_eq!(headed.canonical(&path), format!("vit.{today}"));
            }
        }
    }
    for (today, before) in [
        ("layers.11", "encoder.layer.11"),
        ("layers.1.attention", "encoder.layer.1.attention.attention"),
        ("layers.1.attention.output", "encoder.layer.1.attention.output"),
        ("layers.1.attention.o_proj", "encoder.layer.1.attention.output.dense"),
        ("layers.1.mlp.fc2", "encoder.layer.1.output.dense"),
        ("pooler.dense", "pooler.dense"),
    ] {
        assert_eq!((bare.canonical(before), bare.former(today)), (today.into(), before.into()));
        assert_eq!(headed.former(&format!("vit.{today}")), format!("vit.{before}"));
    }
    assert_eq!(headed.canonical("classifier.lora_A.weight"), "classifier.lora_A.weight");
    let file = Checkpoint::open(fixture("base_vit/model.safetensors")).unwrap();
    let tensors: HashMap<String, Tensor> = file.tensors(Device::Cpu).unwrap().into_iter().collect();
    for prefix in ["", "vit."] {
        let renamed: Vec<(String, &Tensor)> =
            all.iter().map(|(new, old)| (format!("{prefix}{new}"), &tensors[old])).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        save(path, renamed.iter().map(|(n, t)| (n.as_str(), *t)), HashMap::new()).unwrap();
        fs::copy(fixture("base_vit/config.json"), dir.path().join("config.json")).unwrap();
        let again = vit(dir.path()).unwrap();
        assert_eq!(again.fingerprint().unwrap(), bare.fingerprint().unwrap());
    }
}

#[test]
fn sites_are_what_stands_in_the_documentation() {
    let model = vit(fixture("deterministic_vit")).unwrap();
    let find = |path: &str| {
        let site = model.sites().iter().find(|s| s.path == path);
        site.map(|s| (s.kind, s.input, s.output))
    };
    let patches = "vit.embeddings.patch_embeddings.projection";
    assert_eq!(find(patches), Some((SiteKind::Conv, 3, 32)));
    assert_eq!(find("vit.embeddings"), Some((SiteKind::Tokens, 32, 32)));
    assert_eq!(find("vit.layers.1"), Some((SiteKind::Block, 32, 32)));
    assert_eq!(find("vit.layers.1.attention"), Some((SiteKind::Attention, 32, 32)));
    assert_eq!(find("vit.layers.1.attention.output"), Some((SiteKind::Sublayer, 32, 32)));
    assert_eq!(find("vit.layers.0.mlp"), Some((SiteKind::Sublayer, 32, 32)));
    assert_eq!(find("vit.layers.0.mlp.fc1"), Some((SiteKind::Linear, 32, 48)));
    assert_eq!(find("vit.layernorm"), Some((SiteKind::Norm, 32, 32)));
    assert_eq!(find("vit.pooler.dense"), None);
    assert_eq!(find("classifier"), Some((SiteKind::Linear, 32, 3)));
    let site = model.sites().iter().find(|s| s.path == patches).unwrap();
    assert_eq!(model.theta(site).unwrap().need("weight").unwrap().size(), [32, 3, 4, 4]);
}

fn with(config: impl ModuleConfig + Clone + 'static, site: &str, names: &[&str]) -> Modular {
    let model = vit(fixture("base_vit")).unwrap();
    let mut model = Modular::new(model, Seed(3)).unwrap();
    for name in names {
        model.attach(name, Box::new(config.clone()), &Targets::names([site])).unwrap();
    }
    model.aggregate(Box::new(Sum::default())).unwrap();
    model
}

#[test]
fn the_class_token_is_found_behind_prompts_which_have_no_order() {
    let inputs = read("base_vit/inputs.safetensors");
    let mut model = with(Prompt, "embeddings", &["a"]);
    let run = |model: &Modular| no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
    model.route(Given::only(0), false).unwrap();
    let all = run(&model);
    assert_eq!(all.need("last_hidden_state").unwrap().size(), [3, 19, 32]);
    assert_eq!(all.need("attention_mask").unwrap().size(), [3, 19]);
    let pooled = |outputs: &Tensors| outputs.need("pooler_output").unwrap().clone();
    let base = pooled(&read("base_vit/outputs.safetensors"));
    assert!(pooled(&all).max_abs_diff(&base).unwrap() > 1e-3);

    // Rows without a prompt are padded at their ends.
    model.route(Given::rows(&[None, Some(0), None]), false).unwrap();
    let mixed = pooled(&run(&model));
    for (row, wanted) in [(0, &base), (1, &pooled(&all)), (2, &base)] {
        let (found, wanted) = (mixed.select(0, row).unwrap(), wanted.select(0, row).unwrap());
        assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap(), "row {row}");
    }

    // Attention is of a set, and prompts have no positions.
    let mut prompt = model.params().get("modules.a.embeddings.prompt").unwrap().clone();
    let other = [prompt.narrow(0, 1, 1).unwrap(), prompt.narrow(0, 0, 1).unwrap()];
    let other = Tensor::cat(&other, 0).unwrap();
    no_grad(|| prompt.copy_from(&other)).unwrap();
    model.route(Given::only(0), false).unwrap();
    assert!(pooled(&run(&model)).all_close(&pooled(&all), 1e-5, 1e-5).unwrap());
}

#[test]
fn rows_go_to_modules_at_every_kind_of_site() {
    let inputs = read("base_vit/inputs.safetensors");
    let base = read("base_vit/outputs.safetensors");
    let base = base.need("last_hidden_state").unwrap();
    for site in [
        "layers.0",
        "layers.0.attention.output",
        "layers.1.mlp",
        "layers.0.mlp.fc2",
        "layers.1.layernorm_after",
    ] {
        let mut model = with(Scale, site, &["a"]);
        let params = model.params().iter();
        for (_, p) in params {
            let mut t = p.tensor().clone();
            no_grad(|| t.copy_from(&t.add_scalar(0.3)?)).unwrap();
        }
        model.route(Given::rows(&[None, Some(0), None]), false).unwrap();
        let mixed = no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
        let mixed = mixed.need("last_hidden_state").unwrap();
        for row in 0..3 {
            let (m, b) = (mixed.select(0, row).unwrap(), base.select(0, row).unwrap());
            assert_eq!(m.all_close(&b, 1e-5, 1e-5).unwrap(), row != 1, "{site}: row {row}");
        }
    }
}

#[test]
fn dropout_is_applied_in_training_alone() {
    let inputs = read("base_vit/inputs.safetensors");
    let options = LoadOptions { dropout: Some(0.5), ..LoadOptions::default() };
    let model = Vit::load(fixture("base_vit"), &options).unwrap();
    let none = Layers::none(model.sites().len());
    let run = |cx: &Context| no_grad(|| model.forward(&inputs, &none, cx)).unwrap();
    same("base_vit", &["last_hidden_state"], &run(&Context::eval()));
    let train = run(&Context::train(Seed(5), 1));
    let base = read("base_vit/outputs.safetensors");
    let apart = |t: &Tensors| {
        let found = t.need("last_hidden_state").unwrap();
        found.max_abs_diff(base.need("last_hidden_state").unwrap()).unwrap()
    };
    assert!(apart(&train) > 0.1);
}

#[test]
fn text_and_images_of_another_size_are_refused() {
    let model = vit(fixture("base_vit")).unwrap();
    let refused = |name: &'static str, shape: &[i64], kind: Kind| {
        let inputs = Tensors::new().with(name, Tensor::zeros(shape, kind, Device::Cpu).unwrap());
        let none = Layers::none(model.sites().len());
        model.forward(&inputs, &none, &Context::eval()).unwrap_err().to_string()
    };
    let e = refused("input_ids", &[2, 7], Kind::Int64);
    assert!(e.contains("pixel_values: are not among the inputs (input_ids)"), "{e}");
    assert!(e.contains("images, floats of shape [batch, 3, 16, 16]"), "{e}");
    for (shape, kind) in [
        (&[1, 3, 16, 20][..], Kind::Float),
        (&[1, 1, 16, 16], Kind::Float),
        (&[3, 16, 16], Kind::Float),
        (&[0, 3, 16, 16], Kind::Float),
        (&[1, 3, 16, 16], Kind::Int64),
    ] {
        let e = refused("pixel_values", shape, kind);
        assert!(e.contains("wanted are floats of shape [batch, 3, 16, 16]"), "{e}");
    }
}

#[test]
fn settings_that_do_not_fit_are_refused_by_name() {
    let text = fs::read_to_string(fixture("base_vit/config.json")).unwrap();
    for (changes, words) in [
        (json!({"architectures": ["ViTForMaskedImageModeling"]}), "ViTForMaskedImageModeling"),
        (json!({"num_attention_heads": 5}), "num_attention_heads: 5 has to divide hidden_size"),
        (json!({"image_size": [16, 16]}), "image_size: invalid type"),
        (json!({"image_size": 1i64 << 40}), "image_size"),
        (json!({"patch_size": 17}), "patch_size: 17 is larger than image_size"),
        (json!({"patch_size": 0}), "patch_size: 0 is to be positive"),
        (json!({"hidden_act": "mish"}), "hidden_act: unknown variant `mish`"),
        (json!({"qkv_bias": false}), "unexpected layers.0.attention.k_proj.bias"),
        (json!({"image_size": 20}), "embeddings.position_embeddings"),
        (json!({"architectures": ["ViTForImageClassification"]}), "missing    classifier.bias"),
        (json!({"num_hidden_layers": 1_000_000_000}), "num_hidden_layers"),
    ] {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let weights = "model.safetensors";
        fs::copy(fixture("base_vit").join(weights), dir.path().join(weights)).unwrap();
        let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}\n  does not say: {words}");
    }
}
