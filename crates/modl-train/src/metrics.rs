//! How good predictions are: Spearman's ρ, mean absolute error, accuracy of the sign; accuracy and
//! macro F1 of classes; and the mean of several seeds with its 95 % interval.

use std::collections::{BTreeMap, BTreeSet};

use modl_core::{Error, Result};

use crate::Prediction;

/// Mean of |ŷ − y|; `None` without predictions.
pub fn mean_absolute_error(predictions: &[f64], targets: &[f64]) -> Option<f64> {
    mean(&predictions.iter().zip(targets).map(|(p, t)| (p - t).abs()).collect::<Vec<_>>())
}

/// The share of predictions with the target's sign. Targets of |y| ≤ `neutral` are left out; `None`
/// where no other is left. A prediction of exactly 0 is wrong.
pub fn sign_accuracy(predictions: &[f64], targets: &[f64], neutral: f64) -> Option<f64> {
    let pairs = predictions.iter().zip(targets).filter(|(_, t)| t.abs() > neutral);
    mean(&pairs.map(|(p, t)| if p * t > 0.0 { 1.0 } else { 0.0 }).collect::<Vec<_>>())
}

/// The share of predictions that are right; `None` without predictions.
pub fn accuracy(predictions: &[i64], targets: &[i64]) -> Option<f64> {
    mean(&predictions.iter().zip(targets).map(|(p, t)| f64::from(p == t)).collect::<Vec<_>>())
}

/// The mean over classes of F1 = 2 TP ⁄ (2 TP + FP + FN), over the classes that are among predictions
/// or targets, as scikit-learn has it; `None` without predictions.
///
/// ```
/// // F1 is 2⁄3 of class 0 and 4⁄5 of class 1.
/// let f1 = modl_train::macro_f1(&[0, 1, 1, 1], &[0, 0, 1, 1]);
/// assert!((f1.unwrap() - 11.0 / 15.0).abs() < 1e-12);
/// ```
pub fn macro_f1(predictions: &[i64], targets: &[i64]) -> Option<f64> {
    let pairs = || predictions.iter().zip(targets);
    let classes: BTreeSet<&i64> = pairs().flat_map(|(p, t)| [p, t]).collect();
    let f1 = |class: &&i64| {
        let hits = pairs().filter(|(p, t)| p == class && t == class).count();
        // 2 TP + FP + FN: how often it was said, and how often it was right.
        let all: usize =
            pairs().map(|(p, t)| usize::from(p == *class) + usize::from(t == *class)).sum();
        2.0 * hits as f64 / all as f64
    };
    mean(&classes.iter().map(f1).collect::<Vec<_>>())
}

/// Spearman's ρ: Pearson's correlation of the ranks, where equal numbers share the mean of their
/// ranks. `None` where fewer than two pairs are given or one side is constant.
///
/// ```
/// use modl_train::spearman;
/// assert_eq!(spearman(&[1.0, 2.0, 3.0], &[10.0, 100.0, 1000.0]), Some(1.0));
/// ```
pub fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    if a.len() != b.len() {
        return None;
    }
    let (a, b) = (ranks(a), ranks(b));
    let (ma, mb) = (mean(&a)?, mean(&b)?);
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter().zip(&b).map(|(x, y)| f(x - ma, y - mb)).sum()
    };
    let spread = (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt();
    (spread > 0.0).then(|| sum(&|x, y| x * y) / spread)
}

/// Ranks from 1; equal numbers share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<(usize, f64)> = values.iter().copied().enumerate().collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for ties in order.chunk_by(|a, b| a.1 == b.1) {
        let shared = before as f64 + (ties.len() + 1) as f64 / 2.0;
        for (i, _) in ties {
            if let Some(rank) = ranks.get_mut(*i) {
                *rank = shared;
            }
        }
        before += ties.len();
    }
    ranks
}

