//! The lowest point of a convex quadratic function over the simplex, exactly.
//!
//! minimise ½ wᵀ G w + lᵀ w over w ≥ 0, Σ w = 1, by an active set: the function is minimised over
//! the weights that are free at present, those that would become negative are set to 0, and of those
//! at 0 the one that lowers it fastest becomes free. With l = 0 these are the steps of Wolfe 1976,
//! *Finding the nearest point in a polytope*. It ends after finitely many steps in the optimum, up to
//! rounding.

use super::Gram;

/// By how much, relative to the largest number, a derivative has to be lower to count.
const TOLERANCE: f64 = 1e-13;

/// The lowest point; with weights that do not change the function any of the lowest ones.
pub(super) fn minimise(g: &Gram, linear: &[f64]) -> Vec<f64> {
    let n = g.tasks();
    let slope_at =
        |w: &[f64]| -> Vec<f64> { g.times(w).iter().zip(linear).map(|(a, b)| a + b).collect() };
    let corner = |i: usize| 0.5 * g.get(i, i) + linear.get(i).copied().unwrap_or(0.0);
    let Some(first) = (0..n).min_by(|a, b| corner(*a).total_cmp(&corner(*b))) else {
        return Vec::new();
    };
    let scale = linear.iter().fold(g.largest(), |m, v| m.max(v.abs()));
    let mut w = vec![0.0; n];
    w[first] = 1.0;
    let mut free = vec![first];
    // Each round lowers the function, so that no set of free weights comes again.
    for _ in 0..64 * n {
        settle(g, linear, &mut w, &mut free);
        let slope = slope_at(&w);
        let level: f64 = slope.iter().zip(&w).map(|(a, b)| a * b).sum();
        let bound = (0..n).filter(|i| !free.contains(i));
        let Some(lowest) = bound.min_by(|a, b| slope[*a].total_cmp(&slope[*b])) else { break };
        if slope[lowest] >= level - TOLERANCE * scale {
            break;
        }
        free.push(lowest);
    }
    let sum: f64 = w.iter().sum();
    w.iter().map(|v| v / sum).collect()
}

/// Goes to the lowest point over the free weights; those that become 0 on the way are free no more.
fn settle(g: &Gram, linear: &[f64], w: &mut [f64], free: &mut Vec<usize>) {
    while free.len() > 1 {
        let Some(target) = stationary(g, linear, free) else { return };
        let mut step: f64 = 1.0;
        for (i, t) in free.iter().zip(&target) {
            if *t <= 0.0 {
                step = step.min(w[*i] / (w[*i] - t).max(f64::MIN_POSITIVE));
            }
        }
        for (i, t) in free.iter().zip(&target) {
            w[*i] += step * (t - w[*i]);
        }
        if step >= 1.0 {
            return;
        }
        // The one that ended the step may miss 0 by rounding.
        if let Some(lowest) = free.iter().copied().min_by(|a, b| w[*a].total_cmp(&w[*b])) {
            w[lowest] = 0.0;
        }
        w.iter_mut().for_each(|v| *v = v.max(0.0));
        free.retain(|i| w[*i] > 0.0);
    }
    if let [only] = free.as_slice() {
        w.fill(0.0);
        w[*only] = 1.0;
    }
}

/// Where the function is stationary over the free weights with Σ w = 1, whatever their signs.
fn stationary(g: &Gram, linear: &[f64], free: &[usize]) -> Option<Vec<f64>> {
    let n = free.len();
    // Without it the matrix would be singular where gradients depend on each other; the optimum then
    // lies on the boundary, where the step to this far point ends.
    let ridge = 1e-14 * g.largest();
    let mut rows = vec![vec![0.0; n + 2]; n + 1];
    for (r, i) in free.iter().enumerate() {
        for (c, j) in free.iter().enumerate() {
            rows[r][c] = g.get(*i, *j) + if r == c { ridge } else { 0.0 };
        }
        rows[r][n] = 1.0;
        rows[n][r] = 1.0;
        rows[r][n + 1] = -linear.get(*i).copied().unwrap_or(0.0);
    }
    rows[n][n + 1] = 1.0;
    let mut solved = solve(rows)?;
    solved.truncate(n);
    Some(solved)
}

/// x with A x = b, from the rows of `[A | b]`, by elimination with the largest pivot of each column;
/// `None` where A is singular.
pub(super) fn solve(mut rows: Vec<Vec<f64>>) -> Option<Vec<f64>> {
    let n = rows.len();
    for column in 0..n {
        let pivot =
            (column..n).max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs()))?;
        rows.swap(column, pivot);
        let (above, below) = rows.split_at_mut(column + 1);
        let pivot = &above[column];
        if pivot[column] == 0.0 || !pivot[column].is_finite() {
            return None;
        }
        for row in below {
            let factor = row[column] / pivot[column];
            row.iter_mut().zip(pivot).skip(column).for_each(|(v, p)| *v -= factor * p);
        }
    }
    let mut x = vec![0.0; n];
    for r in (0..n).rev() {
        let known: f64 = (r + 1..n).map(|c| rows[r][c] * x[c]).sum();
        x[r] = (rows[r][n] - known) / rows[r][r];
    }
    Some(x)
}
