//! Polytropon: a task is a subset of skills, and modules are skills.
//!
//! ℓ `[T, m]` has a logit for each task t and module j, and starts uniform in ±10⁻³. With z the
//! skills of a row's task,
//!
//! - in training zⱼ = σ((ℓₜⱼ + ln u − ln(1 − u)) ⁄ τ), u ~ U(0, 1): a relaxed Bernoulli variable, drawn
//!   for each row anew, as in the authors' code and in PEFT (Concrete: Maddison, Mnih, Teh 2017,
//!   arXiv 1611.00712), so that no two rows share α, and parameters are merged for each;
//! - in evaluation zⱼ = σ(ℓₜⱼ), the same for all rows of a task, and so is what is merged;
//! - αⱼ = zⱼ ⁄ (Σ z + 10⁻¹²).
//!
//! Ponti, Sordoni, Bengio, Reddy 2023, arXiv 2202.13914; survey §4.2.3. The paper averages the factors
//! of LoRAs and then multiplies, (Σ αᵢBᵢ)(Σ αⱼAⱼ): the aggregator `average`. Its other order,
//! Σ αⱼBⱼAⱼ without cross terms, is `weighted_sum` (or `concat`). Skills as sparse changes, the paper's
//! other kind, are modules of a sparse kind under `average`. ℓ is to learn faster than the modules;
//! the training configuration says so: `lr_scale = { "routers.*" = 100.0 }`.
//!
//! With `ibp` training emits the loss `ibp` = −ln P(\[Z\]) for Z = 1\[σ(ℓ) > ½\] under the Indian buffet
//! process of concentration a (Griffiths, Ghahramani 2011, JMLR 12, eq. 14), N = T tasks:
//!
//! −ln P = −K₊ ln a + Σ_h ln K_h! + a·H_N + Σₖ (ln N! − ln(N − mₖ)! − ln(mₖ − 1)!)
//!
//! over the K₊ modules that any task has, mₖ the number of tasks that have module k, K_h how many
//! modules have the same tasks h, H_N = Σ 1⁄i. It counts 1 unless a recipe says otherwise, as in the
//! authors' code. Gradients go straight through the rounding to σ(ℓ).
//!
//! ```toml
//! router = { type = "polytropon", tasks = ["tweets", "news", "reviews"], ibp = 3.0 }
//! aggregator = { type = "average" }
//! ```

use modl_core::{
    Bank, Context, Device, Error, Init, Kind, Result, Router, RouterConfig, Routing, Scope, Seed,
    Signal, Site, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::labels::{TaskLabels, look_up};

/// A subset of the modules for each task.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Polytropon {
    /// The tasks.
    #[serde(flatten)]
    pub labels: TaskLabels,
    /// How skills are drawn and learned.
    #[serde(flatten)]
    pub skills: SkillSettings,
}

/// How skills are drawn and learned, for one head or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SkillSettings {
    /// τ > 0 of the relaxed Bernoulli variables. Default: 1.
    pub temperature: f64,
    /// The bound of the uniform numbers with which ℓ starts. Default: 10⁻³.
    pub init_bound: f64,
    /// a > 0: emits the loss `ibp` with this concentration. Default: no such loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ibp: Option<f64>,
}

impl Default for SkillSettings {
    fn default() -> Self {
        SkillSettings { temperature: 1.0, init_bound: 1e-3, ibp: None }
    }
}

impl RouterConfig for Polytropon {
    fn kind(&self) -> &'static str {
        "polytropon"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, _: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(PolytroponRouter(Skills::build(
            "polytropon",
            &self.labels,
            &self.skills,
            &[1, bank.len() as i64],
            scope,
        )?)))
    }
}

#[derive(Debug)]
struct PolytroponRouter(Skills);

impl Router for PolytroponRouter {
    fn kind(&self) -> &'static str {
        "polytropon"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        if self.0.has_prior() { &[("ibp", 1.0)] } else { &[] }
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let alpha = self.0.alpha(x, cx)?.squeeze(-2)?; // [modules] or [batch, modules]
        self.0.with_prior(Routing::new(Weights::Dense(alpha), bank.len()).normalised(), cx)
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(PolytroponRouter(self.0.grown(modules, scope)?)))
    }
}

/// ℓ with what becomes of it, also for several heads.
#[derive(Debug, Clone)]
pub(crate) struct Skills {
    labels: TaskLabels,
    config: SkillSettings,
    /// ℓ, `[tasks, heads, modules]`.
    logits: Tensor,
    /// Where draws are.
    path: String,
}

impl Skills {
    pub(crate) fn build(
        method: &'static str,
        labels: &TaskLabels,
        config: &SkillSettings,
        heads_and_modules: &[i64; 2],
        scope: &mut Scope,
    ) -> Result<Skills> {
        let wrong =
            |key: &str, problem: &str| Err(Error::invalid(format!("{method}.{key}"), problem));
        let tasks = labels.check(method)?;
        if !(config.temperature > 0.0 && config.temperature.is_finite()) {
            return wrong("temperature", "is to be above 0");
        }
        if !(config.init_bound >= 0.0 && config.init_bound.is_finite()) {
            return wrong("init_bound", "is to be 0 or above");
        }
        if config.ibp.is_some_and(|a| !(a > 0.0 && a.is_finite())) {
            return wrong("ibp", "is to be above 0");
        }
        let [heads, modules] = *heads_and_modules;
        let shape = [tasks, heads, modules];
        let logits = scope.param("logits", &shape, Init::Uniform(config.init_bound))?;
        let (labels, config) = (labels.clone(), config.clone());
        Ok(Skills { labels, config, logits, path: scope.path().to_owned() })
    }

