//! GradNorm (Chen et al. 2018, *GradNorm: gradient normalization for adaptive loss balancing in deep
//! multitask networks*, arXiv 1711.02257; survey §6.1): weights that are learned so that all tasks train
//! at the same rate.
//!
//! With G_t = w_t ‖∇L_t‖ for the shared parameters, the rates r_t = (L_t ⁄ L_t(0)) ⁄ mean of these, and
//! Ḡ = mean of G, the weights go down Σ_t |G_t − Ḡ r_t^α|, where Ḡ r_t^α is taken as constant, and are then
//! scaled so that Σ w_t = T.
//!
//! The paper takes the last shared layer alone, to save time; here all shared parameters are there
//! anyway.

/// d⁄dw_t of Σ |w_t n_t − Ḡ r_t^α|, from the norms n_t = ‖∇L_t‖ and the ratios L_t ⁄ L_t(0).
///
/// ```
/// use modl_train::multitask::gradnorm_slopes;
/// // Two tasks with the same rate: the one with the larger gradient is to count less.
/// assert_eq!(gradnorm_slopes(&[1.0, 1.0], &[3.0, 1.0], &[0.5, 0.5], 1.5), [3.0, -1.0]);
/// // With α > 0 one that has fallen less is to count more.
/// assert_eq!(gradnorm_slopes(&[1.0, 1.0], &[2.0, 2.0], &[0.9, 0.1], 1.5), [-2.0, 2.0]);
/// ```
pub fn gradnorm_slopes(weights: &[f64], norms: &[f64], ratios: &[f64], alpha: f64) -> Vec<f64> {
    let n = weights.len().max(1) as f64;
    let weighted: Vec<f64> = weights.iter().zip(norms).map(|(w, n)| w * n).collect();
    let mean_norm = weighted.iter().sum::<f64>() / n;
    let mean_ratio = ratios.iter().sum::<f64>() / n;
    let slope = |((own, norm), ratio): ((&f64, &f64), &f64)| {
        let rate = if mean_ratio > 0.0 { ratio / mean_ratio } else { 1.0 };
        let apart = own - mean_norm * rate.powf(alpha);
        // Equal up to rounding is equal.
        if apart.abs() <= 1e-12 * mean_norm { 0.0 } else { apart.signum() * norm }
    };
    weighted.iter().zip(norms).zip(ratios).map(slope).collect()
}
