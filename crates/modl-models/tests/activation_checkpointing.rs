//! Gradients with activation checkpointing are those without it.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::standins::{Prompt, Scale, WeightMask};
use modl_core::testing::{Given, Sum, TinyBackbone, perturb};
use modl_core::{
    ActivationCheckpoints, Bank, Context, Device, Init, Kind, Modular, Outcome, Result, Router,
    RouterConfig, Routing, Scope, Seed, Select, Signal, Site, Targets, Tensor, Tensors, Weights,
};
use modl_models::{LoadOptions, open};

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A backbone with dropout and a module of each kind: at the tokens, at weights, at hidden states.
fn model(base: &str, query: &str, hidden: &str) -> (Modular, Tensors) {
    let dir = fixture(base);
    let options = LoadOptions { dropout: Some(0.2), ..LoadOptions::default() };
    let mut model = Modular::from_box(open(&dir, &options).unwrap(), Seed(1)).unwrap();
    let tokens = model.backbone().sites()[1].path.clone();
    model.attach("prompt", Box::new(Prompt), &Targets::names([tokens])).unwrap();
    model.attach("mask", Box::new(WeightMask), &Targets::names([query])).unwrap();
    model.attach("scale", Box::new(Scale), &Targets::names([hidden])).unwrap();
    model.attach("second", Box::new(Scale), &Targets::names([hidden])).unwrap();
    perturb(&model, &Select::all(), 0.1, Seed(2)).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
        .train_only(&Select::any(["modules.*", "base.*norm*", "base.*ln_*", "base.*LayerNorm*"]))
        .unwrap();
    let file = Checkpoint::open(dir.join("inputs.safetensors")).unwrap();
    (model, file.tensors(Device::Cpu).unwrap().into_iter().collect())
}

/// What becomes of the last hidden states, and all that routers and the backbone add to it.
fn loss(model: &Modular, inputs: &Tensors, cx: &Context) -> Tensor {
    let outputs = model.forward(inputs, cx).unwrap();
    let hidden = outputs.need("last_hidden_state").unwrap();
    let mut total = hidden.tanh().unwrap().square().unwrap().mean().unwrap();
    let rows = total.detach().unwrap().expand(&[hidden.len_of(0)]).unwrap();
    let losses = model.router_losses(&cx.take_trace(), &Outcome::new(&rows, cx)).unwrap();
    for own in losses.values() {
        total = total.add(&own.mul_scalar(0.3).unwrap()).unwrap();
    }
    total
}

/// α = softmax(W x̄ + noise), with a loss of its own and one by what it notes.
#[derive(Debug, Clone, Default)]
struct Noisy(Option<Tensor>, String);

impl RouterConfig for Noisy {
    fn kind(&self) -> &'static str {
        "noisy"
    }

    fn to_json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let shape = [bank.len() as i64, site.input];
        let path = scope.path().to_owned();
        Ok(Box::new(Noisy(Some(scope.param("weight", &shape, Init::Normal(1.0))?), path)))
    }
}

impl Router for Noisy {
    fn kind(&self) -> &'static str {
        "noisy"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let logits = x.x.mean_dims(&[1], false)?.linear(self.0.as_ref().unwrap(), None)?;
        let seed = cx.draw(&self.1);
        let noise = Init::Normal(1.0).tensor(&logits.size(), seed, Kind::Float, Device::Cpu)?;
        let log_p = logits.add(&noise)?.log_softmax(-1)?;
        let count = Tensor::from_slice(&[bank.len() as i64], &[1], Device::Cpu)?;
        let routing = Routing::new(Weights::Dense(log_p.exp()?), bank.len()).normalised();
        let routing = routing.with_loss("size", logits.square()?.mean()?).note("log_p", log_p);
        Ok(routing.note("count", count))
    }

    fn credit(&self, routing: &Routing, _: &Outcome) -> Result<Option<(String, Tensor)>> {
        let first = routing.noted.need("log_p")?.select(-1, 0)?;
        Ok(Some(("first".into(), first.square()?.mean()?)))
    }
}

fn same_gradients(base: &str, query: &str, hidden: &str) {
    let (model, inputs) = model(base, query, hidden);
    compared(base, &model, &inputs);
}

