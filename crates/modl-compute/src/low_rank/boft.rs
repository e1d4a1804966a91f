//! BOFT: the input of a linear layer is rotated by a butterfly, its output is scaled.
//!
//! s ⊙ W(x R) + b with R = Bₘ ⋯ B₁ B₀ and Bᵢ = Pᵢ diag(blocks) Pᵢᵀ. Each block is Cayley's
//! transform of (A − Aᵀ)⁄2, and Pᵢ deals halves of blocks so that after m + 1 factors of block size
//! b each number has met b·2ᵐ others: a dense rotation out of few parameters. A is 0 and s is 1 at
//! the start, so that a fresh module changes nothing. With one factor it is OFT with the exact
//! transform, and a scale.
//!
//! Liu et al. 2024, *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*, arXiv
//! 2311.06243. Survey §3.1, parameter composition. Names, defaults and rules are PEFT's.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, Tensor,
    Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::part_dropout::PartDropout;
use super::rotation::{cayley, rotate, stilled};
use super::weight_change::linear_only;
use crate::peft::Provenance;

/// The parameters' names, as in PEFT's files.
const R: &str = "boft_R";
const S: &str = "boft_s";

/// Configuration of BOFT at linear sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Boft {
    /// The width b of a block, default 4; 0 where `boft_block_num` is given instead. It has to
    /// divide the layer's input.
    pub boft_block_size: i64,
    /// The number of blocks; 0, the default, where `boft_block_size` is given instead.
    pub boft_block_num: i64,
    /// The number of factors m + 1, at least 1, the default. With more, b has to be even and the
    /// number of blocks a multiple of 2ᵐ.
    pub boft_n_butterfly_factor: i64,
    /// In training, this share of the blocks of one factor, in [0, 1), rotates nothing; default 0.
    pub boft_dropout: f64,
    /// Starts without an effect; default true. With false from normals with standard deviation 0.1
    /// around that: for tests.
    pub init_weights: bool,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl Default for Boft {
    fn default() -> Self {
        Boft {
            boft_block_size: 4,
            boft_block_num: 0,
            boft_n_butterfly_factor: 1,
            boft_dropout: 0.0,
            init_weights: true,
            peft: Provenance::default(),
        }
    }
}

impl Boft {
    /// The number and the width of the blocks for a layer's input of `width`.
    ///
    /// # Errors
    /// Where not exactly one of the two is given, or it and the number of factors do not fit.
    pub fn blocks(&self, width: i64) -> Result<(i64, i64)> {
        let (blocks, size) = match (self.boft_block_num, self.boft_block_size) {
            (0, size @ 1..) if width % size == 0 => (width / size, size),
            (blocks @ 1.., 0) if width % blocks == 0 => (blocks, width / blocks),
            (blocks, size) => {
                let problem = format!(
                    "is {size} and boft_block_num {blocks}: one has to be 0, the other a divisor \
                     of the input's width {width}"
                );
                return Err(Error::invalid("boft.boft_block_size", problem));
            }
        };
        let factors = self.boft_n_butterfly_factor;
        let meets = u32::try_from(factors - 1).ok().and_then(|m| 2i64.checked_pow(m));
        match meets {
            Some(1) => Ok((blocks, size)),
            Some(n) if size % 2 == 0 && blocks % n == 0 => Ok((blocks, size)),
            _ => {
                let problem = format!(
                    "is {factors} for {blocks} blocks of {size}: wants at least 1, an even block \
                     size from 2 on, and a number of blocks that 2^(factors − 1) divides"
                );
                Err(Error::invalid("boft.boft_n_butterfly_factor", problem))
            }
        }
    }
}

impl ModuleConfig for Boft {
    fn kind(&self) -> &'static str {
        "boft"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        linear_only("BOFT", at.site)?;
        let width = at.site.input;
        let (blocks, size) = self.blocks(width)?;
        let dropout =
            PartDropout::new("boft.boft_dropout", self.boft_dropout, "boft_dropout", scope)?;
        let init = if self.init_weights { Init::Zeros } else { Init::Normal(0.1) };
        let r = scope.param(R, &[self.boft_n_butterfly_factor, blocks, size, size], init)?;
        let s = match self.init_weights {
            true => scope.param(S, &[at.site.output, 1], Init::Ones)?,
            false => {
                let noise = Init::Normal(0.1).tensor(
                    &[at.site.output, 1],
                    scope.seed().child(S),
                    scope.kind(),
                    scope.device(),
                )?;
                scope.param_from(S, &noise.add_scalar(1.0)?)?
            }
        };
        let mut deals = vec![None];
        for i in 1..self.boft_n_butterfly_factor {
            deals.push(Some(Deal::new(width, size, i, scope)?));
        }
        Ok(Box::new(BoftLinear { r, s, deals, dropout }))
    }
}

