//! The encoder or the decoder: words, blocks, a last normalisation.

use modl_core::{
    Context, Error, HostFn, Layers, Result, ResultExt, Signal, SiteKind, Tensor, Tensors,
};

use super::bias::Buckets;
use super::block::Block;
use super::switch;
use super::view::{Bias, View};
use super::{T5Config, TABLE, WORDS, table_of_words};
use crate::dropout::dropout;
use crate::moe::RouterLogits;
use crate::place::{Pass, Place, Surveyor};

/// A stack with all its sites.
#[derive(Debug)]
pub(super) struct Stack {
    name: &'static str,
    words: Place,
    tokens: Place,
    blocks: Vec<Block>,
    norm: Place,
    bias: Bias,
    settings: T5Config,
}

/// What a stack made of its input.
#[derive(Debug)]
pub(super) struct States {
    /// `[batch, seq, d_model]`, where modules may have lengthened the sequence.
    pub(super) hidden: Tensor,
    /// `[batch, seq]` in the kind of the hidden states.
    pub(super) mask: Tensor,
    /// What its routers said.
    pub(super) routed: Tensors,
}

impl Stack {
    /// The decoder where it is `causal`.
    pub(super) fn new(to: &mut Surveyor, causal: bool, settings: &T5Config) -> Result<Self> {
        let (name, layers) = match causal {
            true => ("decoder", settings.decoder_layers()),
            false => ("encoder", settings.num_layers),
        };
        let (rows, width) = (settings.vocab_size, settings.d_model);
        let words =
            table_of_words(to, &format!("{name}.{WORDS}"), SiteKind::Embedding, [rows, width]);
        let tokens = to.place(name, SiteKind::Tokens, width, width);
        let blocks = (0..layers)
            .map(|i| Block::new(to, name, (causal, i), settings))
            .collect::<Result<_>>()?;
        Ok(Stack {
            name,
            words,
            tokens,
            blocks,
            norm: to.place(&format!("{name}.final_layer_norm"), SiteKind::Norm, width, width),
            bias: Bias {
                table: to.params.get(&format!("{name}.block.0.{TABLE}.weight"))?.clone(),
                buckets: Buckets::new(settings, !causal),
                causal,
            },
            settings: settings.clone(),
        })
    }

    /// Ids `[batch, seq]` with `mask` `[batch, seq]`; in the decoder over the encoder's states.
    pub(super) fn forward(
        &self,
        ids: &Tensor,
        mask: Tensor,
        encoder: Option<&States>,
        layers: &Layers,
        cx: &Context,
    ) -> Result<States> {
        let given = cx.clone().with_feature("mask", mask.clone());
        let (mut x, mut with) = self.embed(ids, mask, Pass { layers, cx: &given })?;
        let mask = with.need("mask")?.clone();
        let cx = &cx.clone().with_feature("mask", mask.clone());
        let pass = Pass { layers, cx };
        if let Some(States { hidden, mask, .. }) = encoder {
            with.set("encoder_hidden_states", hidden.clone());
            with.set("encoder_attention_mask", mask.clone());
        }
        let mut view = View::new(&self.bias, with).at(self.name)?;
        let wanted = self.settings.switch.as_ref().is_some_and(|s| s.router_logits);
        if wanted {
            view.router_logits = RouterLogits::wanted();
        }
        for block in &self.blocks {
            x = block.forward(&x, &view, pass)?;
        }
        let x = self.norm.rms_norm(&x, self.settings.layer_norm_epsilon, pass)?;
        let routed = match wanted {
            true => switch::outputs(self.name, &view.router_logits, &mask)?,
            false => Tensors::new(),
        };
        Ok(States { hidden: self.dropout(x, "final_layer_norm", pass)?, mask, routed })
    }

    /// The first hidden states `[batch, seq, d_model]` with their `mask` and `positions`.
    fn embed(&self, ids: &Tensor, mask: Tensor, pass: Pass) -> Result<(Tensor, Tensors)> {
        let x = self.words.embedding(ids, pass)?;
        let positions = Tensor::arange(ids.len_of(1), ids.device())?.unsqueeze(0)?;
        if !self.tokens.modular(pass) {
            let with = Tensors::new().with("mask", mask).with("positions", positions);
            return Ok((self.dropout(x, WORDS, pass)?, with));
        }
        let host: &HostFn =
            &|_, s, cx| Ok(s.replace(self.dropout(s.x.clone(), WORDS, pass.of(cx))?));
        let positions = positions.expand(&ids.size())?;
        let with = Tensors::new().with("mask", mask).with("positions", positions);
        let Signal { x, with } = self.tokens.run(&Signal { x, with }, pass, host)?;
        for name in ["mask", "positions"] {
            let (hidden, found) = (x.size(), with.need(name).at(self.name)?.size());
            if hidden.len() != 3 || hidden.get(..2) != Some(found.as_slice()) {
                let problem =
                    format!("modules made hidden states {hidden:?} with {name} {found:?}");
                return Err(Error::invalid(self.name, problem));
            }
        }
        Ok((x, with))
    }

    /// Dropout that draws for the place `after`.
    fn dropout(&self, x: Tensor, after: &str, pass: Pass) -> Result<Tensor> {
        let draw = format!("{}.{after}.dropout", self.name);
        dropout(x, pass.dropout(&draw, self.settings.dropout_rate))
    }
}
