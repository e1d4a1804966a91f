//! GPT-2's settings, as in `config.json`.

use modl_core::{Activation, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::settings::{self, Fixed, check_dropout, check_heads, check_layers, check_positive};

/// The settings of GPT-2 that count for its computation, with the defaults of transformers'
/// `GPT2Config`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Gpt2Config {
    /// Rows of the table of words.
    pub vocab_size: i64,
    /// The longest sequence.
    pub n_positions: i64,
    /// Width of the hidden states.
    pub n_embd: i64,
    /// Number of layers.
    pub n_layer: usize,
    /// Number of attention heads, a divisor of `n_embd`.
    pub n_head: i64,
    /// Width within the feed-forward sub-layers; 4 · `n_embd` where `None`.
    pub n_inner: Option<i64>,
    /// Activation of the feed-forward sub-layers.
    pub activation_function: Activation,
    /// Dropout of sub-layers.
    pub resid_pdrop: f64,
    /// Dropout of embeddings.
    pub embd_pdrop: f64,
    /// Dropout of attention probabilities.
    pub attn_pdrop: f64,
    /// ε of the layer normalisations.
    pub layer_norm_epsilon: f64,
    /// Whether scores are divided by √d, d being the width of a head.
    pub scale_attn_weights: bool,
    /// Whether scores of layer n are divided by n + 1.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// Whether the output layer is the table of words.
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
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: true,
        }
    }
}

/// Settings that would change the result, and their only supported value.
const FIXED: [Fixed; 3] = [
    ("add_cross_attention", |v| v == false, "only the decoder alone is"),
    ("reorder_and_upcast_attn", |v| v == false, "load in f32 for attention in f32"),
    ("quantization_config", Value::is_null, "load unquantised weights"),
];

impl Gpt2Config {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// By name where a setting has the wrong type, is out of range, or is not supported.
    pub fn read(config: &Value) -> Result<Self> {
        let settings: Self = settings::read(config, "GPT-2", &FIXED)?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<()> {
        check_positive(&[
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_head", self.n_head),
            ("n_inner", self.n_inner.unwrap_or(1)),
        ])?;
        check_layers("n_layer", self.n_layer)?;
        check_heads("n_head", self.n_head, ("n_embd", self.n_embd))?;
        check_dropout(&[
            ("resid_pdrop", self.resid_pdrop),
            ("embd_pdrop", self.embd_pdrop),
            ("attn_pdrop", self.attn_pdrop),
        ])
    }

    /// With another probability for every dropout.
    ///
    /// # Errors
    /// Where it is not in [0, 1).
    pub fn with_dropout(self, p: f64) -> Result<Self> {
        let settings = Gpt2Config { resid_pdrop: p, embd_pdrop: p, attn_pdrop: p, ..self };
        settings.check()?;
        Ok(settings)
    }

    /// Width within the feed-forward sub-layers.
    pub fn inner_width(&self) -> i64 {
        self.n_inner.unwrap_or_else(|| self.n_embd.saturating_mul(4))
    }

    /// The factor of the scores in layer `n`.
    pub(super) fn scale(&self, n: usize) -> f64 {
        let width = (self.n_embd / self.n_head) as f64;
        let scale = if self.scale_attn_weights { width.sqrt().recip() } else { 1.0 };
        if self.scale_attn_by_inverse_layer_idx { scale / (n + 1) as f64 } else { scale }
    }
}
