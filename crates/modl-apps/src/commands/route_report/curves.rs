//! How the use of modules went while they were trained, from a run's events.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use modl_train::Event;

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

/// The metrics of a training by step.
type Steps = BTreeMap<u64, BTreeMap<String, f64>>;

/// Two drawings for each training of the run that measured its routing twice or more; none where the
/// run has no events.
pub(super) fn of(run: &Path) -> Result<Vec<Map>> {
    let path = run.join("events.jsonl");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| path.display().to_string()),
    };
    let mut trainings: Vec<(String, Steps)> = Vec::new();
    let mut current = String::new();
    // A line that a stop has cut off is none, and so is an event that this version does not know.
    for event in text.lines().filter_map(|line| serde_json::from_str::<Event>(line).ok()) {
        match event {
            Event::Started { name, .. } => current = name,
            Event::Routed { step, metrics } => {
                // Of a step that was done twice, before and after a stop, the later one counts.
                match trainings.iter_mut().find(|(name, _)| *name == current) {
                    Some((_, steps)) => drop(steps.insert(step, metrics)),
                    None => trainings.push((current.clone(), [(step, metrics)].into())),
                }
            }
            _ => {}
        }
    }
    let mut maps = Vec::new();
    for (name, steps) in trainings.iter().filter(|(_, steps)| steps.len() > 1) {
        for (kind, what, metrics) in DRAWINGS {
            let series: Vec<(&str, Vec<(u64, f64)>)> = metrics
                .iter()
                .map(|(key, title)| {
                    let at = |(step, all): (&u64, &BTreeMap<String, f64>)| {
                        Some((*step, *all.get(*key)?))
                    };
                    (*title, steps.iter().filter_map(at).collect())
                })
                .collect();
            maps.push(Map {
                file: format!("{kind}-{}.svg", plain(name)),
                svg: lines(&format!("{name}: {what}"), &series)?,
                caption: format!("Batches of the training `{name}`, the mean over sites."),
            });
        }
    }
    Ok(maps)
}
