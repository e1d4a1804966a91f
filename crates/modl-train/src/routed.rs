//! How modules are used in a step of training.

use std::collections::BTreeMap;

use modl_core::{Context, Result, ResultExt, Trace};
use modl_route::RoutingStats;
use modl_route::stats::{Tally, Units};

/// A statistic by its name in events.
type Metric = (&'static str, fn(&RoutingStats) -> f64);

const METRICS: [Metric; 8] = [
    ("load_cv2", |s| s.load_cv2),
    ("importance_cv2", |s| s.importance_cv2),
    ("max_violation", |s| s.max_violation),
    ("entropy_of_mean", |s| s.entropy_of_mean),
    ("mean_entropy", |s| s.mean_entropy),
    ("active_modules", |s| s.active_modules),
    ("overflow", |s| s.overflow),
    ("unrouted", |s| s.unrouted),
];

/// The statistics of each routing of some passes over so many rows, in the mean. Padding does not
/// count. `None` where nothing was routed.
///
/// # Errors
/// With the site where α does not fit the rows.
pub(crate) fn routed<'p>(
    passes: impl Iterator<Item = (&'p Trace, &'p Context, usize)>,
) -> Result<Option<BTreeMap<String, f64>>> {
    let (mut sums, mut n) = (BTreeMap::<String, f64>::new(), 0.0);
    for (trace, cx, rows) in passes {
        for (path, routing) in &trace.routings {
            let units = Units::of(routing, rows, cx.find("mask")).at(path)?;
            let mut tally = Tally::new(routing.modules);
            units.iter().for_each(|unit| tally.add(unit));
            let stats = tally.stats();
            for (name, of) in METRICS {
                *sums.entry(name.to_owned()).or_default() += of(&stats);
            }
            n += 1.0;
        }
    }
    sums.values_mut().for_each(|sum| *sum /= n);
    Ok((n > 0.0).then_some(sums))
}
