//! Diff pruning: θ' = θ + z ⊙ w with hard concrete gates z, trained to be sparse.
//!
//! The penalty is λ E‖z‖₀ = λ Σ P(z > 0). Structured, an entry's gate is the product of its own and
//! of one for the whole tensor, so that whole tensors can be left alone. Then m takes the share
//! `density` of all entries with the largest |z ⊙ w|, the gates are opened, and w ← z ⊙ w is
//! trained under the mask. In evaluation gates are without noise.
//!
//! Guo, Rush and Kim 2021, *Parameter-Efficient Transfer Learning with Diff Pruning*, arXiv
//! 2012.07463. Survey §3.1, parameter composition.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, ParamStore, Result, Scope,
    Signal, Step, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::full::{Form, effective, learned};
use super::hard_concrete::HardConcrete;
use super::masked::{DELTA, MASK, add_under, is_open, open_mask, part};
use super::top_k::{check_share, share, step_at, top_k_across};

const ALPHA: &str = "alpha";
const GROUP: &str = "group";

/// An α at which a gate is 1 whatever the noise, and no gradient is left.
const OPEN: f64 = 1e4;

/// Configuration of diff pruning at sites that have parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiffPruning {
    /// The distribution of the gates; default that of the authors' code,
    /// [`HardConcrete::DIFF_PRUNING`]. [`HardConcrete::LOUIZOS`] is the usual one of L₀ penalties.
    pub gate: HardConcrete,
    /// Where α starts; default 5. Far below 0 gates are closed and stay so.
    pub start: f64,
    /// λ, at least 0; default 1.25e-7.
    pub l0: f64,
    /// Whether each tensor has a gate of its own besides; default true.
    pub structured: bool,
    /// The share of the parameters of all its sites that is changed in the end, in (0, 1]; default
    /// 0.005.
    pub density: f64,
    /// The share of the training steps after which the mask is fixed, in (0, 1]; default 0.5. It is
    /// fixed once.
    pub fix_at: f64,
}

impl Default for DiffPruning {
    fn default() -> Self {
        DiffPruning {
            gate: HardConcrete::DIFF_PRUNING,
            start: 5.0,
            l0: 1.25e-7,
            structured: true,
            density: 0.005,
            fix_at: 0.5,
        }
    }
}

impl ModuleConfig for DiffPruning {
    fn kind(&self) -> &'static str {
        "diff_pruning"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        self.gate.check("diff_pruning.gate")?;
        check_share("diff_pruning.density", self.density)?;
        check_share("diff_pruning.fix_at", self.fix_at)?;
        if !(self.start.is_finite() && self.l0.is_finite() && self.l0 >= 0.0) {
            let problem =
                format!("are {} and {}, want a number and at least 0", self.start, self.l0);
            return Err(Error::invalid("diff_pruning.start and l0", problem));
        }
        let theta = learned(at, |_| true)?;
        let start = Init::Constant(self.start);
        let mut all = |part: &str, init: Init, whole: bool| {
            let mut places = scope.sub(part);
            theta.map(|n, t| places.param(n, &if whole { vec![1] } else { t.size() }, init))
        };
        let delta = all(DELTA, Init::Zeros, false)?;
        let alpha = all(ALPHA, start, false)?;
        let group = if self.structured { all(GROUP, start, true)? } else { Tensors::new() };
        let mask = open_mask(&theta, scope)?;
        let place = scope.path().to_owned();
        Ok(Box::new(Gated { gate: self.gate, l0: self.l0, delta, alpha, group, mask, place }))
    }

    fn after_step(&self, params: &ParamStore, step: &Step) -> Result<()> {
        let masks = part(params, MASK);
        if step.done != step_at(self.fix_at, step.total) || !is_open(&masks)? {
            return Ok(());
        }
        let (deltas, alphas, groups) =
            (part(params, DELTA), part(params, ALPHA), part(params, GROUP));
        let gated = deltas.map(|key, w| {
            let z = self.gate.without_noise(alphas.need(key)?)?.mul(w)?;
            match groups.get(key) {
                Some(g) => z.mul(&self.gate.without_noise(g)?),
                None => Ok(z),
            }
        })?;
        let n = gated.iter().map(|(_, t)| t.numel()).sum();
        let chosen = top_k_across(&gated.map(|_, t| t.abs())?, share(self.density, n))?;
        for (key, z) in gated.iter() {
            masks.need(key)?.clone().copy_from(chosen.need(key)?)?;
            deltas.need(key)?.clone().copy_from(z)?;
        }
        for (_, alpha) in alphas.iter().chain(groups.iter()) {
            let open = Tensor::full(&alpha.size(), OPEN, alpha.kind(), alpha.device())?;
            alpha.clone().copy_from(&open)?;
        }
        Ok(())
    }
}

/// θ + m ⊙ z ⊙ w at one site; all by θ's names.
#[derive(Debug)]
struct Gated {
    gate: HardConcrete,
    l0: f64,
    delta: Tensors,
    alpha: Tensors,
    /// Empty where gates are not structured.
    group: Tensors,
    mask: Tensors,
    /// Where noise is drawn.
    place: String,
}

impl Gated {
    /// z ⊙ w of the parameter of that name, with the gates that `gate` makes of α.
    fn gated(&self, name: &str, gate: impl Fn(&str, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let z = gate(&format!("{ALPHA}.{name}"), self.alpha.need(name)?)?;
        let delta = self.delta.need(name)?.mul(&z)?;
        match self.group.get(name) {
            Some(group) => delta.mul(&gate(&format!("{GROUP}.{name}"), group)?),
            None => Ok(delta),
        }
    }

    /// θ' with the gates that `gate` makes of the α of that name.
    fn with_gates(
        &self,
        theta: &Tensors,
        gate: impl Fn(&str, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensors> {
        let mut all = theta.clone();
        for name in self.delta.names() {
            let delta = self.gated(name, &gate)?;
            let sum = add_under(theta.need(name)?, &delta, self.mask.need(name)?)?;
            all.set(name.to_owned(), sum);
        }
        Ok(all)
    }
}

impl Module for Gated {
    fn kind(&self) -> &'static str {
        "diff_pruning"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let theta = self.with_gates(f.theta(), |name, alpha| {
            if cx.train {
                self.gate.sample(alpha, cx.draw(&format!("{}.{name}", self.place)))
            } else {
                self.gate.without_noise(alpha)
            }
        })?;
        f.call_with(&theta, x, cx)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        self.with_gates(theta, |_, alpha| self.gate.without_noise(alpha)).map(Some)
    }

    fn penalty(&self, _: &Context) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for (name, alpha) in self.alpha.iter() {
            let mut open = self.gate.open(alpha)?.mul(self.mask.need(name)?)?.sum()?;
            if let Some(group) = self.group.get(name) {
                open = open.mul(&self.gate.open(group)?.sum()?)?;
            }
            sum = Some(match sum {
                Some(s) => s.add(&open)?,
                None => open,
            });
        }
        sum.map(|s| s.mul_scalar(self.l0)).transpose()
    }

    /// m ⊙ z ⊙ w without noise: gates and masks of modules that are averaged may differ.
    fn phi(&self) -> Tensors {
        let open = |_: &str, alpha: &Tensor| self.gate.without_noise(alpha);
        let own = |name: &str, _: &Tensor| self.gated(name, open)?.mul(self.mask.need(name)?);
        // Where it fails `with_phi` misses the names.
        self.delta.map(own).unwrap_or_default()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        effective(self.kind(), Form::Delta, &self.delta, phi)
    }
}
