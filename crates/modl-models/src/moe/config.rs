//! The settings of mixtures, as in the `config.json` of Mixtral and OLMoE.

use modl_core::{Error, Result};
use serde_json::Value;

use crate::settings::{check_positive, refuse};

/// What a mixture has more than a feed-forward network.
#[derive(Debug, Clone, PartialEq)]
pub struct MixtureConfig {
    /// The number of experts: `num_local_experts` of Mixtral (8), `num_experts` of OLMoE (64).
    pub experts: i64,
    /// How many of them each token has, `num_experts_per_tok`: 2 and 8.
    pub top_k: i64,
    /// Whether the gates of a token's experts are divided by their sum: so in Mixtral, and where
    /// `norm_topk_prob` says so in OLMoE, where it is false if it is not given.
    pub normalised: bool,
}

impl MixtureConfig {
    /// Reads and checks the settings, where the architecture has a mixture.
    ///
    /// # Errors
    /// By name where a setting has the wrong type or is out of range.
    pub(crate) fn read(config: &Value) -> Result<Option<Self>> {
        let number = |name: &str, usual: i64| match config.get(name).filter(|v| !v.is_null()) {
            None => Ok(usual),
            Some(v) => v.as_i64().ok_or_else(|| Error::invalid(name, format!("{v} is no number"))),
        };
        let (name, settings) = match config.get("model_type").and_then(Value::as_str) {
            Some("mixtral") => {
                let experts = number("num_local_experts", 8)?;
                let top_k = number("num_experts_per_tok", 2)?;
                ("num_local_experts", MixtureConfig { experts, top_k, normalised: true })
            }
            Some("olmoe") => {
                let experts = number("num_experts", 64)?;
                let top_k = number("num_experts_per_tok", 8)?;
                let normalised = config.get("norm_topk_prob") == Some(&Value::Bool(true));
                ("num_experts", MixtureConfig { experts, top_k, normalised })
            }
            _ => return Ok(None),
        };
        check_positive(&[(name, settings.experts), ("num_experts_per_tok", settings.top_k)])?;
        if settings.top_k > settings.experts {
            refuse("num_experts_per_tok", settings.top_k, "are more than there are experts")?;
        }
        Ok(Some(settings))
    }
}
