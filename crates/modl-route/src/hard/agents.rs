//! Tabular agents: one row of a table for each task, from which a module is chosen.
//!
//! With the return R of a choice a, its past mean value(a), and V̄ = Σ π(a) value(a):
//!
//! - WPL (Abdallah, Lesser 2008, JAIR 33, "A multiagent reinforcement learning algorithm with
//!   non-linear dynamics"): the table is π itself. For each a with Δₐ = value(a) − V̄:
//!   π(a) += η Δₐ · (π(a) where Δₐ < 0, else 1 − π(a)), then π is projected to the simplex.
//! - REINFORCE: the table is ℓ, π = softmax(ℓ), ℓ += η w (R − V̄)(onehot(a) − π), where w corrects for
//!   choices that were not drawn from π.
//! - Q-learning: the table is Q, Q(a) += η (R − Q(a)), π = the largest. The return is the reward at
//!   the end of the pass, so there is no value of a next state in it.

use serde::{Deserialize, Serialize};

/// How an agent learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Agent {
    /// The weighted policy learner.
    #[default]
    Wpl,
    /// The gradient of the expected return.
    Reinforce,
    /// Values of choices.
    QLearning,
}

/// One task's part of the tables.
pub(crate) struct Row<'a> {
    /// π, ℓ or Q.
    pub(crate) table: &'a mut [f64],
    /// The mean return of each choice so far.
    pub(crate) values: &'a mut [f64],
    /// How often each was made.
    pub(crate) visits: &'a mut [f64],
}

impl Agent {
    /// What the table starts with, for m modules.
    pub(crate) fn start(self, m: usize) -> f64 {
        match self {
            Agent::Wpl => 1.0 / m.max(1) as f64,
            Agent::Reinforce | Agent::QLearning => 0.0,
        }
    }

    /// π from a row of the table, which may have been written by anyone. Of equal Q the one that
    /// `rank` has first.
    pub(crate) fn policy(self, table: &[f64], rank: &[usize]) -> Vec<f64> {
        match self {
            Agent::Wpl => {
                let mut p = table.to_vec();
                project_to_simplex(&mut p);
                p
            }
            Agent::Reinforce => {
                let most = table.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let e: Vec<f64> = table.iter().map(|l| (l - most).exp()).collect();
                let sum: f64 = e.iter().sum();
                e.iter().map(|v| v / sum).collect()
            }
            Agent::QLearning => {
                let best = largest(table, rank);
                (0..table.len()).map(|j| f64::from(u8::from(j == best))).collect()
            }
        }
    }

    /// Takes in the return `r` of the choice `a`, which was drawn with probability `drawn_with`.
    pub(crate) fn learn(self, row: &mut Row, a: usize, r: f64, drawn_with: f64, rate: f64) {
        // Ranks matter for Q alone, whose π is not used here.
        let order: Vec<usize> = (0..row.table.len()).collect();
        let p = self.policy(row.table, &order);
        let (Some(value), Some(visits)) = (row.values.get_mut(a), row.visits.get_mut(a)) else {
            return;
        };
        let before = *visits;
        *visits += 1.0;
        // A mean over all visits at first, over the last 1 ⁄ rate or so later on.
        let step = (1.0 / *visits).max(rate.min(1.0));
        let known: f64 = *value;
        *value += step * (r - known);
        // What was never tried is neither better nor worse than the rest.
        let seen = |j: usize| row.visits.get(j).is_some_and(|v| *v > 0.0);
        let (mut mean, mut share) = (0.0, 0.0);
        for (j, (p, v)) in p.iter().zip(row.values.iter()).enumerate().filter(|(j, _)| seen(*j)) {
            // For REINFORCE the baseline is not to know the return that it is taken from.
            let v = if j == a && self == Agent::Reinforce { known } else { *v };
            let counts = !(j == a && self == Agent::Reinforce && before == 0.0);
            mean += if counts { p * v } else { 0.0 };
            share += if counts { *p } else { 0.0 };
        }
        let mean = if share > 0.0 { mean / share } else { 0.0 };
        match self {
            Agent::Wpl => {
                for (j, (w, p)) in row.table.iter_mut().zip(&p).enumerate() {
                    let tried = row.visits.get(j).is_some_and(|v| *v > 0.0);
                    let value = row.values.get(j).copied().filter(|_| tried).unwrap_or(mean);
                    *w = p + wpl_step(value - mean, *p, rate);
                }
                project_to_simplex(row.table);
            }
            Agent::Reinforce => {
                let own = p.get(a).copied().unwrap_or(0.0);
                let weight = if drawn_with > 0.0 { own / drawn_with } else { 0.0 };
                for (j, (l, p)) in row.table.iter_mut().zip(&p).enumerate() {
                    let one = f64::from(u8::from(j == a));
                    *l += rate * weight * (r - mean) * (one - p);
                }
            }
            Agent::QLearning => {
                if let Some(q) = row.table.get_mut(a) {
                    *q += rate.min(1.0) * (r - *q);
                }
            }
        }
    }
}

