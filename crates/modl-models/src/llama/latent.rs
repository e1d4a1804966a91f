//! Multi-head latent attention: queries, keys and values of all heads are made of narrow vectors,
//! and the part of a head that turns by its position is made apart, for keys one for all heads
//! (DeepSeek-AI 2024, *DeepSeek-V2*, arXiv 2405.04434, §2.1).
//!
//! q = W_qb norm(W_qa x), or W_q x; c = W_kva x = [c_kv, k_turning]; [k, v] = W_kvb norm(c_kv).
//! A head's query and key are [q, turn(q_turning)] and [k, turn(k_turning)].
//!
//! What a cache keeps are the keys and values of all heads.

use modl_core::{Error, Result, SiteKind, Tensor};
use serde_json::Value;

use super::LlamaConfig;
use crate::attention::split;
use crate::decoder::{Seen, attention};
use crate::moe::Reader;
use crate::place::{Pass, Place, Surveyor};
use crate::settings::{check_positive, refuse};

/// ε of the narrow vectors' normalisations, whatever that of the others is.
const EPS: f64 = 1e-6;

/// The settings of latent attention, as DeepSeek-V3 has them.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentConfig {
    /// Width of the vector that queries are made of, `q_lora_rank`; `None` where they are made of x.
    pub query_rank: Option<i64>,
    /// Width of the vector that keys and values are made of, `kv_lora_rank`.
    pub rank: i64,
    /// Width of the part of a head that does not turn, `qk_nope_head_dim`.
    pub still: i64,
    /// Width of the part that does, `qk_rope_head_dim`.
    pub turning: i64,
    /// Width of a head's values, `v_head_dim`.
    pub value: i64,
    /// Whether features 2i and 2i + 1 turn together rather than those half a head apart,
    /// `rope_interleave`.
    pub interleaved: bool,
}

impl LatentConfig {
    /// Reads the settings where the architecture has them.
    ///
    /// # Errors
    /// By name where one has the wrong type.
    pub(crate) fn read(config: &Value) -> Result<Option<Self>> {
        if config.get("model_type").is_none_or(|t| t != "deepseek_v3") {
            return Ok(None);
        }
        let from = Reader(config);
        let query_rank = match config.get("q_lora_rank") {
            Some(Value::Null) => None,
            _ => Some(from.number("q_lora_rank", 1536)?),
        };
        Ok(Some(LatentConfig {
            query_rank,
            rank: from.number("kv_lora_rank", 512)?,
            still: from.number("qk_nope_head_dim", 128)?,
            turning: from.number("qk_rope_head_dim", 64)?,
            value: from.number("v_head_dim", 128)?,
            interleaved: from.flag("rope_interleave", true)?,
        }))
    }

    pub(super) fn check(&self, settings: &LlamaConfig) -> Result<()> {
        check_positive(&[
            ("q_lora_rank", self.query_rank.unwrap_or(1)),
            ("kv_lora_rank", self.rank),
            ("qk_nope_head_dim", self.still),
            ("qk_rope_head_dim", self.turning),
            ("v_head_dim", self.value),
        ])?;
        if settings.groups() != settings.num_attention_heads {
            return refuse(
                "num_key_value_heads",
                settings.groups(),
                "is to be num_attention_heads",
            );
        }
        Ok(())
    }

    /// Width of a head's queries and keys.
    pub fn head(&self) -> i64 {
        self.still + self.turning
    }

