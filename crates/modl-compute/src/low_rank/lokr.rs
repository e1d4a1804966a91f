//! LoKr: a change of the weight that is a Kronecker product.
//!
//! W + s·W₁ ⊗ W₂ with W₁ `[a, c]`, W₂ `[b, d]`, a·b = out, c·d = in and s = α⁄r. W₂ is A₂ B₂ of
//! rank r where that is less than half of its longer side, else whole; so is W₁ with
//! `decompose_both`. W₁ starts at 0, so that a fresh module changes nothing. At linear sites the
//! product is never built: x as `[…, c, d]` goes through W₂ and then through W₁.
//!
//! Edalati et al. 2022, *KronA*, arXiv 2212.10650; Yeh et al. 2024, *LyCORIS*, arXiv 2309.14859.
//! Survey §3.1, parameter composition. Names, defaults and rules are PEFT's.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, SiteKind,
    Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lycoris::{Lycoris, Settings, WeightShape, tucker};
use super::weight_change::{added, signature};
use crate::patterns::Patterns;
use crate::peft::Provenance;

/// The parameters' names, as in PEFT's files.
const W1: &str = "lokr_w1";
const W1_A: &str = "lokr_w1_a";
const W1_B: &str = "lokr_w1_b";
const W2: &str = "lokr_w2";
const W2_A: &str = "lokr_w2_a";
const W2_B: &str = "lokr_w2_b";
const T2: &str = "lokr_t2";

/// Configuration of LoKr at linear sites and convolutions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lokr {
    /// The rank r, at least 1; default 8.
    pub r: i64,
    /// α; default 8. The change is scaled by α⁄r, also where neither factor has rank r.
    pub alpha: f64,
    /// In training, each row of the change is dropped with this probability, in [0, 1); default 0.
    pub rank_dropout: f64,
    /// In training, the module is left out with this probability, in [0, 1); default 0.
    pub module_dropout: f64,
    /// Kernels larger than 1 × 1 as a core and factors instead of as one matrix.
    pub use_effective_conv2d: bool,
    /// W₁ is of rank r too where that makes it smaller.
    pub decompose_both: bool,
    /// What the widths are split by, see [`Lokr::split`]; −1, the default, for the two numbers next
    /// to the square root.
    pub decompose_factor: i64,
    /// Rows that are left by `rank_dropout` are scaled up by as much as is dropped.
    pub rank_dropout_scale: bool,
    /// How the factors start.
    pub init_weights: LokrInit,
    /// Ranks of their own for some sites.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub rank_pattern: Patterns<i64>,
    /// α of their own for some sites.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub alpha_pattern: Patterns<f64>,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

/// How W₁ and W₂ start: uniform in ±1⁄√fan_in but for one that is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LokrInit {
    /// W₁ is zero (its left factor, where it has two).
    #[default]
    Standard,
    /// W₂ is zero (its right factor, where it has two): LyCORIS's own way.
    Lycoris,
    /// None is zero: changes the function from the start; for tests.
    Random,
}

impl Default for Lokr {
    fn default() -> Self {
        Lokr {
            r: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
            use_effective_conv2d: false,
            decompose_both: false,
            decompose_factor: -1,
            rank_dropout_scale: false,
            init_weights: LokrInit::default(),
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            peft: Provenance::default(),
        }
    }
}

impl Lokr {
    /// `width` as a product of two numbers: `decompose_factor` and its cofactor where it divides it,
    /// else the largest divisor up to `decompose_factor` and the square root, and its cofactor.
    pub fn split(&self, width: i64) -> (i64, i64) {
        let factor = self.decompose_factor;
        if factor > 0 && width % factor == 0 {
            return (factor, width / factor);
        }
        let root = width.isqrt();
        let bound = if factor == -1 { root } else { root.min(factor) };
        let first = (1..=bound).rev().find(|m| width % m == 0).unwrap_or(1);
        (first, width / first)
    }
}

impl ModuleConfig for Lokr {
    fn kind(&self) -> &'static str {
        "lokr"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let weight = WeightShape::at("LoKr", at)?;
        let settings = Lycoris {
            kind: self.kind(),
            r: self.r,
            alpha: self.alpha,
            rank_pattern: &self.rank_pattern,
            alpha_pattern: &self.alpha_pattern,
            rank_dropout: self.rank_dropout,
            module_dropout: self.module_dropout,
        };
        let settings = settings.at(&at.site.path, scope)?;
        if self.decompose_factor < 1 && self.decompose_factor != -1 {
            let problem = format!("is {}, wants −1 or at least 1", self.decompose_factor);
            return Err(Error::invalid("lokr.decompose_factor", problem));
        }
        let (r, [h, w], taps) = (settings.r, weight.kernel, weight.taps());
        let ((a, b), (c, d)) = (self.split(weight.output), self.split(weight.input));
        let (zero_1, zero_2) =
            (self.init_weights == LokrInit::Standard, self.init_weights == LokrInit::Lycoris);
        let start = |zero: bool| if zero { Init::Zeros } else { Init::Kaiming };
        let thin = |m: i64, n: i64| r.saturating_mul(2) < m.max(n);
        let mut made: Vec<(&str, Vec<i64>, Init)> = Vec::new();
        if self.decompose_both && thin(a, c) {
            made.push((W1_A, vec![a, r], start(zero_1)));
            made.push((W1_B, vec![r, c], Init::Kaiming));
        } else {
            made.push((W1, vec![a, c], start(zero_1)));
        }
        let kernel = at.site.kind == SiteKind::Conv;
        if !thin(b, d) {
            let whole = if kernel { vec![b, d, h, w] } else { vec![b, d] };
            made.push((W2, whole, start(zero_2)));
        } else if self.use_effective_conv2d && taps > 1 {
            made.push((T2, vec![r, r, h, w], Init::Kaiming));
            made.push((W2_A, vec![r, b], Init::Kaiming));
            made.push((W2_B, vec![r, d], start(zero_2)));
        } else {
            made.push((W2_A, vec![b, r], Init::Kaiming));
            made.push((W2_B, vec![r, d * taps], start(zero_2)));
        }
        let mut phi = Tensors::new();
        for (name, shape, init) in made {
            phi = phi.with(name, scope.param(name, &shape, init)?);
        }
        let sides = Sides { a, b, c, d: d * taps };
        let rescale = self.rank_dropout_scale;
        Ok(Box::new(LokrModule { phi, sides, linear: !kernel, settings, rescale }))
    }
}

