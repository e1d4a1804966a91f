//! How the use of modules went while they were trained, from a run's events.

use std::path::Path;

use anyhow::Result;

use super::super::run_events::{self, Training, trainings};
use super::heat_maps::{Map, plain};
use crate::report::lines;

/// A drawing: its file's name, what it is called, and metrics with what they are called.
type Drawing = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const DRAWINGS: [Drawing; 2] = [
    (
        "entropy",
        "entropies in nats",
        &[("entropy_of_mean", "H of mean"), ("mean_entropy", "mean H")],
    ),
    (
        "load",
        "load",
        &[("max_violation", "MaxVio"), ("load_cv2", "CV² load"), ("overflow", "overflow")],
    ),
];

/// Two drawings for each training of the run that measured its routing twice or more; none where the
/// run has no events.
pub(super) fn of(run: &Path) -> Result<Vec<Map>> {
    let trainings = trainings(run)?;
    let mut maps = Vec::new();
    for Training { name, routed, .. } in trainings.iter().filter(|t| t.routed.len() > 1) {
        for (kind, what, metrics) in DRAWINGS {
            let series: Vec<(&str, Vec<(u64, f64)>)> =
                metrics.iter().map(|(key, title)| (*title, run_events::of(routed, key))).collect();
            maps.push(Map {
                file: format!("{kind}-{}.svg", plain(name)),
                svg: lines(&format!("{name}: {what}"), &series)?,
                caption: format!("Batches of the training `{name}`, the mean over sites."),
            });
        }
    }
    Ok(maps)
}
