//! One layer of Llama: attention in groups of heads and a gated feed-forward network, each after a
//! normalisation.

use modl_core::{Result, SiteKind, Tensor};

use super::LlamaConfig;
use crate::decoder::{Seen, attention, split, sublayer};
use crate::place::{Pass, Place, Surveyor};

/// A layer with all its sites but its own.
#[derive(Debug)]
pub(super) struct Layer {
    first_norm: Place,
    query: Place,
    key: Place,
    value: Place,
    attention: Place,
    attention_output: Place,
    attention_dense: Place,
    second_norm: Place,
    feed_forward: Place,
    gate: Place,
    up: Place,
    down: Place,
    settings: LlamaConfig,
}

impl Layer {
    pub(super) fn new(to: &mut Surveyor, path: &str, settings: &LlamaConfig) -> Self {
        use SiteKind::{Attention, Linear, Norm, Sublayer};
        let (width, inner) = (settings.hidden_size, settings.intermediate_size);
        let heads = settings.num_attention_heads * settings.head_width();
        let groups = settings.groups() * settings.head_width();
        let mut place = |name: &str, kind, input, output| {
            to.place(&format!("{path}.{name}"), kind, input, output)
        };
        Layer {
            first_norm: place("input_layernorm", Norm, width, width),
            query: place("self_attn.q_proj", Linear, width, heads),
            key: place("self_attn.k_proj", Linear, width, groups),
            value: place("self_attn.v_proj", Linear, width, groups),
            attention: place("self_attn", Attention, groups, heads),
            attention_output: place("self_attn.output", Sublayer, heads, width),
            attention_dense: place("self_attn.o_proj", Linear, heads, width),
            second_norm: place("post_attention_layernorm", Norm, width, width),
            feed_forward: place("mlp", Sublayer, width, width),
            gate: place("mlp.gate_proj", Linear, width, inner),
            up: place("mlp.up_proj", Linear, width, inner),
            down: place("mlp.down_proj", Linear, inner, width),
            settings: settings.clone(),
        }
    }

    /// x `[batch, seq, hidden]`, of the same shape.
    pub(super) fn forward(&self, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        let eps = self.settings.rms_norm_eps;
        let context = self.attend(&self.first_norm.rms_norm(x, eps, pass)?, seen, pass)?;
        let x = sublayer(&self.attention_output, &context, x, pass, |context, pass| {
            self.attention_dense.linear(context, pass)
        })?;
        let normal = self.second_norm.rms_norm(&x, eps, pass)?;
        sublayer(&self.feed_forward, &normal, &x, pass, |x, pass| {
            let gate = self.settings.hidden_act.apply(&self.gate.linear(x, pass)?)?;
            self.down.linear(&gate.mul(&self.up.linear(x, pass)?)?, pass)
        })
    }

    fn attend(&self, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        let turned = |place: &Place, heads| {
            let t = split(&place.linear(x, pass)?, heads)?;
            seen.rotation.as_ref().map_or_else(|| Ok(t.clone()), |r| r.apply(&t))
        };
        let (heads, groups) = (self.settings.num_attention_heads, self.settings.groups());
        let (query, key) = (turned(&self.query, heads)?, turned(&self.key, groups)?);
        let value = split(&self.value.linear(x, pass)?, groups)?;
        let drop = pass.dropout(&self.attention.site.path, self.settings.attention_dropout);
        let scale = (self.settings.head_width() as f64).sqrt().recip();
        attention(&self.attention, [query, key, value], seen, scale, drop, pass)
    }
}
