//! Dynamic weight averaging, DWA (Liu, Johns, Davison 2019, *End-to-end multi-task learning with
//! attention*, arXiv 1803.10704, section 3.3; survey §6.1): tasks whose loss falls slowly count more.
//!
//! w_t = T · softmax_t(r_t ⁄ τ) with r_t = L_t(k−1) ⁄ L_t(k−2), where L_t(k) is the mean of the task's loss
//! over epoch k and τ = 2. In the first two epochs, and of a task that was not there in both of the last
//! ones, r_t = 1.

/// w of each task from its mean losses of the last epoch and of the one before.
///
/// ```
/// use modl_train::multitask::dwa_weights;
/// // Of two tasks the one whose loss did not fall counts more: e^0.5 : e^0.25.
/// let w = dwa_weights(&[Some((1.0, 1.0)), Some((0.5, 1.0))], 2.0);
/// assert!((w[0] / w[1] - 0.25f64.exp()).abs() < 1e-12);
/// assert!((w[0] + w[1] - 2.0).abs() < 1e-12);
/// ```
pub fn dwa_weights(losses: &[Option<(f64, f64)>], temperature: f64) -> Vec<f64> {
    let rate = |of: &Option<(f64, f64)>| match of {
        Some((last, before)) if *before > 0.0 => last / before,
        _ => 1.0,
    };
    let rates: Vec<f64> = losses.iter().map(rate).collect();
    let highest = rates.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let raised: Vec<f64> = rates.iter().map(|r| ((r - highest) / temperature).exp()).collect();
    let sum: f64 = raised.iter().sum();
    raised.iter().map(|e| losses.len() as f64 * e / sum).collect()
}
