//! Upcycling: dense decoders become the experts of one mixture.
//!
//! The mixture has the attention, normalisations and words of the base model; expert e of a layer is
//! the feed-forward network of model e there. Where all are copies of one network, the mixture
//! computes what the dense model does, whatever its gates, because they sum to 1 — until training
//! makes them differ (Komatsuzaki et al. 2022, *Sparse Upcycling*, arXiv 2212.05055).
//!
//! Settings have the names that the files of `mergekit-moe` give them. What is written is a Mixtral,
//! or where an expert that every token has is asked for, a DeepSeek-MoE or a Qwen2-MoE.

mod gates;
mod recipe;
mod target;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use modl_core::shards::ShardSize;
use modl_core::{Backbone, Error, Kind, Result, ResultExt, Seed, Tensor};
use serde_json::{Value, json};

pub use recipe::{Dtype, ExpertSource, GateMode, Upcycling};
use target::Target;

use crate::llama::LlamaConfig;
use crate::save::{copy_tokenizer, dtype, write};
use crate::{LoadOptions, open};

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Upcycled {
    /// The number of layers, each with a router.
    pub layers: usize,
    /// The number of experts.
    pub experts: usize,
    /// The number of parameters of the mixture.
    pub parameters: usize,
    /// The largest over the smallest singular value of each layer's gates `[experts, hidden]`. Where
    /// it is large, prompts are too much alike for some experts ever to be chosen; `mergekit-moe`
    /// warns from 5 on.
    pub condition: Vec<f64>,
}

/// The dense models by their folders.
type Models = BTreeMap<PathBuf, Box<dyn Backbone>>;

/// Makes a mixture as `recipe` says and writes it to a new folder `out`, with the tokenizer of the
/// base model and files of at most `max` bytes of tensors. Gates that are drawn, and noise, come from
/// `seed`.
///
/// # Errors
/// Where a model cannot be read, is no Llama, has biases, or differs from the base in shape; where a
/// setting is out of range or not supported; where prompts need a tokenizer that is not there; or
/// the disk refuses.
pub fn upcycle(
    recipe: &Upcycling,
    out: impl AsRef<Path>,
    seed: Seed,
    max: ShardSize,
) -> Result<Upcycled> {
    let target = recipe.check()?;
    let kind = recipe.dtype.map(Dtype::kind);
    let mut models = Models::new();
    let sources = recipe.experts.iter().chain(recipe.shared()).map(|e| &e.source_model);
    for path in std::iter::once(&recipe.base_model).chain(sources) {
        if !models.contains_key(path) {
            let model = open(path, &LoadOptions { kind, ..LoadOptions::default() })?;
            models.insert(path.clone(), model);
        }
    }
    let base = model(&models, &recipe.base_model)?;
    let settings = dense(base).at(recipe.base_model.to_string_lossy())?;
    for (path, other) in &models {
        fits(&settings, &dense(other.as_ref()).at(path.to_string_lossy())?)
            .at(path.to_string_lossy())?;
    }
    target.fits(&settings).at(recipe.base_model.to_string_lossy())?;
    let gates = gates::make(base, &settings, recipe, &recipe.experts, seed.child("gate"))?;
    let shared_gates = match target.shared_gate() {
        true => gates::make(base, &settings, recipe, recipe.shared(), seed.child("shared_gate"))?,
        false => Vec::new(),
    };
    let mut tensors = BTreeMap::new();
    for (name, p) in base.params().iter() {
        let Some((layer, matrix)) = network(name) else {
            tensors.insert(name.to_owned(), p.tensor().clone());
            continue;
        };
        let routed =
            recipe.experts.iter().enumerate().map(|(e, own)| (format!("experts.{e}"), own));
        let shared = recipe.shared().iter().map(|own| (target.shared().to_owned(), own));
        for (place, expert) in routed.chain(shared) {
            let own = model(&models, &expert.source_model)?.params().get(name)?;
            let path =
                format!("{}.{place}.{}.weight", target.mixture(layer), target.matrix(matrix));
            let own = changed(own, expert, matrix == "down_proj", seed.child(&path)).at(name)?;
            tensors.insert(path, own);
        }
    }
    let prefix = if base.params().find("model.norm.weight").is_some() { "model." } else { "" };
    let kind = base.params().get(&format!("{prefix}norm.weight"))?.kind();
    let mut condition = Vec::new();
    for (n, gate) in gates.iter().enumerate() {
        let (_, values, _) = gate.svd()?;
        let values = values.to_vec::<f64>()?;
        let (most, least) =
            values.iter().fold((0.0, f64::INFINITY), |(most, least): (f64, f64), v| {
                (most.max(*v), least.min(*v))
            });
        condition.push(most / least);
        let path = target.mixture(&format!("{prefix}layers.{n}"));
        tensors.insert(format!("{path}.gate.weight"), gate.to_kind(kind)?);
        if let Some(own) = shared_gates.get(n) {
            let path = format!("{path}.{}_gate.weight", target.shared());
            tensors.insert(path, own.to_kind(kind)?);
        }
    }
    if target == Target::Qwen {
        add_biases(&mut tensors)?;
    }
    let config = config(base.config(), &settings, recipe, kind, target)?;
    let out = out.as_ref();
    write(out, &config, tensors.iter().map(|(n, t)| (n.as_str(), t)), max)?;
    copy_tokenizer(&recipe.base_model, out)?;
    Ok(Upcycled {
        layers: gates.len(),
        experts: recipe.experts.len(),
        parameters: tensors.values().map(Tensor::numel).sum(),
        condition,
    })
}

