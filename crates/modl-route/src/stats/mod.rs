//! How evenly and how decidedly routers use their modules, and what that says of their inputs.
//!
//! With αᵤⱼ for N units (rows, real tokens; one α for all counts for each row) and m modules:
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
//! | `overflow` | dropped ⁄ (dropped + kept) choices, where full modules drop some |
//! | `unrouted` | the share of units without any module |
//!
//! H is in nats and takes |α|. CV²: Shazeer et al. 2017, arXiv 1701.06538, §4; survey §4.2.1 names
//! what these numbers show: module collapse and overfitting.
//!
//! [`RoutingStats::of`] takes one routing. A [`RoutingReport`] adds up the traces of many batches by
//! site and by a label of the rows (their tasks), from which it has the mutual information of modules
//! and labels and the metrics of [`Mittal`] as well; [`signs`] reads off it what is wrong. A
//! [`Recorder`] keeps the choices themselves, which a [`RoutingTrace`] brings to a file and back.
//!
//! ```
//! use modl_core::{Routing, Trace, Weights};
//! use modl_route::stats::RoutingReport;
//!
//! // What `cx.take_trace()` gives after a forward pass over two rows.
//! let rows = vec![vec![(0, 1.0)], vec![(1, 1.0)]];
//! let routings = vec![("layer.0".to_owned(), Routing::new(Weights::Rows(rows), 2))];
//! let mut report = RoutingReport::default();
//! report.add(&Trace::of(routings), &["news", "tweets"], None)?;
//! let site = &report.sites()[0];
//! assert_eq!(site.stats().max_violation, 0.0);
//! assert!((site.mutual_information() - 2f64.ln()).abs() < 1e-12);
//! # Ok::<(), modl_core::Error>(())
//! ```

mod information;
mod mittal;
mod report;
mod sign;
mod tally;
mod trace;
mod trace_file;
mod units;

pub use information::{entropy, mutual_information};
pub use mittal::Mittal;
pub use modl_core::assignment;
pub use report::{RoutingReport, SiteUse};
pub use sign::{Sign, Thresholds, overfitting, signs};
pub use tally::Tally;
pub use trace::{Recorder, RoutingTrace, Split};
pub use units::{Unit, Units};

use modl_core::{Result, Routing, Weights};
use serde::Serialize;

/// The use of modules under one routing, or under many.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoutingStats {
    /// N, the number of units.
    pub units: u64,
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
    /// The share of choices that full modules dropped, as the router noted it ([`Units::of`]).
    pub overflow: f64,
    /// The share of units without any module.
    pub unrouted: f64,
}

impl RoutingStats {
    /// The numbers of one routing; all 0 where nothing was routed.
    ///
    /// # Errors
    /// Where α is not finite or is of a module that there is not.
    pub fn of(routing: &Routing) -> Result<Self> {
        let rows = match &routing.weights {
            Weights::Fixed(_) => 1,
            Weights::Rows(rows) => rows.len(),
            Weights::Dense(w) if w.dim() == 1 => 1,
            Weights::Dense(t)
            | Weights::Sparse { index: t, .. }
            | Weights::Slots { combine: t, .. } => t.len_of(0).max(0) as usize,
        };
        let mut tally = Tally::new(routing.modules);
        Units::of(routing, rows, None)?.iter().for_each(|unit| tally.add(unit));
        Ok(tally.stats())
    }
}

#[cfg(test)]
mod tests {
    use modl_core::{Device, Kind, Tensor, Weights};

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
