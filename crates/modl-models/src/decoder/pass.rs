//! A pass of a decoder, whole or layer by layer.

use modl_core::{
    Context, Error, HostFn, Kind, Layers, Result, ResultExt, Segments, Signal, Tensor, Tensors,
};

use super::{Architecture, Decoder, Seen};
use crate::mask::with_mask;
use crate::moe::RouterLogits;
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
        let mut seen = self.0.seen(x.with.need("mask")?, x.with.need("positions")?, cx)?;
        let blocks = &self.0.decoder().blocks;
        // Tokens come one by one where there is a cache, and have no loss.
        let wanted = self.0.mixture().filter(|m| m.router_logits && cx.cache().is_none());
        if wanted.is_some() {
            seen.router_logits = RouterLogits::wanted();
        }
        for (n, block) in blocks.iter().enumerate() {
            x.x = self.run_block(n, block, &x.x, &seen, pass)?;
        }
        let mut outputs = self.leave(&x, inputs, layers, cx)?;
        if let Some(mixture) = wanted {
            let own = seen.router_logits.outputs(blocks.len(), mixture, &seen.mask)?;
            own.iter().for_each(|(name, t)| outputs.set(name.to_owned(), t.clone()));
        }
        Ok(outputs)
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
        let seen = self.0.seen(x.with.need("mask")?, x.with.need("positions")?, cx)?;
        let block = self.0.decoder().blocks.get(n);
        let block = block.ok_or_else(|| Error::invalid("segment", format!("{n} is not there")))?;
        Ok(x.replace(self.run_block(n, block, &x.x, &seen, Pass { layers, cx })?))
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
        if let Some(cache) = cx.cache() {
            cache.commit(mask)?;
        }
        Ok(outputs)
    }
}
