//! LoRA: a low-rank change of a weight.
//!
//! y = f_θ(x) + s·B A x with A `[r, in]`, B `[out, r]` and s = α⁄r, or α⁄√r for rank-stabilised
//! LoRA. B starts at 0, so that a fresh module changes nothing. At a convolution `in` is the
//! flattened kernel `[in ⁄ groups · kernel · kernel]`; at a table of embeddings it is the rows,
//! W + s·(B A)ᵀ, where A starts at 0 instead; at a mixture's experts each expert has an A and a B.
//!
//! Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685;
//! Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, arXiv
//! 2312.03732. Survey §3.1, parameter composition. Names, defaults and rules are PEFT's.

use modl_core::{
    Attachment, Error, Init, Module, ModuleConfig, Result, Scope, Site, SiteKind, Targets, Tensor,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dropout::Dropout;
use crate::patterns::Patterns;
use crate::peft::Provenance;

mod change;
mod experts;
mod start;

use change::LoraChange;
use experts::ExpertChange;

/// The names of the parameters, as in PEFT's files.
pub(super) const A: &str = "lora_A.weight";
pub(super) const B: &str = "lora_B.weight";
const BIAS: &str = "lora_B.bias";
pub(crate) const EMBEDDING_A: &str = "lora_embedding_A";
const EMBEDDING_B: &str = "lora_embedding_B";
/// The buffers of a start that is taken off again.
pub(crate) const START_A: &str = "start_A";
pub(crate) const START_B: &str = "start_B";

/// Configuration of LoRA at linear sites, convolutions and tables of embeddings, or at a mixture's
/// experts.
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
    /// A bias that is trained beside B and scaled as B A is; at linear sites and convolutions.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lora_bias: bool,
    /// The stacked weights of experts that are changed, by the end of their names
    /// (`mlp.experts.down_proj`), at sites of experts, and nowhere else.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub target_parameters: Vec<String>,
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
    /// From the weight's largest singular values, which are taken off again: PiSSA.
    Pissa,
    /// From the weight's QR decomposition, which is taken off again: OLoRA.
    Olora,
}

impl LoraInit {
    /// Whether the start is a part of the weight.
    pub(crate) fn is_from_weight(self) -> bool {
        matches!(self, LoraInit::Pissa | LoraInit::Olora)
    }
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
            lora_bias: false,
            target_parameters: Vec::new(),
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
        self.pair(r, (&[r, inputs], &[site.output, r]), site, scope)
    }

    /// A and B of these shapes.
    fn pair(
        &self,
        r: i64,
        (shape_a, shape_b): (&[i64], &[i64]),
        site: &Site,
        scope: &mut Scope,
    ) -> Result<(Tensor, Tensor)> {
        let (init_a, init_b) = match (site.kind, self.init) {
            // Of ids: A is looked up as the table is, so that it is A that is zero.
            (SiteKind::Embedding, LoraInit::Random) => (Init::Normal(1.0), Init::Normal(1.0)),
            (SiteKind::Embedding, _) => (Init::Zeros, Init::Normal(1.0)),
            (_, LoraInit::Gaussian) => (Init::Normal(1.0 / r as f64), Init::Zeros),
            (_, LoraInit::Random) => (Init::Kaiming, Init::Kaiming),
            _ => (Init::Kaiming, Init::Zeros),
        };
        let (a, b) = change::names(site.kind);
        Ok((scope.param(a, shape_a, init_a)?, scope.param(b, shape_b, init_b)?))
    }

    /// What PEFT refuses, too.
    fn check(&self, site: &Site) -> Result<()> {
        let (kind, init) = (site.kind, self.init);
        let named = !self.target_parameters.is_empty();
        if kind == SiteKind::Experts {
            let off = self.dropout == 0.0 && !self.lora_bias && !init.is_from_weight();
            return match named && off {
                true => Ok(()),
                false => Err(Error::unsupported(
                    "LoRA of experts without `target_parameters`, or with dropout, a bias or a \
                     start from the weight",
                    "name the stacked weights, for instance `mlp.experts.down_proj`, and leave \
                     the others out",
                )),
            };
        }
        if named {
            return Err(Error::unsupported(
                format!("`target_parameters` of LoRA at a site of kind {kind:?}"),
                "give sites of experts a part of their own in a union",
            ));
        }
        if !matches!(kind, SiteKind::Linear | SiteKind::Conv | SiteKind::Embedding) {
            return Err(Error::unsupported(
                format!("LoRA at a site of kind {kind:?}"),
                "attach it to linear sites, for instance `query` and `value`, to convolutions or \
                 to tables of embeddings",
            ));
        }
        if init.is_from_weight() && kind != SiteKind::Linear {
            return Err(Error::unsupported(
                format!("LoRA's start {init:?} at a site of kind {kind:?}"),
                "attach it to linear sites alone, or let `init` be kaiming",
            ));
        }
        let plain = matches!(init, LoraInit::Kaiming | LoraInit::Random);
        if self.lora_bias && (kind == SiteKind::Embedding || !plain) {
            return Err(Error::unsupported(
                format!("`lora_bias` at a site of kind {kind:?} with the start {init:?}"),
                "attach it to linear sites and convolutions alone, with `init` kaiming",
            ));
        }
        Ok(())
    }
}

