//! T5's settings, as in `config.json`.

use modl_core::{Activation, Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::FEED_FORWARD;
use super::switch::SwitchConfig;
use crate::settings::{self, Fixed, MOST_LAYERS, check_dropout, check_positive, refuse};

/// The settings of T5 that count for its computation, with the defaults of transformers'
/// `T5Config`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Rows of the table of words.
    pub vocab_size: i64,
    /// Width of the hidden states.
    pub d_model: i64,
    /// Width of one attention head; all heads together need not be as wide as `d_model`.
    pub d_kv: i64,
    /// Width within the feed-forward sub-layers.
    pub d_ff: i64,
    /// Number of the encoder's layers.
    pub num_layers: usize,
    /// Number of the decoder's layers; as many as the encoder's where it is not given.
    pub num_decoder_layers: Option<usize>,
    /// Number of attention heads.
    pub num_heads: i64,
    /// Rows of the tables of relative positions, at least 4.
    pub relative_attention_num_buckets: i64,
    /// The distance from which on all keys are in one bucket.
    pub relative_attention_max_distance: i64,
    /// The probability of every dropout.
    pub dropout_rate: f64,
    /// ε of the normalisations.
    pub layer_norm_epsilon: f64,
    /// The feed-forward sub-layers: an activation, or `gated-` and an activation.
    pub feed_forward_proj: String,
    /// Whether the decoder's last states are multiplied by 1⁄√`d_model` before the head; where it
    /// is not given, `tie_word_embeddings` says it.
    pub scale_decoder_outputs: Option<bool>,
    /// Whether the head's table is that of the words.
    pub tie_word_embeddings: Option<bool>,
    /// The experts that stand for some of the feed-forward networks of Switch Transformers.
    #[serde(skip)]
    pub switch: Option<SwitchConfig>,
}

impl Default for T5Config {
    fn default() -> Self {
        T5Config {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_decoder_layers: None,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            dropout_rate: 0.1,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".to_owned(),
            scale_decoder_outputs: None,
            tie_word_embeddings: None,
            switch: None,
        }
    }
}

const FIXED: [Fixed; 3] = [
    ("is_decoder", |v| v == false, "only encoder and decoder together are"),
    ("is_encoder_decoder", |v| v == true, "only encoder and decoder together are"),
    ("quantization_config", Value::is_null, "load unquantised weights"),
];

impl T5Config {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// By name where a setting has the wrong type, is out of range, or is not supported.
    pub fn read(config: &Value) -> Result<Self> {
        let switch = SwitchConfig::read(config)?;
        let all: Self = match &switch {
            None => settings::read(config, "T5", &FIXED)?,
            Some(_) => settings::read(&filled(config), "Switch Transformers", &FIXED)?,
        };
        let all = T5Config { switch, ..all };
        all.check()?;
        Ok(all)
    }

    /// The name of the feed-forward network in its sub-layer.
    pub(super) fn network(&self) -> &'static str {
        if self.switch.is_some() { "mlp" } else { FEED_FORWARD }
    }

    fn check(&self) -> Result<()> {
        check_positive(&[
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_heads", self.num_heads),
        ])?;
        for (name, n) in
            [("num_layers", self.num_layers), ("num_decoder_layers", self.decoder_layers())]
        {
            if !(1..=MOST_LAYERS).contains(&n) {
                return refuse(name, n, "is to be from 1 to 1000");
            }
        }
        let buckets = self.relative_attention_num_buckets;
        if buckets < 4 {
            return refuse("relative_attention_num_buckets", buckets, "is to be at least 4");
        }
        let distance = self.relative_attention_max_distance;
        if distance <= buckets / 2 {
            let problem = "is to be more than half of relative_attention_num_buckets";
            return refuse("relative_attention_max_distance", distance, problem);
        }
        check_dropout(&[("dropout_rate", self.dropout_rate)])?;
        self.feed_forward().map(drop)
    }

    /// With another probability for every dropout.
    ///
    /// # Errors
    /// Where it is not in [0, 1).
    pub fn with_dropout(mut self, p: f64) -> Result<Self> {
        self.dropout_rate = p;
        self.check()?;
        Ok(self)
    }

    /// Number of the decoder's layers.
    pub fn decoder_layers(&self) -> usize {
        self.num_decoder_layers.unwrap_or(self.num_layers)
    }

    /// Width of all heads together.
    pub fn heads_width(&self) -> i64 {
        self.num_heads * self.d_kv
    }

    /// What the decoder's last states are multiplied by before the head.
    pub fn output_scale(&self) -> f64 {
        let tied = self.tie_word_embeddings != Some(false);
        if self.scale_decoder_outputs.unwrap_or(tied) {
            (self.d_model as f64).sqrt().recip()
        } else {
            1.0
        }
    }

    /// The activation of the feed-forward sub-layers and whether they are gated.
    ///
    /// # Errors
    /// Where `feed_forward_proj` names no activation.
    pub fn feed_forward(&self) -> Result<(Activation, bool)> {
        let name = self.feed_forward_proj.as_str();
        let (name, gated) = match name.strip_prefix("gated-") {
            // Published checkpoints say `gelu` and mean the approximation by tanh.
            Some("gelu") => ("gelu_new", true),
            Some(name) => (name, true),
            None => (name, false),
        };
        let act = serde_json::from_value(name.into())
            .map_err(|e| Error::invalid("feed_forward_proj", e.to_string()))?;
        Ok((act, gated))
    }
}

/// Settings of Switch Transformers with its own defaults, under T5's names.
fn filled(config: &Value) -> Value {
    let mut all = json!({ "d_model": 768, "num_layers": 12, "num_heads": 12 });
    let given = config.as_object().into_iter().flatten().filter(|(_, v)| !v.is_null());
    for (name, value) in given {
        let name = if name == "dense_act_fn" { "feed_forward_proj" } else { name };
        all[name] = value.clone();
    }
    all
}