/// W₁ is `[a, c]`, W₂ as a matrix `[b, d]`.
#[derive(Debug, Clone, Copy)]
struct Sides {
    a: i64,
    b: i64,
    c: i64,
    d: i64,
}

/// LoKr at one site.
#[derive(Debug, Clone)]
struct LokrModule {
    phi: Tensors,
    sides: Sides,
    linear: bool,
    settings: Settings,
    rescale: bool,
}

impl LokrModule {
    fn w1(&self) -> Result<Tensor> {
        match self.phi.get(W1) {
            Some(w1) => Ok(w1.clone()),
            None => self.phi.need(W1_A)?.matmul(self.phi.need(W1_B)?),
        }
    }

    /// W₂ as a matrix.
    fn w2(&self) -> Result<Tensor> {
        if let Some(w2) = self.phi.get(W2) {
            return w2.reshape(&[self.sides.b, self.sides.d]);
        }
        let (a, b) = (self.phi.need(W2_A)?, self.phi.need(W2_B)?);
        match self.phi.get(T2) {
            Some(core) => tucker(core, a, b)?.reshape(&[self.sides.b, self.sides.d]),
            None => a.matmul(b),
        }
    }

    /// ΔW = s·W₁ ⊗ W₂ as a matrix, `[out, …]`.
    fn change(&self) -> Result<Tensor> {
        let Sides { a, b, c, d } = self.sides;
        let w1 = self.w1()?.mul_scalar(self.settings.scale)?.reshape(&[a, 1, c, 1])?;
        w1.mul(&self.w2()?.reshape(&[1, b, 1, d])?)?.reshape(&[a * b, c * d])
    }

    fn row_factors(&self, like: &Tensor, cx: &Context) -> Result<Option<Tensor>> {
        self.settings.row_factors(self.sides.a * self.sides.b, self.rescale, like, cx)
    }

    /// x ΔWᵀ at a linear site, without ΔW.
    fn apply(&self, x: &Tensor, cx: &Context) -> Result<Tensor> {
        let Sides { a, b, c, d } = self.sides;
        let kind = x.kind();
        let mut shape = x.size();
        let parts = x.reshape(&[-1, c, d])?;
        let inner = match (self.phi.get(W2_A), self.phi.get(W2_B)) {
            (Some(up), Some(down)) => {
                parts.linear(&down.to_kind(kind)?, None)?.linear(&up.to_kind(kind)?, None)?
            }
            _ => parts.linear(&self.w2()?.to_kind(kind)?, None)?,
        };
        let w1 = self.w1()?.mul_scalar(self.settings.scale)?.to_kind(kind)?;
        if let Some(last) = shape.last_mut() {
            *last = a * b;
        }
        let y = w1.matmul(&inner)?.reshape(&shape)?;
        match self.row_factors(&y, cx)? {
            Some(rows) => y.mul(&rows),
            None => Ok(y),
        }
    }
}

impl Module for LokrModule {
    fn kind(&self) -> &'static str {
        "lokr"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if self.settings.left_out(&x.x, cx)? {
            return f.call(x, cx);
        }
        if self.linear {
            let y = f.call(x, cx)?;
            return Ok(y.replace(y.x.add(&self.apply(&x.x, cx)?)?));
        }
        let mut change = self.change()?;
        if let Some(rows) = self.row_factors(&change, cx)? {
            change = change.mul(&rows.unsqueeze(1)?)?;
        }
        f.call_with(&added(f.theta(), &change)?, x, cx)
    }

    fn delta(&self, _: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        if !self.linear {
            return Ok(None);
        }
        let delta = self.apply(&x.x, cx)?;
        if self.settings.left_out(&x.x, cx)? { delta.zeros_like() } else { Ok(delta) }.map(Some)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        added(theta, &self.change()?).map(Some)
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(LokrModule { phi: phi.clone(), ..self.clone() }))
    }

    fn signature(&self) -> String {
        signature(self.kind(), &self.phi, &format!("scale {}", self.settings.scale))
    }
}
