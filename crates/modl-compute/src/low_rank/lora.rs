//! LoRA: a low-rank change of a linear layer's weight.
//!
//! y = f_θ(x) + s·B A x with A `[r, in]`, B `[out, r]` and s = α⁄r, or α⁄√r for rank-stabilised
//! LoRA. B starts at 0, so that a fresh module changes nothing.
//!
//! Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685;
//! Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, arXiv
//! 2312.03732. Survey §3.1, parameter composition. Names, defaults and rules are PEFT's.

use modl_core::{
    Attachment, Context, Error, Host, Init, LowRank, Module, ModuleConfig, Result, Scope, Signal,
    Site, SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dropout::Dropout;
use crate::patterns::Patterns;
use crate::peft::Provenance;

/// The names of the two parameters, as in PEFT's files.
pub(super) const A: &str = "lora_A.weight";
pub(super) const B: &str = "lora_B.weight";

/// Configuration of LoRA at linear sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// The rank, at least 1; default 8.
    pub r: i64,
    /// α; default 8. The product is scaled by α⁄r.
    pub alpha: f64,
    /// In training, each element of the low-rank path's input is dropped with this probability, in
    /// [0, 1); default 0.
    pub dropout: f64,
    /// Scales by α⁄√r instead.
    pub use_rslora: bool,
    /// Ranks of their own for some sites.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub rank_pattern: Patterns<i64>,
    /// α of their own for some sites.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub alpha_pattern: Patterns<f64>,
    /// How the parameters start.
    pub init: LoraInit,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

/// How A and B start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraInit {
    /// A uniform in ±1⁄√in, B zero: PEFT's default.
    #[default]
    Kaiming,
    /// A normal with standard deviation 1⁄r, B zero.
    Gaussian,
    /// Both uniform in ±1⁄√fan_in: changes the function from the start; for tests.
    Random,
}

impl Default for Lora {
    fn default() -> Self {
        Lora {
            r: 8,
            alpha: 8.0,
            dropout: 0.0,
            use_rslora: false,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            init: LoraInit::default(),
            peft: Provenance::default(),
        }
    }
}

impl Lora {
    /// The rank and the factor s at the site `path`.
    ///
    /// # Errors
    /// Where the rank is not positive, α is not a number, or a pattern is not a regular expression.
    pub fn rank_and_scale(&self, path: &str) -> Result<(i64, f64)> {
        let r = *self.rank_pattern.find(path)?.unwrap_or(&self.r);
        let alpha = *self.alpha_pattern.find(path)?.unwrap_or(&self.alpha);
        if r < 1 {
            return Err(Error::invalid("lora.r", format!("is {r} at `{path}`, wants at least 1")));
        }
        if !alpha.is_finite() {
            return Err(Error::invalid(
                "lora.alpha",
                format!("is {alpha} at `{path}`, wants a number"),
            ));
        }
        let r_scaled = if self.use_rslora { (r as f64).sqrt() } else { r as f64 };
        Ok((r, alpha / r_scaled))
    }
}

impl Lora {
    /// A `[r, inputs]` and B `[out, r]` at a site, as they start.
    pub(super) fn factors(
        &self,
        inputs: i64,
        site: &Site,
        scope: &mut Scope,
    ) -> Result<(Tensor, Tensor)> {
        let (r, _) = self.rank_and_scale(&site.path)?;
        let (init_a, init_b) = match self.init {
            LoraInit::Kaiming => (Init::Kaiming, Init::Zeros),
            LoraInit::Gaussian => (Init::Normal(1.0 / r as f64), Init::Zeros),
            LoraInit::Random => (Init::Kaiming, Init::Kaiming),
        };
        Ok((scope.param(A, &[r, inputs], init_a)?, scope.param(B, &[site.output, r], init_b)?))
    }
}

impl ModuleConfig for Lora {
    fn kind(&self) -> &'static str {
        "lora"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        if site.kind != SiteKind::Linear {
            return Err(Error::unsupported(
                format!("LoRA at a site of kind {:?}", site.kind),
                "attach it to linear sites, for instance `query` and `value`",
            ));
        }
        let dropout = Dropout::new("lora.dropout", self.dropout, scope)?;
        let (_, scale) = self.rank_and_scale(&site.path)?;
        let (a, b) = self.factors(site.input, site, scope)?;
        Ok(Box::new(LoraLinear { a, b, scale, dropout }))
    }

    fn usual_targets(&self) -> Targets {
        super::query_and_value()
    }
}

/// LoRA at one site.
#[derive(Debug)]
struct LoraLinear {
    a: Tensor,
    b: Tensor,
    scale: f64,
    dropout: Dropout,
}

impl LoraLinear {
    fn factors(&self) -> LowRank {
        LowRank { down: self.a.clone(), up: self.b.clone(), scale: self.scale }
    }
}

impl Module for LoraLinear {
    fn kind(&self) -> &'static str {
        "lora"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = f.call(x, cx)?;
        let kind = x.x.kind();
        // `x Aᵀ` carries the factor: r columns instead of the full width.
        let inner = self.dropout.apply(&x.x, cx)?.linear(&self.a.to_kind(kind)?, None)?;
        let inner = if self.scale == 1.0 { inner } else { inner.mul_scalar(self.scale)? };
        Ok(y.replace(y.x.add_linear(&inner, &self.b.to_kind(kind)?)?))
    }

    fn delta(&self, _: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        self.factors().apply(&self.dropout.apply(&x.x, cx)?).map(Some)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        let delta = self.factors().weight()?;
        // In the module's kind (f32), then rounded once.
        let sum = w.to_kind(delta.kind())?.add(&delta)?.to_kind(w.kind())?;
        Ok(Some(theta.clone().with("weight", sum)))
    }

    fn low_rank(&self, cx: &Context) -> Option<LowRank> {
        (!self.dropout.active(cx)).then(|| self.factors())
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(A, self.a.clone()).with(B, self.b.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(LoraLinear {
            a: phi.need(A)?.clone(),
            b: phi.need(B)?.clone(),
            scale: self.scale,
            dropout: self.dropout.clone(),
        }))
    }

    fn signature(&self) -> String {
        format!("lora({:?}, {:?}, scale {})", self.a.size(), self.b.size(), self.scale)
    }
}
