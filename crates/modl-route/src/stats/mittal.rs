//! How modules relate to rules: Mittal, Bengio, Lajoie 2022, *Is a Modular Architecture Enough?*,
//! arXiv 2206.02713, §4; survey §4.2.1.
//!
//! There are R rules (tasks, domains, labels of any kind) and M modules. A(r, m) is the mean share of
//! module m where rule r holds, each row summing to 1. With all rules equally frequent the joint
//! distribution is J = A ⁄ R, and p(m) = Σᵣ J(r, m).
//!
//! | field | formula | 0 is | 1 is |
//! |---|---|---|---|
//! | `collapse_average` | M ⁄ (M − 1) · Σₘ max(0, 1⁄M − p(m)) | all modules equally used | one has everything |
//! | `collapse_worst` | 1 − M · minₘ p(m) | all modules equally used | one is never used |
//! | `mutual_information` | I = Σ J ln(J ⁄ (p(m) ⁄ R)), in nats | modules know nothing of rules | – |
//! | `specialisation` | I ⁄ ln min(R, M) | the same | each rule a module of its own |
//! | `inverse_mutual_information` | 1 − `specialisation` | each rule a module of its own | modules know nothing of rules |
//! | `alignment` | min over assignments π of ‖A − 1π‖₁ ⁄ 2R = 1 − Σᵣ A(r, π(r)) ⁄ R | each rule a module of its own | – |
//! | `adaptation` | E over p ~ Dirichlet(1, …, 1) of ½ Σᵢ \|p₍ᵢ₎ − q₍ᵢ₎\| with q = pᵀA, both sorted | use follows the rules' frequencies | – |
//!
//! Collapse and specialisation are different axes: uniform A has collapse 0, and yet I = 0 and
//! alignment (R − 1) ⁄ R. The authors take R = M. Where R ≠ M, π gives each rule at most one module,
//! a rule without one counts as wholly misplaced, and the shorter of p and q is filled up with 0.
//! The authors estimate q from samples; it is exact here, and only p is drawn.

use modl_core::{Device, Error, Init, Kind, Result, Seed};
use serde::Serialize;

use super::information::{column_sums, mutual_information};
use modl_core::assignment;

/// The number of distributions of rules that `adaptation` draws.
const DRAWS: i64 = 1000;

/// What Mittal et al. measure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mittal {
    /// How far modules are below their even share, together.
    pub collapse_average: f64,
    /// How far the least used module is below its even share.
    pub collapse_worst: f64,
    /// I(rule; module), in nats.
    pub mutual_information: f64,
    /// I of what is possible.
    pub specialisation: f64,
    /// 1 − `specialisation`.
    pub inverse_mutual_information: f64,
    /// The distance to the nearest one-to-one use.
    pub alignment: f64,
    /// How far the use of modules is from other frequencies of rules.
    pub adaptation: f64,
    /// The module of each rule in the nearest one-to-one use.
    pub assignment: Vec<Option<usize>>,
}

impl Mittal {
    /// The metrics for `activation[rule][module]`, each row summing to 1. `seed` draws the
    /// frequencies of `adaptation`; its standard error is below 0.01.
    ///
    /// # Errors
    /// Where there is no rule or no module, a number is not finite or below 0, or a row does not
    /// sum to 1.
    pub fn of(activation: &[Vec<f64>], seed: Seed) -> Result<Self> {
        let (rules, modules) = check(activation)?;
        let p: Vec<f64> =
            column_sums(activation).into_iter().map(|sum| sum / rules as f64).collect();
        let even = 1.0 / modules as f64;
        let missing: f64 = p.iter().map(|p| (even - p).max(0.0)).sum();
        // A single module cannot collapse.
        let scale = if modules > 1 { modules as f64 / (modules as f64 - 1.0) } else { 0.0 };
        let least = p.iter().fold(f64::INFINITY, |a, b| a.min(*b));
        let information = mutual_information(activation);
        let most = (rules.min(modules) as f64).ln();
        let specialisation = if most > 0.0 { (information / most).min(1.0) } else { 0.0 };
        let cost: Vec<Vec<f64>> =
            activation.iter().map(|row| row.iter().map(|a| 1.0 - a).collect()).collect();
        let assignment = assignment(&cost)?;
        let placed = |(row, j): (&Vec<f64>, &Option<usize>)| j.and_then(|j| row.get(j).copied());
        let aligned: f64 = activation.iter().zip(&assignment).filter_map(placed).sum();
        Ok(Mittal {
            collapse_average: scale * missing,
            collapse_worst: (1.0 - modules as f64 * least).max(0.0),
            mutual_information: information,
            specialisation,
            inverse_mutual_information: 1.0 - specialisation,
            alignment: (1.0 - aligned / rules as f64).max(0.0),
            adaptation: adaptation(activation, modules, seed)?,
            assignment,
        })
    }
}

fn check(activation: &[Vec<f64>]) -> Result<(usize, usize)> {
    let wrong = |problem: String| Error::invalid("activation of modules by rules", problem);
    let modules = activation.first().map_or(0, Vec::len);
    if modules == 0 {
        return Err(wrong("holds no rule or no module".into()));
    }
    for (r, row) in activation.iter().enumerate() {
        if row.len() != modules {
            return Err(wrong(format!("row {r} has {} modules, row 0 {modules}", row.len())));
        }
        let sum: f64 = row.iter().sum();
        let shares = row.iter().all(|a| *a >= 0.0) && (sum - 1.0).abs() < 1e-6;
        if !shares {
            return Err(wrong(format!("row {r} is no distribution: its sum is {sum}")));
        }
    }
    Ok((activation.len(), modules))
}

fn adaptation(activation: &[Vec<f64>], modules: usize, seed: Seed) -> Result<f64> {
    let rules = activation.len();
    let shape = [DRAWS, rules as i64];
    let seed = seed.child("adaptation");
    let uniform = Init::Uniform(0.5).tensor(&shape, seed, Kind::Double, Device::Cpu)?;
    let mut sum = 0.0;
    for draw in uniform.to_vec::<f64>()?.chunks(rules) {
        // Exponential numbers over their sum are a draw from the flat Dirichlet distribution.
        let e: Vec<f64> = draw.iter().map(|v| -(0.5 - v).ln()).collect();
        let total: f64 = e.iter().sum();
        let mut p: Vec<f64> = e.iter().map(|e| e / total).collect();
        let mut q = vec![0.0; modules];
        for (p, row) in p.iter().zip(activation) {
            q.iter_mut().zip(row).for_each(|(q, a)| *q += p * a);
        }
        let length = rules.max(modules);
        for side in [&mut p, &mut q] {
            side.sort_by(|a, b| b.total_cmp(a));
            side.resize(length, 0.0);
        }
        sum += p.iter().zip(&q).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0;
    }
    Ok(sum / DRAWS as f64)
}
