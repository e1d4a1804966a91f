//! Bottleneck adapters: a small network after a sub-layer, or beside it.
//!
//! With h the sub-layer's output before its residual connection, x what will be added to it, and
//! u(z) = s·(W_up σ(W_down z + b_down) + b_up):
//!
//! | | y | where |
//! |---|---|---|
//! | sequential | h + u(h) | [`Bottleneck::houlsby`]: after attention and after the feed-forward layer |
//! | sequential behind the norm | h + u(LN(h + x)) | [`Bottleneck::pfeiffer`]: after the feed-forward layer |
//! | parallel | h + u(x) | [`Bottleneck::parallel`]: beside the feed-forward layer |
//!
//! and the backbone goes on with LN(y + x). With a norm of its own, `ln_after`, u(z) is LN of that.
//! Names and rules are AdapterHub's.
//!
//! Houlsby et al. 2019, *Parameter-Efficient Transfer Learning for NLP*, arXiv 1902.00751; Pfeiffer
//! et al. 2021, *AdapterFusion*, arXiv 2005.00247; He et al. 2022, *Towards a Unified View of
//! Parameter-Efficient Transfer Learning*, arXiv 2110.04366. Survey §3.3, function composition.

mod init;
mod settings;

use modl_core::{
    Activation, Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope,
    Signal, Site, SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Patterns;
use crate::dropout::Dropout;

pub use init::BottleneckInit;
pub use settings::{Residual, Scaling};

/// The parameters' names, as in AdapterHub's files.
const DOWN_WEIGHT: &str = "adapter_down.0.weight";
const DOWN_BIAS: &str = "adapter_down.0.bias";
const UP_WEIGHT: &str = "adapter_up.weight";
const UP_BIAS: &str = "adapter_up.bias";
const SCALING: &str = "scaling";
const NORM_WEIGHT: &str = "adapter_norm_after.weight";
const NORM_BIAS: &str = "adapter_norm_after.bias";
/// The ε of the adapter's own norm, PyTorch's default.
const NORM_EPS: f64 = 1e-5;

/// Configuration of bottleneck adapters at sub-layer sites. The default is
/// [`Bottleneck::pfeiffer`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bottleneck {
    /// The bottleneck has width ⌊width ⁄ this⌋, at least 1.
    pub reduction_factor: f64,
    /// Factors of their own for some sites.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub reduction_pattern: Patterns<f64>,
    /// σ.
    pub non_linearity: Activation,
    /// The adapter works on LN(h + x) instead of h.
    pub original_ln_before: bool,
    /// The backbone's own LN(y + x) follows. Only `true` is supported.
    pub original_ln_after: bool,
    /// u ends with a layer norm of the adapter's own, before it is added to anything
    /// ([`Residual::AfterLn`]).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ln_after: bool,
    /// What u is added to.
    pub residual_before_ln: Residual,
    /// u works on x, what goes into the sub-layer, instead of on what comes out.
    pub is_parallel: bool,
    /// s.
    pub scaling: Scaling,
    /// In training, each element of u is dropped with this probability, in [0, 1).
    pub dropout: f64,
    /// How the parameters start.
    pub init_weights: BottleneckInit,
}

impl Default for Bottleneck {
    fn default() -> Self {
        Self::pfeiffer()
    }
}

impl Bottleneck {
    /// Houlsby et al.: h + u(h) with swish, reduction 16. AdapterHub's `double_seq_bn`.
    pub fn houlsby() -> Self {
        Bottleneck {
            non_linearity: Activation::Swish,
            original_ln_before: false,
            ..Self::pfeiffer()
        }
    }

    /// Pfeiffer et al.: h + u(LN(h + x)) with ReLU, reduction 16. AdapterHub's `seq_bn`.
    pub fn pfeiffer() -> Self {
        Bottleneck {
            reduction_factor: 16.0,
            reduction_pattern: Patterns::default(),
            non_linearity: Activation::Relu,
            original_ln_before: true,
            original_ln_after: true,
            ln_after: false,
            residual_before_ln: Residual::BeforeLn,
            is_parallel: false,
            scaling: Scaling::Fixed(1.0),
            dropout: 0.0,
            init_weights: BottleneckInit::Bert,
        }
    }

