//! A sparse difference: θ' = θ + m ⊙ δ with a fixed mask m over a trained δ.
//!
//! Off the mask θ' is θ bit for bit and δ has no gradient; differences with disjoint masks add up
//! in any order. LT-SFT and the FISH mask choose m in their own ways. Survey §3.1.

use modl_core::{
    Attachment, Context, Init, Kind, Module, ParamStore, Result, Scope, Tensor, Tensors, no_grad,
};

use super::full::{Form, effective, learned};
use super::top_k::{share, top_k_across};

/// The parts under which a site keeps its tensors: `SITE.delta.weight`.
pub(super) const DELTA: &str = "delta";
pub(super) const MASK: &str = "mask";

/// θ + m ⊙ δ at one site.
#[derive(Debug)]
pub(super) struct Masked {
    kind: &'static str,
    /// By θ's names.
    delta: Tensors,
    /// Bool, by θ's names.
    mask: Tensors,
    /// λ ⁄ N with N over all sites; N is not known before the last site is built.
    penalty: Option<(f64, Tensor)>,
}

impl Masked {
    /// A difference of all that is learned at the site, δ = 0, with nothing masked out. `l1` is λ of
    /// the penalty (λ ⁄ N) Σ |m ⊙ δ|.
    pub(super) fn new(
        kind: &'static str,
        l1: f64,
        at: &Attachment,
        scope: &mut Scope,
    ) -> Result<Self> {
        let theta = learned(at, |_| true)?;
        let mut deltas = scope.sub(DELTA);
        let delta = theta.map(|n, t| deltas.param(n, &t.size(), Init::Zeros))?;
        let mask = open_mask(&theta, scope)?;
        let penalty = if l1 == 0.0 {
            None
        } else {
            let n: usize = theta.iter().map(|(_, t)| t.numel()).sum();
            let device = scope.device();
            let size = scope
                .common()
                .shared_buffer("size", |_| Tensor::zeros(&[1], Kind::Double, device))?;
            no_grad(|| size.clone().add_scalar_in_place(n as f64))?;
            Some((l1, size))
        };
        Ok(Masked { kind, delta, mask, penalty })
    }
}

/// Buffers for the masks of `theta` in which all is kept.
pub(super) fn open_mask(theta: &Tensors, scope: &mut Scope) -> Result<Tensors> {
    let mut masks = scope.sub(MASK);
    theta.map(|n, t| masks.buffer(n, &Tensor::ones(&t.size(), Kind::Bool, t.device())?))
}

/// The tensors `SITE.PART.NAME` of an attached module by `SITE.NAME`.
pub(super) fn part(params: &ParamStore, part: &str) -> Tensors {
    let own = |(full, p): (&str, &modl_core::Param)| {
        let (head, name) = full.rsplit_once('.')?;
        let site = head.strip_suffix(part)?.strip_suffix('.')?;
        Some((format!("{site}.{name}"), p.tensor().clone()))
    };
    params.iter().filter_map(own).collect()
}

/// Whether nothing is masked out yet.
pub(super) fn is_open(masks: &Tensors) -> Result<bool> {
    for (_, m) in masks.iter() {
        if m.all()?.item()? == 0.0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lets the share `density` of all weights with the largest scores through the masks, and sets
/// every δ to 0. Gives the names of what starts anew.
pub(super) fn choose(params: &ParamStore, density: f64, scores: &Tensors) -> Result<Vec<String>> {
    let masks = part(params, MASK);
    let n = scores.iter().map(|(_, t)| t.numel()).sum();
    for (key, chosen) in top_k_across(scores, share(density, n))?.iter() {
        masks.need(key)?.clone().copy_from(chosen)?;
    }
    for (_, delta) in part(params, DELTA).iter() {
        delta.clone().zero_in_place()?;
    }
    Ok(names_of(params, DELTA))
}

/// The names of the tensors `SITE.PART.NAME`.
pub(super) fn names_of(params: &ParamStore, part: &str) -> Vec<String> {
    let of_part = |name: &&str| {
        let head = name.rsplit_once('.').map(|(head, _)| head);
        head.and_then(|h| h.strip_suffix(part)).is_some_and(|site| site.ends_with('.'))
    };
    params.iter().map(|(name, _)| name).filter(of_part).map(str::to_owned).collect()
}

/// θ + δ where the mask is on, θ itself elsewhere.
pub(super) fn add_under(theta: &Tensor, delta: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let sum = theta.to_kind(delta.kind())?.add(delta)?.to_kind(theta.kind())?;
    sum.where_else(mask, theta)
}

impl Module for Masked {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let mut all = theta.clone();
        for (name, delta) in self.delta.iter() {
            let sum = add_under(theta.need(name)?, delta, self.mask.need(name)?)?;
            all.set(name.to_owned(), sum);
        }
        Ok(Some(all))
    }

    fn penalty(&self, _: &Context) -> Result<Option<Tensor>> {
        let Some((l1, size)) = &self.penalty else { return Ok(None) };
        let mut sum: Option<Tensor> = None;
        for (name, delta) in self.delta.iter() {
            let own = delta.abs()?.mul(self.mask.need(name)?)?.sum()?;
            sum = Some(match sum {
                Some(s) => s.add(&own)?,
                None => own,
            });
        }
        sum.map(|s| s.mul_scalar(l1 / size.item()?)).transpose()
    }

    /// m ⊙ δ: masks of modules that are averaged may differ.
    fn phi(&self) -> Tensors {
        // Where it fails `with_phi` misses the names.
        let own = |name: &str, delta: &Tensor| delta.mul(self.mask.need(name)?);
        self.delta.map(own).unwrap_or_default()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        effective(self.kind, Form::Delta, &self.delta, phi)
    }
}
