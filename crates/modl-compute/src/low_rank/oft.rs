//! OFT: the input of a linear layer is rotated, block by block.
//!
//! f_θ(x R), that is the weight W Rᵀ, where R is block-diagonal with blocks made from
//! skew-symmetric matrices by Cayley's transform. All are 0 at the start, so that R is the identity
//! and a fresh module changes nothing. A rotation keeps the angles between neurons. COFT keeps R
//! near the identity: each skew-symmetric block is at most ε⁄√blocks long.
//!
//! Qiu et al. 2023, *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*, arXiv
//! 2306.07280; Qiu et al. 2025, *Orthogonal Finetuning Made Scalable*, arXiv 2506.19847 (input
//! side, Neumann series). Survey §3.1, parameter composition. Names, defaults and rules are PEFT's.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, ParamStore, Result, Scope,
    Signal, Step, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::part_dropout::PartDropout;
use super::rotation::{cayley, cayley_neumann, rotate, stilled};
use super::weight_change::{linear_only, signature};
use crate::peft::Provenance;

/// The name of the parameter, as in PEFT's files.
const R: &str = "oft_R.weight";

/// More terms of a series that converges add nothing.
const MOST_TERMS: i64 = 64;

/// Configuration of OFT at linear sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Oft {
    /// The number of blocks; 0, the default, where `oft_block_size` is given instead.
    pub r: i64,
    /// The width of a block, default 32; 0 where `r` is given instead. What does not divide the
    /// layer's input is replaced by the nearest number that does.
    pub oft_block_size: i64,
    /// In training, this share of the blocks, in [0, 1), rotates nothing; default 0.
    pub module_dropout: f64,
    /// Limits the rotation, see `eps`.
    pub coft: bool,
    /// ε with `coft`; default 6e-5.
    pub eps: f64,
    /// One block for all.
    pub block_share: bool,
    /// The Neumann series instead of the exact transform; default true. The two turn in opposite
    /// directions, as in PEFT.
    pub use_cayley_neumann: bool,
    /// The number of terms of the series, at most 64; default 5.
    pub num_cayley_neumann_terms: i64,
    /// Starts without an effect; default true. With false from a normal with standard deviation
    /// 0.1: for tests.
    pub init_weights: bool,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl Default for Oft {
    fn default() -> Self {
        Oft {
            r: 0,
            oft_block_size: 32,
            module_dropout: 0.0,
            coft: false,
            eps: 6e-5,
            block_share: false,
            use_cayley_neumann: true,
            num_cayley_neumann_terms: 5,
            init_weights: true,
            peft: Provenance::default(),
        }
    }
}

impl Oft {
    /// The number and the width of the blocks for a layer's input of `width`.
    ///
    /// # Errors
    /// Where not exactly one of `r` and `oft_block_size` is above 0.
    pub fn blocks(&self, width: i64) -> Result<(i64, i64)> {
        match (self.r, self.oft_block_size) {
            (0, size @ 1..) => {
                let size = nearest_divisor(width, size);
                Ok((width / size, size))
            }
            (r @ 1.., 0) => {
                let r = nearest_divisor(width, r);
                Ok((r, width / r))
            }
            (r, size) => Err(Error::invalid(
                "oft.r",
                format!("is {r} and oft_block_size {size}: one has to be 0, the other above"),
            )),
        }
    }
}

/// The divisor of `width` nearest to `wanted`, the smaller one of two.
fn nearest_divisor(width: i64, wanted: i64) -> i64 {
    let divides = |n: &i64| width % n == 0;
    let below = (1..=wanted.min(width)).rev().find(divides).unwrap_or(1);
    let above = (wanted..=width).find(divides).unwrap_or(width);
    if wanted < width && wanted - below <= above - wanted { below } else { above }
}

