//! Prompts and prefixes: the contract of every module, and their formulas.
#![allow(clippy::unwrap_used)]

use modl_compute::input::start_from_words;
use modl_compute::{PTuning, PrefixTuning, PromptTuning, peft, register};
use modl_core::testing::{Given, Identity, ModuleClaims, Sum, TinyBackbone, check_module, perturb};
use modl_core::{
    Attachment, Backbone, Context, Device, Host, Init, Kind, Modular, ModuleConfig, ParamStore,
    Registry, Result, Scope, Seed, Select, Signal, Site, SiteKind, Targets, Tensor, Tensors,
};
use modl_models::{Bert, LoadOptions};

fn check(make: &dyn Fn() -> Box<dyn ModuleConfig>, parameters: usize) {
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims {
        identity: Identity::No,
        parameters,
        merges: false,
        smooth: true,
        task_vector: 0,
    };
    check_module(make, &make().usual_targets(), &claims, &registry);
}

#[test]
fn prompt_tuning_keeps_the_contract() {
    let before = PromptTuning { num_virtual_tokens: 3, ..PromptTuning::default() };
    check(&|| Box::new(before.clone()), 3 * 8);
    let after = PromptTuning { after_embeddings: true, ..before.clone() };
    check(&|| Box::new(after.clone()), 3 * 8);
}

#[test]
fn p_tuning_keeps_the_contract() {
    let make = || {
        Box::new(PTuning { num_virtual_tokens: 3, encoder_hidden_size: 4, ..PTuning::default() })
            as Box<dyn ModuleConfig>
    };
    check(&make, 3 * 8 + (4 * 8 + 4) + (4 * 4 + 4) + (8 * 4 + 8));
}

#[test]
fn prefix_tuning_keeps_the_contract() {
    let plain = PrefixTuning { num_virtual_tokens: 3, ..PrefixTuning::default() };
    check(&|| Box::new(plain.clone()), 3 * 2 * 8);
    let projected =
        PrefixTuning { prefix_projection: true, encoder_hidden_size: 4, ..plain.clone() };
    check(&|| Box::new(projected.clone()), 3 * 8 + (4 * 8 + 4) + (16 * 4 + 16));
}

fn numbers(shape: &[i64], name: &str) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(5).child(name), Kind::Double, Device::Cpu).unwrap()
}

/// softmax(q kᵀ ⁄ √d + mask) v, and the sums of the exponentials, `[…, queries, 1]`.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> (Tensor, Tensor) {
    let scores = q.matmul(&k.t().unwrap()).unwrap();
    let scores = scores.mul_scalar((q.len_of(-1) as f64).sqrt().recip()).unwrap();
    let scores = mask.map_or(Ok(scores.clone()), |m| scores.add(m)).unwrap();
    let mass = scores.exp().unwrap().sum_dims(&[-1], true).unwrap();
    (scores.softmax(-1).unwrap().matmul(v).unwrap(), mass)
}

#[test]
fn a_prefix_is_a_gated_second_attention() {
    // He et al. 2022, §3.1: (1 − λ)·attn(q, K, V) + λ·attn(q, P_K, P_V).
    let (heads, d, p) = (2, 3, 4);
    let width = heads * d;
    let site =
        Site { path: "a".into(), kind: SiteKind::Attention, input: width, output: width, index: 0 };
    let none = Tensors::new();
    let mut store = ParamStore::new();
    let mut scope = Scope::new(&mut store, Seed(1)).on(Kind::Double, Device::Cpu);
    let config = PrefixTuning { num_virtual_tokens: p, ..PrefixTuning::default() };
    let module = config.build(&Attachment::alone(&site, &none), &mut scope).unwrap();
    let (q, k, v) = (
        numbers(&[2, heads, 5, d], "q"),
        numbers(&[2, heads, 6, d], "k"),
        numbers(&[2, heads, 6, d], "v"),
    );
    // The last key of the first row is padding.
    let mut mask = vec![0.0f64; 12];
    mask[5] = f64::from(f32::MIN);
    let mask = Tensor::from_slice(&mask, &[2, 1, 1, 6], Device::Cpu).unwrap();
    let f = |_: &Tensors, s: &Signal, _: &Context| -> Result<Signal> {
        let (k, v) = (s.with.need("key")?, s.with.need("value")?);
        Ok(attention(&s.x, k, v, s.with.get("mask")).0.into())
    };
    let host = Host::new(&site, &none, &f);
    let with = Tensors::new().with("key", k.clone()).with("value", v.clone());
    let signal = Signal { x: q.clone(), with: with.with("mask", mask.clone()) };
    let found = module.forward(&host, &signal, &Context::eval()).unwrap().x;

    let all = store.get("prompt_embeddings").unwrap().detach().unwrap();
    let part = |at: i64| {
        let own = all.narrow(1, at, width).unwrap().reshape(&[p, heads, d]).unwrap();
        own.transpose(0, 1).unwrap().unsqueeze(0).unwrap()
    };
    let (own, mass) = attention(&q, &k, &v, Some(&mask));
    let (prefix, weight) = attention(&q, &part(0), &part(width), None);
    let lambda = weight.div(&mass.add(&weight).unwrap()).unwrap();
    let wanted = own.add(&prefix.sub(&own).unwrap().mul(&lambda).unwrap()).unwrap();
    assert!(found.all_close(&wanted, 1e-10, 1e-10).unwrap());
}

