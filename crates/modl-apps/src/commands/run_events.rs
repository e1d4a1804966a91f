//! What the log of a run says of its trainings.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

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

/// At most `most` points, each the mean of as many steps.
pub(super) fn thinned(points: &[(u64, f64)], most: usize) -> Vec<(f64, f64)> {
    let mean = |part: &[(u64, f64)]| {
        let n = part.len().max(1) as f64;
        let (steps, values) =
            part.iter().fold((0.0, 0.0), |(a, b), (step, v)| (a + *step as f64, b + v));
        (steps / n, values / n)
    };
    points.chunks(points.len().div_ceil(most.max(1)).max(1)).map(mean).collect()
}

/// The trainings of a run in their order; none where it has no log.
pub(super) fn trainings(run: &Path) -> Result<Vec<Training>> {
    let mut log = Log::of(run);
    log.read()?;
    Ok(log.trainings)
}

/// The log of a run, which may still grow.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    /// The trainings so far in their order.
    pub(super) trainings: Vec<Training>,
    current: usize,
    read: u64,
}

impl Log {
    pub(super) fn of(run: &Path) -> Self {
        let path = run.join("events.jsonl");
        Log { path, trainings: Vec::new(), current: 0, read: 0 }
    }

    /// The training that the last lines are of.
    pub(super) fn current(&self) -> usize {
        self.current
    }

    /// Takes up the whole lines that have been written since; false where there are none.
    pub(super) fn read(&mut self) -> Result<bool> {
        let place = || self.path.display().to_string();
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).with_context(place),
        };
        if file.metadata().with_context(place)?.len() < self.read {
            // Another run has begun in this folder.
            *self = Log { path: std::mem::take(&mut self.path), ..Log::of(Path::new("")) };
        }
        let place = || self.path.display().to_string();
        file.seek(SeekFrom::Start(self.read)).with_context(place)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).with_context(place)?;
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        self.read += whole as u64;
        let lines = text.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n');
        // A line that a stop has cut off is none, and so is an event that this version does not know.
        for event in lines.filter_map(|line| serde_json::from_slice::<Event>(line).ok()) {
            self.take(event);
        }
        Ok(whole > 0)
    }

    fn take(&mut self, event: Event) {
        let all = &mut self.trainings;
        if let Event::Started { name, step, steps, trained, examples, .. } = event {
            self.current = all.iter().position(|t| t.name == name).unwrap_or(all.len());
            if self.current == all.len() {
                all.push(Training { name, ..Training::default() });
            }
            if let Some(t) = all.get_mut(self.current) {
                t.forget_after(step);
                (t.wanted, t.trained, t.examples) = (steps, trained, examples);
            }
            return;
        }
        let Some(training) = all.get_mut(self.current) else { return };
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

    #[test]
    fn a_log_is_read_as_it_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = Log::of(dir.path());
        assert!(!log.read().unwrap());
        let started = |name: &str| {
            format!(
                "{{\"event\":\"started\",\"name\":\"{name}\",\"step\":0,\"steps\":4,\"trained\":7,\"examples\":9,\"note\":null}}\n"
            )
        };
        let step = |n: u64| {
            format!(
                "{{\"event\":\"step\",\"step\":{n},\"loss\":1.0,\"aux\":{{}},\"lr\":0.1,\"grad_norm\":1.0,\"seconds\":0.5}}\n"
            )
        };
        let whole = [started("a"), step(1), step(2), started("b"), step(1)].concat();
        // Byte by byte: a line counts when it is whole, and once.
        for end in 1..=whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            let more = log.read().unwrap();
            assert_eq!(more, whole.as_bytes()[end - 1] == b'\n');
        }
        let found: Vec<_> =
            log.trainings.iter().map(|t| (t.name.as_str(), t.steps.len())).collect();
        assert_eq!((found, log.current()), (vec![("a", 2), ("b", 1)], 1));
        // A file that has become shorter is another run's.
        std::fs::write(&path, started("c")).unwrap();
        assert!(log.read().unwrap());
        assert_eq!((log.trainings.len(), log.trainings[0].name.as_str()), (1, "c"));
    }

    #[test]
    fn many_steps_become_means_of_some() {
        let all: Vec<(u64, f64)> = (1..=900).map(|n| (n, n as f64)).collect();
        let few = thinned(&all, 300);
        assert_eq!((few.len(), few[0], few[299]), (300, (2.0, 2.0), (899.0, 899.0)));
        assert_eq!(thinned(&all[..5], 300), [1.0, 2.0, 3.0, 4.0, 5.0].map(|n| (n, n)));
        assert!(thinned(&[], 300).is_empty());
    }
}
