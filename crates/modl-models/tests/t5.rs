//! T5 against transformers' outputs, and that modules can stand at each of its sites.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::standins::{Prompt, Scale};
use modl_core::testing::{Given, Sum, perturb};
use modl_core::{
    Backbone, Bank, Base, Context, Device, Kind, Layers, Modular, ModuleConfig, Result, Router,
    RouterConfig, Routing, Scope, Seed, Select, Signal, Site, SiteKind, Targets, Tensor, Tensors,
    Weights, no_grad,
};
use modl_models::{LoadOptions, T5, greedy, open};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: &str) -> Tensors {
    let file = Checkpoint::open(fixture(path)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn inputs(name: &str) -> Tensors {
    read(&format!("{name}/inputs.safetensors"))
}

fn t5(name: &str) -> T5 {
    T5::load(fixture(name), &LoadOptions::default()).unwrap()
}

fn run_in(model: &dyn Backbone, inputs: &Tensors, cx: &Context) -> Tensors {
    no_grad(|| model.forward(inputs, &Layers::none(model.sites().len()), cx)).unwrap()
}

fn run(model: &dyn Backbone, inputs: &Tensors) -> Tensors {
    run_in(model, inputs, &Context::eval())
}

fn ids(rows: &[&[i64]]) -> Tensor {
    let shape = [rows.len() as i64, rows[0].len() as i64];
    Tensor::from_slice(&rows.concat(), &shape, Device::Cpu).unwrap()
}

#[track_caller]
fn close(found: &Tensors, wanted: &Tensors, name: &str) {
    let (f, w) = (found.need(name).unwrap(), wanted.need(name).unwrap());
    assert!(f.all_close(w, 1e-5, 1e-5).unwrap(), "{name}: {}", f.max_abs_diff(w).unwrap());
}

#[test]
fn outputs_are_those_of_transformers() {
    for name in ["base_t5", "deterministic_t5", "t5_gated"] {
        let wanted = read(&format!("{name}/outputs.safetensors"));
        let model = open(fixture(name), &LoadOptions::default()).unwrap();
        let found = run(&*model, &inputs(name));
        close(&found, &wanted, "logits");
        if name != "deterministic_t5" {
            close(&found, &wanted, "encoder_last_hidden_state");
        }
        assert_eq!(found.len(), 2, "no module has lengthened anything");
    }
}

#[test]
fn sites_have_the_names_of_transformers_in_the_order_of_a_forward_pass() {
    use SiteKind::{Attention, Block, Embedding, Linear, Norm, Sublayer, Tokens};
    let attention = |layer: String, name: &str| {
        let part =
            |end: &str, kind, input, output| (format!("{layer}.{name}{end}"), kind, input, output);
        vec![
            (format!("{layer}.layer_norm"), Norm, 16, 16),
            part(".q", Linear, 16, 18),
            part(".k", Linear, 16, 18),
            part(".v", Linear, 16, 18),
            part("", Attention, 18, 18),
            (layer.clone(), Sublayer, 18, 16),
            part(".o", Linear, 18, 16),
        ]
    };
    let mut wanted = Vec::new();
    for (stack, blocks) in [("encoder", 1), ("decoder", 2)] {
        wanted.push((format!("{stack}.embed_tokens"), Embedding, 40, 16));
        wanted.push((stack.to_owned(), Tokens, 16, 16));
        for block in (0..blocks).map(|n| format!("{stack}.block.{n}")) {
            wanted.push((block.clone(), Block, 16, 16));
            wanted.extend(attention(format!("{block}.layer.0"), "SelfAttention"));
            if stack == "decoder" {
                wanted.extend(attention(format!("{block}.layer.1"), "EncDecAttention"));
            }
            let layer = format!("{block}.layer.{}", if stack == "decoder" { 2 } else { 1 });
            wanted.push((format!("{layer}.layer_norm"), Norm, 16, 16));
            wanted.push((layer.clone(), Sublayer, 16, 16));
            for (end, input, output) in [("wi_0", 16, 24), ("wi_1", 16, 24), ("wo", 24, 16)] {
                wanted.push((format!("{layer}.DenseReluDense.{end}"), Linear, input, output));
            }
        }
        wanted.push((format!("{stack}.final_layer_norm"), Norm, 16, 16));
    }
    wanted.push(("lm_head".to_owned(), Linear, 16, 40));
    let model = t5("t5_gated");
    let sites = model.sites().iter();
    let found: Vec<_> = sites.map(|s| (s.path.clone(), s.kind, s.input, s.output)).collect();
    assert_eq!(found, wanted);
    assert!(model.sites().iter().enumerate().all(|(i, s)| s.index == i));
}

#[test]
fn one_table_of_words_is_for_all_unless_each_has_its_own() {
    for (name, tables) in [("base_t5", 1), ("t5_gated", 4)] {
        let model = t5(name);
        let words = |path: &str| {
            let site = model.sites().iter().find(|s| s.path == path).unwrap();
            model.theta(site).unwrap().need("weight").unwrap().clone()
        };
        let paths = ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"];
        let shared = model.params().get("shared.weight").unwrap();
        let same = paths.iter().filter(|p| words(p).bit_equal(shared).unwrap()).count();
        assert_eq!(same, if tables == 1 { 3 } else { 0 }, "{name}");
        let vocab = model.settings().vocab_size;
        let all = model.params().iter().filter(|(_, p)| p.tensor().len_of(0) == vocab);
        assert_eq!(all.count(), tables, "{name}");
    }
}

fn attached(name: &str, module: Box<dyn ModuleConfig>, targets: &Targets) -> Modular {
    let mut model = Modular::new(t5(name), Seed(1)).unwrap();
    model.attach("m", module, targets).unwrap();
    model.route(Given::only(0), false).unwrap();
    model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
    model
}

/// A factor of 1 for every output: the way through the modules is another one, the result is not.
#[test]
fn modules_that_change_nothing_change_nothing_at_any_site() {
    for (name, sites) in [("base_t5", 63), ("t5_gated", 55)] {
        let model = t5(name);
        let all = model.sites().iter().filter(|s| s.kind != SiteKind::Attention);
        let targets = Targets::names(all.map(|s| s.path.as_str()));
        let model = attached(name, Box::new(Scale), &targets);
        assert_eq!(model.modular_sites().len(), sites);
        let wanted = read(&format!("{name}/outputs.safetensors"));
        let found = no_grad(|| model.forward(&inputs(name), &Context::eval())).unwrap();
        close(&found, &wanted, "logits");
        close(&found, &wanted, "encoder_last_hidden_state");
    }
}

/// Each site by itself: its module is met, and rows that are not routed to it do not change.
#[test]
fn every_site_can_be_changed_for_some_rows_of_a_batch() {
    let name = "base_t5";
    let plain = run(&t5(name), &inputs(name)).need("logits").unwrap().clone();
    let model = t5(name);
    for site in model.sites().iter().filter(|s| s.kind != SiteKind::Attention) {
        let mut model = attached(name, Box::new(Scale), &Targets::names([site.path.as_str()]));
        perturb(&model, &Select::all(), 0.5, Seed(2)).unwrap();
        model.route(Given::rows(&[None, Some(0), None]), false).unwrap();
        let found = no_grad(|| model.forward(&inputs(name), &Context::eval())).unwrap();
        let found = found.need("logits").unwrap();
        for row in 0..3 {
            let (f, p) = (found.select(0, row).unwrap(), plain.select(0, row).unwrap());
            let apart = f.max_abs_diff(&p).unwrap();
            // A name may end several paths, but only rows of the module change.
            assert_eq!(apart > 1e-4, row == 1, "{}, row {row}: {apart}", site.path);
        }
    }
}

#[test]
fn padding_on_either_side_changes_nothing() {
    let model = t5("base_t5");
    let logits = |tokens: &[i64], mask: &[i64]| {
        let inputs = Tensors::new()
            .with("input_ids", ids(&[tokens]))
            .with("attention_mask", ids(&[mask]))
            .with("decoder_input_ids", ids(&[&[0, 7, 8]]));
        run(&model, &inputs).need("logits").unwrap().clone()
    };
    let short = logits(&[5, 6, 7], &[1, 1, 1]);
    // Distances are relative.
    for (tokens, mask) in [([5, 6, 7, 9, 9], [1, 1, 1, 0, 0]), ([9, 9, 5, 6, 7], [0, 0, 1, 1, 1])] {
        assert!(logits(&tokens, &mask).all_close(&short, 1e-5, 1e-5).unwrap());
    }
    assert!(!logits(&[5, 6, 7, 9], &[1, 1, 1, 1]).all_close(&short, 1e-3, 1e-3).unwrap());
}

#[test]
fn the_decoder_does_not_look_ahead_nor_at_its_padding() {
    let model = t5("base_t5");
    let logits = |tokens: &[i64], mask: &[i64]| {
        let inputs = Tensors::new()
            .with("input_ids", ids(&[&[5, 6, 7]]))
            .with("decoder_input_ids", ids(&[tokens]))
            .with("decoder_attention_mask", ids(&[mask]));
        run(&model, &inputs).need("logits").unwrap().clone()
    };
    let short = logits(&[0, 8, 9], &[1, 1, 1]);
    let long = logits(&[0, 8, 9, 20, 30], &[1, 1, 1, 1, 1]);
    assert!(long.narrow(1, 0, 3).unwrap().all_close(&short, 1e-5, 1e-5).unwrap());
    let left = logits(&[40, 0, 8, 9], &[0, 1, 1, 1]);
    assert!(left.narrow(1, 1, 3).unwrap().all_close(&short, 1e-5, 1e-5).unwrap());
    assert!(left.to_vec::<f32>().unwrap().iter().all(|v| v.is_finite()));
}

/// A prompt in front of the encoder is seen by the decoder, row by row.
#[test]
fn a_longer_encoder_sequence_reaches_cross_attention() {
    let name = "base_t5";
    let mut model = attached(name, Box::new(Prompt), &Targets::names(["encoder"]));
    perturb(&model, &Select::all(), 0.5, Seed(2)).unwrap();
    let run = |model: &Modular| no_grad(|| model.forward(&inputs(name), &Context::eval())).unwrap();
    let all = run(&model);
    assert_eq!(all.need("encoder_last_hidden_state").unwrap().size(), [3, 12, 32]);
    assert_eq!(all.need("attention_mask").unwrap().size(), [3, 12]);
    assert_eq!(all.need("logits").unwrap().size(), [3, 6, 96]);
    assert!(all.get("decoder_attention_mask").is_none());
    model.route(Given::rows(&[Some(0), None, Some(0)]), false).unwrap();
    let (mixed, plain) = (run(&model), run_in(&t5(name), &inputs(name), &Context::eval()));
    for (row, wanted) in [(0, &all), (1, &plain), (2, &all)] {
        let of = |t: &Tensors| t.need("logits").unwrap().select(0, row).unwrap();
        assert!(of(&mixed).all_close(&of(wanted), 1e-5, 1e-5).unwrap(), "row {row}");
    }
    let of = |t: &Tensors| t.need("logits").unwrap().clone();
    assert!(of(&all).max_abs_diff(&of(&plain)).unwrap() > 1e-3);
}

#[test]
fn a_longer_decoder_sequence_comes_back_with_its_mask() {
    let model = attached("t5_gated", Box::new(Prompt), &Targets::names(["decoder"]));
    let found = no_grad(|| model.forward(&inputs("t5_gated"), &Context::eval())).unwrap();
    assert_eq!(found.need("logits").unwrap().size(), [2, 27, 40]);
    let mask = found.need("decoder_attention_mask").unwrap().sum_dims(&[1], false).unwrap();
    assert_eq!(mask.to_vec::<i64>().unwrap(), [22, 27]);
    assert!(found.get("attention_mask").is_none());
}

#[test]
fn greedy_decoding_is_that_of_transformers() {
    let (given, wanted) = (inputs("t5_gated"), read("t5_gated/outputs.safetensors"));
    let inputs = Tensors::new()
        .with("input_ids", given.need("input_ids").unwrap().clone())
        .with("attention_mask", given.need("attention_mask").unwrap().clone());
    let model = t5("t5_gated");
    let found = greedy(|x| Ok(run(&model, x)), &inputs, [0, 1], 10).unwrap();
    assert_eq!(
        found.to_vec::<i64>().unwrap(),
        wanted.need("greedy").unwrap().to_vec::<i64>().unwrap()
    );
}

#[test]
fn a_row_that_has_ended_is_padded_and_all_that_have_end_the_decoding() {
    // Row 0 counts down to 1, the end; row 1 always says 1 from its third token on.
    let model = |x: &Tensors| {
        let ids = x.need("decoder_input_ids")?;
        let n = ids.len_of(1);
        assert_eq!(x.get("encoder_last_hidden_state").is_some(), n > 1, "encoded once");
        let next = [(5 - n).max(1), if n >= 3 { 1 } else { 7 }];
        let next = Tensor::from_slice(&next, &[2, 1], Device::Cpu)?.one_hot(8)?;
        let logits = next.to_kind(Kind::Float)?.expand(&[2, n, 8])?;
        let states = Tensor::zeros(&[2, 1, 4], Kind::Float, Device::Cpu)?;
        Ok(Tensors::new().with("logits", logits).with("encoder_last_hidden_state", states))
    };
    let inputs = Tensors::new().with("input_ids", ids(&[&[3], &[4]]));
    let found = greedy(model, &inputs, [0, 1], 9).unwrap();
    assert_eq!(found.size(), [2, 5]);
    assert_eq!(found.to_vec::<i64>().unwrap(), [0, 4, 3, 2, 1, 0, 7, 7, 1, 0]);
    assert_eq!(greedy(model, &inputs, [0, 1], 2).unwrap().size(), [2, 3]);
}

#[test]
fn dropout_is_for_training_and_repeats_by_seed_and_step() {
    let (model, inputs) = (t5("base_t5"), inputs("base_t5"));
    let logits = |cx: &Context| run_in(&model, &inputs, cx).need("logits").unwrap().clone();
    let first = logits(&Context::train(Seed(1), 1));
    assert!(first.bit_equal(&logits(&Context::train(Seed(1), 1))).unwrap());
    assert!(!first.all_close(&logits(&Context::train(Seed(1), 2)), 1e-3, 1e-3).unwrap());
    assert!(!first.all_close(&logits(&Context::eval()), 1e-3, 1e-3).unwrap());
    let options = LoadOptions { dropout: Some(0.0), ..LoadOptions::default() };
    let still = T5::load(fixture("base_t5"), &options).unwrap();
    let trained = run_in(&still, &inputs, &Context::train(Seed(1), 1));
    assert!(trained.need("logits").unwrap().bit_equal(&logits(&Context::eval())).unwrap());
}

#[test]
fn inputs_and_settings_that_do_not_fit_are_refused_in_words() {
    let model = t5("base_t5");
    let both =
        |a: Tensor, b: Tensor| Tensors::new().with("input_ids", a).with("decoder_input_ids", b);
    let one = || ids(&[&[1, 2, 3]]);
    let wide = Tensor::zeros(&[1, 3, 31], Kind::Float, Device::Cpu).unwrap();
    for (inputs, words) in [
        (Tensors::new().with("input_ids", one()), "unknown tensor `decoder_input_ids`"),
        (Tensors::new().with("decoder_input_ids", one()), "unknown tensor `input_ids`"),
        (both(ids(&[&[96]]), one()), "input_ids: 96 is not in 0..96"),
        (both(one(), ids(&[&[-1]])), "decoder_input_ids: -1 is not in 0..96"),
        (both(one(), ids(&[&[1], &[2]])), "decoder_input_ids: 2 rows, but the encoder has 1"),
        (both(one(), one()).with("decoder_attention_mask", ids(&[&[1]])), "decoder_input_ids"),
        (both(one(), one()).with("encoder_last_hidden_state", wide), "[batch, seq, 32]"),
    ] {
        let none = Layers::none(model.sites().len());
        let e = model.forward(&inputs, &none, &Context::eval()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}\n  does not say: {words}");
    }
    let text = std::fs::read_to_string(fixture("base_t5").join("config.json")).unwrap();
    for (from, to, words) in [
        ("\"relu\"", "\"gated-mish\"", "feed_forward_proj"),
        ("T5ForConditionalGeneration", "T5EncoderModel", "the architecture `T5EncoderModel`"),
        ("\"num_heads\": 4", "\"num_heads\": 0", "num_heads: 0 is to be positive"),
        ("\"is_decoder\": false", "\"is_decoder\": true", "is_decoder"),
        ("num_buckets\": 32", "num_buckets\": 3", "relative_attention_num_buckets"),
        ("\"num_decoder_layers\": 2", "\"num_decoder_layers\": 3", "decoder.block.2.layer"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text.replace(from, to)).unwrap();
        let weights = "model.safetensors";
        std::fs::copy(fixture("base_t5").join(weights), dir.path().join(weights)).unwrap();
        let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}\n  does not say: {words}");
    }
}

/// A router that takes no module, and fails unless it reads these ids.
#[derive(Debug, Clone)]
struct Reads(Tensor);

impl RouterConfig for Reads {
    fn kind(&self) -> &'static str {
        "reads"
    }

    fn to_json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(self.clone()))
    }
}

