//! The names and shapes of BERT's parameters, and the names under which checkpoints have them.

use super::{BertConfig, POSITIONS, TYPES, WORDS};
use crate::folder::Shapes;

/// What transformers puts on top of BERT, beside the names that start with `bert.`.
const HEADS: [&str; 3] = ["cls.", "classifier.", "qa_outputs."];

/// The name of a stored tensor in a bare encoder, or `None` where it is not part of it.
pub(super) fn canonical(stored: &str) -> Option<String> {
    let name = stored.strip_prefix("bert.").unwrap_or(stored);
    if name == "embeddings.position_ids" || HEADS.iter().any(|head| stored.starts_with(head)) {
        return None;
    }
    Some(match name.rsplit_once(".LayerNorm.") {
        Some((path, "gamma")) => format!("{path}.LayerNorm.weight"),
        Some((path, "beta")) => format!("{path}.LayerNorm.bias"),
        _ => name.to_owned(),
    })
}

/// All parameters with their shapes.
pub(super) fn shapes(settings: &BertConfig, pooled: bool) -> Shapes {
    let (width, inner) = (settings.hidden_size, settings.intermediate_size);
    let mut all = Shapes::new();
    let mut table = |path: &str, rows| all.insert(format!("{path}.weight"), vec![rows, width]);
    table(WORDS, settings.vocab_size);
    table(POSITIONS, settings.max_position_embeddings);
    table(TYPES, settings.type_vocab_size);
    let mut pair = |path: &str, weight: Vec<i64>| {
        all.insert(format!("{path}.bias"), weight.iter().take(1).copied().collect());
        all.insert(format!("{path}.weight"), weight);
    };
    pair("embeddings.LayerNorm", vec![width]);
    for i in 0..settings.num_hidden_layers {
        let layer = format!("encoder.layer.{i}");
        for name in ["query", "key", "value"] {
            pair(&format!("{layer}.attention.self.{name}"), vec![width, width]);
        }
        pair(&format!("{layer}.attention.output.dense"), vec![width, width]);
        pair(&format!("{layer}.attention.output.LayerNorm"), vec![width]);
        pair(&format!("{layer}.intermediate.dense"), vec![inner, width]);
        pair(&format!("{layer}.output.dense"), vec![width, inner]);
        pair(&format!("{layer}.output.LayerNorm"), vec![width]);
    }
    if pooled {
        pair("pooler.dense", vec![width, width]);
    }
    all
}
