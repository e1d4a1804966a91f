//! VeRA: two vectors for each site between random matrices that all sites share.
//!
//! y = f_θ(x) + b ⊙ (B (d ⊙ (A x))) with A `[r, in]` and B `[out, r]` random and frozen, and only
//! d `[r]` and b `[out]` trained. b starts at 0, so that a fresh module changes nothing; d starts at
//! 0.1. The matrices are as large as the largest site, smaller sites use their upper left part.
//! AdapterHub's library has diagonal matrices in place of d and b, of which it trains all elements,
//! and a factor before the sum: `full_matrices` and `scaling`.
//!
//! Kopiczko, Blankevoort, Asano 2023, *VeRA: Vector-based Random Matrix Adaptation*, arXiv
//! 2310.11454. Survey §3.1, parameter composition. Names and defaults are PEFT's; unlike PEFT's, the
//! matrices are always in the file, since they depend on the generator.

use modl_core::{
    Attachment, Context, Error, Host, Init, LowRank, Module, ModuleConfig, Result, Scope, Signal,
    SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dropout::Dropout;
use crate::peft::Provenance;

/// The shared matrices, as in PEFT's files.
pub(crate) const SHARED: [&str; 2] = ["vera_A", "vera_B"];
pub(crate) const B: &str = "vera_lambda_b";
pub(crate) const D: &str = "vera_lambda_d";

/// Configuration of VeRA at linear sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vera {
    /// The rank, at least 1; default 256.
    pub r: i64,
    /// The start of d; default 0.1.
    pub d_initial: f64,
    /// Whether b starts at 0; else at random, for tests. Default: true.
    pub init_weights: bool,
    /// In training, each element of the input of A is dropped with this probability, in [0, 1);
    /// default 0.
    pub dropout: f64,
    /// The factor before what is added; default 1.
    pub scaling: f64,
    /// Matrices `[r, r]` and `[out, out]` stand in place of the vectors d and b; default false.
    pub full_matrices: bool,
    /// The seed that PEFT drew the matrices with, kept for its file.
    pub projection_prng_key: i64,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl Default for Vera {
    fn default() -> Self {
        Vera {
            r: 256,
            d_initial: 0.1,
            init_weights: true,
            dropout: 0.0,
            scaling: 1.0,
            full_matrices: false,
            projection_prng_key: 0,
            peft: Provenance::default(),
        }
    }
}

impl ModuleConfig for Vera {
    fn kind(&self) -> &'static str {
        "vera"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        super::query_and_value()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if let Some(other) = at.sites.iter().find(|s| s.kind != SiteKind::Linear) {
            return Err(Error::unsupported(
                format!("VeRA at `{}`, a site of kind {:?}", other.path, other.kind),
                "attach it to linear sites, for instance `query` and `value`",
            ));
        }
        if self.r < 1 {
            return Err(Error::invalid("vera.r", format!("is {}, wants at least 1", self.r)));
        }
        let dropout = Dropout::new("vera.dropout", self.dropout, scope)?;
        let widest =
            |width: fn(&modl_core::Site) -> i64| at.sites.iter().map(width).max().unwrap_or(0);
        let shapes = [[self.r, widest(|s| s.input)], [widest(|s| s.output), self.r]];
        let mut common = scope.common();
        let a = common.shared_frozen(SHARED[0], &shapes[0], Init::Kaiming)?;
        let b = common.shared_frozen(SHARED[1], &shapes[1], Init::Kaiming)?;
        let start = if self.init_weights { Init::Zeros } else { Init::Normal(0.1) };
        let (down, up) = (a.narrow(1, 0, at.site.input)?, b.narrow(0, 0, at.site.output)?);
        let (b, d) = if self.full_matrices {
            let (kind, device) = (scope.kind(), scope.device());
            let mut diagonal = |name: &str, n: i64, x: f64| {
                let start = || Tensor::eye(n, kind, device)?.mul_scalar(x);
                scope.param_drawn(name, &[n, n], start)
            };
            let b = diagonal(B, at.site.output, if self.init_weights { 0.0 } else { 0.1 })?;
            (b, diagonal(D, self.r, self.d_initial)?)
        } else {
            let d = scope.param(D, &[self.r], Init::Constant(self.d_initial))?;
            (scope.param(B, &[at.site.output], start)?, d)
        };
        Ok(Box::new(VeraLinear { down, up, b, d, scaling: self.scaling, dropout }))
    }
}

/// VeRA at one site.
#[derive(Debug)]
struct VeraLinear {
    /// `[r, in]` and `[out, r]`: views of the shared matrices.
    down: Tensor,
    up: Tensor,
    b: Tensor,
    d: Tensor,
    scaling: f64,
    dropout: Dropout,
}

/// A vector's product with each row of x, or a matrix' with each column of xᵀ.
fn weigh(x: &Tensor, by: &Tensor) -> Result<Tensor> {
    let by = by.to_kind(x.kind())?;
    if by.dim() == 1 { x.mul(&by) } else { x.linear(&by, None) }
}

impl VeraLinear {
    fn factors(&self) -> Result<LowRank> {
        let left = |by: &Tensor, x: &Tensor| {
            if by.dim() == 1 { x.mul(&by.unsqueeze(1)?) } else { by.matmul(x) }
        };
        Ok(LowRank {
            down: left(&self.d, &self.down)?,
            up: left(&self.b, &self.up)?,
            scale: self.scaling,
        })
    }
}

impl Module for VeraLinear {
    fn kind(&self) -> &'static str {
        "vera"
    }

    fn delta(&self, _: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        let kind = x.x.kind();
        let inner = self.dropout.apply(&x.x, cx)?.linear(&self.down.to_kind(kind)?, None)?;
        let outer = weigh(&inner, &self.d)?.linear(&self.up.to_kind(kind)?, None)?;
        let y = weigh(&outer, &self.b)?;
        if self.scaling == 1.0 { Ok(Some(y)) } else { y.mul_scalar(self.scaling).map(Some) }
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        self.factors()?.compose(theta)
    }

    fn low_rank(&self, cx: &Context) -> Option<LowRank> {
        (!self.dropout.active(cx)).then(|| self.factors().ok()).flatten()
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(B, self.b.clone()).with(D, self.d.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(VeraLinear {
            down: self.down.clone(),
            up: self.up.clone(),
            b: phi.need(B)?.clone(),
            d: phi.need(D)?.clone(),
            scaling: self.scaling,
            dropout: self.dropout.clone(),
        }))
    }
}
