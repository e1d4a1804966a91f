//! One layer of Llama: attention in groups of heads and a gated feed-forward network, or a mixture of
//! them, each after a normalisation.

use modl_core::{Result, SiteKind, Tensor};

use super::LlamaConfig;
use crate::attention::split;
use crate::decoder::{Seen, attention};
use crate::moe::Mixture;
use crate::place::{Pass, Place, Surveyor};

/// A layer with all its sites but its own.
#[derive(Debug)]
pub(super) struct Layer {
    first_norm: Place,
    query: Place,
    key: Place,
    value: Place,
    /// Of queries and keys.
    norms: Option<[Place; 2]>,
    attention: Place,
    attention_output: Place,
    attention_dense: Place,
    second_norm: Place,
    feed_forward: Place,
    network: Network,
    settings: LlamaConfig,
}

/// What stands in the feed-forward sub-layer.
#[derive(Debug)]
enum Network {
    /// down(σ(gate x) · up x).
    Gated {
        gate: Place,
        up: Place,
        down: Place,
    },
    Mixture(Mixture),
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
        let first_norm = place("input_layernorm", Norm, width, width);
        let query = place("self_attn.q_proj", Linear, width, heads);
        let key = place("self_attn.k_proj", Linear, width, groups);
        let value = place("self_attn.v_proj", Linear, width, groups);
        let norms = settings.query_norm.then(|| {
            let query = place("self_attn.q_norm", Norm, heads, heads);
            [query, place("self_attn.k_norm", Norm, groups, groups)]
        });
        let attention = place("self_attn", Attention, groups, heads);
        let attention_output = place("self_attn.output", Sublayer, heads, width);
        let attention_dense = place("self_attn.o_proj", Linear, heads, width);
        let second_norm = place("post_attention_layernorm", Norm, width, width);
        let feed_forward = place("mlp", Sublayer, width, width);
        let network = match &settings.mixture {
            None => Network::Gated {
                gate: place("mlp.gate_proj", Linear, width, inner),
                up: place("mlp.up_proj", Linear, width, inner),
                down: place("mlp.down_proj", Linear, inner, width),
            },
            Some(mixture) => {
                let (path, act) = (format!("{path}.mlp"), settings.hidden_act);
                Network::Mixture(Mixture::new(to, &path, width, mixture, act))
            }
        };
        let settings = settings.clone();
        Layer {
            first_norm,
            query,
            key,
            value,
            norms,
            attention,
            attention_output,
            attention_dense,
            second_norm,
            feed_forward,
            network,
            settings,
        }
    }

    /// x `[batch, seq, hidden]`, of the same shape.
    pub(super) fn forward(&self, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        let eps = self.settings.rms_norm_eps;
        let context = self.attend(&self.first_norm.rms_norm(x, eps, pass)?, seen, pass)?;
        let x = self.attention_output.sublayer(&context, x, pass, |context, pass| {
            self.attention_dense.linear(context, pass)
        })?;
        let normal = self.second_norm.rms_norm(&x, eps, pass)?;
        self.feed_forward.sublayer(&normal, &x, pass, |x, pass| match &self.network {
            Network::Gated { gate, up, down } => {
                let gate = self.settings.hidden_act.apply(&gate.linear(x, pass)?)?;
                down.linear(&gate.mul(&up.linear(x, pass)?)?, pass)
            }
            Network::Mixture(mixture) => mixture.forward(x, pass),
        })
    }

    fn attend(&self, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        let norms = self.norms.as_ref().map(|[query, key]| (query, key)).unzip();
        let projected = |place: &Place, norm: Option<&Place>| {
            let t = place.linear(x, pass)?;
            let t =
                norm.map_or(Ok(t.clone()), |n| n.rms_norm(&t, self.settings.rms_norm_eps, pass))?;
            self.settings.clip_qkv.map_or(Ok(t.clone()), |limit| t.clamp(-limit, limit))
        };
        let turned = |t: Tensor, heads| {
            let t = split(&t, heads)?;
            seen.rotation.as_ref().map_or_else(|| Ok(t.clone()), |r| r.apply(&t))
        };
        let (heads, groups) = (self.settings.num_attention_heads, self.settings.groups());
        let query = turned(projected(&self.query, norms.0)?, heads)?;
        let key = turned(projected(&self.key, norms.1)?, groups)?;
        let value = split(&projected(&self.value, None)?, groups)?;
        let drop = pass.dropout(&self.attention.site.path, self.settings.attention_dropout);
        let scale = (self.settings.head_width() as f64).sqrt().recip();
        attention(&self.attention, [query, key, value], seen, scale, drop, pass)
    }
}
