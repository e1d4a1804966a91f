//! A pass of a decoder, whole or layer by layer.

use modl_core::{
    Context, Error, HostFn, Kind, Layers, Result, ResultExt, Segments, Signal, Tensor, Tensors,
};

use super::{Architecture, Decoder, Seen};
use crate::mask::with_mask;
use crate::moe::{MixtureConfig, RouterLogits};
use crate::place::{Pass, Place};

/// A pass of a decoder.
#[derive(Debug)]
pub(crate) struct DecoderPass<'a>(pub(crate) &'a dyn Architecture);

impl DecoderPass<'_> {
    pub(crate) fn forward(
        &self,
        inputs: &Tensors,
        layers: &Layers,
        cx: &Context,
    ) -> Result<Tensors> {
        let mut x = self.enter(inputs, layers, cx)?;
        let cx = &with_mask(&x, cx)?;
        let pass = Pass { layers, cx };
        let seen = self.seen(&x, cx)?;
        for (n, block) in self.0.decoder().blocks.iter().enumerate() {
            x.x = self.run_block(n, block, &x.x, &seen, pass)?;
        }
        seen.router_logits.say(cx);
        self.leave(&x, inputs, layers, cx)
    }

    /// The mixtures' settings, where somebody wants to know what their routers say. Tokens come one
    /// by one where there is a cache, and have no loss.
    fn wanted(&self, cx: &Context) -> Option<&MixtureConfig> {
        self.0.mixture().filter(|m| m.router_logits && cx.cache().is_none())
    }

    fn seen(&self, x: &Signal, cx: &Context) -> Result<Seen> {
        let seen = self.0.seen(x.with.need("mask")?, x.with.need("positions")?, cx)?;
        Ok(match self.wanted(cx) {
            Some(_) => Seen { router_logits: RouterLogits::wanted(), ..seen },
            None => seen,
        })
    }

    /// The first hidden states with their `mask` and `positions`, longer where a module puts tokens
    /// in.
    fn embed(&self, ids: &Tensor, mask: Tensor, positions: Tensor, pass: Pass) -> Result<Signal> {
        let Decoder { words, tokens, .. } = self.0.decoder();
        let x = words.embedding(ids, pass)?;
        let path = &tokens.site.path;
        let host: &HostFn = &|theta, s, cx| {
            let positions = s.with.need("positions")?;
            Ok(s.replace(self.0.place_tokens(theta, &s.x, positions, pass.of(cx)).at(path)?))
        };
        let with = Tensors::new().with("mask", mask).with("positions", positions);
        let y = tokens.run(&Signal { x, with }, pass, host)?;
        let (hidden, mask) = (y.x.size(), y.with.need("mask").at(path)?.size());
        let places = y.with.need("positions").at(path)?.size();
        if hidden.len() != 3 || hidden.get(..2) != Some(mask.as_slice()) || mask != places {
            let problem = format!(
                "modules made hidden states {hidden:?}, mask {mask:?}, positions {places:?}"
            );
            return Err(Error::invalid(path, problem));
        }
        Ok(y)
    }

    fn run_block(
        &self,
        n: usize,
        block: &Place,
        x: &Tensor,
        seen: &Seen,
        pass: Pass,
    ) -> Result<Tensor> {
        if !block.modular(pass) {
            return self.0.layer(n, x, seen, pass);
        }
        let host: &HostFn = &|_, s, cx| {
            let router_logits = seen.router_logits.clone();
            let seen = self.0.seen(s.with.need("mask")?, s.with.need("positions")?, cx)?;
            let seen = Seen { router_logits, ..seen };
            Ok(s.replace(self.0.layer(n, &s.x, &seen, pass.of(cx))?))
        };
        let with = Tensors::new()
            .with("mask", seen.mask.clone())
            .with("positions", seen.positions.clone());
        Ok(block.run(&Signal { x: x.clone(), with }, pass, host)?.x)
    }
}

impl Segments for DecoderPass<'_> {
    fn segments(&self) -> usize {
        self.0.decoder().blocks.len()
    }

    fn enter(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Signal> {
        let (ids, mask, positions) = self.0.decoder().read(inputs, cx.past())?;
        if let Some(cache) = cx.cache() {
            cache.begin(ids.len_of(0))?;
        }
        let given = cx.clone().with_feature("mask", mask.clone());
        self.embed(&ids, mask, positions, Pass { layers, cx: &given })
    }

    fn segment(&self, n: usize, x: &Signal, layers: &Layers, cx: &Context) -> Result<Signal> {
        let cx = &with_mask(x, cx)?;
        let seen = self.seen(x, cx)?;
        let block = self.0.decoder().blocks.get(n);
        let block = block.ok_or_else(|| Error::invalid("segment", format!("{n} is not there")))?;
        let y = self.run_block(n, block, &x.x, &seen, Pass { layers, cx })?;
        seen.router_logits.say(cx);
        Ok(x.replace(y))
    }

    fn leave(
        &self,
        x: &Signal,
        inputs: &Tensors,
        layers: &Layers,
        cx: &Context,
    ) -> Result<Tensors> {
        let pass = Pass { layers, cx: &with_mask(x, cx)? };
        let mask = x.with.need("mask")?;
        let x = self.0.normalise(&x.x, pass)?;
        let mut outputs = Tensors::new().with("last_hidden_state", x.clone());
        if let Some(head) = &self.0.decoder().head {
            outputs.set("logits", head.linear(&x, pass)?);
        }
        if mask.size() != inputs.need("input_ids")?.size() {
            outputs.set("attention_mask", mask.to_kind(Kind::Int64)?);
        }
        if let Some(mixture) = self.wanted(cx) {
            let blocks = self.0.decoder().blocks.len();
            let own = RouterLogits::said(cx).outputs(blocks, mixture, mask)?;
            own.iter().for_each(|(name, t)| outputs.set(name.to_owned(), t.clone()));
        }
        if let Some(cache) = cx.cache() {
            cache.commit(mask)?;
        }
        Ok(outputs)
    }
}
