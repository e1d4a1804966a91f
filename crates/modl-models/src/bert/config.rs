//! BERT's settings, as in `config.json`.

use modl_core::{Activation, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::settings::{Fixed, layers, parse, positive, probabilities, refuse};

/// The settings of BERT that count for its computation, with the defaults of transformers'
/// `BertConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct BertConfig {
    /// Rows of the table of words.
    pub vocab_size: i64,
    /// Width of the hidden states.
    pub hidden_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads, a divisor of `hidden_size`.
    pub num_attention_heads: i64,
    /// Width within the feed-forward sub-layers.
    pub intermediate_size: i64,
    /// Activation of the feed-forward sub-layers.
    pub hidden_act: Activation,
    /// Dropout of embeddings and sub-layers.
    pub hidden_dropout_prob: f64,
    /// Dropout of attention probabilities.
    pub attention_probs_dropout_prob: f64,
    /// The longest sequence.
    pub max_position_embeddings: i64,
    /// Rows of the table of segments.
    pub type_vocab_size: i64,
    /// ε of the layer normalisations.
    pub layer_norm_eps: f64,
}

impl Default for BertConfig {
    fn default() -> Self {
        BertConfig {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
        }
    }
}

/// Settings that would change the result, and their only supported value.
const FIXED: [Fixed; 5] = [
    ("position_embedding_type", |v| v == "absolute", "only `absolute` positions are"),
    ("is_decoder", |v| v == false, "only the encoder is"),
    ("add_cross_attention", |v| v == false, "only the encoder is"),
    ("quantization_config", Value::is_null, "load unquantised weights"),
    ("pruned_heads", |v| v.as_object().is_some_and(Map::is_empty), "save the model unpruned"),
];

impl BertConfig {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// By name where a setting has the wrong type, is out of range, or is not supported.
    pub fn read(config: &Value) -> Result<Self> {
        let settings: Self = parse("BERT", config, &FIXED)?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<()> {
        positive(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ])?;
        layers("num_hidden_layers", self.num_hidden_layers)?;
        if self.hidden_size % self.num_attention_heads != 0 {
            return refuse(
                "num_attention_heads",
                self.num_attention_heads,
                "has to divide hidden_size",
            );
        }
        probabilities(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
        ])
    }

    /// With another probability for every dropout.
    ///
    /// # Errors
    /// Where it is not in [0, 1).
    pub fn with_dropout(mut self, p: f64) -> Result<Self> {
        self.hidden_dropout_prob = p;
        self.attention_probs_dropout_prob = p;
        self.check()?;
        Ok(self)
    }

    /// Width of one attention head.
    pub fn head_width(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }
}
