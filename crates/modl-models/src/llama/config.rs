//! The settings of Llama and of what is built as it, as in `config.json`.

use modl_core::{Activation, Result};
use serde::Deserialize;
use serde_json::Value;

use super::latent::LatentConfig;
use crate::moe::{MixtureConfig, Reader};
use crate::rope::Rope;
use crate::settings::{
    self, Fixed, check_dropout, check_heads, check_layers, check_positive, refuse,
};

/// The settings of Llama that count for its computation, with the defaults of transformers'
/// `LlamaConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct LlamaConfig {
    /// Rows of the table of words.
    pub vocab_size: i64,
    /// Width of the hidden states.
    pub hidden_size: i64,
    /// Width within the feed-forward sub-layers.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: i64,
    /// Number of groups of heads that share keys and values, a divisor of `num_attention_heads`;
    /// as many as heads where `None`.
    pub num_key_value_heads: Option<i64>,
    /// Width of a head, an even number; `hidden_size ⁄ num_attention_heads` where `None`.
    pub head_dim: Option<i64>,
    /// Activation of the gates in the feed-forward sub-layers.
    pub hidden_act: Activation,
    /// ε of the normalisations.
    pub rms_norm_eps: f64,
    /// Dropout of attention probabilities.
    pub attention_dropout: f64,
    /// Whether the linear layers of attention have biases; in DeepSeek-V3, those that make narrow
    /// vectors and the last one.
    pub attention_bias: bool,
    /// Whether queries, keys and values have biases even so, as Qwen2-MoE's have.
    #[serde(skip)]
    pub qkv_bias: bool,
    /// Whether those of the feed-forward sub-layers have.
    pub mlp_bias: bool,
    /// Whether the output layer is the table of words.
    pub tie_word_embeddings: bool,
    /// The limit of queries, keys and values on both sides of 0, which OLMoE may have.
    pub clip_qkv: Option<f64>,
    /// Rotary positions.
    #[serde(skip)]
    pub rope: Rope,
    /// Whether queries and keys are normalised over all heads together, as OLMoE's are.
    #[serde(skip)]
    pub query_norm: bool,
    /// The experts that stand for the feed-forward networks of Mixtral, OLMoE, Qwen2-MoE and
    /// DeepSeek-V3.
    #[serde(skip)]
    pub mixture: Option<MixtureConfig>,
    /// Keys and values from narrow vectors, as in DeepSeek-V3; then `head_dim` is the width of the
    /// part of a head that turns.
    #[serde(skip)]
    pub latent: Option<LatentConfig>,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        LlamaConfig {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::Swish,
            rms_norm_eps: 1e-6,
            attention_dropout: 0.0,
            attention_bias: false,
            qkv_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
            clip_qkv: None,
            rope: Rope::default(),
            query_norm: false,
            mixture: None,
            latent: None,
        }
    }
}

/// Settings that would change the result, and their only supported value.
const FIXED: [Fixed; 1] = [("quantization_config", Value::is_null, "load unquantised weights")];
/// That of all but Qwen2-MoE, where another setting says whether it counts.
const WINDOW: [Fixed; 1] =
    [("sliding_window", Value::is_null, "only attention to all earlier tokens is")];

impl LlamaConfig {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// By name where a setting has the wrong type, is out of range, or is not supported.
    pub fn read(config: &Value) -> Result<Self> {
        let is = |name: &str| config.get("model_type").is_some_and(|t| t == name);
        let (mixture, latent) = (MixtureConfig::read(config)?, LatentConfig::read(config)?);
        let own = settings::read::<Self>(config, "Llama", &FIXED)?;
        if !is("qwen2_moe") {
            settings::check_fixed(config, "Llama", &WINDOW)?;
        }
        let usual_eps = (is("mixtral") || is("olmoe")) && config.get("rms_norm_eps").is_none();
        let settings = LlamaConfig {
            rope: Rope::read(config, if is("mixtral") { 1e6 } else { Rope::default().theta })?,
            rms_norm_eps: if usual_eps { 1e-5 } else { own.rms_norm_eps },
            query_norm: is("olmoe"),
            qkv_bias: is("qwen2_moe") && Reader(config).flag("qkv_bias", true)?,
            head_dim: latent.as_ref().map_or(own.head_dim, |l| Some(l.turning)),
            mixture,
            latent,
            ..own
        };
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<()> {
        check_positive(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.groups()),
            ("head_dim", self.head_width()),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        if let Some(latent) = &self.latent {
            latent.check(self)?;
        }
        let heads = ("num_attention_heads", self.num_attention_heads);
        check_heads("num_key_value_heads", self.groups(), heads)?;
        if self.head_dim.is_none() && self.hidden_size % self.num_attention_heads != 0 {
            let problem = "has to divide hidden_size where there is no head_dim";
            return refuse("num_attention_heads", self.num_attention_heads, problem);
        }
        if self.head_width() % 2 != 0 {
            return refuse("head_dim", self.head_width(), "is to be even");
        }
        if let Some(limit) = self.clip_qkv.filter(|limit| *limit <= 0.0) {
            return refuse("clip_qkv", limit, "is to be positive");
        }
        check_dropout(&[("attention_dropout", self.attention_dropout)])
    }

    /// With another probability for every dropout.
    ///
    /// # Errors
    /// Where it is not in [0, 1).
    pub fn with_dropout(self, p: f64) -> Result<Self> {
        let settings = LlamaConfig { attention_dropout: p, ..self };
        settings.check()?;
        Ok(settings)
    }

    /// Width of one attention head.
    pub fn head_width(&self) -> i64 {
        self.head_dim.unwrap_or_else(|| self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Width of all heads' values together.
    pub(crate) fn values_width(&self) -> i64 {
        let of_one = self.latent.as_ref().map_or_else(|| self.head_width(), |l| l.value);
        self.num_attention_heads * of_one
    }

    /// The mixture of layer `n`, where it has one.
    pub(crate) fn mixture_at(&self, n: usize) -> Option<&MixtureConfig> {
        self.mixture.as_ref().filter(|m| m.layers.has(n))
    }

    /// Number of groups of heads that share keys and values.
    pub fn groups(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }
}
