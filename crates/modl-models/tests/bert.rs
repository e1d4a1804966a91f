//! BERT against transformers' outputs, and the properties that its inputs and kinds promise.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::standins::{Prompt, Scale};
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Base, Context, Device, Kind, Layers, Modular, ModuleConfig, Seed, Select, SiteKind,
    Targets, Tensor, Tensors, no_grad,
};
use modl_models::{Bert, LoadOptions, mean_pool, open};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: &str) -> Tensors {
    let file = Checkpoint::open(fixture(path)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn bert(kind: Kind) -> Bert {
    let options = LoadOptions { kind: Some(kind), ..LoadOptions::default() };
    Bert::load(fixture("base_bert"), &options).unwrap()
}

fn run_in(bert: &dyn Backbone, inputs: &Tensors, cx: &Context) -> Tensors {
    no_grad(|| bert.forward(inputs, &Layers::none(bert.sites().len()), cx)).unwrap()
}

fn run(bert: &dyn Backbone, inputs: &Tensors) -> Tensors {
    run_in(bert, inputs, &Context::eval())
}

fn ids(rows: &[&[i64]]) -> Tensor {
    let shape = [rows.len() as i64, rows[0].len() as i64];
    Tensor::from_slice(&rows.concat(), &shape, Device::Cpu).unwrap()
}

#[test]
fn outputs_are_those_of_transformers() {
    let wanted = read("base_bert/outputs.safetensors");
    let found = run(
        &*open(fixture("base_bert"), &LoadOptions::default()).unwrap(),
        &read("base_bert/inputs.safetensors"),
    );
    for name in ["last_hidden_state", "pooler_output"] {
        let (w, f) = (wanted.need(name).unwrap(), found.need(name).unwrap());
        assert!(f.all_close(w, 1e-5, 1e-5).unwrap(), "{name}: {}", f.max_abs_diff(w).unwrap());
    }
    assert_eq!(found.len(), 2);
}

#[test]
fn sites_have_the_names_of_transformers_in_the_order_of_a_forward_pass() {
    use SiteKind::{Attention, Block, Embedding, Linear, Norm, Sublayer, Tokens};
    let layer = |n: usize| {
        [
            ("", Block, 32, 32),
            (".attention.self.query", Linear, 32, 32),
            (".attention.self.key", Linear, 32, 32),
            (".attention.self.value", Linear, 32, 32),
            (".attention.self", Attention, 32, 32),
            (".attention.output", Sublayer, 32, 32),
            (".attention.output.dense", Linear, 32, 32),
            (".attention.output.LayerNorm", Norm, 32, 32),
            (".intermediate.dense", Linear, 32, 64),
            (".output", Sublayer, 64, 32),
            (".output.dense", Linear, 64, 32),
            (".output.LayerNorm", Norm, 32, 32),
        ]
        .map(|(end, kind, input, output)| (format!("encoder.layer.{n}{end}"), kind, input, output))
    };
    let mut wanted = vec![
        ("embeddings.word_embeddings".to_owned(), Embedding, 96, 32),
        ("embeddings".to_owned(), Tokens, 32, 32),
        ("embeddings.LayerNorm".to_owned(), Norm, 32, 32),
    ];
    wanted.extend(layer(0).into_iter().chain(layer(1)));
    wanted.push(("pooler.dense".to_owned(), Linear, 32, 32));
    let bert = bert(Kind::Float);
    let sites = bert.sites().iter();
    let found: Vec<_> = sites.map(|s| (s.path.clone(), s.kind, s.input, s.output)).collect();
    assert_eq!(found, wanted);
    assert!(bert.sites().iter().enumerate().all(|(i, s)| s.index == i));
}

#[test]
fn theta_shares_storage_with_the_parameters() {
    let bert = bert(Kind::Float);
    let site = bert.sites().iter().find(|s| s.path == "encoder.layer.1.output.dense").unwrap();
    let theta = bert.theta(site).unwrap();
    assert_eq!(theta.names().collect::<Vec<_>>(), ["weight", "bias"]);
    let inputs = read("base_bert/inputs.safetensors");
    let before = run(&bert, &inputs);
    no_grad(|| theta.need("bias").unwrap().clone().add_in_place(theta.need("bias").unwrap()))
        .unwrap();
    let after = run(&bert, &inputs);
    let name = "last_hidden_state";
    assert!(!after.need(name).unwrap().bit_equal(before.need(name).unwrap()).unwrap());
    let mut foreign = site.clone();
    foreign.path = "encoder.layer.1.output.dens".to_owned();
    let e = bert.theta(&foreign).unwrap_err().to_string();
    assert!(e.contains("did you mean `encoder.layer.1.output.dense`"), "{e}");
}

/// The products and the fused kernel are two ways to the same attention: gradients that are wanted
/// select the former.
#[test]
fn outputs_do_not_depend_on_whether_gradients_are_wanted() {
    let bert = bert(Kind::Float);
    let inputs = read("base_bert/inputs.safetensors");
    let wanted = read("base_bert/outputs.safetensors");
    bert.params().train_only(&Select::new("embeddings.*")).unwrap();
    let found = bert.forward(&inputs, &Layers::none(bert.sites().len()), &Context::eval()).unwrap();
    let (h, w) =
        (found.need("last_hidden_state").unwrap(), wanted.need("last_hidden_state").unwrap());
    assert!(h.requires_grad());
    assert!(h.all_close(w, 1e-5, 1e-5).unwrap(), "{}", h.max_abs_diff(w).unwrap());
}

/// bf16 keeps 8 bits, so that one rounding is off by at most 2⁻⁹ of the value. The hidden states
/// pass two normalisations per layer, which bring them back to a size near 1; between two of them
/// lie about six rounded operations of terms of that size. Two layers and the embeddings: 5 · 6 ·
/// 2⁻⁹ ≈ 0.06 were all errors of one sign; the mean of independent ones is far below a third of it.
#[test]
fn bf16_is_close_to_f32() {
    let inputs = read("base_bert/inputs.safetensors");
    let wanted = read("base_bert/outputs.safetensors");
    let found = run(&bert(Kind::BFloat16), &inputs);
    for name in ["last_hidden_state", "pooler_output"] {
        let (f, w) = (found.need(name).unwrap(), wanted.need(name).unwrap());
        assert_eq!(f.kind(), Kind::BFloat16);
        let (f, w) = (f.to_vec::<f64>().unwrap(), w.to_vec::<f64>().unwrap());
        let errors: Vec<f64> =
            f.iter().zip(&w).map(|(f, w)| (f - w).abs() / w.abs().max(1.0)).collect();
        let largest = errors.iter().fold(0f64, |m, e| m.max(*e));
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        assert!(largest < 30.0 / 512.0 && mean < 10.0 / 512.0, "{name}: {largest} {mean}");
        assert!(mean > 1e-5, "computed in f32 after all");
    }
}

#[test]
fn padding_changes_nothing_and_a_wrong_mask_does() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let bert = bert(kind);
        let hidden = |ids: Tensor, mask: Tensor| {
            let inputs = Tensors::new().with("input_ids", ids).with("attention_mask", mask);
            run(&bert, &inputs).need("last_hidden_state").unwrap().clone()
        };
        let short = hidden(ids(&[&[5, 6, 7]]), ids(&[&[1, 1, 1]]));
        let long = hidden(ids(&[&[5, 6, 7, 9, 9]]), ids(&[&[1, 1, 1, 0, 0]]));
        let wrong = hidden(ids(&[&[5, 6, 7, 9, 9]]), ids(&[&[1, 1, 1, 1, 0]]));
        let head = |t: &Tensor| t.narrow(1, 0, 3).unwrap();
        let bound = if kind == Kind::Float { 1e-5 } else { 0.06 };
        assert!(head(&long).all_close(&short, bound, bound).unwrap());
        assert!(!head(&wrong).all_close(&short, bound, bound).unwrap());
        // A row of nothing but padding must not spoil the others, nor become NaN.
        let two = hidden(ids(&[&[5, 6, 7], &[5, 6, 7]]), ids(&[&[0, 0, 0], &[1, 1, 1]]));
        assert!(two.narrow(0, 1, 1).unwrap().all_close(&short, bound, bound).unwrap());
        assert!(two.to_vec::<f64>().unwrap().iter().all(|v| v.is_finite()));
    }
}

