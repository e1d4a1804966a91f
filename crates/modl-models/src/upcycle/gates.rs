//! The gates of a mixture of dense models.

use modl_core::{
    Backbone, Context, Device, Error, Init, Kind, Layers, Result, Seed, Tensor, Tensors, no_grad,
};
use serde_json::Value;

use super::{ExpertSource, GateMode, Upcycling};
use crate::Tokenizer;
use crate::folder::read_json;
use crate::llama::LlamaConfig;

/// The gates `[experts, hidden]` of each layer in f32; those that are drawn come from `seed`.
pub(super) fn make(
    base: &dyn Backbone,
    settings: &LlamaConfig,
    recipe: &Upcycling,
    experts: &[ExpertSource],
    seed: Seed,
) -> Result<Vec<Tensor>> {
    let shape = [experts.len() as i64, settings.hidden_size];
    let layers = 0..settings.num_hidden_layers;
    let drawn = |init: Init| {
        let one =
            |n: usize| init.tensor(&shape, seed.child(&n.to_string()), Kind::Float, Device::Cpu);
        layers.clone().map(one).collect()
    };
    match recipe.gate_mode {
        GateMode::Random => return drawn(Init::Normal(1.0)),
        GateMode::Normal(std) => return drawn(Init::Normal(std)),
        GateMode::UniformRandom => return drawn(Init::Kaiming),
        GateMode::Hidden | GateMode::CheapEmbed => {}
    }
    let prompts = Prompts::open(recipe)?;
    let vectors = |texts: &[String]| match recipe.gate_mode {
        GateMode::CheapEmbed => words(base, &prompts, texts, settings.num_hidden_layers),
        _ => hidden(base, &prompts, texts),
    };
    let mut all = Vec::new();
    for expert in experts {
        let mut own = vectors(expert.positive_prompts.as_deref().unwrap_or_default())?;
        if let Some(negative) = expert.negative_prompts.as_deref().filter(|n| !n.is_empty()) {
            own = own.sub(&vectors(negative)?)?;
        }
        all.push(unit(&own)?);
    }
    Tensor::stack(&all, 1)?.unbind(0)
}

/// Vectors of length 1.
fn unit(x: &Tensor) -> Result<Tensor> {
    let length = x.square()?.sum_dims(&[-1], true)?.sqrt()?.clamp(1e-8, f64::INFINITY)?;
    x.div(&length)
}

/// The tokenizer of the base model and what starts a text.
struct Prompts {
    tokenizer: Tokenizer,
    start: String,
}

impl Prompts {
    fn open(recipe: &Upcycling) -> Result<Self> {
        let tokenizer = Tokenizer::open(&recipe.base_model)?;
        let path = recipe.base_model.join("tokenizer_config.json");
        let config = if path.is_file() { read_json(&path)? } else { Value::Null };
        let start = config.get("bos_token").unwrap_or(&Value::Null);
        let start = start.as_str().or_else(|| start.get("content")?.as_str()).unwrap_or_default();
        Ok(Prompts { start: start.to_owned(), tokenizer })
    }

    /// The ids of a prompt after the token that starts a text, `[1, seq]`.
    fn ids(&self, text: &str) -> Result<Tensor> {
        let ids = self.tokenizer.encode_bare(&format!("{}{text}", self.start))?;
        if ids.is_empty() {
            return Err(Error::invalid("prompts", format!("{text:?} has no token")));
        }
        Tensor::from_slice(&ids, &[1, ids.len() as i64], Device::Cpu)
    }
}

/// What goes into each layer at the last token, averaged over prompts: `[layers, hidden]`.
fn hidden(base: &dyn Backbone, prompts: &Prompts, texts: &[String]) -> Result<Tensor> {
    let none = Layers::none(base.sites().len());
    let cx = Context::eval();
    let segments = base.segments().ok_or_else(|| {
        Error::unsupported("gates from hidden states of this model", "set `gate_mode: random`")
    })?;
    let mut sum: Option<Tensor> = None;
    for text in texts {
        let inputs = Tensors::new().with("input_ids", prompts.ids(text)?);
        let states = no_grad(|| -> Result<Vec<Tensor>> {
            let mut x = segments.enter(&inputs, &none, &cx)?;
            let mut states = Vec::new();
            for n in 0..segments.segments() {
                states.push(x.x.select(1, x.x.len_of(1) - 1)?.reshape(&[-1])?);
                x = segments.segment(n, &x, &none, &cx)?;
            }
            Ok(states)
        })?;
        let own = Tensor::stack(&states, 0)?.to_kind(Kind::Float)?;
        sum = Some(sum.map_or(Ok(own.clone()), |s| s.add(&own))?);
    }
    let sum = sum.ok_or_else(|| Error::invalid("prompts", "are none"))?;
    sum.mul_scalar(1.0 / texts.len() as f64)
}

/// The vectors of all words of all prompts, added up, of length 1: `[layers, hidden]`.
fn words(
    base: &dyn Backbone,
    prompts: &Prompts,
    texts: &[String],
    layers: usize,
) -> Result<Tensor> {
    let table = base.params().get(&base.canonical("embed_tokens.weight"))?;
    let ids = texts.iter().map(|t| prompts.ids(t)).collect::<Result<Vec<_>>>()?;
    let ids = Tensor::cat(&ids, 1)?;
    crate::ids::in_range("prompts", &ids, table.len_of(0))?;
    let sum = table.embedding(&ids)?.to_kind(Kind::Float)?.sum_dims(&[0, 1], false)?;
    unit(&sum)?.unsqueeze(0)?.expand(&[layers as i64, -1])
}
