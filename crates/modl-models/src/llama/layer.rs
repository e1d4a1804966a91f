//! One layer of Llama: attention with rotated queries and keys, and a gated feed-forward network,
//! each of a normalised copy of the residual stream and added to it.

use modl_core::{Activation, Result, ResultExt, SiteKind, Tensor};

use super::LlamaConfig;
use super::rope::Rotation;
use crate::decoder::{Stream, join_heads, split_heads};
use crate::place::{Pass, Place, Surveyor};

/// A layer with all its sites.
#[derive(Debug)]
pub(super) struct Layer {
    block: Place,
    attention_norm: Place,
    query: Place,
    key: Place,
    value: Place,
    attention: Place,
    attention_output: Place,
    out: Place,
    feed_norm: Place,
    feed: Place,
    gate: Place,
    up: Place,
    down: Place,
    /// Where the dropout of attention probabilities draws from.
    draw: String,
    heads: i64,
    groups: i64,
    eps: f64,
    activation: Activation,
    dropout: f64,
}

impl Layer {
    pub(super) fn new(to: &mut Surveyor, path: &str, settings: &LlamaConfig) -> Self {
        use SiteKind::{Attention, Block, Linear, Norm, Sublayer};
        let (width, inner) = (settings.hidden_size, settings.intermediate_size);
        let queries = settings.num_attention_heads * settings.head_width();
        let groups = settings.groups() * settings.head_width();
        let block = to.place(path, Block, width, width);
        let mut at = |name: &str, kind, input, output| {
            to.place(&format!("{path}.{name}"), kind, input, output)
        };
        let attention_norm = at("input_layernorm", Norm, width, width);
        let query = at("self_attn.q_proj", Linear, width, queries);
        let key = at("self_attn.k_proj", Linear, width, groups);
        let value = at("self_attn.v_proj", Linear, width, groups);
        let attention = at("self_attn", Attention, groups, queries);
        let attention_output = at("self_attn.output", Sublayer, queries, width);
        let out = at("self_attn.o_proj", Linear, queries, width);
        let feed_norm = at("post_attention_layernorm", Norm, width, width);
        let feed = at("mlp", Sublayer, width, width);
        let gate = at("mlp.gate_proj", Linear, width, inner);
        let up = at("mlp.up_proj", Linear, width, inner);
        let down = at("mlp.down_proj", Linear, inner, width);
        Layer {
            block,
            attention_norm,
            query,
            key,
            value,
            attention,
            attention_output,
            out,
            feed_norm,
            feed,
            gate,
            up,
            down,
            draw: format!("{path}.self_attn.dropout"),
            heads: settings.num_attention_heads,
            groups: settings.groups(),
            eps: settings.rms_norm_eps,
            activation: settings.hidden_act,
            dropout: settings.attention_dropout,
        }
    }

    /// The next hidden states. `rotation` and `hidden` are those of the whole stream.
    pub(super) fn forward(
        &self,
        stream: &Stream,
        hidden: &Tensor,
        rotation: &Rotation,
        frequencies: &Tensor,
        pass: Pass,
    ) -> Result<Tensor> {
        let split = self.block.modular(pass);
        self.block.block(stream, hidden, pass, |own, hidden, pass| {
            if !split {
                return self.inner(&own.x, hidden, rotation, pass);
            }
            let rotation = Rotation::new(frequencies, &own.positions, own.x.kind())?;
            self.inner(&own.x, hidden, &rotation, pass)
        })
    }

    fn inner(&self, x: &Tensor, hidden: &Tensor, turn: &Rotation, pass: Pass) -> Result<Tensor> {
        let normed = self.attention_norm.rms_norm(x, self.eps, pass)?;
        let split = |place: &Place, heads: i64| {
            split_heads(&place.linear(&normed, pass)?, heads).at(&place.site.path)
        };
        let query = turn.apply(&split(&self.query, self.heads)?)?;
        let key = turn.apply(&split(&self.key, self.groups)?)?;
        let value = split(&self.value, self.groups)?;
        let scale = (query.len_of(3) as f64).sqrt().recip();
        let drop = pass.dropout(&self.draw, self.dropout);
        let context =
            self.attention.attend([query, key, value], Some(hidden), scale, drop, pass)?;
        let context = join_heads(&context).at(&self.attention.site.path)?;
        let x = self.attention_output.add(x, context, pass, |c, pass| self.out.linear(c, pass))?;
        let normed = self.feed_norm.rms_norm(&x, self.eps, pass)?;
        self.feed.add(&x, normed, pass, |x, pass| {
            let gate = self.activation.apply(&self.gate.linear(x, pass)?)?;
            self.down.linear(&gate.mul(&self.up.linear(x, pass)?)?, pass)
        })
    }
}
