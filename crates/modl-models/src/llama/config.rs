//! Llama's settings, as in `config.json`.

use modl_core::{Activation, Error, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::settings::{self, Fixed, MOST_LAYERS, check_dropout, check_positive, refuse};

/// The settings of Llama that count for its computation, with the defaults of transformers'
/// `LlamaConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct LlamaConfig {
    /// Rows of the table of words.
    pub vocab_size: i64,
    /// Width of the hidden states.
    pub hidden_size: i64,
    /// Width within the feed-forward network.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of heads of queries.
    pub num_attention_heads: i64,
    /// Number of heads of keys and values, which divides that of queries; the same where it is not
    /// given.
    pub num_key_value_heads: Option<i64>,
    /// Width of one head; `hidden_size` ⁄ `num_attention_heads` where it is not given.
    pub head_dim: Option<i64>,
    /// The activation of the gate.
    pub hidden_act: Activation,
    /// The longest sequence that the model was made for. Longer ones are computed all the same.
    pub max_position_embeddings: i64,
    /// ε of the normalisations.
    pub rms_norm_eps: f64,
    /// The base of the rotations, in files of transformers 4.
    pub rope_theta: f64,
    /// The rotations, in files of transformers 5.
    pub rope_parameters: Option<Rope>,
    /// Whether the attention's projections have biases.
    pub attention_bias: bool,
    /// Whether the feed-forward network's have.
    pub mlp_bias: bool,
    /// The probability of dropout of attention's probabilities.
    pub attention_dropout: f64,
    /// Whether the head's table is that of the words.
    pub tie_word_embeddings: bool,
}

/// How positions become rotations.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Rope {
    /// The base of the rotations.
    pub rope_theta: f64,
    /// Only `default` is supported.
    #[serde(default = "default_rope")]
    pub rope_type: String,
}

fn default_rope() -> String {
    "default".to_owned()
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
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
            rope_parameters: None,
            attention_bias: false,
            mlp_bias: false,
            attention_dropout: 0.0,
            tie_word_embeddings: false,
        }
    }
}

const FIXED: [Fixed; 2] = [
    ("rope_scaling", Value::is_null, "only plain rotations are; take a model without scaling"),
    ("quantization_config", Value::is_null, "load unquantised weights"),
];

impl LlamaConfig {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// By name where a setting has the wrong type, is out of range, or is not supported.
    pub fn read(config: &Value) -> Result<Self> {
        let all: Self = settings::read(config, "Llama", &FIXED)?;
        all.check()?;
        Ok(all)
    }

    fn check(&self) -> Result<()> {
        check_positive(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.groups()),
            ("head_dim", self.head_width()),
            ("max_position_embeddings", self.max_position_embeddings),
        ])?;
        check_dropout(&[("attention_dropout", self.attention_dropout)])?;
        if self.num_hidden_layers > MOST_LAYERS {
            return refuse("num_hidden_layers", self.num_hidden_layers, "is too many");
        }
        if self.num_attention_heads % self.groups() != 0 {
            return refuse("num_key_value_heads", self.groups(), "does not divide the heads");
        }
        if self.head_width() % 2 != 0 {
            return refuse("head_dim", self.head_width(), "is to be even");
        }
        match &self.rope_parameters {
            Some(rope) if rope.rope_type != "default" => Err(Error::unsupported(
                format!("Llama with `rope_type` = {}", rope.rope_type),
                "only plain rotations are; take a model without scaling",
            )),
            _ => Ok(()),
        }
    }

    /// With another probability of dropout.
    ///
    /// # Errors
    /// Where it is not in [0, 1).
    pub fn with_dropout(self, p: f64) -> Result<Self> {
        let all = LlamaConfig { attention_dropout: p, ..self };
        all.check().map(|()| all)
    }

    /// The number of heads of keys and values.
    pub fn groups(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// The width of one head.
    pub fn head_width(&self) -> i64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// The base of the rotations.
    pub fn rope_base(&self) -> f64 {
        self.rope_parameters.as_ref().map_or(self.rope_theta, |rope| rope.rope_theta)
    }
}