/// A permutation of the input's numbers, and its inverse, as indices.
#[derive(Debug, Clone)]
struct Deal {
    there: Tensor,
    back: Tensor,
}

impl Deal {
    /// Pᵢ for blocks of `size`: among each `size`·2ⁱ numbers the even half blocks come first, then
    /// the odd ones.
    fn new(width: i64, size: i64, i: i64, scope: &Scope) -> Result<Self> {
        let (group, half) = (size << i, size / 2);
        let evens = group / half / 2;
        let from = |at: i64| {
            let part = (at % group) / half;
            let part = if part < evens { 2 * part } else { 2 * (part - evens) + 1 };
            at - at % group + part * half + at % half
        };
        let back: Vec<i64> = (0..width).map(from).collect();
        let mut there: Vec<i64> = (0..width).collect();
        there.sort_by_key(|at| back.get(*at as usize).copied());
        let index = |v: &[i64]| Tensor::from_slice(v, &[width], scope.device());
        // `there` lists where each number goes: the inverse of where each comes from.
        Ok(Deal { there: index(&there)?, back: index(&back)? })
    }
}

/// BOFT at one site.
#[derive(Debug, Clone)]
struct BoftLinear {
    /// `[factors, blocks, b, b]`.
    r: Tensor,
    /// `[out, 1]`.
    s: Tensor,
    /// How each factor's numbers are dealt to blocks; the first one's as they lie.
    deals: Vec<Option<Deal>>,
    dropout: PartDropout,
}

impl BoftLinear {
    /// The blocks of all factors, `[factors, blocks, b, b]`.
    fn rotations(&self) -> Result<Tensor> {
        let shape = self.r.size();
        let b = self.r.len_of(-1);
        let q = self.r.sub(&self.r.t()?)?.mul_scalar(0.5)?;
        cayley(&q.reshape(&[-1, b, b])?)?.reshape(&shape)
    }

    /// x Bᵢ.
    fn turn(&self, x: &Tensor, i: usize, rotations: &Tensor) -> Result<Tensor> {
        let blocks = rotations.select(0, i as i64)?;
        match self.deals.get(i) {
            Some(Some(deal)) => {
                let dealt = x.index_select(-1, &deal.there)?;
                rotate(&dealt, &blocks)?.index_select(-1, &deal.back)
            }
            _ => rotate(x, &blocks),
        }
    }
}

impl Module for BoftLinear {
    fn kind(&self) -> &'static str {
        "boft"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let mut rotations = self.rotations()?;
        let (factors, blocks) = (rotations.len_of(0), rotations.len_of(1));
        if let Some(chosen) = self.dropout.chosen(factors, blocks, &rotations, cx)? {
            rotations = stilled(&rotations, &chosen)?;
        }
        let mut turned = x.x.clone();
        for i in (0..self.deals.len()).rev() {
            turned = self.turn(&turned, i, &rotations)?;
        }
        let w = f.theta().need("weight")?;
        let scaled = w.mul(&self.s.to_kind(w.kind())?)?;
        f.call_with(&f.theta().clone().with("weight", scaled), &x.replace(turned), cx)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        // W Rᵀ = W B₀ᵀ B₁ᵀ ⋯
        let rotations = self.rotations()?.t()?;
        let mut turned = w.to_kind(self.r.kind())?;
        for i in 0..self.deals.len() {
            turned = self.turn(&turned, i, &rotations)?;
        }
        let scaled = turned.mul(&self.s)?.to_kind(w.kind())?;
        Ok(Some(theta.clone().with("weight", scaled)))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(R, self.r.clone()).with(S, self.s.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let (r, s) = (phi.need(R)?.clone(), phi.need(S)?.clone());
        Ok(Box::new(BoftLinear { r, s, ..self.clone() }))
    }
}
