//! What PEFT files say besides the method.

use modl_core::{Error, Names, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::fields::Fields;

/// The fields of a PEFT file that say where an adapter belongs. They do not change what it
/// computes; they are kept so that they are there again when the adapter is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Provenance {
    /// `SEQ_CLS`, `SEQ_2_SEQ_LM`, `CAUSAL_LM`, `TOKEN_CLS`, `QUESTION_ANS` or
    /// `FEATURE_EXTRACTION`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_type: Option<String>,
    /// The class that PEFT loads the backbone with, where `task_type` does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_mapping: Option<Value>,
    /// Path or name of the backbone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model_name_or_path: Option<String>,
    /// Version of the backbone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// How PEFT's kind of layer stores its weight: `[in, out]` if true, as GPT-2's do. The backbone
    /// knows it by itself.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fan_in_fan_out: bool,
    /// Whole modules that the file holds beside the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved: Option<Saved>,
    /// What a file with virtual tokens notes of its backbone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<PromptDimensions>,
    /// How a prompt started.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub start: Map<String, Value>,
}

/// `modules_to_save`: modules that a file holds whole, in a part of their own of a
/// [`Union`](crate::Union).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Saved {
    /// How the file calls them. PEFT names a classifier both `classifier` and `score`, and takes
    /// what is there.
    pub modules: Vec<String>,
    /// `exclude_modules`; the adapter does not stand at the saved modules either.
    pub exclude: Option<Names>,
}

/// What PEFT notes of the backbone of virtual tokens; it works these out where they are missing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptDimensions {
    /// How many stacks have virtual tokens.
    pub num_transformer_submodules: Option<i64>,
    /// The width of the embeddings, or of all keys.
    pub token_dim: Option<i64>,
    /// The number of layers.
    pub num_layers: Option<i64>,
    /// The number of heads, of keys where they are fewer.
    pub num_attention_heads: Option<i64>,
}

/// PEFT's `TaskType`.
const TASK_TYPES: &[&str] =
    &["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"];

impl Provenance {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn read(fields: &mut Fields) -> Result<Self> {
        let task_type: Option<String> = fields.optional("task_type")?;
        if let Some(t) = &task_type
            && !TASK_TYPES.contains(&t.as_str())
        {
            return Err(Error::unknown("task_type", t, TASK_TYPES));
        }
        Ok(Provenance {
            task_type,
            auto_mapping: fields.optional("auto_mapping")?,
            base_model_name_or_path: fields.optional("base_model_name_or_path")?,
            revision: fields.optional("revision")?,
            saved: Saved::read(fields)?,
            prompt: None,
            start: Map::new(),
            fan_in_fan_out: fields.optional("fan_in_fan_out")?.unwrap_or(false),
        })
    }
}