    /// The linear layers of a layer but `o_proj`: name, output, input, whether it may have a bias.
    /// Then the normalisations: name, width.
    pub(super) fn shapes(&self, settings: &LlamaConfig) -> (Vec<Linear>, Vec<(&'static str, i64)>) {
        let (width, heads) = (settings.hidden_size, settings.num_attention_heads);
        let biased = settings.attention_bias;
        let queries = heads * self.head();
        let mut linear = match self.query_rank {
            None => vec![("q_proj", queries, width, false)],
            Some(rank) => {
                vec![("q_a_proj", rank, width, biased), ("q_b_proj", queries, rank, false)]
            }
        };
        linear.push(("kv_a_proj_with_mqa", self.rank + self.turning, width, biased));
        linear.push(("kv_b_proj", heads * (self.still + self.value), self.rank, false));
        let norms = self.query_rank.map(|rank| ("q_a_layernorm", rank));
        (linear, norms.into_iter().chain([("kv_a_layernorm", self.rank)]).collect())
    }
}

/// Name, output, input, whether it has a bias.
type Linear = (&'static str, i64, i64, bool);

/// A wide vector by way of a narrow one, normalised.
#[derive(Debug)]
struct Narrow {
    into: Place,
    norm: Place,
    out: Place,
}

/// Latent attention with all its sites but `o_proj`.
#[derive(Debug)]
pub(super) struct Latent {
    query: Query,
    key_value: Narrow,
    attention: Place,
    settings: LatentConfig,
    heads: i64,
    /// What scores are multiplied by.
    scale: f64,
    dropout: f64,
}

#[derive(Debug)]
enum Query {
    Plain(Place),
    Narrow(Narrow),
}

impl Latent {
    /// Attention at `path`.
    pub(super) fn new(
        to: &mut Surveyor,
        path: &str,
        settings: &LlamaConfig,
        latent: &LatentConfig,
    ) -> Self {
        let (width, heads) = (settings.hidden_size, settings.num_attention_heads);
        let mut place = |name: &str, kind, i, o| to.place(&format!("{path}{name}"), kind, i, o);
        use SiteKind::{Attention, Linear, Norm};
        let queries = heads * latent.head();
        let query = match latent.query_rank {
            None => Query::Plain(place(".q_proj", Linear, width, queries)),
            Some(rank) => Query::Narrow(Narrow {
                into: place(".q_a_proj", Linear, width, rank),
                norm: place(".q_a_layernorm", Norm, rank, rank),
                out: place(".q_b_proj", Linear, rank, queries),
            }),
        };
        let (rank, values) = (latent.rank, heads * latent.value);
        let key_value = Narrow {
            into: place(".kv_a_proj_with_mqa", Linear, width, rank + latent.turning),
            norm: place(".kv_a_layernorm", Norm, rank, rank),
            out: place(".kv_b_proj", Linear, rank, heads * latent.still + values),
        };
        let attention = place("", Attention, queries, values);
        let scale = (latent.head() as f64).sqrt().recip() * settings.rope.sharpness();
        let (settings, dropout) = (latent.clone(), settings.attention_dropout);
        Latent { query, key_value, attention, settings, heads, scale, dropout }
    }

    /// x `[batch, seq, hidden]` to `[batch, seq, heads · values]`.
    pub(super) fn forward(&self, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        let LatentConfig { rank, still, turning, value, .. } = self.settings;
        let query = match &self.query {
            Query::Plain(place) => place.linear(x, pass)?,
            Query::Narrow(Narrow { into, norm, out }) => {
                out.linear(&norm.rms_norm(&into.linear(x, pass)?, EPS, pass)?, pass)?
            }
        };
        let Narrow { into, norm, out } = &self.key_value;
        let [narrow, key_turning] = two(&into.linear(x, pass)?, [rank, turning])?;
        let both = out.linear(&norm.rms_norm(&narrow, EPS, pass)?, pass)?;
        let [key, value] = two(&split(&both, self.heads)?, [still, value])?;
        let [query, query_turning] = two(&split(&query, self.heads)?, [still, turning])?;
        let query = Tensor::cat(&[query, self.turn(&query_turning, seen)?], -1)?;
        let key_turning = self.turn(&split(&key_turning, 1)?, seen)?;
        let key_turning = key_turning.expand(&[-1, self.heads, -1, -1])?;
        let key = Tensor::cat(&[key, key_turning], -1)?;
        let drop = pass.dropout(&self.attention.site.path, self.dropout);
        attention(&self.attention, [query, key, value], seen, self.scale, drop, pass)
    }

    /// x `[batch, heads, seq, turning]` by its positions.
    fn turn(&self, x: &Tensor, seen: &Seen) -> Result<Tensor> {
        let Some(rotation) = &seen.rotation else { return Ok(x.clone()) };
        if !self.settings.interleaved {
            return rotation.apply(x);
        }
        // Pairs that lie side by side come to lie half a head apart; queries and keys both.
        let mut pairs = x.size();
        pairs.pop();
        pairs.extend([self.settings.turning / 2, 2]);
        rotation.apply(&x.reshape(&pairs)?.transpose(-1, -2)?.reshape(&x.size())?)
    }
}

/// The two parts of the last dimension.
fn two(x: &Tensor, lengths: [i64; 2]) -> Result<[Tensor; 2]> {
    let parts = x.split(&lengths, -1)?;
    let none = |_| Error::invalid("attention", format!("{x:?} is no {lengths:?}"));
    parts.try_into().map_err(none)
}
