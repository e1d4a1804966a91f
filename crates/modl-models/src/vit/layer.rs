//! One layer of ViT: attention and a feed-forward network, each of a normalised copy of the residual
//! stream and added to it.

use modl_core::{Error, Result, ResultExt, SiteKind, Tensor};

use super::VitConfig;
use crate::attention::split;
use crate::dropout::dropout;
use crate::place::{Pass, Place, Surveyor};

/// A layer with all its sites.
#[derive(Debug)]
pub(super) struct Layer {
    block: Place,
    first_norm: Place,
    query: Place,
    key: Place,
    value: Place,
    attention: Place,
    attention_output: Place,
    attention_dense: Place,
    second_norm: Place,
    feed_forward: Place,
    inner: Place,
    outer: Place,
    settings: VitConfig,
}

impl Layer {
    pub(super) fn new(to: &mut Surveyor, path: &str, settings: &VitConfig) -> Self {
        use SiteKind::{Attention, Block, Linear, Norm, Sublayer};
        let (width, inner) = (settings.hidden_size, settings.intermediate_size);
        let block = to.place(path, Block, width, width);
        let mut place = |name: &str, kind, input, output| {
            to.place(&format!("{path}.{name}"), kind, input, output)
        };
        Layer {
            block,
            first_norm: place("layernorm_before", Norm, width, width),
            query: place("attention.q_proj", Linear, width, width),
            key: place("attention.k_proj", Linear, width, width),
            value: place("attention.v_proj", Linear, width, width),
            attention: place("attention", Attention, width, width),
            attention_output: place("attention.output", Sublayer, width, width),
            attention_dense: place("attention.o_proj", Linear, width, width),
            second_norm: place("layernorm_after", Norm, width, width),
            feed_forward: place("mlp", Sublayer, width, width),
            inner: place("mlp.fc1", Linear, width, inner),
            outer: place("mlp.fc2", Linear, inner, width),
            settings: settings.clone(),
        }
    }

    /// x `[batch, seq, hidden]` under `mask` `[batch, seq]`, which is `hidden_keys` as it is added
    /// to scores.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        mask: &Tensor,
        hidden_keys: Option<&Tensor>,
        pass: Pass,
    ) -> Result<Tensor> {
        self.block
            .masked_block(x, mask, hidden_keys, pass, |x, keys, pass| self.inner(x, keys, pass))
    }

    fn inner(&self, x: &Tensor, hidden_keys: Option<&Tensor>, pass: Pass) -> Result<Tensor> {
        let VitConfig { layer_norm_eps: eps, hidden_dropout_prob: p, hidden_act, .. } =
            &self.settings;
        let residual = |place: &Place, pass: Pass| pass.dropout(&place.site.path, *p);
        let normal = self.first_norm.layer_norm(x, *eps, pass)?;
        let context = self.attend(&normal, hidden_keys, pass)?;
        let x = self.attention_output.sublayer(&context, x, pass, |context, pass| {
            let y = self.attention_dense.linear(context, pass)?;
            dropout(y, residual(&self.attention_output, pass))
        })?;
        let normal = self.second_norm.layer_norm(&x, *eps, pass)?;
        self.feed_forward.sublayer(&normal, &x, pass, |x, pass| {
            let inner = self.inner.linear_then(x, pass, *hidden_act)?;
            dropout(self.outer.linear(&inner, pass)?, residual(&self.feed_forward, pass))
        })
    }

    /// Self-attention of x `[batch, seq, hidden]`, of the same shape.
    fn attend(&self, x: &Tensor, hidden_keys: Option<&Tensor>, pass: Pass) -> Result<Tensor> {
        if x.dim() != 3 {
            let problem =
                format!("hidden states of shape {:?}, not [batch, seq, hidden]", x.size());
            return Err(Error::invalid(&self.block.site.path, problem));
        }
        let part = |place: &Place| {
            split(&place.linear(x, pass)?, self.settings.num_attention_heads).at(&place.site.path)
        };
        let all = [part(&self.query)?, part(&self.key)?, part(&self.value)?];
        let path = &self.attention.site.path;
        let drop = pass.dropout(path, self.settings.attention_probs_dropout_prob);
        let scale = (self.settings.head_width() as f64).sqrt().recip();
        let context = self.attention.attend(all, hidden_keys, scale, drop, pass)?;
        context.transpose(1, 2)?.reshape(&x.size()).at(path)
    }
}
