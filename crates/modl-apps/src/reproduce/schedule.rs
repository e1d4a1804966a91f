//! Which runs are missing, and who does them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use modl_core::{Registry, Seed};
use serde_json::json;

use super::experiment::{Condition, Experiment, Lab};
use crate::progress::bar;
use crate::trials::{Run, Runs, commit, fingerprint, peak_rss_mb};

/// An experiment with how it is run.
pub(super) struct Plan<'a> {
    pub(super) experiment: &'a dyn Experiment,
    pub(super) registry: &'a Registry,
    pub(super) seeds: u64,
    pub(super) quick: bool,
    pub(super) folder: PathBuf,
    /// How many runs at once.
    pub(super) workers: usize,
}

/// All runs of a plan.
pub(super) struct Done {
    pub(super) conditions: Vec<Condition>,
    /// One for each condition and seed.
    pub(super) runs: Vec<Run>,
    /// How many of them were there before.
    pub(super) kept: usize,
    /// Wall time of the others together.
    pub(super) seconds: f64,
}

impl Plan<'_> {
    /// Does what is missing.
    pub(super) fn run(&self) -> Result<Done> {
        let clock = Instant::now();
        let about = self.experiment.about();
        let conditions = self.experiment.conditions(self.registry);
        let config = |condition: &str| {
            let settings = self.experiment.settings(self.quick);
            fingerprint(&json!({"of": about.name, "condition": condition, "settings": settings}))
        };
        let file = self.folder.join("runs.jsonl");
        let before = Runs::open(&file)?;
        // By seed, so that what is there after a stop can be compared.
        let all = (0..self.seeds).flat_map(|s| conditions.iter().map(move |c| (s, c.key.as_str())));
        let missing: Vec<(u64, &str)> =
            all.clone().filter(|(s, c)| before.find(c, *s, &config(c)).is_none()).collect();
        let kept = all.clone().count() - missing.len();
        let commit = commit();
        let runs = Mutex::new(before);
        let steps = self.experiment.steps(self.quick);
        let progress = bar(steps * missing.len() as u64, about.name);
        let next = AtomicUsize::new(0);
        let work_off = || -> Result<()> {
            modl_core::set_threads(1);
            while let Some((seed, condition)) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                let clock = Instant::now();
                let lab = Lab {
                    registry: self.registry,
                    seed: Seed(*seed).child(about.name),
                    quick: self.quick,
                    tick: &|| progress.inc(1),
                };
                let metrics = self.experiment.run(condition, &lab);
                let metrics =
                    metrics.with_context(|| format!("{}: {condition}, seed {seed}", about.name))?;
                let run = Run {
                    condition: (*condition).to_owned(),
                    seed: *seed,
                    config: config(condition),
                    metrics,
                    seconds: clock.elapsed().as_secs_f64(),
                    peak_rss_mb: peak_rss_mb(),
                    modl: env!("CARGO_PKG_VERSION").to_owned(),
                    commit: commit.clone(),
                };
                runs.lock().unwrap_or_else(PoisonError::into_inner).add(run)?;
            }
            Ok(())
        };
        let work = || work_off().inspect_err(|_| next.store(missing.len(), Ordering::Relaxed));
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..self.workers.min(missing.len())).map(|_| scope.spawn(work)).collect();
            let ended = |t: std::thread::ScopedJoinHandle<'_, Result<()>>| {
                let crashed = |_| Err(anyhow::anyhow!("a run of {} crashed", about.name));
                t.join().unwrap_or_else(crashed)
            };
            // All are waited for, so that what they finish is kept whatever one of them meets.
            let outcomes: Vec<Result<()>> = threads.into_iter().map(ended).collect();
            outcomes.into_iter().collect::<Result<()>>()
        })?;
        progress.finish_and_clear();
        let runs = runs.into_inner().unwrap_or_else(PoisonError::into_inner);
        let found = all.filter_map(|(s, c)| runs.find(c, s, &config(c)).cloned()).collect();
        let seconds = clock.elapsed().as_secs_f64();
        Ok(Done { runs: found, kept, seconds, conditions })
    }
}
