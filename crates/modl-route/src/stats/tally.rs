//! Sums over units, from which the statistics follow.

use super::RoutingStats;
use super::information::entropy;
use super::units::Unit;

/// What is added up over units.
#[derive(Debug, Clone, PartialEq)]
pub struct Tally {
    units: u64,
    routed: u64,
    /// #{u : αᵤⱼ ≠ 0}.
    count: Vec<f64>,
    /// Σ αᵤⱼ.
    sum: Vec<f64>,
    /// Σ |αᵤⱼ| ⁄ Σⱼ |αᵤⱼ|: each unit with a module counts 1.
    share: Vec<f64>,
    entropy: f64,
    dropped: f64,
}

impl Tally {
    /// Of no unit yet, over `modules` modules.
    pub fn new(modules: usize) -> Self {
        let zeros = vec![0.0; modules];
        Tally {
            units: 0,
            routed: 0,
            count: zeros.clone(),
            sum: zeros.clone(),
            share: zeros,
            entropy: 0.0,
            dropped: 0.0,
        }
    }

    /// Adds a unit. Choices beyond the modules do not count.
    pub fn add(&mut self, unit: Unit) {
        self.units += 1;
        self.dropped += unit.dropped;
        let total: f64 = unit.weights.iter().map(|w| w.abs()).sum();
        if total == 0.0 {
            return;
        }
        self.routed += 1;
        self.entropy += entropy(unit.weights);
        for (j, w) in unit.chosen.iter().zip(unit.weights) {
            let j = *j as usize;
            let own = (self.count.get_mut(j), self.sum.get_mut(j), self.share.get_mut(j));
            if let (Some(count), Some(sum), Some(share)) = own {
                *count += 1.0;
                *sum += w;
                *share += w.abs() / total;
            }
        }
    }

    /// Adds what another one has.
    pub fn merge(&mut self, other: &Tally) {
        self.units += other.units;
        self.routed += other.routed;
        self.entropy += other.entropy;
        self.dropped += other.dropped;
        for (all, more) in [
            (&mut self.count, &other.count),
            (&mut self.sum, &other.sum),
            (&mut self.share, &other.share),
        ] {
            all.iter_mut().zip(more).for_each(|(a, b)| *a += b);
        }
    }

    /// How many units.
    pub fn units(&self) -> u64 {
        self.units
    }

    /// How many units with a module.
    pub fn routed(&self) -> u64 {
        self.routed
    }

    /// How many units' worth each module has: Σ over u of |αᵤⱼ| ⁄ Σⱼ |αᵤⱼ|.
    pub fn shares(&self) -> &[f64] {
        &self.share
    }

    /// The mean over units with a module of their share of each module, which sums to 1; all 0
    /// where there is none.
    pub fn mean_shares(&self) -> Vec<f64> {
        let n = self.routed.max(1) as f64;
        self.share.iter().map(|s| s / n).collect()
    }

    /// The statistics.
    pub fn stats(&self) -> RoutingStats {
        let units = self.units.max(1) as f64;
        let choices = self.count.iter().sum::<f64>();
        let load: Vec<f64> = self.count.iter().map(|c| c / choices.max(1.0)).collect();
        let importance: Vec<f64> = self.sum.iter().map(|s| s / units).collect();
        let most = load.iter().fold(0.0, |a: f64, b| a.max(*b));
        let used = most > 0.0;
        RoutingStats {
            units: self.units,
            load_cv2: cv2(&load),
            importance_cv2: cv2(&importance),
            entropy_of_mean: entropy(&importance),
            mean_entropy: self.entropy / self.routed.max(1) as f64,
            max_violation: if used { most * load.len() as f64 - 1.0 } else { 0.0 },
            active_modules: if used { entropy(&load).exp() } else { 0.0 },
            overflow: self.dropped / (self.dropped + choices).max(1.0),
            unrouted: (self.units - self.routed) as f64 / units,
            load,
            importance,
        }
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
