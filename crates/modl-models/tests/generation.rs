//! Continuations: those of transformers, and the same with and without a cache whatever the
//! modules.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use modl_core::testing::standins::{Prompt, Scale};
use modl_core::testing::{Given, PlainSum, Sum};
use modl_core::{
    Attachment, Cache, Context, Device, Host, Init, Kind, Modular, Module, ModuleConfig, Result,
    RouterConfig, Scope, Seed, Signal, Targets, Tensor, Tensors, no_grad,
};
use modl_models::{Choice, Generation, LoadOptions, generate, open};
use serde_json::{Value, json};

const MODELS: [&str; 4] =
    ["base_gpt2", "base_llama", "deterministic_mixtral", "deterministic_olmoe"];

fn decoder(name: &str) -> Modular {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    Modular::from_box(open(dir, &LoadOptions::default()).unwrap(), Seed(1)).unwrap()
}

/// Three keys and values of its own before those of the tokens, for every query to see.
#[derive(Debug)]
struct Prefix;

#[derive(Debug)]
struct PrefixModule {
    /// `[groups · head_dim, 3]`.
    key: Tensor,
    value: Tensor,
}

impl ModuleConfig for Prefix {
    fn kind(&self) -> &'static str {
        "prefix"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let shape = [at.site.input, 3];
        Ok(Box::new(PrefixModule {
            key: scope.param("key", &shape, Init::Normal(1.0))?,
            value: scope.param("value", &shape, Init::Normal(1.0))?,
        }))
    }
}

impl Module for PrefixModule {
    fn kind(&self) -> &'static str {
        "prefix"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let longer = |name: &str, own: &Tensor| -> Result<Tensor> {
            let rest = x.with.need(name)?.clone();
            let (groups, width) = (rest.len_of(1), rest.len_of(3));
            let own = own.reshape(&[1, groups, width, 3])?.transpose(2, 3)?;
            Tensor::cat(&[own.expand(&[x.rows(), -1, -1, -1])?, rest], 2)
        };
        let mask = x.with.need("mask")?;
        let seen = mask.narrow(3, 0, 1)?.zeros_like()?.expand(&[-1, -1, -1, 3])?;
        let with = Tensors::new()
            .with("key", longer("key", &self.key)?)
            .with("value", longer("value", &self.value)?)
            .with("mask", Tensor::cat(&[seen, mask.clone()], 3)?);
        f.call(&Signal { x: x.x.clone(), with }, cx)
    }
}

/// Two modules of a kind at `sites`, far from where they start, each row with its own.
fn attached(
    name: &str,
    module: fn() -> Box<dyn ModuleConfig>,
    sites: &[&str],
    router: Box<dyn RouterConfig>,
) -> Modular {
    let mut model = decoder(name);
    for module_name in ["a", "b"] {
        let targets = Targets::names(sites.to_vec());
        model.attach(module_name, module(), &targets).unwrap();
    }
    for (path, p) in model.params().iter() {
        let draw = Init::Normal(0.3)
            .tensor(&p.tensor().size(), Seed(3).child(path), Kind::Float, Device::Cpu)
            .unwrap();
        no_grad(|| p.tensor().clone().add_in_place(&draw)).unwrap();
    }
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(router, false).unwrap();
    model
}

fn rows(rows: [[i64; 5]; 3]) -> Tensor {
    Tensor::from_slice(&rows.concat(), &[3, 5], Device::Cpu).unwrap()
}

/// Rows of 5, 3 (padded on the left) and 2 tokens (padded on the right).
fn inputs() -> Tensors {
    let ids = rows([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [14, 15, 0, 0, 0]]);
    let mask = rows([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]);
    Tensors::new().with("input_ids", ids).with("attention_mask", mask)
}

fn greedy(cache: bool) -> Generation {
    Generation { max_tokens: 12, cache, ..Generation::default() }
}

fn continued(model: &Modular, how: &Generation) -> Vec<Vec<i64>> {
    generate(model, &inputs(), &Context::eval(), how).unwrap()
}

