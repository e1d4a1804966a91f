//! GPT-2's settings, as in `config.json`.

use modl_core::{Activation, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::settings::{self, Fixed, MOST_LAYERS, check_dropout, check_positive, refuse};

/// The settings of GPT-2 that count for its computation, with the defaults of transformers'
/// `GPT2Config`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Gpt2Config {
    /// Rows of the table of words.
    pub vocab_size: i64,
    /// Rows of the table of positions: the longest sequence.
    pub n_positions: i64,
    /// Width of the hidden states.
    pub n_embd: i64,
    /// Number of layers.
    pub n_layer: usize,
    /// Number of attention heads.
    pub n_head: i64,
    /// Width within the feed-forward network; four times `n_embd` where it is not given.
    pub n_inner: Option<i64>,
    /// The activation of the feed-forward network.
    pub activation_function: Activation,
    /// The probability of dropout of what sub-layers add.
    pub resid_pdrop: f64,
    /// The probability of dropout of the first hidden states.
    pub embd_pdrop: f64,
    /// The probability of dropout of attention's probabilities.
    pub attn_pdrop: f64,
    /// ε of the normalisations.
    pub layer_norm_epsilon: f64,
    /// Whether the head's table is that of the words.
    pub tie_word_embeddings: bool,
}

impl Default for Gpt2Config {
    fn default() -> Self {
        Gpt2Config {
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: Activation::GeluNew,
            resid_pdrop: 0.1,
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            layer_norm_epsilon: 1e-5,
            tie_word_embeddings: true,
        }
    }
}

const FIXED: [Fixed; 5] = [
    ("scale_attn_weights", |v| v == true, "only scaled attention is"),
    ("scale_attn_by_inverse_layer_idx", |v| v == false, "only scaling by the heads' width is"),
    ("reorder_and_upcast_attn", |v| v == false, "load it in f32 instead"),
    ("add_cross_attention", |v| v == false, "only the decoder by itself is"),
    ("quantization_config", Value::is_null, "load unquantised weights"),
];

impl Gpt2Config {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// By name where a setting has the wrong type, is out of range, or is not supported.
    pub fn read(config: &Value) -> Result<Self> {
        let all: Self = settings::read(config, "GPT-2", &FIXED)?;
        all.check()?;
        Ok(all)
    }

    fn check(&self) -> Result<()> {
        check_positive(&[
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_head", self.n_head),
            ("n_inner", self.inner_width()),
        ])?;
        check_dropout(&[
            ("resid_pdrop", self.resid_pdrop),
            ("embd_pdrop", self.embd_pdrop),
            ("attn_pdrop", self.attn_pdrop),
        ])?;
        if self.n_layer > MOST_LAYERS {
            return refuse("n_layer", self.n_layer, "is too many");
        }
        if self.n_embd % self.n_head != 0 {
            return refuse("n_head", self.n_head, "does not divide n_embd");
        }
        Ok(())
    }

    /// With another probability of every dropout.
    ///
    /// # Errors
    /// Where it is not in [0, 1).
    pub fn with_dropout(self, p: f64) -> Result<Self> {
        let all = Gpt2Config { resid_pdrop: p, embd_pdrop: p, attn_pdrop: p, ..self };
        all.check().map(|()| all)
    }

    /// The width within the feed-forward network.
    pub fn inner_width(&self) -> i64 {
        self.n_inner.unwrap_or(4 * self.n_embd)
    }
}