    /// He et al.: h + 4·u(x) with ReLU, reduction 2; changes nothing before it is trained.
    /// AdapterHub's `par_bn`.
    pub fn parallel() -> Self {
        Bottleneck {
            reduction_factor: 2.0,
            original_ln_before: false,
            is_parallel: true,
            scaling: Scaling::Fixed(4.0),
            init_weights: BottleneckInit::MamAdapter,
            ..Self::pfeiffer()
        }
    }

    /// The sites of [`Bottleneck::houlsby`]: `attention.output` and `output` of each layer.
    pub fn houlsby_sites() -> Targets {
        Targets::pattern(r"(.*\.)?\d+\.(attention\.)?output")
    }

    /// The sites of [`Bottleneck::pfeiffer`]: `output` of each layer.
    pub fn pfeiffer_sites() -> Targets {
        Targets::pattern(r"(.*\.)?\d+\.output")
    }

    /// The sites of [`Bottleneck::parallel`]: `output` of each layer.
    pub fn parallel_sites() -> Targets {
        Self::pfeiffer_sites()
    }

    fn reduction(&self, site: &Site) -> Result<f64> {
        Ok(*self.reduction_pattern.find(&site.path)?.unwrap_or(&self.reduction_factor))
    }

    fn check(&self, site: &Site) -> Result<()> {
        if site.kind != SiteKind::Sublayer {
            return Err(Error::unsupported(
                format!("a bottleneck adapter at a site of kind {:?}", site.kind),
                "attach it to sub-layers, for instance with Bottleneck::houlsby_sites",
            ));
        }
        if !self.original_ln_after {
            return Err(Error::unsupported(
                "`original_ln_after` = false",
                "the backbone's residual connection and norm always follow; leave it true",
            ));
        }
        if self.residual_before_ln == Residual::PostAdd && !self.original_ln_before {
            return Err(Error::invalid(
                "bottleneck.residual_before_ln",
                "is \"post_add\", which needs original_ln_before = true",
            ));
        }
        if self.ln_after && self.residual_before_ln != Residual::AfterLn {
            return Err(Error::unsupported(
                "`ln_after` where the residual is added before the norm",
                "let residual_before_ln be false",
            ));
        }
        let factor = self.reduction(site)?;
        if !(factor.is_finite() && factor > 0.0) {
            let problem = format!("is {factor}, wants a number above 0");
            return Err(Error::invalid("bottleneck.reduction_factor", problem));
        }
        if let Scaling::Fixed(s) = self.scaling
            && !s.is_finite()
        {
            return Err(Error::invalid("bottleneck.scaling", format!("is {s}, wants a number")));
        }
        Ok(())
    }
}

impl ModuleConfig for Bottleneck {
    fn usual_targets(&self) -> Targets {
        Self::pfeiffer_sites()
    }