impl ModuleConfig for Oft {
    fn kind(&self) -> &'static str {
        "oft"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        linear_only("OFT", at.site)?;
        let (blocks, size) = self.blocks(at.site.input)?;
        if !(self.eps.is_finite() && self.eps > 0.0) {
            let problem = format!("is {}, wants a number above 0", self.eps);
            return Err(Error::invalid("oft.eps", problem));
        }
        let terms = self.num_cayley_neumann_terms;
        if self.use_cayley_neumann && !(1..=MOST_TERMS).contains(&terms) {
            let problem = format!("is {terms}, wants 1 to {MOST_TERMS}");
            return Err(Error::invalid("oft.num_cayley_neumann_terms", problem));
        }
        let dropout =
            PartDropout::new("oft.module_dropout", self.module_dropout, "module_dropout", scope)?;
        let own = if self.block_share { 1 } else { blocks };
        let init = if self.init_weights { Init::Zeros } else { Init::Normal(0.1) };
        let upper = scope.param(R, &[own, size * (size - 1) / 2], init)?;
        let places = Tensor::from_slice(&skew_places(size), &[size * size], scope.device())?;
        Ok(Box::new(OftLinear { config: self.clone(), upper, size, places, dropout }))
    }

    fn after_step(&self, params: &ParamStore, _: &Step) -> Result<()> {
        if !self.coft {
            return Ok(());
        }
        for (_, param) in params.iter() {
            let upper = param.tensor();
            upper.clone().copy_from(&limited(upper, self.eps)?)?;
        }
        Ok(())
    }
}

/// Where each element of a skew-symmetric matrix is in (0, upper triangle, −upper triangle).
fn skew_places(size: i64) -> Vec<i64> {
    let n = size * (size - 1) / 2;
    let above = |i: i64, j: i64| 1 + i * size - i * (i + 1) / 2 + (j - i - 1);
    let place = |i: i64, j: i64| match i.cmp(&j) {
        std::cmp::Ordering::Less => above(i, j),
        std::cmp::Ordering::Equal => 0,
        std::cmp::Ordering::Greater => n + above(j, i),
    };
    (0..size * size).map(|at| place(at / size, at % size)).collect()
}

/// Upper triangles `[blocks, n]`, each shortened to where its matrix has the norm ε⁄√blocks.
fn limited(upper: &Tensor, eps: f64) -> Result<Tensor> {
    // Both triangles count. Within the limit the factor is 1, and its gradient 0.
    let squared = upper.square()?.sum_dims(&[1], true)?.mul_scalar(2.0)?;
    let limit = eps * eps / upper.len_of(0) as f64;
    let excess = squared.mul_scalar(1.0 / limit)?.clamp(1.0, f64::INFINITY)?;
    upper.mul(&excess.pow(-0.5)?)
}

/// OFT at one site.
#[derive(Debug, Clone)]
struct OftLinear {
    config: Oft,
    /// The upper triangles of the skew-symmetric blocks, row by row.
    upper: Tensor,
    size: i64,
    places: Tensor,
    dropout: PartDropout,
}

impl OftLinear {
    /// The blocks of R, `[blocks or 1, b, b]`.
    fn rotation(&self) -> Result<Tensor> {
        let c = &self.config;
        let upper = if c.coft { limited(&self.upper, c.eps)? } else { self.upper.clone() };
        let blocks = upper.len_of(0);
        let zero = Tensor::zeros(&[blocks, 1], upper.kind(), upper.device())?;
        let all = Tensor::cat(&[zero, upper.clone(), upper.neg()?], 1)?;
        let q = all.index_select(1, &self.places)?.reshape(&[blocks, self.size, self.size])?;
        if c.use_cayley_neumann {
            cayley_neumann(&q, c.num_cayley_neumann_terms)
        } else {
            cayley(&q)
        }
    }
}

impl Module for OftLinear {
    fn kind(&self) -> &'static str {
        "oft"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let mut r = self.rotation()?;
        let blocks = r.len_of(0);
        // One block for all is no part.
        if blocks > 1
            && let Some(chosen) = self.dropout.chosen(1, blocks, &r, cx)?
        {
            r = stilled(&r, &chosen.select(0, 0)?)?;
        }
        f.call(&x.replace(rotate(&x.x, &r)?), cx)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        let r = self.rotation()?;
        let turned = rotate(&w.to_kind(r.kind())?, &r.t()?)?.to_kind(w.kind())?;
        Ok(Some(theta.clone().with("weight", turned)))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(R, self.upper.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(OftLinear { upper: phi.need(R)?.clone(), ..self.clone() }))
    }

    fn signature(&self) -> String {
        let c = &self.config;
        let limit = if c.coft { format!("eps {}", c.eps) } else { "no limit".to_owned() };
        let terms = if c.use_cayley_neumann { c.num_cayley_neumann_terms } else { 0 };
        signature(self.kind(), &self.phi(), &format!("{limit}, terms {terms}"))
    }
}