/// η Δ · (π where Δ < 0, else 1 − π).
fn wpl_step(delta: f64, p: f64, rate: f64) -> f64 {
    rate * delta * if delta < 0.0 { p } else { 1.0 - p }
}

/// The place of the largest number, among equal ones that which `rank` has first.
pub(crate) fn largest(values: &[f64], rank: &[usize]) -> usize {
    let at = |j: &usize| values.get(*j).copied().unwrap_or(f64::NEG_INFINITY);
    let mut best = rank.first().copied().unwrap_or(0);
    for j in rank {
        if at(j) > at(&best) {
            best = *j;
        }
    }
    best
}

/// The nearest point whose numbers are 0 or above and sum to 1 (Duchi et al. 2008, ICML, "Efficient
/// projections onto the ℓ₁-ball for learning in high dimensions", figure 1).
pub(crate) fn project_to_simplex(v: &mut [f64]) {
    let mut sorted = v.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut shift) = (0.0, 0.0);
    for (i, u) in (1..).zip(&sorted) {
        sum += u;
        let own = (sum - 1.0) / f64::from(i);
        if u - own > 0.0 {
            shift = own;
        }
    }
    v.iter_mut().for_each(|x| *x = (*x - shift).max(0.0));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use modl_core::Seed;
    use rand::Rng;

    use super::*;

    #[test]
    fn the_projection_is_the_nearest_point_of_the_simplex() {
        let mut rng = Seed(1).rng();
        for _ in 0..200 {
            let v: Vec<f64> = (0..3).map(|_| rng.gen_range(-2.0..2.0)).collect();
            let mut p = v.clone();
            project_to_simplex(&mut p);
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12 && p.iter().all(|x| *x >= 0.0));
            let far = |q: &[f64]| q.iter().zip(&v).map(|(q, v)| (q - v).powi(2)).sum::<f64>();
            // All points of a grid with 60 steps a side.
            for i in 0..=60 {
                for j in 0..=60 - i {
                    let q = [i, j, 60 - i - j].map(|n| f64::from(n) / 60.0);
                    assert!(far(&p) <= far(&q) + 1e-12, "{v:?} {p:?} {q:?}");
                }
            }
        }
    }

    #[test]
    fn a_wpl_step_is_the_formula() {
        // π = (.5, .3, .2), values (1, 0, −1): V̄ = .3, Δ = (.7, −.3, −1.3).
        let (mut table, mut values) = ([0.5, 0.3, 0.2], [1.0, 0.0, -1.0]);
        let mut visits = [1e9, 1e9, 1e9];
        let mut row = Row { table: &mut table, values: &mut values, visits: &mut visits };
        Agent::Wpl.learn(&mut row, 1, 0.0, 0.3, 0.1);
        let raw = [0.5 + 0.1 * 0.7 * 0.5, 0.3 - 0.1 * 0.3 * 0.3, 0.2 - 0.1 * 1.3 * 0.2];
        let off = (raw.iter().sum::<f64>() - 1.0) / 3.0; // all stay above 0
        for (found, raw) in table.iter().zip(raw) {
            assert!((found - (raw - off)).abs() < 1e-9, "{table:?}");
        }
    }

    #[test]
    fn policies_stay_on_the_simplex_and_find_the_best_arm() {
        for agent in [Agent::Wpl, Agent::Reinforce, Agent::QLearning] {
            let mut rng = Seed(3).rng();
            let means = [-1.0, -0.4, -0.8, -2.0];
            let (mut table, mut values, mut visits) = ([agent.start(4); 4], [0.0; 4], [0.0; 4]);
            for _ in 0..4000 {
                let p = agent.policy(&table, &[0, 1, 2, 3]);
                assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-9 && p.iter().all(|p| *p >= 0.0));
                let drawn = |j: usize| 0.8 * p[j] + 0.05;
                let (mut a, mut u) = (0, rng.r#gen::<f64>());
                while a < 3 && u > drawn(a) {
                    u -= drawn(a);
                    a += 1;
                }
                let r = means[a] + rng.gen_range(-0.5..0.5);
                let with = drawn(a);
                let mut row = Row { table: &mut table, values: &mut values, visits: &mut visits };
                agent.learn(&mut row, a, r, with, 0.05);
            }
            let p = agent.policy(&table, &[0, 1, 2, 3]);
            assert!(p[1] > 0.9, "{agent:?}: {p:?}");
        }
    }
}