fn bert() -> Modular {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/base_bert");
    Modular::new(Bert::load(dir, &LoadOptions::default()).unwrap(), Seed(1)).unwrap()
}

fn hidden(model: &Modular) -> Tensor {
    let ids = Tensor::from_slice(&[3i64, 9, 4, 7, 7, 1], &[2, 3], Device::Cpu).unwrap();
    let inputs = Tensors::new().with("input_ids", ids);
    model.forward(&inputs, &Context::eval()).unwrap().need("last_hidden_state").unwrap().clone()
}

#[test]
fn what_is_multiplied_out_for_peft_computes_the_same() {
    let projected = PrefixTuning {
        num_virtual_tokens: 3,
        prefix_projection: true,
        encoder_hidden_size: 4,
        ..PrefixTuning::default()
    };
    let made = PTuning { num_virtual_tokens: 2, encoder_hidden_size: 5, ..PTuning::default() };
    let configs: [Box<dyn ModuleConfig>; 2] = [Box::new(projected), Box::new(made)];
    for config in configs {
        let mut model = bert();
        let targets = config.usual_targets();
        let kind = config.kind();
        model.attach("a", config, &targets).unwrap();
        model.aggregate(Box::new(Sum::default())).unwrap();
        model.route(Given::only(0), false).unwrap();
        perturb(&model, &Select::all(), 0.3, Seed(8)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        peft::save(&model, "a", dir.path()).unwrap();
        let mut again = bert();
        peft::load(&mut again, dir.path(), Some("a")).unwrap();
        again.aggregate(Box::new(Sum::default())).unwrap();
        again.route(Given::only(0), false).unwrap();
        assert_eq!(again.params().iter().count(), 1, "{kind}: one tensor");
        assert!(hidden(&again).all_close(&hidden(&model), 1e-5, 1e-5).unwrap(), "{kind}");
    }
}

#[test]
fn a_prompt_of_words_is_the_words_before_the_text() {
    let mut model = bert();
    let config = PromptTuning { num_virtual_tokens: 3, ..PromptTuning::default() };
    let targets = config.usual_targets();
    model.attach("a", Box::new(config), &targets).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    start_from_words(&model, "a", &[5, 8]).unwrap();
    let longer = [5i64, 8, 5, 3, 9, 4, 5, 8, 5, 7, 7, 1];
    let ids = Tensor::from_slice(&longer, &[2, 6], Device::Cpu).unwrap();
    let inputs = Tensors::new().with("input_ids", ids);
    let words = model.forward_base(&inputs, &Context::eval()).unwrap();
    let words = words.need("last_hidden_state").unwrap();
    assert!(hidden(&model).all_close(words, 1e-5, 1e-5).unwrap());
    assert!(start_from_words(&model, "a", &[]).is_err());
    assert!(start_from_words(&model, "a", &[96]).is_err());
    let tiny = TinyBackbone::new(Seed(1), Kind::Float).unwrap();
    assert!(tiny.sites().iter().any(|s| s.kind == SiteKind::Tokens));
    assert!(Targets::pattern("all-tokens|all-attention").select(tiny.sites()).unwrap().len() == 2);
}