/// The metrics of some predictions by name: `spearman`, `mae`, `sign_accuracy`, those of them that
/// are defined. Targets of |y| ≤ `neutral` have no sign.
pub fn scores<'a>(
    predictions: impl IntoIterator<Item = &'a Prediction>,
    neutral: f64,
) -> BTreeMap<String, f64> {
    let (said, right): (Vec<f64>, Vec<f64>) =
        predictions.into_iter().map(|p| (p.prediction, p.target)).unzip();
    let all = [
        ("spearman", spearman(&said, &right)),
        ("mae", mean_absolute_error(&said, &right)),
        ("sign_accuracy", sign_accuracy(&said, &right, neutral)),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// A mean with its interval: mean ± half.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// Half the width of the 95 % interval.
    pub half: f64,
}

/// The mean over seeds with its 95 % interval by Student's t: mean ± t₀.₉₇₅,ₙ₋₁ · s ⁄ √n.
///
/// # Errors
/// Where there are fewer than two values, from which no spread can be told.
pub fn interval(values: &[f64]) -> Result<Interval> {
    let n = values.len();
    let few = || Error::invalid("interval", format!("of {n} values; run 2 seeds at least"));
    let mean = mean(values).filter(|_| n >= 2).ok_or_else(few)?;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
    Ok(Interval { mean, half: t_975(n - 1) * (variance / n as f64).sqrt() })
}

/// The 97.5 % quantile of Student's t.
fn t_975(freedom: usize) -> f64 {
    const TABLE: [f64; 12] = [
        12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157,
        2.228139, 2.200985, 2.178813,
    ];
    if let Some(t) = freedom.checked_sub(1).and_then(|i| TABLE.get(i)) {
        return *t;
    }
    // Expansion in 1/ν around the normal quantile (Abramowitz and Stegun, 26.7.5).
    let (z, v) = (1.959963985f64, freedom as f64);
    z + (z.powi(3) + z) / (4.0 * v)
        + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * v.powi(2))
        + (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / (384.0 * v.powi(3))
        + (79.0 * z.powi(9) + 776.0 * z.powi(7) + 1482.0 * z.powi(5)
            - 1920.0 * z.powi(3)
            - 945.0 * z)
            / (92160.0 * v.powi(4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ranks by counting, straight from the definition.
    fn counted(values: &[f64]) -> Vec<f64> {
        let below = |v: f64| values.iter().filter(|w| **w < v).count() as f64;
        let equal = |v: f64| values.iter().filter(|w| **w == v).count() as f64;
        values.iter().map(|v| below(*v) + (equal(*v) + 1.0) / 2.0).collect()
    }

    proptest! {
        #[test]
        fn ranks_are_as_counted(values in prop::collection::vec(0u8..6, 0..30)) {
            let values: Vec<f64> = values.into_iter().map(f64::from).collect();
            prop_assert_eq!(ranks(&values), counted(&values));
        }
    }

    #[test]
    fn spearman_has_the_closed_values() {
        // Without ties ρ = 1 − 6 Σd² ⁄ (n(n²−1)): d = (1, −1, 1, −1, 0), so 1 − 24⁄120.
        let rho = spearman(&[1., 2., 3., 4., 5.], &[2., 1., 4., 3., 5.]).unwrap();
        assert!((rho - 0.8).abs() < 1e-12);
        // Ranks (1.5, 1.5, 3) against (1, 2, 3): 1.5 ⁄ √(1.5 · 2).
        let rho = spearman(&[7., 7., 9.], &[1., 2., 3.]).unwrap();
        assert!((rho - 0.75f64.sqrt()).abs() < 1e-12);
        assert_eq!(spearman(&[1., 1.], &[1., 2.]), None);
        assert_eq!(spearman(&[], &[]), None);
    }

    #[test]
    fn signs_leave_neutral_targets_out() {
        let said = [0.5, -1.0, 3.0, 0.0];
        assert_eq!(sign_accuracy(&said, &[1.0, 2.0, 0.05, -1.0], 0.1), Some(1.0 / 3.0));
        assert_eq!(sign_accuracy(&said, &[0.0; 4], 0.0), None);
        assert_eq!(mean_absolute_error(&[1.0, 2.0], &[0.0, 4.0]), Some(1.5));
    }

    #[test]
    fn the_interval_is_students() {
        let i = interval(&[1.0, 2.0, 3.0]).unwrap();
        assert!((i.mean - 2.0).abs() < 1e-12 && (i.half - 4.302653 / 3f64.sqrt()).abs() < 1e-6);
        assert!(interval(&[1.0]).is_err());
        // Published quantiles on both sides of the table's end.
        for (v, t) in [(13, 2.160369), (20, 2.085963), (30, 2.042272), (120, 1.979930)] {
            assert!((t_975(v) - t).abs() < 3e-6, "{v}: {}", t_975(v));
        }
    }
}