/// Gives queries, keys and values the biases that Qwen2-MoE has: zeros.
fn add_biases(tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
    let mut biases = Vec::new();
    for (name, weight) in tensors.iter() {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        if ["q_proj", "k_proj", "v_proj"].iter().any(|end| path.ends_with(end)) {
            let zeros = Tensor::zeros(&[weight.len_of(0)], weight.kind(), weight.device())?;
            biases.push((format!("{path}.bias"), zeros));
        }
    }
    tensors.extend(biases);
    Ok(())
}

fn model<'a>(models: &'a Models, path: &Path) -> Result<&'a dyn Backbone> {
    let lost = || Error::file(path, "has not been opened");
    models.get(path).map(AsRef::as_ref).ok_or_else(lost)
}

/// The settings of a dense model that a mixture can be made of.
fn dense(model: &dyn Backbone) -> Result<LlamaConfig> {
    let kind = model.config().get("model_type").and_then(Value::as_str).unwrap_or("nothing");
    if kind != "llama" {
        return Err(Error::unsupported(
            format!("a mixture of models of type `{kind}`"),
            "take dense ones of type `llama`",
        ));
    }
    let settings = LlamaConfig::read(model.config())?;
    for (name, there) in
        [("attention_bias", settings.attention_bias), ("mlp_bias", settings.mlp_bias)]
    {
        if there {
            return Err(Error::unsupported(
                format!("`{name}` in a model for a mixture"),
                "the mixtures that are written have none there",
            ));
        }
    }
    Ok(settings)
}

/// Checks that the feed-forward networks are of one shape and one activation.
fn fits(base: &LlamaConfig, other: &LlamaConfig) -> Result<()> {
    let of = |s: &LlamaConfig| {
        [
            ("hidden_size", json!(s.hidden_size)),
            ("intermediate_size", json!(s.intermediate_size)),
            ("num_hidden_layers", json!(s.num_hidden_layers)),
            ("hidden_act", json!(s.hidden_act)),
        ]
    };
    for ((name, wanted), (_, found)) in of(base).into_iter().zip(of(other)) {
        if wanted != found {
            let problem = format!("is {found} here, but {wanted} in the base model");
            return Err(Error::invalid(name, problem));
        }
    }
    Ok(())
}

/// `PATH.mlp.NAME.weight` as the path of its layer and the name of the matrix.
fn network(name: &str) -> Option<(&str, &'static str)> {
    let (layer, rest) = name.split_once(".mlp.")?;
    let own = rest.strip_suffix(".weight")?;
    let matrix = ["gate_proj", "up_proj", "down_proj"].into_iter().find(|m| *m == own)?;
    Some((layer, matrix))
}

/// A matrix of an expert with its noise and, where it is the `last`, its scale.
fn changed(t: &Tensor, expert: &ExpertSource, last: bool, seed: Seed) -> Result<Tensor> {
    let mut t = t.clone();
    if let Some(scale) = expert.noise_scale {
        let noise = modl_core::Init::Normal(scale).tensor(&t.size(), seed, t.kind(), t.device())?;
        t = t.add(&noise)?;
    }
    match expert.residual_scale {
        Some(scale) if last => t.mul_scalar(scale),
        _ => Ok(t),
    }
}

/// The settings of the mixture.
fn config(
    dense: &Value,
    settings: &LlamaConfig,
    recipe: &Upcycling,
    kind: Kind,
    target: Target,
) -> Result<Value> {
    let table = ["rope_parameters", "rope_scaling"].into_iter().find_map(|n| dense[n].as_object());
    let mut rope = table.cloned().unwrap_or_default();
    if let Some(former) = rope.remove("type") {
        rope.entry("rope_type").or_insert(former);
    }
    rope.entry("rope_type").or_insert("default".into());
    rope.insert("rope_theta".into(), json!(settings.rope.theta));
    let bare = crate::settings::class(dense, "LlamaForCausalLM") == "LlamaModel";
    let mut config = json!({
        "attention_dropout": settings.attention_dropout,
        "dtype": dtype(kind),
        "hidden_act": dense.get("hidden_act").cloned().unwrap_or("silu".into()),
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_attention_heads": settings.num_attention_heads,
        "num_experts_per_tok": recipe.experts_per_token,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_key_value_heads": settings.groups(),
        "rms_norm_eps": settings.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": settings.tie_word_embeddings,
        "vocab_size": settings.vocab_size,
    });
    for (name, value) in target.settings(settings, recipe, bare).as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    let same = [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "head_dim",
        "initializer_range",
        "max_position_embeddings",
        "use_cache",
    ];
    for name in same {
        if let Some(value) = dense.get(name) {
            config[name] = value.clone();
        }
    }
    LlamaConfig::read(&config).at("the mixture")?;
    Ok(config)
}
