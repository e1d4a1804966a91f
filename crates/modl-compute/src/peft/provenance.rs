//! What PEFT files say besides the method.

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

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
    /// Whether the backbone stores the weights of the adapter's sites as `[in, out]`, as GPT-2's
    /// does. It says nothing about the adapter's own tensors, and θ of a linear site is `[out, in]`
    /// either way.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fan_in_fan_out: bool,
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
            fan_in_fan_out: fields.optional("fan_in_fan_out")?.unwrap_or(false),
        })
    }
}