#[test]
fn the_likeliest_continuations_are_those_of_transformers() {
    // transformers 5.24, `generate(do_sample=False)` on the first two rows.
    let wanted = [
        (MODELS[0], [[45; 12], [36; 12]]),
        (
            MODELS[1],
            [
                [4, 41, 4, 4, 24, 53, 57, 55, 85, 57, 55, 85],
                [91, 91, 4, 4, 4, 24, 46, 4, 24, 46, 32, 40],
            ],
        ),
    ];
    for (name, wanted) in wanted {
        for cache in [true, false] {
            let found = continued(&decoder(name), &greedy(cache));
            assert_eq!(found[..2], wanted, "{name}");
        }
    }
}

#[test]
fn a_row_is_continued_as_it_is_alone() {
    for name in MODELS {
        let model = decoder(name);
        let together = continued(&model, &greedy(true));
        for (row, ids) in [&[5i64, 6, 7, 8, 9][..], &[11, 12, 13], &[14, 15]].iter().enumerate() {
            let ids = Tensor::from_slice(ids, &[1, ids.len() as i64], Device::Cpu).unwrap();
            let alone = Tensors::new().with("input_ids", ids);
            let alone = generate(&model, &alone, &Context::eval(), &greedy(true)).unwrap();
            assert_eq!(alone[0], together[row], "{name} row {row}");
        }
    }
}

#[test]
fn a_stop_ends_a_row_and_no_other() {
    let model = decoder("base_llama");
    let free = continued(&model, &greedy(true));
    let stop = vec![24];
    let found = continued(&model, &Generation { stop, ..greedy(true) });
    let mut stopped = 0;
    for (found, free) in found.iter().zip(&free) {
        let end = free.iter().position(|id| *id == 24).unwrap_or(free.len());
        stopped += usize::from(end < free.len());
        assert_eq!(found[..], free[..end]);
    }
    assert!(stopped > 0);
    let none = continued(&model, &Generation { max_tokens: 0, ..greedy(true) });
    assert_eq!(none, [[0i64; 0]; 3]);
}

#[test]
fn draws_repeat_by_seed() {
    let model = decoder("base_llama");
    let draw = |seed, temperature| {
        let choice = Choice::Sample { temperature, top_k: Some(50), top_p: 0.95, seed: Seed(seed) };
        continued(&model, &Generation { choice, ..greedy(true) })
    };
    assert_eq!(draw(1, 1.0), draw(1, 1.0));
    assert_ne!(draw(1, 1.0), draw(2, 1.0));
    assert_eq!(draw(1, 1e-4), continued(&model, &greedy(true)), "cold draws are greedy");
}

/// Every way in which modules can stand between a token and what it sees. Drawn, because this GPT-2's
/// likeliest tokens do not depend on much.
#[test]
fn with_a_cache_or_without_the_continuation_is_the_same() {
    let scale: fn() -> Box<dyn ModuleConfig> = || Box::new(Scale);
    let prompt: fn() -> Box<dyn ModuleConfig> = || Box::new(Prompt);
    let prefix: fn() -> Box<dyn ModuleConfig> = || Box::new(Prefix);
    let own = || Given::rows(&[Some(1), None, Some(0)]);
    for (name, tokens, key, attention, block) in [
        (MODELS[0], "wpe", "c_attn", "attn", "h.1"),
        (MODELS[1], "rotary_emb", "k_proj", "self_attn", "layers.1"),
    ] {
        let cases = [
            ("prompt", attached(name, prompt, &[tokens], Given::only(0))),
            ("prompts by row", attached(name, prompt, &[tokens], own())),
            ("prefix", attached(name, prefix, &[attention], Given::only(0))),
            ("prefixes by row", attached(name, prefix, &[attention], own())),
            ("linear by row", attached(name, scale, &[key], own())),
            ("block", attached(name, scale, &[block], Given::only(1))),
            ("block by row", attached(name, scale, &[block], own())),
            ("all by row", attached(name, scale, &[key, "mlp", tokens], own())),
        ];
        let choice = Choice::Sample { temperature: 1.0, top_k: None, top_p: 1.0, seed: Seed(5) };
        let drawn = |cache| Generation { choice, ..greedy(cache) };
        let plain = continued(&decoder(name), &drawn(false));
        for (case, model) in cases {
            let (with, without) =
                (continued(&model, &drawn(true)), continued(&model, &drawn(false)));
            assert_eq!(with, without, "{name}: {case}");
            assert_ne!(with, plain, "{name}: {case} does nothing");
        }
    }
}

