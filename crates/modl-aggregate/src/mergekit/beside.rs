//! What stands beside the tensors of a result: `config.json`, the tokenizer, the configuration.

use std::path::{Path, PathBuf};

use modl_core::{Error, Result};
use safetensors::Dtype;

use super::chat_template::chat_template;
use super::config::{MergeConfig, OutputSlice};
use super::expand::Models;
use super::part::Part;
use super::tokenizer::Tokens;

/// The name of a dtype in `config.json`.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::F64 => "float64",
        _ => "float32",
    }
}

/// Files that are copied beside the weights.
const BESIDE: [&str; 12] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
];

type Beside = (Vec<(String, String)>, Vec<PathBuf>);

/// `config.json` and what else belongs to the result.
pub(super) fn beside(
    config: &MergeConfig,
    models: &Models,
    donor: usize,
    parts: &[Part],
    kind: Option<Dtype>,
    tokens: Option<&Tokens>,
) -> Result<Beside> {
    let mut settings = models.get(donor)?.config.clone();
    if let (Some(tokens), Some(map)) = (tokens, settings.as_object_mut()) {
        map.insert("vocab_size".to_owned(), tokens.size.into());
    }
    if let (Some(kind), Some(map)) = (kind, settings.as_object_mut()) {
        let key = if map.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        map.insert(key.to_owned(), dtype_name(kind).into());
    }
    for part in parts.iter().filter(|p| p.sliced) {
        let count = |s: &OutputSlice| {
            s.sources.first().map_or(0, |i| i.layer_range.1.saturating_sub(i.layer_range.0))
        };
        let layers: usize = part.slices.iter().map(count).sum();
        let decoder = part.stack.as_deref().is_some_and(|s| s.starts_with("decoder"));
        let keys: &[&str] = match decoder && settings.get("num_decoder_layers").is_some() {
            true => &["num_decoder_layers"],
            false => &["num_hidden_layers", "n_layer", "n_layers", "num_layers"],
        };
        let key = keys.iter().find(|k| settings.get(**k).is_some());
        if let Some(place) = key.and_then(|k| settings.get_mut(*k)) {
            *place = layers.into();
        }
    }
    let mut texts = Vec::new();
    if !settings.is_null() {
        let text = serde_json::to_string_pretty(&settings)
            .map_err(|e| Error::invalid("config.json", e.to_string()))?;
        texts.push(("config.json".to_owned(), text + "\n"));
    }
    let yaml = serde_norway::to_string(config)
        .map_err(|e| Error::invalid("merge configuration", e.to_string()))?;
    texts.push(("mergekit_config.yml".to_owned(), yaml));
    let donor = models.get(tokens.map_or(donor, |t| t.donor))?;
    let folder = if donor.path.is_dir() { donor.path.as_path() } else { Path::new("") };
    let made = tokens.and_then(|t| t.text.clone());
    // Older forms of a vocabulary would contradict the one that was made.
    const OF_VOCABULARY: [&str; 7] = [
        "tokenizer.json",
        "tokenizer.model",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
    ];
    let template = chat_template(config.chat_template.as_deref(), &models.sources)?;
    let stale = |name: &str| {
        let vocabulary = made.is_some() && OF_VOCABULARY.contains(&name);
        vocabulary || (template.is_some() && name == "chat_template.jinja")
    };
    let copies = BESIDE
        .iter()
        .filter(|name| !stale(name))
        .map(|n| folder.join(n))
        .filter(|p| p.is_file())
        .collect();
    if let Some(text) = made {
        texts.push(("tokenizer.json".to_owned(), text));
    }
    if let Some(template) = template {
        texts.push(("chat_template.jinja".to_owned(), template));
    }
    Ok((texts, copies))
}
