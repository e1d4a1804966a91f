//! What the log of a run says of its trainings.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use modl_train::Event;

/// Numbers by name.
pub(super) type Numbers = BTreeMap<String, f64>;

/// A training of a run: a phase, or a part of one. Of a step that was done twice, before and after a
/// stop, the later one counts.
#[derive(Debug, Default)]
pub(super) struct Training {
    pub(super) name: String,
    /// Examples, and trained parameters as numbers.
    pub(super) examples: usize,
    pub(super) trained: usize,
    /// The steps that there were to be.
    pub(super) wanted: u64,
    /// `loss`, `lr`, `grad_norm`, `seconds` and `aux/NAME` by step.
    pub(super) steps: BTreeMap<u64, Numbers>,
    /// What the routers chose, by step.
    pub(super) routed: BTreeMap<u64, Numbers>,
    /// What was measured on watched examples, by step.
    pub(super) watched: BTreeMap<u64, Numbers>,
}

impl Training {
    /// One number by step.
    pub(super) fn series(&self, key: &str) -> Vec<(u64, f64)> {
        of(&self.steps, key)
    }

    fn forget_after(&mut self, step: u64) {
        for all in [&mut self.steps, &mut self.routed, &mut self.watched] {
            all.retain(|n, _| *n <= step);
        }
    }
}

/// One of the numbers by step.
pub(super) fn of(all: &BTreeMap<u64, Numbers>, key: &str) -> Vec<(u64, f64)> {
    all.iter().filter_map(|(step, numbers)| Some((*step, *numbers.get(key)?))).collect()
}

/// The trainings of a run in their order; none where it has no log.
pub(super) fn trainings(run: &Path) -> Result<Vec<Training>> {
    let path = run.join("events.jsonl");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| path.display().to_string()),
    };
    let mut all: Vec<Training> = Vec::new();
    let mut current = 0;
    // A line that a stop has cut off is none, and so is an event that this version does not know.
    for event in text.lines().filter_map(|line| serde_json::from_str::<Event>(line).ok()) {
        if let Event::Started { name, step, steps, trained, examples, .. } = event {
            current = all.iter().position(|t| t.name == name).unwrap_or(all.len());
            if current == all.len() {
                all.push(Training { name, ..Training::default() });
            }
            if let Some(t) = all.get_mut(current) {
                t.forget_after(step);
                (t.wanted, t.trained, t.examples) = (steps, trained, examples);
            }
            continue;
        }
        let Some(training) = all.get_mut(current) else { continue };
        match event {
            Event::Step { step, loss, aux, lr, grad_norm, seconds } => {
                let own =
                    [("loss", loss), ("lr", lr), ("grad_norm", grad_norm), ("seconds", seconds)];
                let own = own.into_iter().map(|(name, v)| (name.to_owned(), v));
                let aux = aux.into_iter().map(|(name, v)| (format!("aux/{name}"), v));
                training.steps.insert(step, own.chain(aux).collect());
            }
            Event::Routed { step, metrics } => drop(training.routed.insert(step, metrics)),
            Event::Evaluated { step: Some(step), metrics, .. } => {
                training.watched.insert(step, metrics);
            }
            _ => {}
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_steps_that_were_done_twice_the_later_ones_count() {
        let dir = tempfile::tempdir().unwrap();
        let started = |step| {
            format!(
                r#"{{"event":"started","name":"fit/a","step":{step},"steps":4,"trained":7,"examples":9,"note":null}}"#
            )
        };
        let step = |step: u64, loss: f64| {
            format!(
                r#"{{"event":"step","step":{step},"loss":{loss},"aux":{{"z":2.0}},"lr":0.1,"grad_norm":1.0,"seconds":0.5}}"#
            )
        };
        let lines = [
            started(0),
            step(1, 9.0),
            step(2, 8.0),
            step(3, 7.0),
            started(1),
            step(2, 8.5),
            "{\"event\":\"ste".to_owned(),
        ];
        assert!(trainings(dir.path()).unwrap().is_empty());
        std::fs::write(dir.path().join("events.jsonl"), lines.join("\n")).unwrap();
        let found = trainings(dir.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].series("loss"), [(1, 9.0), (2, 8.5)]);
        assert_eq!(found[0].series("aux/z").len(), 2);
        assert_eq!((found[0].wanted, found[0].trained, found[0].examples), (4, 7, 9));
    }
}
