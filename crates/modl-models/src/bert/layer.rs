//! One layer of BERT's encoder: attention and a feed-forward network, each followed by dropout, the
//! residual connection and a layer normalisation.

use modl_core::{Error, HostFn, Result, ResultExt, Signal, SiteKind, Tensor, Tensors};

use super::BertConfig;
use crate::dropout::dropout;
use crate::place::{Pass, Place, Surveyor};

/// A dense layer with dropout (the site), the residual connection and a normalisation.
#[derive(Debug)]
struct Sublayer {
    place: Place,
    dense: Place,
    norm: Place,
    /// Where its dropout draws from.
    draw: String,
    dropout: f64,
    eps: f64,
}

impl Sublayer {
    fn new(to: &mut Surveyor, path: &str, input: i64, settings: &BertConfig) -> Self {
        let width = settings.hidden_size;
        Sublayer {
            place: to.place(path, SiteKind::Sublayer, input, width),
            dense: to.place(&format!("{path}.dense"), SiteKind::Linear, input, width),
            norm: to.place(&format!("{path}.LayerNorm"), SiteKind::Norm, width, width),
            draw: format!("{path}.dropout"),
            dropout: settings.hidden_dropout_prob,
            eps: settings.layer_norm_eps,
        }
    }

    /// x `[batch, seq, input]`, residual `[batch, seq, hidden]` → `[batch, seq, hidden]`.
    fn forward(&self, x: &Tensor, residual: &Tensor, pass: Pass) -> Result<Tensor> {
        if !self.place.modular(pass) {
            return self.normalise(&self.inner(x, pass)?, residual, pass);
        }
        let inner: &HostFn = &|_, x, cx| Ok(x.replace(self.inner(&x.x, pass.of(cx))?));
        let norm: &HostFn = &|_, h, cx| {
            Ok(h.replace(self.normalise(&h.x, h.with.need("residual")?, pass.of(cx))?))
        };
        let with = Tensors::new().with("residual", residual.clone());
        let x = Signal { x: x.clone(), with };
        let Place { site, theta } = &self.place;
        let h = pass.layers.run_staged(site, theta, &x, pass.cx, inner, &[("norm", norm)])?;
        self.normalise(&h.x, residual, pass)
    }

    fn inner(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        dropout(self.dense.linear(x, pass)?, pass.dropout(&self.draw, self.dropout))
    }

    fn normalise(&self, h: &Tensor, residual: &Tensor, pass: Pass) -> Result<Tensor> {
        self.norm.layer_norm(&h.add(residual)?, self.eps, pass)
    }
}

/// A layer with all its sites.
#[derive(Debug)]
pub(super) struct Layer {
    block: Place,
    query: Place,
    key: Place,
    value: Place,
    attention: Place,
    attention_output: Sublayer,
    intermediate: Place,
    output: Sublayer,
    /// Where the dropout of attention probabilities draws from.
    draw: String,
    settings: BertConfig,
}

impl Layer {
    pub(super) fn new(to: &mut Surveyor, path: &str, settings: &BertConfig) -> Self {
        let (width, inner) = (settings.hidden_size, settings.intermediate_size);
        let attention = format!("{path}.attention.self");
        let block = to.place(path, SiteKind::Block, width, width);
        let mut projection =
            |name| to.place(&format!("{attention}.{name}"), SiteKind::Linear, width, width);
        Layer {
            block,
            query: projection("query"),
            key: projection("key"),
            value: projection("value"),
            attention: to.place(&attention, SiteKind::Attention, width, width),
            attention_output: {
                Sublayer::new(to, &format!("{path}.attention.output"), width, settings)
            },
            intermediate: {
                to.place(&format!("{path}.intermediate.dense"), SiteKind::Linear, width, inner)
            },
            output: Sublayer::new(to, &format!("{path}.output"), inner, settings),
            draw: format!("{attention}.dropout"),
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
        let context = self.attend(x, hidden_keys, pass)?;
        let x = self.attention_output.forward(&context, x, pass)?;
        let inner = self.intermediate.linear_then(&x, pass, self.settings.hidden_act)?;
        self.output.forward(&inner, &x, pass)
    }

    /// Self-attention of x `[batch, seq, hidden]`, of the same shape.
    fn attend(&self, x: &Tensor, hidden_keys: Option<&Tensor>, pass: Pass) -> Result<Tensor> {
        let size = x.size();
        let &[batch, seq, width] = size.as_slice() else {
            let problem = format!("hidden states of shape {size:?}, not [batch, seq, hidden]");
            return Err(Error::invalid(&self.block.site.path, problem));
        };
        let heads = [batch, seq, self.settings.num_attention_heads, self.settings.head_width()];
        let split = |place: &Place| {
            place.linear(x, pass)?.reshape(&heads)?.transpose(1, 2).at(&place.site.path)
        };
        let (query, key, value) = (split(&self.query)?, split(&self.key)?, split(&self.value)?);
        let drop = pass.dropout(&self.draw, self.settings.attention_probs_dropout_prob);
        let scale = (self.settings.head_width() as f64).sqrt().recip();
        let context = self.attention.attend([query, key, value], hidden_keys, scale, drop, pass)?;
        context.transpose(1, 2)?.reshape(&[batch, seq, width]).at(&self.attention.site.path)
    }
}
