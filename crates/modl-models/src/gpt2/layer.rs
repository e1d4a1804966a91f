//! One layer of GPT-2: attention and a feed-forward network, each of a normalised copy of the
//! residual stream and added to it.

use modl_core::{Error, Result, ResultExt, SiteKind, Tensor};

use super::{Gpt2Config, out_in};
use crate::decoder::{Stream, join_heads, split_heads};
use crate::dropout::dropout;
use crate::place::{Pass, Place, Surveyor};

/// A layer with all its sites.
#[derive(Debug)]
pub(super) struct Layer {
    block: Place,
    attention_norm: Place,
    projections: Place,
    attention: Place,
    attention_output: Place,
    out: Place,
    feed_norm: Place,
    feed: Place,
    into: Place,
    down: Place,
    settings: Gpt2Config,
}

impl Layer {
    pub(super) fn new(to: &mut Surveyor, path: &str, settings: &Gpt2Config) -> Result<Self> {
        use SiteKind::{Attention, Block, Linear, Norm, Sublayer};
        let (width, inner) = (settings.n_embd, settings.inner_width());
        let mut at = |name: &str, kind, input, output| {
            let end = if name.is_empty() { String::new() } else { format!(".{name}") };
            out_in(to.place(&format!("{path}{end}"), kind, input, output))
        };
        Ok(Layer {
            block: at("", Block, width, width)?,
            attention_norm: at("ln_1", Norm, width, width)?,
            projections: at("attn.c_attn", Linear, width, 3 * width)?,
            attention: at("attn", Attention, width, width)?,
            attention_output: at("attn.output", Sublayer, width, width)?,
            out: at("attn.c_proj", Linear, width, width)?,
            feed_norm: at("ln_2", Norm, width, width)?,
            feed: at("mlp", Sublayer, width, width)?,
            into: at("mlp.c_fc", Linear, width, inner)?,
            down: at("mlp.c_proj", Linear, inner, width)?,
            settings: settings.clone(),
        })
    }

    /// The next hidden states, where `hidden` is added to the scores.
    pub(super) fn forward(&self, stream: &Stream, hidden: &Tensor, pass: Pass) -> Result<Tensor> {
        self.block.block(stream, hidden, pass, |own, hidden, pass| self.inner(&own.x, hidden, pass))
    }

    fn inner(&self, x: &Tensor, hidden: &Tensor, pass: Pass) -> Result<Tensor> {
        let (eps, p) = (self.settings.layer_norm_epsilon, self.settings.resid_pdrop);
        let normed = self.attention_norm.layer_norm(x, eps, pass)?;
        let context = self.attend(&normed, hidden, pass)?;
        let drop = |y: Tensor, place: &Place, pass: Pass| {
            dropout(y, pass.dropout(&format!("{}.dropout", place.site.path), p))
        };
        let x = self.attention_output.add(x, context, pass, |c, pass| {
            drop(self.out.linear(c, pass)?, &self.attention_output, pass)
        })?;
        let normed = self.feed_norm.layer_norm(&x, eps, pass)?;
        self.feed.add(&x, normed, pass, |x, pass| {
            let inner = self.settings.activation_function.apply(&self.into.linear(x, pass)?)?;
            drop(self.down.linear(&inner, pass)?, &self.feed, pass)
        })
    }

    fn attend(&self, x: &Tensor, hidden: &Tensor, pass: Pass) -> Result<Tensor> {
        let (width, heads) = (self.settings.n_embd, self.settings.n_head);
        let all = self.projections.linear(x, pass)?;
        if all.dim() != 3 || all.len_of(2) != 3 * width {
            let problem = format!("gives {all:?}, wanted are {} columns", 3 * width);
            return Err(Error::invalid(&self.projections.site.path, problem));
        }
        let part = |i: i64| split_heads(&all.narrow(2, i * width, width)?, heads);
        let at = |r: Result<Tensor>| r.at(&self.projections.site.path);
        let parts = [at(part(0))?, at(part(1))?, at(part(2))?];
        let scale = ((width / heads) as f64).sqrt().recip();
        let draw = format!("{}.dropout", self.attention.site.path);
        let drop = pass.dropout(&draw, self.settings.attn_pdrop);
        join_heads(&self.attention.attend(parts, Some(hidden), scale, drop, pass)?)
            .at(&self.attention.site.path)
    }
}
