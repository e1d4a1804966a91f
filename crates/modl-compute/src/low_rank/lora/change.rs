//! LoRA as a module: one change of a weight, whatever kind of site the weight belongs to.

use modl_core::{Context, Host, LowRank, Module, Result, Signal, SiteKind, Tensor, Tensors};

use super::{A, B, BIAS, EMBEDDING_A, EMBEDDING_B, LoraInit};
use crate::dropout::Dropout;

/// LoRA at one site.
#[derive(Debug, Clone)]
pub(super) struct LoraChange {
    pub(super) kind: SiteKind,
    /// `[r, in]`, `[r, in ⁄ groups, kernel, kernel]`, or `[r, rows]` of a table.
    pub(super) a: Tensor,
    /// `[out, r]`, `[out, r, 1, 1]`, or `[dim, r]` of a table.
    pub(super) b: Tensor,
    /// `[out]`, scaled as B A is.
    pub(super) bias: Option<Tensor>,
    /// How it started.
    pub(super) init: LoraInit,
    /// A₀ and B₀ where the start is taken off again.
    pub(super) start: Option<(Tensor, Tensor)>,
    pub(super) scale: f64,
    pub(super) dropout: Dropout,
}

impl LoraChange {
    /// The change of the weight as it lies in θ; that of a convolution flattened to
    /// `[out, in ⁄ groups · kernel · kernel]`.
    fn factors(&self) -> Result<LowRank> {
        let (down, up) = match (&self.start, self.kind) {
            (_, SiteKind::Embedding) => (self.b.t()?, self.a.t()?),
            (_, SiteKind::Conv) => {
                let r = self.a.len_of(0);
                (self.a.reshape(&[r, -1])?, self.b.reshape(&[-1, r])?)
            }
            (None, _) => (self.a.clone(), self.b.clone()),
            (Some((a, b)), _) => (
                Tensor::cat(&[self.a.clone(), a.clone()], 0)?,
                Tensor::cat(&[self.b.clone(), b.neg()?], 1)?,
            ),
        };
        Ok(LowRank { down, up, scale: self.scale })
    }

    /// What is added to the output, as a thin tensor `[…, r]` and the matrix `[out, r]` that
    /// widens it; not for convolutions.
    fn thin(&self, f: &Host, x: &Signal, cx: &Context) -> Result<(Tensor, Tensor)> {
        // At a table x are ids.
        let kind = if self.kind == SiteKind::Embedding { f.kind(x) } else { x.x.kind() };
        let LowRank { down, up, scale } = self.factors()?;
        let (inner, up) = match self.kind {
            // Ids cannot be dropped.
            SiteKind::Embedding => (up.to_kind(kind)?.embedding(&x.x)?, down.t()?),
            _ => (self.dropout.apply(&x.x, cx)?.linear(&down.to_kind(kind)?, None)?, up),
        };
        // The thin side carries the factor: r columns instead of the full width.
        let inner = if scale == 1.0 { inner } else { inner.mul_scalar(scale)? };
        Ok((inner, up.to_kind(kind)?))
    }

    /// s times the bias, in `like`'s kind.
    fn scaled_bias(&self, like: &Tensor) -> Result<Option<Tensor>> {
        let scaled = |b: &Tensor| b.mul_scalar(self.scale)?.to_kind(like.kind());
        self.bias.as_ref().map(scaled).transpose()
    }

    /// The change of the parameters alone: f with them gives what is added to the output.
    fn change(&self, theta: &Tensors) -> Result<Tensors> {
        let w = theta.need("weight")?;
        let weight = self.factors()?.weight()?.reshape(&w.size())?.to_kind(w.kind())?;
        let bias = match (self.scaled_bias(w)?, theta.get("bias")) {
            (None, Some(own)) => Some(own.zeros_like()?),
            (bias, _) => bias,
        };
        let change = Tensors::new().with("weight", weight);
        Ok(bias.into_iter().fold(change, |t, b| t.with("bias", b)))
    }
}

impl Module for LoraChange {
    fn kind(&self) -> &'static str {
        "lora"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if self.kind == SiteKind::Conv && !self.dropout.active(cx) {
            let theta = self.compose(f.theta())?;
            return f.call_with(theta.as_ref().unwrap_or(f.theta()), x, cx);
        }
        let y = f.call(x, cx)?;
        if self.kind == SiteKind::Conv {
            let delta = self.delta(f, x, cx)?;
            let sum = delta.map_or_else(|| Ok(y.x.clone()), |d| y.x.add(&d))?;
            return Ok(y.replace(sum));
        }
        let (inner, up) = self.thin(f, x, cx)?;
        let sum = y.x.add_linear(&inner, &up)?;
        let sum = self.scaled_bias(&sum)?.map_or_else(|| Ok(sum.clone()), |b| sum.add(&b))?;
        Ok(y.replace(sum))
    }

    fn delta(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        if self.kind == SiteKind::Conv {
            let dropped = x.replace(self.dropout.apply(&x.x, cx)?);
            return Ok(Some(f.call_with(&self.change(f.theta())?, &dropped, cx)?.x));
        }
        let (inner, up) = self.thin(f, x, cx)?;
        inner.linear(&up, self.scaled_bias(&inner)?.as_ref()).map(Some)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        let delta = self.factors()?.weight()?.reshape(&w.size())?;
        // In the module's kind (f32), then rounded once.
        let sum = w.to_kind(delta.kind())?.add(&delta)?.to_kind(w.kind())?;
        let bias = match (self.scaled_bias(w)?, theta.get("bias")) {
            (Some(own), Some(bias)) => Some(bias.add(&own)?),
            (own, _) => own,
        };
        let changed = theta.clone().with("weight", sum);
        Ok(Some(bias.into_iter().fold(changed, |t, b| t.with("bias", b))))
    }

    fn low_rank(&self, cx: &Context) -> Option<LowRank> {
        let is_one = match self.kind {
            SiteKind::Conv => false,
            SiteKind::Embedding => true,
            _ => self.bias.is_none() && !self.dropout.active(cx),
        };
        is_one.then(|| self.factors().ok()).flatten()
    }

    fn phi(&self) -> Tensors {
        let (a, b) = names(self.kind);
        let phi = Tensors::new().with(a, self.a.clone()).with(b, self.b.clone());
        self.bias.iter().fold(phi, |phi, bias| phi.with(BIAS, bias.clone()))
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let (a, b) = names(self.kind);
        let bias = self.bias.as_ref().map(|_| phi.need(BIAS).cloned()).transpose()?;
        let (a, b) = (phi.need(a)?.clone(), phi.need(b)?.clone());
        Ok(Box::new(LoraChange { a, b, bias, ..self.clone() }))
    }

    fn signature(&self) -> String {
        let bias = if self.bias.is_some() { ", bias" } else { "" };
        // Two modules with the same start at the same weight have the same A₀ and B₀.
        let start = match self.start {
            Some(_) => format!(", {:?}", self.init),
            None => String::new(),
        };
        let (a, b) = (self.a.size(), self.b.size());
        format!("lora({a:?}, {b:?}, scale {}{bias}{start})", self.scale)
    }
}

/// The names of A and B at a kind of site.
pub(super) fn names(kind: SiteKind) -> (&'static str, &'static str) {
    if kind == SiteKind::Embedding { (EMBEDDING_A, EMBEDDING_B) } else { (A, B) }
}
