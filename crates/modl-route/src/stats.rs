//! How evenly and how decidedly a router uses its modules.
//!
//! With αᵤⱼ for N units (rows, tokens, or the one of a static α) and m modules:
//!
//! | field | formula |
//! |---|---|
//! | `load` | fⱼ = #{u : αᵤⱼ ≠ 0} ⁄ Σⱼ #{u : αᵤⱼ ≠ 0} |
//! | `importance` | Pⱼ = mean over u of αᵤⱼ |
//! | `load_cv2`, `importance_cv2` | CV² = variance ⁄ mean², the variance over m (not m − 1) |
//! | `entropy_of_mean` | H(P ⁄ ΣP): large where all modules are used by some unit |
//! | `mean_entropy` | mean over u of H(αᵤ ⁄ Σαᵤ): 0 where each unit has one module |
//! | `max_violation` | MaxVio = maxⱼ fⱼ ⁄ mean f − 1 (Wang et al. 2024, arXiv 2408.15664) |
//! | `active_modules` | exp H(f): m where all are used alike, 1 where one has everything |
//!
//! H is in nats and takes |α|. CV²: Shazeer et al. 2017, arXiv 1701.06538, §4; survey §4.2.1 names
//! what these numbers show: module collapse and overfitting.

use modl_core::{Device, Kind, Result, Routing};
use serde::Serialize;

/// The use of modules under one routing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoutingStats {
    /// The share of each module in all choices.
    pub load: Vec<f64>,
    /// The mean weight of each module.
    pub importance: Vec<f64>,
    /// Squared coefficient of variation of the load.
    pub load_cv2: f64,
    /// Squared coefficient of variation of the importance.
    pub importance_cv2: f64,
    /// Entropy of the mean weights, in nats.
    pub entropy_of_mean: f64,
    /// Mean entropy of the weights of one unit, in nats, over units with any module.
    pub mean_entropy: f64,
    /// How far the most used module is above the mean load: 0 where all are used alike.
    pub max_violation: f64,
    /// The effective number of modules in use.
    pub active_modules: f64,
}

impl RoutingStats {
    /// The numbers of one routing; all 0 where nothing was routed.
    ///
    /// # Errors
    /// Where α cannot be made dense.
    pub fn of(routing: &Routing) -> Result<Self> {
        let m = routing.modules;
        let alpha = routing.dense(Kind::Double, Device::Cpu)?.to_vec::<f64>()?;
        let units = (alpha.len() / m.max(1)).max(1) as f64;
        let mut count = vec![0.0; m];
        let mut sum = vec![0.0; m];
        let mut entropies = Vec::new();
        for unit in alpha.chunks(m.max(1)) {
            for ((c, s), a) in count.iter_mut().zip(&mut sum).zip(unit) {
                *c += f64::from(u8::from(*a != 0.0));
                *s += a;
            }
            if unit.iter().any(|a| *a != 0.0) {
                entropies.push(entropy(unit));
            }
        }
        let choices = count.iter().sum::<f64>().max(1.0);
        let load: Vec<f64> = count.iter().map(|c| c / choices).collect();
        let importance: Vec<f64> = sum.iter().map(|s| s / units).collect();
        let most = load.iter().fold(0.0, |a: f64, b| a.max(*b));
        let used = most > 0.0;
        Ok(RoutingStats {
            load_cv2: cv2(&load),
            importance_cv2: cv2(&importance),
            entropy_of_mean: entropy(&importance),
            mean_entropy: entropies.iter().sum::<f64>() / entropies.len().max(1) as f64,
            max_violation: if used { most * m as f64 - 1.0 } else { 0.0 },
            active_modules: if used { entropy(&load).exp() } else { 0.0 },
            load,
            importance,
        })
    }
}

/// Variance ⁄ mean² over all numbers; 0 where the mean is.
fn cv2(values: &[f64]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    if mean == 0.0 {
        return 0.0;
    }
    values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n / mean.powi(2)
}

/// −Σ q ln q with q = |w| ⁄ Σ|w|; 0 where all are 0.
fn entropy(weights: &[f64]) -> f64 {
    let total: f64 = weights.iter().map(|w| w.abs()).sum();
    let term = |w: &f64| {
        let q = w.abs() / total;
        if q > 0.0 { -q * q.ln() } else { 0.0 }
    };
    weights.iter().map(term).sum()
}

#[cfg(test)]
mod tests {
    use modl_core::{Tensor, Weights};

    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-12
    }

    #[test]
    fn hard_choices_have_the_closed_forms() {
        // Modules 0, 0, 0, 1 of four: f = P = (3/4, 1/4, 0, 0).
        let rows = [0, 0, 0, 1].map(|j| vec![(j, 1.0)]);
        let s = RoutingStats::of(&Routing::new(Weights::Rows(rows.to_vec()), 4)).unwrap();
        assert_eq!(s.load, [0.75, 0.25, 0.0, 0.0]);
        assert_eq!(s.importance, s.load);
        // Mean 1/4; squares of deviations 1/4, 0, 1/16, 1/16 → variance 3/32 → ⁄ (1/16) = 3/2.
        assert!(close(s.load_cv2, 1.5) && close(s.importance_cv2, 1.5));
        assert!(close(s.mean_entropy, 0.0));
        let h = 0.75 * (4.0f64 / 3.0).ln() + 0.25 * 4.0f64.ln();
        assert!(close(s.entropy_of_mean, h) && close(s.active_modules, h.exp()));
        assert!(close(s.max_violation, 2.0));
    }

    #[test]
    fn a_uniform_distribution_is_even_and_undecided() {
        let alpha = Tensor::full(&[2, 3, 5], 0.2, Kind::Double, Device::Cpu).unwrap();
        let s = RoutingStats::of(&Routing::new(Weights::Dense(alpha), 5)).unwrap();
        assert!(close(s.load_cv2, 0.0) && close(s.importance_cv2, 0.0));
        assert!(close(s.entropy_of_mean, 5f64.ln()) && close(s.mean_entropy, 5f64.ln()));
        assert!(close(s.max_violation, 0.0) && close(s.active_modules, 5.0));
    }

    #[test]
    fn different_sharp_choices_have_entropy_in_the_mean_alone() {
        let alpha = Tensor::from_slice(&[1f64, 0., 0., 1.], &[2, 2], Device::Cpu).unwrap();
        let s = RoutingStats::of(&Routing::new(Weights::Dense(alpha), 2)).unwrap();
        assert!(close(s.mean_entropy, 0.0) && close(s.entropy_of_mean, 2f64.ln()));
    }

    #[test]
    fn nothing_routed_is_all_zeros_and_not_nan() {
        for weights in [Weights::Rows(vec![]), Weights::Fixed(vec![]), Weights::Rows(vec![vec![]])]
        {
            let s = RoutingStats::of(&Routing::new(weights, 2)).unwrap();
            assert_eq!((s.load_cv2, s.entropy_of_mean, s.mean_entropy), (0.0, 0.0, 0.0));
            assert_eq!((s.max_violation, s.active_modules), (0.0, 0.0));
        }
    }
}
