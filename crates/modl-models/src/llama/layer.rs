//! One layer of Llama: attention in groups of heads, or by latent vectors, and a gated feed-forward
//! network, or a mixture of them, each after a normalisation.

use modl_core::{Result, SiteKind, Tensor};

use super::LlamaConfig;
use super::latent::Latent;
use crate::attention::split;
use crate::decoder::{Seen, attention};
use crate::gated::Gated;
use crate::moe::Mixture;
use crate::place::{Pass, Place, Surveyor};

/// A layer with all its sites but its own.
#[derive(Debug)]
pub(super) struct Layer {
    number: usize,
    first_norm: Place,
    attention: Attention,
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
    Gated(Box<Gated>),
    Mixture(Box<Mixture>),
}

/// What stands in the attention sub-layer, but for its last linear layer.
#[derive(Debug)]
enum Attention {
    Grouped(Box<Grouped>),
    Latent(Box<Latent>),
}

/// Attention in groups of heads that share keys and values.
#[derive(Debug)]
struct Grouped {
    query: Place,
    key: Place,
    value: Place,
    /// Of queries and keys.
    norms: Option<[Place; 2]>,
    place: Place,
    settings: LlamaConfig,
}

impl Grouped {
    fn new(to: &mut Surveyor, path: &str, settings: &LlamaConfig) -> Self {
        use SiteKind::{Linear, Norm};
        let width = settings.hidden_size;
        let heads = settings.num_attention_heads * settings.head_width();
        let groups = settings.groups() * settings.head_width();
        let mut place = |name: &str, kind, input, output| {
            to.place(&format!("{path}{name}"), kind, input, output)
        };
        let query = place(".q_proj", Linear, width, heads);
        let key = place(".k_proj", Linear, width, groups);
        let value = place(".v_proj", Linear, width, groups);
        let norms = settings.query_norm.then(|| {
            let query = place(".q_norm", Norm, heads, heads);
            [query, place(".k_norm", Norm, groups, groups)]
        });
        let place = place("", SiteKind::Attention, groups, heads);
        Grouped { query, key, value, norms, place, settings: settings.clone() }
    }

    fn forward(&self, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
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
        let drop = pass.dropout(&self.place.site.path, self.settings.attention_dropout);
        let scale = (self.settings.head_width() as f64).sqrt().recip();
        attention(&self.place, [query, key, value], seen, scale, drop, pass)
    }
}

impl Layer {
    /// The layer of that `number` at `path`.
    pub(super) fn new(
        to: &mut Surveyor,
        path: &str,
        number: usize,
        settings: &LlamaConfig,
    ) -> Self {
        use SiteKind::{Linear, Norm, Sublayer};
        let (width, heads) = (settings.hidden_size, settings.values_width());
        let place = |to: &mut Surveyor, name: &str, kind, input, output| {
            to.place(&format!("{path}.{name}"), kind, input, output)
        };
        let first_norm = place(to, "input_layernorm", Norm, width, width);
        let own = format!("{path}.self_attn");
        let attention = match &settings.latent {
            None => Attention::Grouped(Box::new(Grouped::new(to, &own, settings))),
            Some(latent) => Attention::Latent(Box::new(Latent::new(to, &own, settings, latent))),
        };
        let attention_output = place(to, "self_attn.output", Sublayer, heads, width);
        let attention_dense = place(to, "self_attn.o_proj", Linear, heads, width);
        let second_norm = place(to, "post_attention_layernorm", Norm, width, width);
        let feed_forward = place(to, "mlp", Sublayer, width, width);
        let (path, act) = (format!("{path}.mlp"), settings.hidden_act);
        let network = match settings.mixture_at(number) {
            None => {
                let sizes = [width, settings.intermediate_size];
                Network::Gated(Box::new(Gated::new(to, &path, sizes, act)))
            }
            Some(mixture) => {
                Network::Mixture(Box::new(Mixture::new(to, &path, width, mixture, act)))
            }
        };
        let settings = settings.clone();
        Layer {
            number,
            first_norm,
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
        let normal = self.first_norm.rms_norm(x, eps, pass)?;
        let context = match &self.attention {
            Attention::Grouped(attention) => attention.forward(&normal, seen, pass),
            Attention::Latent(attention) => attention.forward(&normal, seen, pass),
        }?;
        let x = self.attention_output.sublayer(&context, x, pass, |context, pass| {
            self.attention_dense.linear(context, pass)
        })?;
        let normal = self.second_norm.rms_norm(&x, eps, pass)?;
        self.feed_forward.sublayer(&normal, &x, pass, |x, pass| match &self.network {
            Network::Gated(network) => network.forward(x, pass),
            Network::Mixture(mixture) => {
                let (y, logits) = mixture.forward(x, pass)?;
                seen.router_logits.note(self.number, &logits);
                Ok(y)
            }
        })
    }
}