impl ModuleConfig for Lora {
    fn kind(&self) -> &'static str {
        "lora"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    /// A rank times `factor`, with α such that the scale is what it was. Where only some sites have
    /// ranks or α of their own, these change likewise.
    fn widened(&self, factor: f64) -> Option<Box<dyn ModuleConfig>> {
        let rank = |r: &i64| ((*r as f64 * factor).round() as i64).max(1);
        let grows = rank(&self.r) as f64 / self.r as f64;
        let grows = if self.use_rslora { grows.sqrt() } else { grows };
        let alpha = |alpha: &f64| alpha * grows;
        Some(Box::new(Lora {
            r: rank(&self.r),
            alpha: alpha(&self.alpha),
            rank_pattern: self.rank_pattern.map(rank),
            alpha_pattern: self.alpha_pattern.map(alpha),
            ..self.clone()
        }))
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        self.check(site)?;
        if site.kind == SiteKind::Experts {
            return Ok(Box::new(ExpertChange::build(self, at, scope)?));
        }
        let dropout = Dropout::new("lora.dropout", self.dropout, scope)?;
        let (r, scale) = self.rank_and_scale(&site.path)?;
        let weight = at.theta.need("weight")?;
        let wide = weight.detach()?.to_kind(scope.kind())?;
        let start = start::from_weight(self.init, &wide, r, scale)?;
        let (a, b) = match &start {
            Some((a, b)) => (scope.param_from(A, a)?, scope.param_from(B, b)?),
            None if site.kind == SiteKind::Conv => {
                let mut kernel = weight.size();
                kernel.splice(..1, [r]);
                self.pair(r, (&kernel, &[site.output, r, 1, 1]), site, scope)?
            }
            None => self.factors(site.input, site, scope)?,
        };
        let start = match start {
            Some((a, b)) => Some((scope.buffer(START_A, &a)?, scope.buffer(START_B, &b)?)),
            None => None,
        };
        let bias = match (self.lora_bias, self.init) {
            (false, _) => None,
            (true, LoraInit::Random) => Some(Init::Uniform(1.0 / (r as f64).sqrt())),
            (true, _) => Some(Init::Zeros),
        };
        let bias = bias.map(|init| scope.param(BIAS, &[site.output], init)).transpose()?;
        let (kind, init) = (site.kind, self.init);
        Ok(Box::new(LoraChange { kind, a, b, bias, init, start, scale, dropout }))
    }

    fn usual_targets(&self) -> Targets {
        super::query_and_value()
    }
}
