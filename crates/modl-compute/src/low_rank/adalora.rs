//! AdaLoRA: a low-rank change in the form of a singular value decomposition, whose rank moves to
//! the sites that need it.
//!
//! y = f_θ(x) + s·B (E ⊙ A) x with A `[r, in]`, B `[out, r]`, E `[r, 1]` and s = α ⁄ init_r. E starts at
//! 0, so that a fresh module changes nothing. A penalty keeps A and B near orthogonal: the mean over
//! all of them of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius).
//!
//! After each step the triplets (a row of A, a column of B, an entry of E) of all sites are ranked,
//! and only b(t) of them keep their E. b falls from init_r to target_r for each site by a cubic
//! between the steps tinit and total − tfinal. A triplet counts I(E) + mean I(A's row) +
//! mean I(B's column), where I = Ī · Ū with the running averages Ī of |w·∂w| and Ū of |I − Ī|.
//!
//! Zhang et al. 2023, *AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*,
//! arXiv 2303.10512. Survey §3.1, parameter composition. Names, defaults and the order of the steps
//! are PEFT's; where scores are equal, exactly the budget is kept, the first ones first.

use modl_core::{
    Attachment, Context, Error, Host, Init, LowRank, Module, ModuleConfig, ParamStore, Result,
    Scope, Signal, SiteKind, Step, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Patterns;
use crate::dropout::Dropout;
use crate::peft::Provenance;

/// The parameters, as in PEFT's files.
const A: &str = "lora_A";
const B: &str = "lora_B";
pub(crate) const E: &str = "lora_E";
/// The running averages of a parameter, kept as buffers.
const SENSITIVITY: &str = ".sensitivity";
const UNCERTAINTY: &str = ".uncertainty";

/// The parameter of which `name` is a running average, which PEFT's files do not have; `None` where
/// it is none.
pub(crate) fn averaged(name: &str) -> Option<&str> {
    name.strip_suffix(SENSITIVITY).or_else(|| name.strip_suffix(UNCERTAINTY))
}

/// Configuration of AdaLoRA at linear sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdaLora {
    /// The rank at the start, at least 1; default 12.
    pub init_r: i64,
    /// The mean rank at the end; default 8.
    pub target_r: i64,
    /// Ranks of their own for some sites: of a module whose rank has been allocated.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub ranks: Patterns<i64>,
    /// α; default 8. The product is scaled by α ⁄ (init_r + 10⁻⁵), whatever the site's rank.
    pub alpha: f64,
    /// In training, each element of the low-rank path's input is dropped with this probability, in
    /// [0, 1); default 0.
    pub dropout: f64,
    /// Steps before the budget falls; default 0.
    pub tinit: u64,
    /// Steps at the end in which the budget stays; default 0.
    pub tfinal: u64,
    /// Triplets are chosen each so many steps; default 1.
    pub delta_t: u64,
    /// The inertia of Ī, in [0, 1); default 0.85.
    pub beta1: f64,
    /// The inertia of Ū, in [0, 1); default 0.85.
    pub beta2: f64,
    /// The factor of the penalty; default 0.5.
    pub orth_reg_weight: f64,
    /// The number of steps by which the budget falls; that of the training where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_step: Option<u64>,
    /// Whether E starts at 0; else at random, for tests. Default: true.
    pub init_lora_weights: bool,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl Default for AdaLora {
    fn default() -> Self {
        AdaLora {
            init_r: 12,
            target_r: 8,
            ranks: Patterns::default(),
            alpha: 8.0,
            dropout: 0.0,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
            init_lora_weights: true,
            peft: Provenance::default(),
        }
    }
}

impl AdaLora {
    fn check(&self) -> Result<()> {
        for (key, fits) in [
            ("init_r", self.init_r >= 1),
            ("target_r", (1..=self.init_r).contains(&self.target_r)),
            ("delta_t", self.delta_t >= 1),
            ("beta1", (0.0..1.0).contains(&self.beta1)),
            ("beta2", (0.0..1.0).contains(&self.beta2)),
            ("orth_reg_weight", self.orth_reg_weight >= 0.0 && self.orth_reg_weight.is_finite()),
            ("alpha", self.alpha.is_finite()),
        ] {
            if !fits {
                let problem = "is out of range; wanted are init_r ≥ target_r ≥ 1, delta_t ≥ 1, \
                     beta1 and beta2 in [0, 1), a penalty of 0 or more";
                return Err(Error::invalid(format!("adalora.{key}"), problem));
            }
        }
        Ok(())
    }

    /// The number of triplets that stay after step `done` of `total`, from `start` down to `end`.
    ///
    /// ```
    /// # use modl_compute::low_rank::AdaLora;
    /// let a = AdaLora { tinit: 2, tfinal: 3, ..AdaLora::default() };
    /// assert_eq!((a.budget(2, 10, 48, 32), a.budget(7, 10, 48, 32)), (48, 32));
    /// ```
    pub fn budget(&self, done: u64, total: u64, start: usize, end: usize) -> usize {
        let last = total.saturating_sub(self.tfinal);
        if done <= self.tinit {
            return start;
        }
        if done >= last {
            return end;
        }
        let part = (done - self.tinit) as f64 / last.saturating_sub(self.tinit).max(1) as f64;
        end + ((start.saturating_sub(end)) as f64 * (1.0 - part).powi(3)) as usize
    }

    /// Brings the running averages of one parameter forward.
    fn average(&self, params: &ParamStore, name: &str, gradient: &Tensor) -> Result<()> {
        let mut mean = params.get(&format!("{name}{SENSITIVITY}"))?.clone();
        let mut spread = params.get(&format!("{name}{UNCERTAINTY}"))?.clone();
        let own = params.get(name)?.detach()?.mul(gradient)?.abs()?;
        mean.lerp_in_place(&own, 1.0 - self.beta1)?;
        spread.lerp_in_place(&own.sub(&mean)?.abs()?, 1.0 - self.beta2)
    }
}

/// I = Ī · Ū of a parameter.
fn importance(params: &ParamStore, name: &str) -> Result<Tensor> {
    let mean = params.get(&format!("{name}{SENSITIVITY}"))?;
    mean.mul(params.get(&format!("{name}{UNCERTAINTY}"))?)
}

impl ModuleConfig for AdaLora {
    fn kind(&self) -> &'static str {
        "adalora"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        super::query_and_value()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        if site.kind != SiteKind::Linear {
            return Err(Error::unsupported(
                format!("AdaLoRA at a site of kind {:?}", site.kind),
                "attach it to linear sites, for instance `query` and `value`",
            ));
        }
        self.check()?;
        let dropout = Dropout::new("adalora.dropout", self.dropout, scope)?;
        let r = *self.ranks.find(&site.path)?.unwrap_or(&self.init_r);
        if r < 0 {
            let problem = format!("is {r} at `{}`, wants 0 or more", site.path);
            return Err(Error::invalid("adalora.ranks", problem));
        }
        let start = if self.init_lora_weights { Init::Zeros } else { Init::Normal(0.02) };
        let mut make = |name: &str, shape: &[i64], init: Init| -> Result<Tensor> {
            for average in [SENSITIVITY, UNCERTAINTY] {
                scope.shared_frozen(&format!("{name}{average}"), shape, Init::Zeros)?;
            }
            scope.param(name, shape, init)
        };
        Ok(Box::new(AdaLoraLinear {
            a: make(A, &[r, site.input], Init::Normal(0.02))?,
            b: make(B, &[site.output, r], Init::Normal(0.02))?,
            e: make(E, &[r, 1], start)?,
            scale: self.alpha / (self.init_r as f64 + 1e-5),
            penalty: self.orth_reg_weight / (2 * at.sites.len().max(1)) as f64,
            dropout,
        }))
    }

    fn after_step(&self, params: &ParamStore, step: &Step) -> Result<()> {
        if step.gradients.is_empty() {
            return Ok(()); // Not trained in this phase, or not used in this batch.
        }
        let total = self.total_step.unwrap_or(step.total);
        let last = total.saturating_sub(self.tfinal);
        if step.done < last {
            for (name, gradient) in step.gradients.iter() {
                self.average(params, name, gradient)?;
            }
        }
        if step.done <= self.tinit || (step.done < last && !step.done.is_multiple_of(self.delta_t))
        {
            return Ok(());
        }
        let is_e = |n: &&str| n.rsplit('.').next() == Some(E);
        let singular: Vec<&str> = params.iter().map(|(n, _)| n).filter(is_e).collect();
        let mut scores = Vec::new();
        for e in &singular {
            let site = e.strip_suffix(E).unwrap_or(e);
            let a = importance(params, &format!("{site}{A}"))?.mean_dims(&[1], false)?;
            let b = importance(params, &format!("{site}{B}"))?.mean_dims(&[0], false)?;
            let own = importance(params, e)?.squeeze(-1)?;
            scores.extend(own.add(&a)?.add(&b)?.to_vec::<f64>()?);
        }
        let start = scores.len();
        let end = (start as f64 * self.target_r as f64 / self.init_r as f64).round() as usize;
        let budget = self.budget(step.done, total, start, end);
        let mut order: Vec<usize> = (0..start).collect();
        order.sort_by(|i, j| scores[*j].total_cmp(&scores[*i]).then(i.cmp(j)));
        let mut kept = vec![0f32; start];
        order.iter().take(budget).for_each(|i| kept[*i] = 1.0);
        let mut rest = kept.as_slice();
        for e in singular {
            let mut value = params.get(e)?.clone();
            let (own, others) = rest.split_at(value.numel().min(rest.len()));
            rest = others;
            let mask = Tensor::from_slice(own, &value.size(), value.device())?;
            let masked = value.detach()?.mul(&mask.to_kind(value.kind())?)?;
            value.copy_from(&masked)?;
        }
        Ok(())
    }
}