/// Logits, not only the largest of them: a pass in three parts against one pass.
#[test]
fn parts_of_a_sequence_give_the_logits_of_the_whole() {
    for name in MODELS {
        let model = decoder(name);
        let ids = Tensor::from_slice(&[5i64, 6, 7, 8, 9, 3], &[1, 6], Device::Cpu).unwrap();
        let part = |from: i64, len: i64| {
            Tensors::new().with("input_ids", ids.narrow(1, from, len).unwrap())
        };
        let whole = no_grad(|| model.forward(&part(0, 6), &Context::eval())).unwrap();
        let cx = Context::eval().with_cache(Cache::new());
        let mut logits = Vec::new();
        for (from, len) in [(0, 3), (3, 1), (4, 2)] {
            assert_eq!(cx.past(), from);
            let out = no_grad(|| model.forward(&part(from, len), &cx)).unwrap();
            logits.push(out.need("logits").unwrap().clone());
        }
        let (parts, whole) = (Tensor::cat(&logits, 1).unwrap(), whole.need("logits").unwrap());
        assert!(parts.all_close(whole, 1e-5, 1e-5).unwrap(), "{name}");
        let two = Tensor::cat(&[ids.clone(), ids.clone()], 0).unwrap();
        let e = model.forward(&Tensors::new().with("input_ids", two), &cx).unwrap_err().to_string();
        assert!(e.contains("cache: is of 1 rows, and the batch has 2"), "{e}");
    }
}

/// f of other hidden states.
#[derive(Debug)]
struct Shift;

#[derive(Debug)]
struct ShiftModule(Tensor);

impl ModuleConfig for Shift {
    fn kind(&self) -> &'static str {
        "shift"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        Ok(Box::new(ShiftModule(scope.param("by", &[at.site.input], Init::Normal(0.5))?)))
    }
}

impl Module for ShiftModule {
    fn kind(&self) -> &'static str {
        "shift"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        f.call(&x.replace(x.x.add(&self.0)?), cx)
    }
}

/// Modules at a block that see different inputs would leave different keys behind.
#[test]
fn what_a_cache_cannot_keep_is_refused() {
    use modl_core::Weights;
    let both = Box::new(Given(Weights::Fixed(vec![(0, 0.5), (1, 0.5)])));
    let scale: fn() -> Box<dyn ModuleConfig> = || Box::new(Scale);
    // Two modules share f(x) where x is the same, which is fine.
    let mut model = attached("base_llama", scale, &["layers.0"], both);
    model.aggregate(Box::new(PlainSum::default())).unwrap();
    assert_eq!(continued(&model, &greedy(true)), continued(&model, &greedy(false)));
    // Soft weights by row run each module on its own part, and share the base.
    let half = || Box::new(Given(Weights::Rows(vec![vec![(0, 0.5)]; 3])));
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(half(), false).unwrap();
    assert_eq!(continued(&model, &greedy(true)), continued(&model, &greedy(false)));
    // Where a module calls f with hidden states of its own, the base sees others.
    let shift: fn() -> Box<dyn ModuleConfig> = || Box::new(Shift);
    let mut model = attached("base_llama", shift, &["layers.0"], half());
    model.aggregate(Box::new(Sum::default())).unwrap();
    let e = generate(&model, &inputs(), &Context::eval(), &greedy(true)).unwrap_err().to_string();
    assert!(e.contains("model.layers.0.self_attn") && e.contains("without a cache"), "{e}");
    assert_eq!(continued(&model, &greedy(false)).len(), 3);
}

#[test]
fn a_row_without_tokens_is_refused() {
    let mask = rows([[1; 5], [0; 5], [1; 5]]);
    let empty = inputs().with("attention_mask", mask);
    let e = generate(&decoder("base_gpt2"), &empty, &Context::eval(), &greedy(true)).unwrap_err();
    assert!(e.to_string().contains("row 1 has no token"), "{e}");
}
