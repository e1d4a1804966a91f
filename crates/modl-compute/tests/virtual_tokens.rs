//! Prompts and prefixes: the contract of every module, and their formulas.
#![allow(clippy::unwrap_used)]

use modl_compute::input::{PromptEncoder, start_from_vocabulary, start_from_words};
use modl_compute::{PTuning, PrefixTuning, PromptTuning, peft, register};
use modl_core::checkpoint::Checkpoint;
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

fn lstm() -> PTuning {
    PTuning {
        num_virtual_tokens: 3,
        encoder_reparameterization_type: PromptEncoder::Lstm,
        encoder_hidden_size: 4,
        ..PTuning::default()
    }
}

#[test]
fn p_tuning_with_an_lstm_keeps_the_contract() {
    let direction = |input: usize| 16 * input + 16 * 4 + 16 + 16;
    let network = 2 * direction(8) + 2 * direction(8) + (8 * 8 + 8) + (8 * 8 + 8);
    check(&|| Box::new(lstm()), 3 * 8 + network);
}

/// The network and its output are of PEFT 0.21.2's `PromptEncoder`, whose LSTM is PyTorch's.
#[test]
fn the_prompt_of_an_lstm_is_pefts() {
    let golden = Checkpoint::open(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/p_tuning_lstm.safetensors"
    ));
    let golden: Tensors = golden.unwrap().tensors(Device::Cpu).unwrap().into_iter().collect();
    let config = PTuning { num_virtual_tokens: 5, encoder_hidden_size: 6, ..lstm() };
    let model = bert_of(config);
    let network = golden.iter().filter(|(name, _)| *name != "prompt");
    let named: Vec<(String, &Tensor)> =
        network.map(|(name, t)| (format!("modules.a.{name}"), t)).collect();
    let named = named.iter().map(|(name, t)| (name.as_str(), *t));
    model.params().load("golden", named, &Select::new("modules.a.*")).unwrap();
    // A PEFT folder holds what the network makes.
    let dir = tempfile::tempdir().unwrap();
    peft::save(&model, "a", dir.path()).unwrap();
    let file = Checkpoint::open(dir.path().join("adapter_model.safetensors")).unwrap();
    let found = file.tensor("prompt_embeddings", Device::Cpu).unwrap();
    assert!(found.all_close(golden.need("prompt").unwrap(), 1e-5, 1e-5).unwrap());
}

/// BERT with a module at its usual sites.
fn bert_of(config: impl ModuleConfig + 'static) -> Modular {
    let mut model = bert();
    let targets = config.usual_targets();
    model.attach("a", Box::new(config), &targets).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

#[test]
fn dropout_between_the_layers_of_an_lstm_is_for_training_alone() {
    let dropped = PTuning { encoder_dropout: 0.5, ..lstm() };
    let (plain, dropped) = (bert_of(lstm()), bert_of(dropped));
    assert!(hidden(&plain).bit_equal(&hidden(&dropped)).unwrap());
    let train = |model: &Modular, step| {
        let cx = Context::train(Seed(2), step);
        model.forward(&inputs(), &cx).unwrap().need("last_hidden_state").unwrap().clone()
    };
    assert!(train(&dropped, 1).bit_equal(&train(&dropped, 1)).unwrap());
    assert!(!train(&dropped, 1).bit_equal(&train(&dropped, 2)).unwrap());
    assert!(train(&plain, 1).bit_equal(&train(&plain, 2)).unwrap());
}

/// P-tuning v2 is deep prompts without reparametrisation: 2 · p · width numbers for each layer.
#[test]
fn p_tuning_v2_has_a_prompt_of_its_own_in_each_layer() {
    let model = bert_of(PrefixTuning { num_virtual_tokens: 7, ..PrefixTuning::default() });
    let count: usize = model.params().iter().map(|(_, p)| p.tensor().numel()).sum();
    let layers = model.backbone().sites().iter().filter(|s| s.kind == SiteKind::Attention);
    let widths: Vec<i64> = layers.map(|s| s.input).collect();
    assert_eq!(count as i64, widths.iter().map(|w| 2 * 7 * w).sum::<i64>());
    assert!(widths.len() > 1);
}

#[test]
fn a_prefix_at_some_layers_only_is_refused_as_a_peft_folder_by_the_layer() {
    let sites = bert().backbone().sites().to_vec();
    let attention: Vec<&Site> = sites.iter().filter(|s| s.kind == SiteKind::Attention).collect();
    let tokens = sites.iter().find(|s| s.kind == SiteKind::Tokens).unwrap();
    let [first, last] = [attention[0], attention[attention.len() - 1]];
    let missing = |paths: Vec<&Site>| {
        let mut model = bert();
        let targets = Targets::names(paths.iter().map(|s| s.path.clone()));
        let config = PrefixTuning { num_virtual_tokens: 2, ..PrefixTuning::default() };
        model.attach("a", Box::new(config), &targets).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let e = peft::save(&model, "a", dir.path()).unwrap_err().to_string();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is written");
        e
    };
    let e = missing(vec![tokens, first]);
    assert!(e.contains("PREFIX_TUNING") && e.contains(&format!("not at `{}`", last.path)), "{e}");
    let e = missing(attention.clone());
    assert!(e.contains(&format!("not at `{}`", tokens.path)), "without shifted positions: {e}");
}

#[test]
fn a_prompt_may_start_from_the_vocabulary() {
    let start = |seed| {
        let model = bert_of(PromptTuning { num_virtual_tokens: 9, ..PromptTuning::default() });
        start_from_vocabulary(&model, "a", 4, Seed(seed)).unwrap();
        let words = &model.backbone().sites()[0];
        let table = model.backbone().theta(words).unwrap().need("weight").unwrap().clone();
        let prompt = model.params().get("modules.a.prompt_embeddings").unwrap().detach().unwrap();
        let row = |t: &Tensor, i: i64| t.select(0, i).unwrap().to_vec::<f64>().unwrap();
        let drawn: Vec<Option<i64>> = (0..9)
            .map(|i| (0..table.len_of(0)).find(|word| row(&table, *word) == row(&prompt, i)))
            .collect();
        assert!(start_from_vocabulary(&model, "a", 0, Seed(1)).is_err());
        assert!(start_from_vocabulary(&model, "b", 4, Seed(1)).is_err());
        drawn.into_iter().collect::<Option<Vec<i64>>>().unwrap()
    };
    let first = start(1);
    assert!(first.iter().all(|word| *word < 4), "{first:?}");
    assert_eq!(first, start(1));
    assert_ne!(first, start(2));
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
    let options = LoadOptions { dropout: Some(0.0), ..LoadOptions::default() };
    Modular::new(Bert::load(dir, &options).unwrap(), Seed(1)).unwrap()
}

fn inputs() -> Tensors {
    let ids = Tensor::from_slice(&[3i64, 9, 4, 7, 7, 1], &[2, 3], Device::Cpu).unwrap();
    Tensors::new().with("input_ids", ids)
}

fn hidden(model: &Modular) -> Tensor {
    model.forward(&inputs(), &Context::eval()).unwrap().need("last_hidden_state").unwrap().clone()
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
    let configs: [Box<dyn ModuleConfig>; 3] =
        [Box::new(projected), Box::new(made), Box::new(lstm())];
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
