//! BERT's settings, as in `config.json`.

use modl_core::{Activation, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::settings::{
    self, Fixed, check_dropout, check_heads, check_layers, check_positive, refuse,
};

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
    /// Dropout in front of a classifier; `hidden_dropout_prob` where it is not given.
    pub classifier_dropout: Option<f64>,
    /// The id of padding, which RoBERTa's positions count from; 1 where it is not given.
    pub pad_token_id: Option<i64>,
    /// `bert`, or `roberta` or `xlm-roberta`, whose positions start after that of padding.
    pub model_type: String,
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
            classifier_dropout: None,
            pad_token_id: None,
            model_type: "bert".to_owned(),
        }
    }
}

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
        let all: Self = settings::read(config, "BERT", &FIXED)?;
        all.check()?;
        Ok(all)
    }

    fn check(&self) -> Result<()> {
        check_positive(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        let width = ("hidden_size", self.hidden_size);
        check_heads("num_attention_heads", self.num_attention_heads, width)?;
        check_dropout(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", self.classifier_dropout.unwrap_or(0.0)),
        ])?;
        match self.padding() {
            Some(id) if !(0..self.max_position_embeddings).contains(&id) => {
                refuse("pad_token_id", id, "has no position")
            }
            _ => Ok(()),
        }
    }

    /// With another probability for every dropout.
    ///
    /// # Errors
    /// Where it is not in [0, 1).
    pub fn with_dropout(mut self, p: f64) -> Result<Self> {
        self.hidden_dropout_prob = p;
        self.attention_probs_dropout_prob = p;
        self.classifier_dropout = Some(p);
        self.check()?;
        Ok(self)
    }

    /// The id of padding where positions count from it.
    pub(super) fn padding(&self) -> Option<i64> {
        (self.model_type != "bert").then(|| self.pad_token_id.unwrap_or(1))
    }

    /// Width of one attention head.
    pub fn head_width(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }
}
