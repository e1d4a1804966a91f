//! Decoders against transformers' outputs, and the properties that a causal model promises.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::standins::{Prompt, Scale};
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Base, Context, Device, Kind, Layers, Modular, Seed, Select, SiteKind, Targets,
    Tensor, Tensors, no_grad,
};
use modl_models::{LoadOptions, open};

const BASES: [&str; 4] = ["base_llama", "base_gpt2", "deterministic_llama", "deterministic_gpt2"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: &str) -> Tensors {
    let file = Checkpoint::open(fixture(path)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn load(name: &str) -> Box<dyn Backbone> {
    open(fixture(name), &LoadOptions::default()).unwrap()
}

fn run(model: &dyn Backbone, inputs: &Tensors) -> Tensors {
    let none = Layers::none(model.sites().len());
    no_grad(|| model.forward(inputs, &none, &Context::eval())).unwrap()
}

fn logits(model: &Modular, inputs: &Tensors) -> Tensor {
    model.forward(inputs, &Context::eval()).unwrap().need("logits").unwrap().clone()
}

#[test]
fn outputs_are_those_of_transformers() {
    for name in BASES {
        let found = run(load(name).as_ref(), &read(&format!("{name}/inputs.safetensors")));
        for (key, wanted) in read(&format!("{name}/outputs.safetensors")).iter() {
            let Some(output) = ["logits", "base.logits"].contains(&key).then_some("logits") else {
                continue;
            };
            let found = found.need(output).unwrap();
            let apart = found.max_abs_diff(wanted).unwrap();
            assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}: {key}: {apart}");
        }
        assert!(found.need("last_hidden_state").unwrap().dim() == 3);
    }
}

#[test]
fn nobody_looks_ahead() {
    for name in ["base_llama", "base_gpt2"] {
        let model = load(name);
        let inputs = read(&format!("{name}/inputs.safetensors"));
        let whole = run(model.as_ref(), &inputs);
        let seq = inputs.need("input_ids").unwrap().len_of(1);
        let short = inputs.map(|_, t| t.narrow(1, 0, seq - 3)).unwrap();
        let short = run(model.as_ref(), &short);
        let first = whole.need("logits").unwrap().narrow(1, 0, seq - 3).unwrap();
        // Rows that are padding from the start on see nothing but themselves either way.
        assert!(first.all_close(short.need("logits").unwrap(), 1e-5, 1e-5).unwrap(), "{name}");
    }
}

#[test]
fn bf16_is_close_to_f32() {
    for name in ["base_llama", "base_gpt2"] {
        let options = LoadOptions { kind: Some(Kind::BFloat16), ..LoadOptions::default() };
        let inputs = read(&format!("{name}/inputs.safetensors"));
        let half = run(open(fixture(name), &options).unwrap().as_ref(), &inputs);
        let half = half.need("logits").unwrap();
        assert_eq!(half.kind(), Kind::BFloat16);
        let whole = run(load(name).as_ref(), &inputs);
        let whole = whole.need("logits").unwrap();
        let norm = |t: &Tensor| t.to_kind(Kind::Double).unwrap().square().unwrap().sum().unwrap();
        let apart = half.to_kind(Kind::Float).unwrap().sub(whole).unwrap();
        let ratio = norm(&apart).item().unwrap() / norm(whole).item().unwrap();
        assert!(ratio.sqrt() < 0.05, "{name}: {ratio}");
    }
}

#[test]
fn modules_that_change_nothing_change_nothing_at_any_site() {
    for name in ["base_llama", "base_gpt2"] {
        let inputs = read(&format!("{name}/inputs.safetensors"));
        let base = run(load(name).as_ref(), &inputs);
        let rows = inputs.need("input_ids").unwrap().len_of(0) as usize;
        // Half of the rows alone: blocks and tokens have to read masks and positions from the signal.
        let table: Vec<Option<usize>> = (0..rows).map(|r| (r % 2 == 0).then_some(0)).collect();
        for site in load(name).sites().iter().filter(|s| !s.path.contains(".1.")) {
            if site.kind == SiteKind::Attention {
                continue; // A scale has the width of all heads, what stands there that of one.
            }
            let mut model = Modular::from_box(load(name), Seed(1)).unwrap();
            let exactly = Targets::pattern(site.path.replace('.', r"\."));
            model.attach("one", Box::new(Scale), &exactly).unwrap();
            model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
            model.route(Given::rows(&table), false).unwrap();
            let found = logits(&model, &inputs);
            let at = format!("{name}, {}", site.path);
            assert!(found.all_close(base.need("logits").unwrap(), 1e-5, 1e-5).unwrap(), "{at}");
            modl_core::testing::perturb(&model, &Select::all(), 0.1, Seed(2)).unwrap();
            let moved = logits(&model, &inputs);
            for r in 0..rows as i64 {
                let row = |t: &Tensor| t.select(0, r).unwrap();
                let apart = row(&moved).max_abs_diff(&row(&found)).unwrap();
                assert_eq!(apart > 1e-4, r % 2 == 0, "{at}: row {r} moved by {apart}");
            }
        }
    }
}

#[test]
fn a_prompt_lengthens_the_sequence_for_all_layers() {
    for name in ["base_llama", "base_gpt2"] {
        let inputs = read(&format!("{name}/inputs.safetensors"));
        let mut model = Modular::from_box(load(name), Seed(1)).unwrap();
        model.attach("p", Box::new(Prompt), &Targets::pattern("all-tokens")).unwrap();
        model.aggregate(Box::new(Sum::default())).unwrap();
        model.route(Given::only(0), false).unwrap();
        let found = model.forward(&inputs, &Context::eval()).unwrap();
        let seq = inputs.need("input_ids").unwrap().len_of(1);
        assert_eq!(found.need("logits").unwrap().len_of(1), seq + 2, "{name}");
        assert_eq!(found.need("attention_mask").unwrap().len_of(1), seq + 2, "{name}");
    }
}
