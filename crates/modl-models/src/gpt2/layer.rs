//! One layer of GPT-2: attention and a feed-forward network, each after a layer normalisation.

use modl_core::{Error, Result, SiteKind, Tensor};

use super::Gpt2Config;
use crate::attention::split;
use crate::decoder::{Seen, attention};
use crate::dropout::dropout;
use crate::place::{Pass, Place, Surveyor};

/// A layer with all its sites but its own.
#[derive(Debug)]
pub(super) struct Layer {
    first_norm: Place,
    qkv: Place,
    attention: Place,
    attention_output: Place,
    attention_dense: Place,
    second_norm: Place,
    feed_forward: Place,
    inner: Place,
    outer: Place,
    scale: f64,
    settings: Gpt2Config,
}

impl Layer {
    pub(super) fn new(to: &mut Surveyor, path: &str, n: usize, settings: &Gpt2Config) -> Self {
        use SiteKind::{Attention, Linear, Norm, Sublayer};
        let (width, inner) = (settings.n_embd, settings.inner_width());
        let mut place = |name: &str, kind, input, output| {
            to.place(&format!("{path}.{name}"), kind, input, output)
        };
        Layer {
            first_norm: place("ln_1", Norm, width, width),
            qkv: place("attn.c_attn", Linear, width, 3 * width),
            attention: place("attn", Attention, width, width),
            attention_output: place("attn.output", Sublayer, width, width),
            attention_dense: place("attn.c_proj", Linear, width, width),
            second_norm: place("ln_2", Norm, width, width),
            feed_forward: place("mlp", Sublayer, width, width),
            inner: place("mlp.c_fc", Linear, width, inner),
            outer: place("mlp.c_proj", Linear, inner, width),
            scale: settings.scale(n),
            settings: settings.clone(),
        }
    }

    /// x `[batch, seq, n_embd]`, of the same shape.
    pub(super) fn forward(&self, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        let eps = self.settings.layer_norm_epsilon;
        let residual =
            |place: &Place, pass: Pass| pass.dropout(&place.site.path, self.settings.resid_pdrop);
        let context = self.attend(&self.first_norm.layer_norm(x, eps, pass)?, seen, pass)?;
        let x = self.attention_output.sublayer(&context, x, pass, |context, pass| {
            dropout(
                self.attention_dense.conv1d(context, pass)?,
                residual(&self.attention_output, pass),
            )
        })?;
        let normal = self.second_norm.layer_norm(&x, eps, pass)?;
        self.feed_forward.sublayer(&normal, &x, pass, |x, pass| {
            let inner = self.settings.activation_function.apply(&self.inner.conv1d(x, pass)?)?;
            dropout(self.outer.conv1d(&inner, pass)?, residual(&self.feed_forward, pass))
        })
    }

    fn attend(&self, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        let qkv = self.qkv.conv1d(x, pass)?;
        let width = self.settings.n_embd;
        if qkv.len_of(-1) != 3 * width {
            return Err(Error::invalid(&self.qkv.site.path, format!("modules made {qkv:?}")));
        }
        let part = |n| split(&qkv.narrow(-1, n * width, width)?, self.settings.n_head);
        let drop = pass.dropout(&self.attention.site.path, self.settings.attn_pdrop);
        let all = [part(0)?, part(1)?, part(2)?];
        attention(&self.attention, all, seen, self.scale, drop, pass)
    }
}
