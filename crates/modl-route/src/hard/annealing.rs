//! The temperature τ of relaxed choices, which may fall as training goes on.

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// How τ gets from its start to `to`, over the first `steps` steps of training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Annealing {
    /// τ from step `steps` on, above 0. Jang et al. 2016 (arXiv 1611.01144) end at 0.5.
    pub to: f64,
    /// The number of steps on the way.
    pub steps: u64,
    /// The way. Default: `exponential`.
    #[serde(default)]
    pub shape: AnnealingShape,
}

/// The way from one temperature to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnnealingShape {
    /// By the same factor in each step: τ₀ (to ⁄ τ₀)^(step ⁄ steps).
    #[default]
    Exponential,
    /// By the same difference in each step.
    Linear,
}

/// τ at a step that starts at `tau`.
pub(crate) fn tau_at(tau: f64, anneal: Option<&Annealing>, step: u64) -> f64 {
    let Some(a) = anneal else { return tau };
    let way = (step as f64 / a.steps.max(1) as f64).min(1.0);
    match a.shape {
        AnnealingShape::Exponential => tau * (a.to / tau).powf(way),
        AnnealingShape::Linear => tau + (a.to - tau) * way,
    }
}

/// Refuses temperatures that are not above 0.
pub(crate) fn check_tau(method: &str, tau: f64, anneal: Option<&Annealing>) -> Result<()> {
    for (key, value) in [("tau", Some(tau)), ("anneal.to", anneal.map(|a| a.to))] {
        if value.is_some_and(|v| !(v > 0.0 && v.is_finite())) {
            return Err(Error::invalid(format!("{method}.{key}"), "is to be above 0"));
        }
    }
    match anneal {
        Some(a) if a.steps == 0 => {
            Err(Error::invalid(format!("{method}.anneal.steps"), "is to be 1 or more"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_start_and_end_where_they_say() {
        for (shape, half) in [(AnnealingShape::Exponential, 0.5), (AnnealingShape::Linear, 0.625)] {
            let a = Annealing { to: 0.25, steps: 100, shape };
            let at = |step| tau_at(1.0, Some(&a), step);
            assert_eq!(at(0), 1.0);
            assert!((at(50) - half).abs() < 1e-12);
            assert_eq!((at(100), at(10_000)), (0.25, 0.25));
        }
        assert_eq!(tau_at(0.7, None, 99), 0.7);
    }
}