/// AdaLoRA at one site.
#[derive(Debug)]
struct AdaLoraLinear {
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: f64,
    /// What one ‖·‖ of the two counts.
    penalty: f64,
    dropout: Dropout,
}

impl AdaLoraLinear {
    fn factors(&self) -> Result<LowRank> {
        Ok(LowRank { down: self.a.mul(&self.e)?, up: self.b.clone(), scale: self.scale })
    }
}

impl Module for AdaLoraLinear {
    fn kind(&self) -> &'static str {
        "adalora"
    }

    fn delta(&self, _: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        self.factors()?.apply(&self.dropout.apply(&x.x, cx)?).map(Some)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        self.factors()?.compose(theta)
    }

    fn low_rank(&self, cx: &Context) -> Option<LowRank> {
        (!self.dropout.active(cx)).then(|| self.factors().ok()).flatten()
    }

    fn penalty(&self, _: &Context) -> Result<Option<Tensor>> {
        if self.penalty == 0.0 || !self.a.requires_grad() {
            return Ok(None);
        }
        let far = |gram: Tensor| {
            let one = Tensor::eye(gram.len_of(0), gram.kind(), gram.device())?;
            // The norm of zero has a gradient, the root of a sum of squares has none.
            gram.sub(&one)?.norm()
        };
        let a = far(self.a.matmul(&self.a.t()?)?)?;
        a.add(&far(self.b.t()?.matmul(&self.b)?)?)?.mul_scalar(self.penalty).map(Some)
    }

    fn phi(&self) -> Tensors {
        let all = [(A, &self.a), (B, &self.b), (E, &self.e)];
        all.into_iter().map(|(n, t)| (n, t.clone())).collect()
    }
}