    /// α, `[heads, modules]` where all rows share one and `[batch, heads, modules]` where not.
    pub(crate) fn alpha(&self, x: &Signal, cx: &Context) -> Result<Tensor> {
        let tasks = self.labels.of_rows(x.rows(), cx)?;
        self.logits.check_finite("logits of the skills of tasks")?;
        let z = match tasks.split_first() {
            Some((first, others)) if !cx.train && others.iter().all(|t| t == first) => {
                self.logits.select(0, *first)?.sigmoid()?
            }
            _ => {
                let logits = look_up(&self.logits, &tasks)?;
                if cx.train {
                    relaxed_bernoulli(&logits, self.config.temperature, cx.draw(&self.path))?
                } else {
                    logits.sigmoid()?
                }
            }
        };
        z.div(&z.sum_dims(&[-1], true)?.add_scalar(1e-12)?)
    }

    /// Whether there is a loss `ibp`.
    pub(crate) fn has_prior(&self) -> bool {
        self.config.ibp.is_some()
    }

    /// The routing with the loss `ibp` where it is wanted. Each head has its own Z.
    pub(crate) fn with_prior(&self, routing: Routing, cx: &Context) -> Result<Routing> {
        let Some(a) = self.config.ibp.filter(|_| cx.train) else { return Ok(routing) };
        let mut sum: Option<Tensor> = None;
        for logits in self.logits.unbind(1)? {
            let own = ibp(&logits.sigmoid()?, a)?;
            sum = Some(sum.map_or(Ok(own.clone()), |s| s.add(&own))?);
        }
        Ok(match sum {
            Some(loss) => routing.with_loss("ibp", loss),
            None => routing,
        })
    }

    pub(crate) fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Skills> {
        let mut grown = self.clone();
        let [tasks, heads, old] = self.logits.size()[..] else { return Ok(grown) };
        let (kind, device) = (self.logits.kind(), self.logits.device());
        let (shape, seed) =
            ([tasks, heads, modules as i64 - old], scope.seed().nth(modules as u64));
        let new = Init::Uniform(self.config.init_bound).tensor(&shape, seed, kind, device)?;
        grown.logits = scope.replace("logits", &Tensor::cat(&[self.logits.detach()?, new], -1)?)?;
        Ok(grown)
    }
}

/// σ((ℓ + ln u − ln(1 − u)) ⁄ τ).
fn relaxed_bernoulli(logits: &Tensor, temperature: f64, seed: Seed) -> Result<Tensor> {
    let u = Init::Uniform(0.5).tensor(&logits.size(), seed, Kind::Double, Device::Cpu)?;
    let u = u.add_scalar(0.5)?.clamp(1e-9, 1.0 - 1e-9)?;
    let noise = u.log()?.sub(&u.neg()?.add_scalar(1.0)?.log()?)?;
    let noise = noise.to_kind(logits.kind())?.to_device(logits.device())?;
    logits.add(&noise)?.mul_scalar(1.0 / temperature)?.sigmoid()
}

/// −ln P(\[Z\]) for Z = 1\[p > ½\], p `[tasks, modules]`, a scalar.
fn ibp(p: &Tensor, a: f64) -> Result<Tensor> {
    let [n, m] = p.size()[..] else {
        return Err(Error::invalid("ibp", format!("{p:?} is not [tasks, modules]")));
    };
    let half = Tensor::full(&[1], 0.5, p.kind(), p.device())?;
    let hard = p.detach()?.greater(&half)?;
    let flat = hard.t()?.to_kind(Kind::Int64)?.to_vec::<i64>()?; // module by module
    let columns: Vec<&[i64]> = flat.chunks(n.max(1) as usize).collect();
    let used: Vec<i64> =
        (0..m).zip(&columns).filter(|(_, c)| c.contains(&1)).map(|(k, _)| k).collect();
    // ln K_h! = Σ ln i over the i-th of equal columns.
    let mut constant = a * (1..=n).map(|i| 1.0 / i as f64).sum::<f64>();
    constant -= used.len() as f64 * a.ln();
    for k in &used {
        let own = columns.get(*k as usize);
        let so_far = columns.iter().take(*k as usize + 1).filter(|c| Some(*c) == own).count();
        constant += (so_far as f64).ln();
    }
    let through = hard.to_kind(p.kind())?.add(&p.sub(&p.detach()?)?)?; // [tasks, modules]
    let index = Tensor::from_slice(&used, &[used.len() as i64], p.device())?;
    let counts = through.sum_dims(&[0], false)?.index_select(0, &index)?; // [K₊]
    let ln_gamma = |t: &Tensor| Tensor::op("lgamma", &[t], |t| t[0].f_lgamma());
    let free = ln_gamma(&counts.neg()?.add_scalar(n as f64 + 1.0)?)?;
    let taken = ln_gamma(&counts)?;
    let ln_n: f64 = (1..=n).map(|i| (i as f64).ln()).sum();
    constant += used.len() as f64 * ln_n;
    free.add(&taken)?.sum()?.neg()?.add_scalar(constant)
}
