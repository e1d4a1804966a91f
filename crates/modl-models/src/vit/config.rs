//! ViT's settings, as in `config.json`.

use modl_core::{Activation, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::settings::{
    self, Fixed, check_dropout, check_heads, check_layers, check_positive, refuse,
};

/// The settings of ViT that count for its computation, with the defaults of transformers'
/// `ViTConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VitConfig {
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
    /// ε of the layer normalisations.
    pub layer_norm_eps: f64,
    /// Height and width of an image, in pixels.
    pub image_size: i64,
    /// Height and width of a patch, in pixels; what is left of an image at its right and lower end
    /// is not seen.
    pub patch_size: i64,
    /// Channels of an image.
    pub num_channels: i64,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Width of the pooler's output; `hidden_size` where it is not given.
    pub pooler_output_size: Option<i64>,
    /// Activation of the pooler.
    pub pooler_act: Activation,
}

impl Default for VitConfig {
    fn default() -> Self {
        VitConfig {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            layer_norm_eps: 1e-12,
            image_size: 224,
            patch_size: 16,
            num_channels: 3,
            qkv_bias: true,
            pooler_output_size: None,
            pooler_act: Activation::Tanh,
        }
    }
}

const FIXED: [Fixed; 1] = [("quantization_config", Value::is_null, "load unquantised weights")];

impl VitConfig {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// By name where a setting has the wrong type, is out of range, or is not supported.
    pub fn read(config: &Value) -> Result<Self> {
        let all: Self = settings::read(config, "ViT", &FIXED)?;
        all.check()?;
        Ok(all)
    }

    fn check(&self) -> Result<()> {
        check_positive(&[
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("num_channels", self.num_channels),
            ("pooler_output_size", self.pooler_width()),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        let width = ("hidden_size", self.hidden_size);
        check_heads("num_attention_heads", self.num_attention_heads, width)?;
        if self.patch_size > self.image_size {
            return refuse("patch_size", self.patch_size, "is larger than image_size");
        }
        // Its square, the number of patches, has to be a number.
        if self.image_size > 1 << 20 {
            return refuse("image_size", self.image_size, "is too large");
        }
        check_dropout(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
        ])
    }

    /// With another probability for every dropout.
    ///
    /// # Errors
    /// Where it is not in [0, 1).
    pub fn with_dropout(self, p: f64) -> Result<Self> {
        let settings =
            VitConfig { hidden_dropout_prob: p, attention_probs_dropout_prob: p, ..self };
        settings.check()?;
        Ok(settings)
    }

    /// Tokens of an image: its patches, and the class token before them.
    pub fn tokens(&self) -> i64 {
        (self.image_size / self.patch_size).pow(2) + 1
    }

    /// Width of one attention head.
    pub fn head_width(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }

    /// Width of the pooler's output.
    pub fn pooler_width(&self) -> i64 {
        self.pooler_output_size.unwrap_or(self.hidden_size)
    }
}