#[test]
fn segments_count_and_zeros_are_the_default() {
    let bert = bert(Kind::Float);
    let tokens = || Tensors::new().with("input_ids", ids(&[&[5, 6, 7]]));
    let hidden = |inputs: Tensors| run(&bert, &inputs).need("last_hidden_state").unwrap().clone();
    let default = hidden(tokens());
    let zeros = hidden(tokens().with("token_type_ids", ids(&[&[0, 0, 0]])));
    let ones = hidden(tokens().with("token_type_ids", ids(&[&[0, 1, 1]])));
    assert!(zeros.bit_equal(&default).unwrap());
    assert!(!ones.all_close(&default, 1e-3, 1e-3).unwrap());
}

#[test]
fn dropout_is_for_training_repeats_by_seed_and_step_and_can_be_overridden() {
    let inputs = read("base_bert/inputs.safetensors");
    let load = |dropout| {
        let options = LoadOptions { dropout, ..LoadOptions::default() };
        Bert::load(fixture("base_bert"), &options).unwrap()
    };
    let hidden = |bert: &Bert, cx: &Context| {
        run_in(bert, &inputs, cx).need("last_hidden_state").unwrap().clone()
    };
    let (config, none) = (load(None), load(Some(0.0)));
    assert_eq!(config.settings().hidden_dropout_prob, 0.1);
    let first = hidden(&config, &Context::train(Seed(1), 1));
    assert!(first.bit_equal(&hidden(&config, &Context::train(Seed(1), 1))).unwrap());
    assert!(!first.bit_equal(&hidden(&config, &Context::train(Seed(1), 2))).unwrap());
    assert!(!first.bit_equal(&hidden(&config, &Context::train(Seed(2), 1))).unwrap());
    let still = hidden(&none, &Context::train(Seed(1), 1));
    assert!(still.bit_equal(&hidden(&none, &Context::eval())).unwrap());
    assert!(!still.all_close(&first, 1e-3, 1e-3).unwrap());
    let options = LoadOptions { dropout: Some(1.0), ..LoadOptions::default() };
    assert!(Bert::load(fixture("base_bert"), &options).is_err());
}

