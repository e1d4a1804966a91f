//! DoRA: direction by LoRA, magnitude of its own.
//!
//! W' = m ⊙ (W + s·B A) ⁄ ‖W + s·B A‖, where norm and m `[out]` are by rows (one for each output),
//! and the norm counts as a constant for gradients (§4.3 of the paper). m starts as ‖W‖, so that a
//! fresh module changes nothing. With c = m ⁄ ‖W + s·B A‖,
//!
//! y = c ⊙ (W x + s·B A x) + b.
//!
//! The full product B A is never formed: ‖W + s·B A‖² = ‖W‖² + 2s·rows((W Aᵀ) ⊙ B) +
//! s²·rows((B (A Aᵀ)) ⊙ B). In training with dropout, y = W x + b + (c − 1) ⊙ W x' + c ⊙ s·B A x'
//! with x' the input with dropped elements, as in PEFT.
//!
//! Liu et al. 2024, *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv 2402.09353. Survey §3.1,
//! parameter composition.

use modl_core::{
    Attachment, Context, Error, Host, Module, ModuleConfig, Result, Scope, Signal, SiteKind,
    Targets, Tensor, Tensors, no_grad,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Lora;
use super::lora::{A, B};
use crate::dropout::Dropout;

/// The name of m, as in PEFT's files.
pub(crate) const MAGNITUDE: &str = "lora_magnitude_vector";
/// The kind of [`AdapterHubDora`].
const HUB: &str = "adapterhub_dora";

/// Configuration of DoRA at linear sites: that of the LoRA that gives the direction.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Dora(pub Lora);

impl ModuleConfig for Dora {
    fn kind(&self) -> &'static str {
        "dora"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.0.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        Ok(Box::new(DoraLinear::new(&self.0, false, at, scope)?))
    }
}

/// Configuration of DoRA as AdapterHub's library computes it: y = c ⊙ (f_θ(x) + s·B A x) with
/// c = m ⁄ ‖W + B A‖. Other than in the paper, the bias is scaled, too, the norm is that of the
/// product without s, and gradients flow through it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AdapterHubDora(pub Lora);

impl ModuleConfig for AdapterHubDora {
    fn kind(&self) -> &'static str {
        HUB
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.0.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        Ok(Box::new(DoraLinear::new(&self.0, true, at, scope)?))
    }
}

/// DoRA at one site.
#[derive(Debug)]
struct DoraLinear {
    a: Tensor,
    b: Tensor,
    /// `[out]`.
    magnitude: Tensor,
    scale: f64,
    dropout: Dropout,
    /// As AdapterHub has it.
    hub: bool,
}

impl DoraLinear {
    fn new(lora: &Lora, hub: bool, at: &Attachment, scope: &mut Scope) -> Result<Self> {
        if at.site.kind != SiteKind::Linear {
            return Err(Error::unsupported(
                format!("DoRA at a site of kind {:?}", at.site.kind),
                "attach it to linear sites, for instance `query` and `value`",
            ));
        }
        if lora.lora_bias || lora.init.is_from_weight() {
            return Err(Error::unsupported(
                "`lora_bias` or a start from the weight in DoRA",
                "leave out `lora_bias`, and let `init` be kaiming, gaussian or random",
            ));
        }
        let dropout = Dropout::new("dora.dropout", lora.dropout, scope)?;
        let (_, scale) = lora.rank_and_scale(&at.site.path)?;
        let (a, b) = lora.factors(at.site.input, at.site, scope)?;
        let weight = at.theta.need("weight")?.to_kind(scope.kind())?;
        let mut module = DoraLinear { a, b, magnitude: weight.clone(), scale, dropout, hub };
        let start = || no_grad(|| module.norm(&weight));
        module.magnitude = scope.param_drawn(MAGNITUDE, &[at.site.output], start)?;
        Ok(module)
    }

    /// ‖W + s·B A‖ by rows, `[out]`.
    fn norm(&self, weight: &Tensor) -> Result<Tensor> {
        let (a, b, s) = (&self.a, &self.b, if self.hub { 1.0 } else { self.scale });
        let rows = |t: Tensor| t.sum_dims(&[1], false);
        let own = rows(weight.square()?)?;
        let cross = rows(weight.matmul(&a.t()?)?.mul(b)?)?.mul_scalar(2.0 * s)?;
        let change = rows(b.matmul(&a.matmul(&a.t()?)?)?.mul(b)?)?.mul_scalar(s * s)?;
        own.add(&cross)?.add(&change)?.clamp(0.0, f64::INFINITY)?.sqrt()
    }

    /// c = m ⁄ ‖W + s·B A‖, `[out]` in the module's kind. A row of zeros stays one.
    fn ratio(&self, theta: &Tensors) -> Result<Tensor> {
        let weight = theta.need("weight")?.to_kind(self.a.kind())?;
        let norm = || self.norm(&weight)?.clamp(f64::from(f32::MIN_POSITIVE), f64::INFINITY);
        let norm = if self.hub { norm()? } else { no_grad(norm)? };
        self.magnitude.div(&norm)
    }
}

impl Module for DoraLinear {
    fn kind(&self) -> &'static str {
        if self.hub { HUB } else { "dora" }
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let kind = x.x.kind();
        let y = f.call(x, cx)?;
        let ratio = self.ratio(f.theta())?;
        let c = ratio.to_kind(kind)?;
        let dropped = self.dropout.apply(&x.x, cx)?;
        let inner = dropped.linear(&self.a.to_kind(kind)?, None)?;
        // The factors go to the thin matrix: c ⊙ s·B.
        let up = self.b.mul(&ratio.unsqueeze(1)?)?.mul_scalar(self.scale)?.to_kind(kind)?;
        let scaled = if self.hub {
            y.x.mul(&c)?
        } else if self.dropout.active(cx) {
            let bare = Tensors::new().with("weight", f.theta().need("weight")?.clone());
            let again = f.call_with(&bare, &x.replace(dropped), cx)?.x;
            y.x.addcmul(&again, &c.add_scalar(-1.0)?)?
        } else {
            match f.theta().get("bias") {
                None => y.x.mul(&c)?,
                // c ⊙ (y − b) + b
                Some(bias) => bias.sub(&bias.mul(&c)?)?.addcmul(&y.x, &c)?,
            }
        };
        Ok(y.replace(scaled.add_linear(&inner, &up)?))
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        let delta = self.b.matmul(&self.a)?.mul_scalar(self.scale)?;
        let sum = w.to_kind(delta.kind())?.add(&delta)?;
        let c = self.ratio(theta)?;
        let scaled = sum.mul(&c.unsqueeze(1)?)?.to_kind(w.kind())?;
        let composed = theta.clone().with("weight", scaled);
        Ok(Some(match theta.get("bias") {
            Some(b) if self.hub => {
                composed.with("bias", b.to_kind(c.kind())?.mul(&c)?.to_kind(b.kind())?)
            }
            _ => composed,
        }))
    }

    fn phi(&self) -> Tensors {
        let all = [(A, &self.a), (B, &self.b), (MAGNITUDE, &self.magnitude)];
        all.into_iter().map(|(n, t)| (n, t.clone())).collect()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(DoraLinear {
            a: phi.need(A)?.clone(),
            b: phi.need(B)?.clone(),
            magnitude: phi.need(MAGNITUDE)?.clone(),
            scale: self.scale,
            dropout: self.dropout.clone(),
            hub: self.hub,
        }))
    }

    fn signature(&self) -> String {
        let (a, b) = (self.a.size(), self.b.size());
        format!("{}({a:?}, {b:?}, scale {})", self.kind(), self.scale)
    }
}
