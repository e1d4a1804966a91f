//! What decoders have in common: the first hidden states with their companions, sub-layers before
//! the residual connection, and the table of words as head.

use modl_core::{Error, HostFn, Result, ResultExt, Signal, Tensor, Tensors};

use crate::mask::causal;
use crate::place::{Pass, Place};

/// Hidden states and where they stand.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    /// `[batch, seq, hidden]`.
    pub(crate) x: Tensor,
    /// `[batch, seq]`, 1 for real tokens.
    pub(crate) mask: Tensor,
    /// `[batch, seq]` i64.
    pub(crate) positions: Tensor,
}

impl Stream {
    /// A stream and its companions as they go through a site.
    pub(crate) fn signal(&self) -> Result<Signal> {
        let positions = self.positions.expand(&self.mask.size())?;
        let with = Tensors::new().with("mask", self.mask.clone()).with("positions", positions);
        Ok(Signal { x: self.x.clone(), with })
    }

    pub(crate) fn from_signal(s: Signal) -> Result<Self> {
        let (mask, positions) = (s.with.need("mask")?.clone(), s.with.need("positions")?.clone());
        Ok(Stream { x: s.x, mask, positions })
    }

    /// What is added to the scores, `[batch, 1, seq, seq]`.
    pub(crate) fn causal(&self) -> Result<Tensor> {
        causal(&self.mask, self.mask.len_of(1))
    }
}

impl Place {
    /// The first hidden states at a tokens site: `f` makes them of vectors at positions.
    pub(crate) fn first(
        &self,
        x: Tensor,
        mask: Tensor,
        pass: Pass,
        f: impl Fn(&Tensor, &Tensor, Pass) -> Result<Tensor>,
    ) -> Result<Stream> {
        let positions = Tensor::arange(x.len_of(1), x.device())?.unsqueeze(0)?;
        let first = Stream { x, mask, positions };
        if !self.modular(pass) {
            let x = f(&first.x, &first.positions, pass).at(&self.site.path)?;
            return Ok(Stream { x, ..first });
        }
        let host: &HostFn =
            &|_, s, cx| Ok(s.replace(f(&s.x, s.with.need("positions")?, pass.of(cx))?));
        let y = Stream::from_signal(self.run(&first.signal()?, pass, host)?)?;
        let (hidden, covered) = (y.x.size(), y.mask.size());
        if hidden.get(..2) != Some(covered.as_slice()) || y.positions.size() != covered {
            let problem = format!("modules made hidden states {hidden:?} with a mask {covered:?}");
            return Err(Error::invalid(&self.site.path, problem));
        }
        Ok(y)
    }

    /// A block: `f` takes the stream and what is added to the scores.
    pub(crate) fn block(
        &self,
        stream: &Stream,
        hidden: &Tensor,
        pass: Pass,
        f: impl Fn(&Stream, &Tensor, Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !self.modular(pass) {
            return f(stream, hidden, pass);
        }
        // Modules may send some of the rows only, so that all is read from the signal.
        let host: &HostFn = &|_, s, cx| {
            let own = Stream::from_signal(s.clone())?;
            let hidden = own.causal()?;
            Ok(s.replace(f(&own, &hidden, pass.of(cx))?))
        };
        Ok(self.run(&stream.signal()?, pass, host)?.x)
    }

    /// residual + f(x), where f is the sub-layer at this place.
    pub(crate) fn add(
        &self,
        residual: &Tensor,
        x: Tensor,
        pass: Pass,
        f: impl Fn(&Tensor, Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !self.modular(pass) {
            return residual.add(&f(&x, pass)?).at(&self.site.path);
        }
        let host: &HostFn = &|_, s, cx| Ok(s.replace(f(&s.x, pass.of(cx))?));
        let with = Tensors::new().with("residual", residual.clone());
        residual.add(&self.run(&Signal { x, with }, pass, host)?.x).at(&self.site.path)
    }
}

/// `[batch, seq, heads · d]` → `[batch, heads, seq, d]`.
pub(crate) fn split_heads(x: &Tensor, heads: i64) -> Result<Tensor> {
    let width = x.len_of(2) / heads;
    x.reshape(&[x.len_of(0), x.len_of(1), heads, width])?.transpose(1, 2)
}

/// `[batch, heads, seq, d]` → `[batch, seq, heads · d]`.
pub(crate) fn join_heads(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, seq, width) = (x.len_of(0), x.len_of(1), x.len_of(2), x.len_of(3));
    x.transpose(1, 2)?.reshape(&[batch, seq, heads * width])
}