fn compared(base: &str, model: &Modular, inputs: &Tensors) {
    let trained = model.trainable();
    let leaves: Vec<&Tensor> = trained.iter().map(|(_, t)| t).collect();
    let cx = || Context::train(Seed(5), 3);

    // Two passes in one loss, as a batch in two parts has them.
    let whole = loss(model, inputs, &cx());
    let total = whole.add(&loss(model, inputs, &Context::train(Seed(6), 3))).unwrap();
    let wanted = total.gradients(&leaves, false).unwrap();

    let kept = ActivationCheckpoints::new();
    let with = |cx: Context| cx.with_activation_checkpoints(kept.clone());
    let own = loss(model, inputs, &with(cx()));
    assert!(own.bit_equal(&whole).unwrap(), "{base}: the pass itself is the same");
    let own = own.add(&loss(model, inputs, &with(Context::train(Seed(6), 3)))).unwrap();
    let found = kept.gradients(model, &own, &leaves).unwrap();

    let mut kinds = 0;
    for (((name, _), wanted), found) in trained.iter().zip(&wanted).zip(&found) {
        match (wanted, found) {
            (Some(a), Some(b)) => {
                let size = a.norm().unwrap().item().unwrap();
                assert!(size > 1e-9, "{base}: {name} has no influence");
                let apart = a.sub(b).unwrap().norm().unwrap().item().unwrap();
                assert!(apart < 1e-5 * size, "{base}: {name}: {apart} of {size}");
                kinds += usize::from(name.starts_with("modules."));
            }
            (None, None) => {}
            _ => panic!("{base}: {name}: {} and {}", wanted.is_some(), found.is_some()),
        }
    }
    assert!(kinds >= 3, "{base}: {kinds} modules' parameters have gradients");
}

#[test]
fn bert() {
    same_gradients("deterministic_bert", "query", "output.dense");
}

#[test]
fn gpt2() {
    same_gradients("deterministic_gpt2", "c_attn", "c_proj");
}

#[test]
fn llama() {
    same_gradients("deterministic_llama", "q_proj", "down_proj");
}

#[test]
fn vit() {
    same_gradients("deterministic_vit", "q_proj", "fc2");
}

/// What routers in segments add to the loss, and what they note and derive a loss from later, arrives
/// at the routers and at all that comes before them; noise is drawn twice alike.
#[test]
fn losses_of_routers_arrive() {
    let (mut model, inputs) = model("deterministic_llama", "q_proj", "down_proj");
    model.route(Box::new(Noisy::default()), false).unwrap();
    perturb(&model, &Select::all(), 0.1, Seed(4)).unwrap();
    model.train_only(&Select::any(["modules.*", "routers.*", "base.*norm*"])).unwrap();
    let cx = Context::train(Seed(5), 3);
    model.forward(&inputs, &cx).unwrap();
    let trace = cx.take_trace();
    assert!(trace.losses().unwrap().contains_key("size"));
    compared("llama with routers", &model, &inputs);
}

/// So does the loss of a mixture's own routers, which is of all layers together.
#[test]
fn losses_of_mixtures_arrive() {
    let (model, inputs) = model("deterministic_mixtral", "q_proj", "self_attn.o_proj");
    model.train_only(&Select::any(["modules.*", "base.*gate.weight", "base.*norm*"])).unwrap();
    let cx = Context::train(Seed(5), 3).with_activation_checkpoints(ActivationCheckpoints::new());
    model.forward(&inputs, &cx).unwrap();
    let found = cx.take_trace().losses().unwrap()["aux_loss"].item().unwrap();
    let cx = Context::train(Seed(5), 3);
    model.forward(&inputs, &cx).unwrap();
    assert_eq!(found, cx.take_trace().losses().unwrap()["aux_loss"].item().unwrap());
    compared("mixtral", &model, &inputs);
}

#[test]
fn what_cannot_be_done_is_refused() {
    let (mut model, inputs) = model("deterministic_bert", "query", "output.dense");
    let cx = || Context::eval().with_activation_checkpoints(ActivationCheckpoints::new());
    model.forward(&inputs, &cx()).unwrap();
    model.route(Given::only(0), true).unwrap();
    let error = model.forward(&inputs, &cx()).unwrap_err().to_string();
    assert!(error.contains("one router for all sites"), "{error}");

    let tiny = Modular::new(TinyBackbone::new(Seed(0), Kind::Float).unwrap(), Seed(1)).unwrap();
    let error = tiny.forward(&Tensors::new(), &cx()).unwrap_err().to_string();
    assert!(error.contains("activation_checkpointing"), "{error}");
}
