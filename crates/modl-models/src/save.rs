//! Model folders, written as transformers writes them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use modl_core::checkpoint::write_whole;
use modl_core::shards::{self, ShardSize};
use modl_core::{Backbone, Error, Kind, Result, Tensor};
use serde_json::Value;

use crate::folder::{CONFIG, STEM, WEIGHTS};
use crate::moe::on_disk;

/// How the matrices of a mixture's experts are named in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExpertNames {
    /// Each by itself, as published checkpoints have them and every version of transformers reads
    /// them: `block_sparse_moe.experts.0.w1.weight`, `mlp.experts.0.gate_proj.weight`,
    /// `mlp.experts.expert_0.wi.weight`.
    #[default]
    Each,
    /// Those of all experts in one tensor, as transformers 5 has them in memory:
    /// `mlp.experts.gate_up_proj`. Switch Transformers has no such names.
    Fused,
}

/// Writes a backbone as a folder: `config.json` and `model.safetensors`, or shards of at most `max`
/// bytes with their index, with tensors in the kind in which they are. Each file appears whole or not
/// at all, and `config.json` last.
///
/// # Errors
/// Where there is a folder of that name that has a model, the names are none of the architecture's,
/// or the disk refuses.
pub fn save(
    backbone: &dyn Backbone,
    dir: impl AsRef<Path>,
    names: ExpertNames,
    max: ShardSize,
) -> Result<()> {
    let dir = dir.as_ref();
    let params = backbone.params();
    let mut tensors = BTreeMap::new();
    for (name, p) in params.iter() {
        tensors.extend(on_disk(name, p.tensor(), backbone.config(), names)?);
    }
    // Some are kept wider than the others; what most are of is the model's kind.
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for (_, p) in params.iter() {
        *counts.entry(dtype(p.tensor().kind())).or_default() += p.tensor().numel();
    }
    let kind = counts.into_iter().max_by_key(|(_, n)| *n).map_or("float32", |(kind, _)| kind);
    let mut config = backbone.config().clone();
    for key in ["dtype", "torch_dtype"] {
        if let Some(stated) = config.get_mut(key) {
            *stated = kind.into();
        }
    }
    write(dir, &config, tensors.iter().map(|(n, t)| (n.as_str(), t)), max)
}

/// What transformers calls a kind.
pub(crate) fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        Kind::Double => "float64",
        _ => "float32",
    }
}

/// Writes settings and tensors as a folder where there is no model yet.
pub(crate) fn write<'a>(
    dir: &Path,
    config: &Value,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    max: ShardSize,
) -> Result<()> {
    if let Some(there) = std::iter::once(CONFIG)
        .chain(WEIGHTS.into_iter().flat_map(|(whole, index)| [whole, index]))
        .find(|name| dir.join(name).exists())
    {
        return Err(Error::file(dir, format!("has a {there} already; name a new folder")));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    shards::save(dir, STEM, tensors, &metadata, max)?;
    let text = serde_json::to_string_pretty(config)
        .map_err(|e| Error::file(dir.join(CONFIG), format!("cannot be written: {e}")))?;
    write_whole(dir.join(CONFIG), (text + "\n").as_bytes())
}

/// Copies what a folder has beside its model: the tokenizer's files and the settings of generation.
///
/// # Errors
/// Where one cannot be read or written.
pub fn copy_tokenizer(from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
    for name in BESIDE {
        let (from, to) = (from.as_ref().join(name), to.as_ref().join(name));
        if from.is_file() {
            let bytes = std::fs::read(&from)
                .map_err(|e| Error::file(&from, format!("cannot be read: {e}")))?;
            write_whole(to, &bytes)?;
        }
    }
    Ok(())
}

const BESIDE: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];