impl Router for Reads {
    fn kind(&self) -> &'static str {
        "reads"
    }

    fn reads_ids(&self) -> bool {
        true
    }

    fn route(&self, _: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let ids = cx.feature("input_ids")?;
        assert!(ids.bit_equal(&self.0)?, "{ids:?} {:?}", self.0);
        Ok(Routing::new(Weights::Fixed(Vec::new()), bank.len()))
    }
}

#[test]
fn routers_read_the_ids_of_their_own_side() {
    let (source, target) = (ids(&[&[3, 1, 4], &[1, 5, 9]]), ids(&[&[2, 7, 1], &[8, 2, 8]]));
    let inputs = Tensors::new().with("input_ids", source.clone());
    let inputs = inputs.with("decoder_input_ids", target.clone());
    for (side, wanted) in [("encoder", source), ("decoder", target)] {
        let mut model = Modular::new(t5("base_t5"), Seed(1)).unwrap();
        let targets = Targets::pattern(format!(r"{side}\.block\.0\.layer\.0\.SelfAttention\.q"));
        model.attach("a", Box::new(Scale), &targets).unwrap();
        model.aggregate(Box::new(Sum::default())).unwrap();
        model.route(Box::new(Reads(wanted)), false).unwrap();
        let cx = Context::eval();
        model.forward(&inputs, &cx).unwrap();
        assert_eq!(cx.take_trace().routings.len(), 1);
    }
}
