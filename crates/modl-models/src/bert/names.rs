//! The names and shapes of BERT's parameters, and the names under which checkpoints have them.

use serde_json::Value;

use super::head::HeadKind;
use super::{BertConfig, POSITIONS, TYPES, WORDS};
use crate::folder::Shapes;
use crate::settings::{class, labels};

/// What transformers puts on top of the encoder, beside the names that start with the encoder's.
const HEADS: [&str; 4] = ["cls.", "classifier.", "qa_outputs.", "lm_head."];

/// How the class in `config.json` names things.
#[derive(Debug, Clone)]
pub(super) struct Names {
    /// The encoder's name in a model with a head: `bert.` or `roberta.`.
    family: &'static str,
    /// In front of the encoder's paths: its name where the class has a head, else nothing.
    pub(super) prefix: &'static str,
    pub(super) head: Option<HeadKind>,
    pub(super) labels: i64,
}

impl Names {
    pub(super) fn new(config: &Value, settings: &BertConfig) -> Self {
        let roberta = settings.padding().is_some();
        let family = if roberta { "roberta." } else { "bert." };
        let class = class(config, "BertModel");
        let head = if class.ends_with("ForTokenClassification") {
            Some(HeadKind::Tokens)
        } else if class.ends_with("ForSequenceClassification") {
            Some(if roberta { HeadKind::First } else { HeadKind::Pooled })
        } else {
            None
        };
        let prefix = if class.ends_with("Model") { "" } else { family };
        Names { family, prefix, head, labels: labels(config) }
    }

    /// This model's path for one of the same encoder with or without a head.
    pub(super) fn path(&self, path: &str) -> String {
        if HEADS.iter().any(|head| path.starts_with(head)) {
            return path.to_owned();
        }
        format!("{}{}", self.prefix, path.strip_prefix(self.family).unwrap_or(path))
    }

    /// The name of a stored tensor in this model, or `None` where it is not part of it.
    pub(super) fn canonical(&self, stored: &str) -> Option<String> {
        if HEADS.iter().any(|head| stored.starts_with(head)) {
            let own = self.head.is_some() && stored.starts_with("classifier.");
            return own.then(|| stored.to_owned());
        }
        let name = self.path(stored);
        if name.ends_with("embeddings.position_ids") {
            return None;
        }
        Some(match name.rsplit_once(".LayerNorm.") {
            Some((path, "gamma")) => format!("{path}.LayerNorm.weight"),
            Some((path, "beta")) => format!("{path}.LayerNorm.bias"),
            _ => name,
        })
    }
}

/// All parameters with their shapes.
pub(super) fn shapes(settings: &BertConfig, names: &Names, pooled: bool) -> Shapes {
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
    let mut all: Shapes =
        all.into_iter().map(|(name, shape)| (format!("{}{name}", names.prefix), shape)).collect();
    for (path, rows) in names.head.map(|h| h.layers(width, names.labels)).into_iter().flatten() {
        all.insert(format!("{path}.weight"), vec![rows, width]);
        all.insert(format!("{path}.bias"), vec![rows]);
    }
    all
}
