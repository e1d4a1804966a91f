//! Prompts and prefixes while a decoder generates: the same with and without a cache of what has
//! been seen.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use modl_compute::{PTuning, PrefixTuning, PromptTuning};
use modl_core::testing::{Given, Sum};
use modl_core::{
    Cache, Context, Device, Modular, ModuleConfig, Seed, Select, Tensor, Tensors, no_grad,
};
use modl_models::{Choice, Generation, LoadOptions, generate, open};

fn with_module(base: &str, config: Box<dyn ModuleConfig>) -> Modular {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(base);
    let mut model =
        Modular::from_box(open(dir, &LoadOptions::default()).unwrap(), Seed(1)).unwrap();
    let targets = config.usual_targets();
    model.attach("a", config, &targets).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    modl_core::testing::perturb(&model, &Select::all(), 0.3, Seed(4)).unwrap();
    model
}

fn modules() -> Vec<Box<dyn ModuleConfig>> {
    let p = PrefixTuning { num_virtual_tokens: 3, ..PrefixTuning::default() };
    let projected = PrefixTuning { prefix_projection: true, encoder_hidden_size: 4, ..p.clone() };
    vec![
        Box::new(PromptTuning { num_virtual_tokens: 3, ..PromptTuning::default() }),
        Box::new(PTuning { num_virtual_tokens: 3, encoder_hidden_size: 4, ..PTuning::default() }),
        Box::new(p),
        Box::new(projected),
    ]
}

fn ids(ids: &[i64], rows: i64) -> Tensor {
    Tensor::from_slice(ids, &[rows, ids.len() as i64 / rows], Device::Cpu).unwrap()
}

fn logits(model: &Modular, ids: Tensor, cx: &Context) -> Tensor {
    let inputs = Tensors::new().with("input_ids", ids);
    no_grad(|| model.forward(&inputs, cx)).unwrap().need("logits").unwrap().clone()
}

/// One greedy continuation, step by step: what is compared are all logits, not only the largest.
#[test]
fn a_cache_changes_neither_tokens_nor_logits() {
    for base in ["base_gpt2", "base_llama"] {
        for config in modules() {
            let kind = config.kind();
            let model = with_module(base, config);
            let mut text = vec![5i64, 6, 7, 8, 9, 11];
            let cx = Context::eval().with_cache(Cache::new());
            let mut new = ids(&text, 2);
            let mut rows: [Vec<i64>; 2] = [text[..3].to_vec(), text[3..].to_vec()];
            for step in 0..8 {
                let whole = logits(&model, ids(&text, 2), &Context::eval());
                let part = logits(&model, new, &cx);
                let last = |t: &Tensor| t.select(1, t.len_of(1) - 1).unwrap();
                let (whole, part) = (last(&whole), last(&part));
                let apart = whole.max_abs_diff(&part).unwrap();
                let same = part.all_close(&whole, 1e-5, 1e-5).unwrap();
                assert!(same, "{base} {kind} step {step}: {apart}");
                let next = |t: &Tensor| t.argmax(-1).unwrap().to_vec::<i64>().unwrap();
                assert_eq!(next(&whole), next(&part), "{base} {kind} step {step}");
                for (row, id) in rows.iter_mut().zip(next(&part)) {
                    row.push(id);
                }
                new = ids(&next(&part), 2);
                text = rows.concat();
            }
        }
    }
}

/// Padded rows, drawn, because the likeliest tokens of a small model depend on little.
#[test]
fn generation_of_padded_rows_is_the_same_with_a_cache() {
    let mask = ids(&[1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0], 3);
    let inputs = Tensors::new()
        .with("input_ids", ids(&[5, 6, 7, 8, 0, 9, 11, 12, 13, 14, 0, 0], 3))
        .with("attention_mask", mask);
    let how = |cache| {
        let choice = Choice::Sample { temperature: 1.0, top_k: None, top_p: 1.0, seed: Seed(5) };
        Generation { max_tokens: 8, cache, choice, ..Generation::default() }
    };
    for base in ["base_gpt2", "base_llama"] {
        for config in modules() {
            let kind = config.kind();
            let model = with_module(base, config);
            let go = |cache| generate(&model, &inputs, &Context::eval(), &how(cache)).unwrap();
            assert_eq!(go(true), go(false), "{base} {kind}");
        }
    }
}
