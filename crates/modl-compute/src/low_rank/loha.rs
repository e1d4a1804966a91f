//! LoHa: a change of the weight that is the Hadamard product of two low-rank ones.
//!
//! W + s·(A₁ B₁) ⊙ (A₂ B₂) with Aₖ `[out, r]`, Bₖ `[r, in]` and s = α⁄r: its rank is up to r². B₂
//! starts at 0, so that a fresh module changes nothing. A convolution's weight is taken as a matrix
//! `[out, in · h · w]`, or, with `use_effective_conv2d`, as two kernels of a core `[r, r, h, w]`
//! and two factors each.
//!
//! Hyeon-Woo et al. 2022, *FedPara*, arXiv 2108.06098; Yeh et al. 2024, *LyCORIS*, arXiv
//! 2309.14859. Survey §3.1, parameter composition. Names, defaults and rules are PEFT's.

use modl_core::{
    Attachment, Context, Host, Init, Module, ModuleConfig, Result, Scope, Signal, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lycoris::{Lycoris, Settings, WeightShape, tucker};
use super::weight_change::{added, signature};
use crate::patterns::Patterns;
use crate::peft::Provenance;

/// The names of each product's left factor, right factor and core, as in PEFT's files.
const FIRST: [&str; 3] = ["hada_w1_a", "hada_w1_b", "hada_t1"];
const SECOND: [&str; 3] = ["hada_w2_a", "hada_w2_b", "hada_t2"];

/// Configuration of LoHa at linear sites and convolutions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Loha {
    /// The rank r, at least 1; default 8.
    pub r: i64,
    /// α; default 8. The change is scaled by α⁄r.
    pub alpha: f64,
    /// In training, each row of the change is dropped with this probability, in [0, 1), and the
    /// others are scaled up by as much; default 0.
    pub rank_dropout: f64,
    /// In training, the module is left out with this probability, in [0, 1); default 0.
    pub module_dropout: f64,
    /// Kernels larger than 1 × 1 as a core and factors instead of as one matrix.
    pub use_effective_conv2d: bool,
    /// Starts without an effect; default true. With false all factors are random: for tests.
    pub init_weights: bool,
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

impl Default for Loha {
    fn default() -> Self {
        Loha {
            r: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
            use_effective_conv2d: false,
            init_weights: true,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            peft: Provenance::default(),
        }
    }
}

impl ModuleConfig for Loha {
    fn kind(&self) -> &'static str {
        "loha"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let weight = WeightShape::at("LoHa", at)?;
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
        let (r, [h, w]) = (settings.r, weight.kernel);
        let last = if self.init_weights { Init::Zeros } else { Init::Kaiming };
        let mut phi = Tensors::new();
        for ([left, right, core], init) in [(FIRST, Init::Kaiming), (SECOND, last)] {
            let (a, b) = if self.use_effective_conv2d && weight.taps() > 1 {
                phi = phi.with(core, scope.param(core, &[r, r, h, w], Init::Kaiming)?);
                ([r, weight.output], [r, weight.input])
            } else {
                ([weight.output, r], [r, weight.input * weight.taps()])
            };
            phi = phi.with(left, scope.param(left, &a, Init::Kaiming)?);
            phi = phi.with(right, scope.param(right, &b, init)?);
        }
        Ok(Box::new(LohaModule { phi, output: weight.output, settings }))
    }
}

/// LoHa at one site.
#[derive(Debug)]
struct LohaModule {
    phi: Tensors,
    output: i64,
    settings: Settings,
}

impl LohaModule {
    fn product(&self, [left, right, core]: [&str; 3]) -> Result<Tensor> {
        let (a, b) = (self.phi.need(left)?, self.phi.need(right)?);
        match self.phi.get(core) {
            Some(core) => tucker(core, a, b)?.reshape(&[self.output, -1]),
            None => a.matmul(b),
        }
    }

    /// ΔW as a matrix, `[out, …]`.
    fn change(&self) -> Result<Tensor> {
        self.product(FIRST)?.mul(&self.product(SECOND)?)?.mul_scalar(self.settings.scale)
    }
}

impl Module for LohaModule {
    fn kind(&self) -> &'static str {
        "loha"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if self.settings.left_out(&x.x, cx)? {
            return f.call(x, cx);
        }
        let mut change = self.change()?;
        if let Some(rows) = self.settings.row_factors(self.output, true, &change, cx)? {
            change = change.mul(&rows.unsqueeze(1)?)?;
        }
        f.call_with(&added(f.theta(), &change)?, x, cx)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        added(theta, &self.change()?).map(Some)
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let (output, settings) = (self.output, self.settings.clone());
        Ok(Box::new(LohaModule { phi: phi.clone(), output, settings }))
    }

    fn signature(&self) -> String {
        signature(self.kind(), &self.phi, &format!("scale {}", self.settings.scale))
    }
}