    fn kind(&self) -> &'static str {
        "bottleneck"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn widened(&self, factor: f64) -> Option<Box<dyn ModuleConfig>> {
        // A hair more than the quotient, so that rounding does not take a unit away.
        let factor = factor * (1.0 + 1e-9);
        Some(Box::new(Bottleneck {
            reduction_factor: self.reduction_factor / factor,
            reduction_pattern: self.reduction_pattern.map(|by| by / factor),
            ..self.clone()
        }))
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        self.check(site)?;
        let dropout = Dropout::new("bottleneck.dropout", self.dropout, scope)?;
        let d = site.output;
        let b = ((d as f64 / self.reduction(site)?).floor() as i64).max(1);
        let up = match self.ln_after {
            false => self.init_weights.up(scope, UP_WEIGHT, &[d, b])?,
            true => self.init_weights.down(scope, UP_WEIGHT, &[d, b])?,
        };
        let phi = Tensors::new()
            .with(DOWN_WEIGHT, self.init_weights.down(scope, DOWN_WEIGHT, &[b, d])?)
            .with(DOWN_BIAS, scope.param(DOWN_BIAS, &[b], Init::Zeros)?)
            .with(UP_WEIGHT, up)
            .with(UP_BIAS, scope.param(UP_BIAS, &[d], Init::Zeros)?);
        let phi = match self.ln_after {
            false => phi,
            true => phi
                .with(NORM_WEIGHT, scope.param(NORM_WEIGHT, &[d], self.init_weights.gain())?)
                .with(NORM_BIAS, scope.param(NORM_BIAS, &[d], Init::Zeros)?),
        };
        let phi = match self.scaling {
            Scaling::Fixed(_) => phi,
            Scaling::Learned => phi.with(SCALING, scope.param(SCALING, &[1], Init::Ones)?),
            Scaling::Channel => phi.with(SCALING, scope.param(SCALING, &[d], Init::Ones)?),
        };
        Ok(Box::new(Adapter { config: self.clone(), dropout, phi }))
    }
}

/// A bottleneck adapter at one site.
#[derive(Debug)]
struct Adapter {
    config: Bottleneck,
    dropout: Dropout,
    phi: Tensors,
}

impl Adapter {
    /// u(z), `[batch, seq, width]`.
    fn up_down(&self, z: &Tensor, cx: &Context) -> Result<Tensor> {
        let kind = z.kind();
        let phi = |name: &str| self.phi.need(name)?.to_kind(kind);
        let down = z.linear(&phi(DOWN_WEIGHT)?, Some(&phi(DOWN_BIAS)?))?;
        let down = self.config.non_linearity.apply(&down)?;
        let up = down.linear(&phi(UP_WEIGHT)?, Some(&phi(UP_BIAS)?))?;
        let up = match self.config.scaling {
            Scaling::Fixed(1.0) => up,
            Scaling::Fixed(s) => up.mul_scalar(s)?,
            Scaling::Learned | Scaling::Channel => up.mul(&phi(SCALING)?)?,
        };
        let up = match self.config.ln_after {
            false => up,
            true => up.layer_norm(&phi(NORM_WEIGHT)?, &phi(NORM_BIAS)?, NORM_EPS)?,
        };
        self.dropout.apply(&up, cx)
    }
}

impl Module for Adapter {
    fn kind(&self) -> &'static str {
        "bottleneck"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let h = f.call(x, cx)?;
        if let Some(u) = self.delta(f, x, cx)? {
            return Ok(h.replace(h.x.add(&u)?));
        }
        if !self.config.original_ln_before {
            return Ok(h.replace(h.x.add(&self.up_down(&h.x, cx)?)?));
        }
        let normed = f.stage("norm", &x.replace(h.x.clone()), cx)?.x;
        let u = self.up_down(&normed, cx)?;
        let onto = match self.config.residual_before_ln {
            Residual::BeforeLn => h.x.clone(),
            Residual::AfterLn => normed,
            Residual::PostAdd => h.x.add(x.with.need("residual")?)?,
        };
        Ok(h.replace(onto.add(&u)?))
    }

    /// Only a parallel adapter works without the sub-layer's output.
    fn delta(&self, _: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        if !self.config.is_parallel {
            return Ok(None);
        }
        self.up_down(x.with.need("residual")?, cx).map(Some)
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        Ok(Box::new(Adapter { config: self.config.clone(), dropout: self.dropout.clone(), phi }))
    }

    fn signature(&self) -> String {
        // Neither dropout nor the start matters to what trained parameters mean.
        let Bottleneck {
            non_linearity,
            original_ln_before,
            residual_before_ln,
            is_parallel,
            scaling,
            ..
        } = &self.config;
        let shapes: Vec<String> =
            self.phi.iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
        format!(
            "bottleneck({}; {non_linearity:?}, original_ln_before {original_ln_before}, \
             residual_before_ln {residual_before_ln:?}, is_parallel {is_parallel}, {scaling:?})",
            shapes.join(", ")
        )
    }
}