#[test]
fn inputs_that_do_not_fit_are_refused_in_words() {
    let bert = bert(Kind::Float);
    let refusal = |inputs: Tensors| {
        let none = Layers::none(bert.sites().len());
        bert.forward(&inputs, &none, &Context::eval()).unwrap_err().to_string()
    };
    let one = || Tensors::new().with("input_ids", ids(&[&[1, 2, 3]]));
    let only = |t: Tensor| Tensors::new().with("input_ids", t);
    let floats = Tensor::zeros(&[1, 3], Kind::Float, Device::Cpu).unwrap();
    let empty = Tensor::zeros(&[1, 0], Kind::Int64, Device::Cpu).unwrap();
    for (inputs, words) in [
        (Tensors::new(), "unknown tensor `input_ids`"),
        (only(ids(&[&[1, 96]])), "input_ids: 96 is not in 0..96"),
        (only(ids(&[&[-1, 3]])), "input_ids: -1 is not in 0..96"),
        (only(ids(&[&[1; 41]])), "max_position_embeddings is 40"),
        (only(floats), "f32[1, 3]; wanted are i64"),
        (only(empty), "i64[1, 0]; wanted are i64 of shape [batch, seq]"),
        (one().with("attention_mask", ids(&[&[1, 1]])), "attention_mask: has shape [1, 2]"),
        (one().with("attention_mask", ids(&[&[1, 1, 2]])), "attention_mask: holds 2"),
        (one().with("token_type_ids", ids(&[&[0, 2, 0]])), "token_type_ids: 2 is not in 0..2"),
        (one().with("token_type_ids", ids(&[&[0, 0]])), "token_type_ids: i64[1, 2]"),
    ] {
        let e = refusal(inputs);
        assert!(e.contains(words), "{e}\n  does not say: {words}");
    }
}

