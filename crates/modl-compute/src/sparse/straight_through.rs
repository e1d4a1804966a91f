//! A binary mask on frozen weights, θ' = θ ⊙ m(s), whose scores s are trained through it.
//!
//! Forward m is exactly 0 or 1; backward ∂m ⁄ ∂s is taken as 1 (straight-through estimate), so that
//! scores of weights that are masked out move, too. θ never moves: modules do not disturb each
//! other. Piggyback, edge-popup and SupSup choose m in their own ways.
//!
//! Bengio, Léonard and Courville 2013, *Estimating or Propagating Gradients Through Stochastic
//! Neurons*, arXiv 1308.3432. Survey §3.1.

use modl_core::{Attachment, Init, Module, Result, Scope, Tensor, Tensors};
use serde::{Deserialize, Serialize};

use super::full::learned;
use super::top_k::{share, top_k};

/// The parameter's name.
const SCORES: &str = "scores";

/// How scores become a mask.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rule {
    /// m = 1 where s > this.
    Above(f64),
    /// m = 1 at this share of the weights, where |s| is largest.
    Top(f64),
}

/// What is masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// θ.
    #[default]
    Theta,
    /// sign(θ)·√(2 ⁄ fan_in): of θ only the signs are left, as in networks that are never trained.
    SignedConstant,
}

/// θ ⊙ m(s) at one site.
#[derive(Debug)]
pub(super) struct StraightThrough {
    kind: &'static str,
    rule: Rule,
    weights: Weights,
    scores: Tensor,
}

impl StraightThrough {
    /// A mask on `weight`.
    pub(super) fn new(
        kind: &'static str,
        rule: Rule,
        weights: Weights,
        init: Init,
        at: &Attachment,
        scope: &mut Scope,
    ) -> Result<Self> {
        let shape = learned(at, |name| name == "weight")?.need("weight")?.size();
        Ok(StraightThrough { kind, rule, weights, scores: scope.param(SCORES, &shape, init)? })
    }

    /// 0 and 1 in the scores' kind, with the gradient of the scores.
    fn mask(&self) -> Result<Tensor> {
        let (through, mask) = match self.rule {
            Rule::Above(bound) => (self.scores.clone(), self.scores.detach()?.gt_scalar(bound)?),
            Rule::Top(density) => {
                let size = self.scores.abs()?;
                let mask = top_k(&size, share(density, size.numel()))?;
                (size, mask)
            }
        };
        // s − s is exactly 0, so that m is exactly 0 or 1.
        mask.to_kind(through.kind())?.add(&through.sub(&through.detach()?)?)
    }

    fn masked(&self, theta: &Tensor) -> Result<Tensor> {
        let mask = self.mask()?;
        match self.weights {
            Weights::Theta => theta.to_kind(mask.kind())?.mul(&mask),
            Weights::SignedConstant => {
                let fan_in = theta.numel() as f64 / theta.len_of(0).max(1) as f64;
                let size = (2.0 / fan_in.max(1.0)).sqrt();
                theta.sign()?.to_kind(mask.kind())?.mul_scalar(size)?.mul(&mask)
            }
        }
    }
}

impl Module for StraightThrough {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let weight = theta.need("weight")?;
        let masked = self.masked(weight)?.to_kind(weight.kind())?;
        Ok(Some(theta.clone().with("weight", masked)))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(SCORES, self.scores.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let scores = phi.need(SCORES)?.clone();
        let (kind, rule, weights) = (self.kind, self.rule, self.weights);
        Ok(Box::new(StraightThrough { kind, rule, weights, scores }))
    }

    fn signature(&self) -> String {
        format!("{}({:?}, {:?}, {:?})", self.kind, self.rule, self.weights, self.scores.size())
    }
}