#[test]
fn the_mean_is_over_the_tokens_that_count() {
    let h = Tensor::from_slice(&[1f32, 2., 3., 4., 100., 200.], &[1, 3, 2], Device::Cpu).unwrap();
    let mean = mean_pool(&h, &ids(&[&[1, 1, 0]])).unwrap();
    assert_eq!(mean.to_vec::<f32>().unwrap(), [2.0, 3.0]);
    let none = mean_pool(&h, &ids(&[&[0, 0, 0]])).unwrap();
    assert_eq!(none.to_vec::<f32>().unwrap(), [0.0, 0.0]);
    let e = mean_pool(&h, &ids(&[&[1, 1]])).unwrap_err().to_string();
    assert!(e.contains("[1, 3, 2] do not go with a mask [1, 2]"), "{e}");
}

fn attached(kind: Kind, module: Box<dyn ModuleConfig>, targets: &Targets) -> Modular {
    let mut model = Modular::new(bert(kind), Seed(1)).unwrap();
    model.attach("m", module, targets).unwrap();
    model.route(Given::only(0), false).unwrap();
    model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
    model
}

/// A factor of 1 for every output, at every site whose output is that wide: the way through the
/// modules is another one, the result is not.
#[test]
fn modules_that_change_nothing_change_nothing_at_any_site() {
    let bert = bert(Kind::Float);
    let sites = bert.sites().iter().filter(|s| s.kind != SiteKind::Attention);
    let targets = Targets::names(sites.map(|s| s.path.as_str()));
    let model = attached(Kind::Float, Box::new(Scale), &targets);
    assert_eq!(model.modular_sites().len(), 26);
    let inputs = read("base_bert/inputs.safetensors");
    let wanted = read("base_bert/outputs.safetensors");
    let found = no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
    for name in ["last_hidden_state", "pooler_output"] {
        let (w, f) = (wanted.need(name).unwrap(), found.need(name).unwrap());
        assert!(f.all_close(w, 1e-5, 1e-5).unwrap(), "{name}: {}", f.max_abs_diff(w).unwrap());
    }
}

#[test]
fn a_longer_sequence_comes_back_with_its_mask() {
    let model = attached(Kind::Float, Box::new(Prompt), &Targets::names(["embeddings"]));
    let tokens = ids(&[&[5, 6, 7], &[8, 9, 0]]);
    let mask = ids(&[&[1, 1, 1], &[1, 1, 0]]);
    let inputs = Tensors::new().with("input_ids", tokens).with("attention_mask", mask);
    let found = no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
    let hidden = found.need("last_hidden_state").unwrap();
    assert_eq!(hidden.size(), [2, 5, 32]);
    let mask = found.need("attention_mask").unwrap();
    assert_eq!(mask.to_vec::<i64>().unwrap(), [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
    assert!(mean_pool(hidden, mask).is_ok());
    let refusal =
        |inputs: Tensors| model.forward(&inputs, &Context::eval()).unwrap_err().to_string();
    let e = refusal(inputs.with("token_type_ids", ids(&[&[0, 1, 1], &[0, 0, 1]])));
    assert!(e.contains("3 token_type_ids for 5 tokens"), "{e}");
    let e = refusal(Tensors::new().with("input_ids", ids(&[&[1; 39]])));
    assert!(e.contains("41 tokens") && e.contains("max_position_embeddings is 40"), "{e}");
}

#[test]
fn an_untrained_bert_has_the_tensors_of_a_trained_one() {
    let trained = bert(Kind::Float);
    let fresh =
        || Bert::untrained(trained.config().clone(), Seed(4), Kind::Float, Device::Cpu).unwrap();
    let shapes = |b: &Bert| -> Vec<(String, Vec<i64>)> {
        b.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().size())).collect()
    };
    assert_eq!(shapes(&fresh()), shapes(&trained));
    let inputs = read("base_bert/inputs.safetensors");
    let (a, b) = (run(&fresh(), &inputs), run(&fresh(), &inputs));
    let (a, b) = (a.need("last_hidden_state").unwrap(), b.need("last_hidden_state").unwrap());
    assert!(a.bit_equal(b).unwrap());
    let mean = a.square().unwrap().sum().unwrap().item().unwrap() / a.numel() as f64;
    assert!((mean - 1.0).abs() < 1e-2, "normalised by a norm that is the identity: {mean}");
}
