//! Trainings of one recipe under several settings, each kept as soon as it is known.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use modl_train::{Fanout, JsonLines, Methods, Recipe, RunFolder};
use serde_json::Value;

use super::eval::measure;
use super::run_folder::{self, Loaded};
use crate::progress::Bars;
use crate::trials::{Run, Runs, commit, fingerprint, peak_rss_mb};

/// A recipe, and what its trainings have come to; `OUT/runs.jsonl` holds them.
#[derive(Debug)]
pub(super) struct Study<'a> {
    recipe: &'a Path,
    text: String,
    out: &'a Path,
    methods: &'a Methods,
    runs: Runs,
}

impl<'a> Study<'a> {
    /// With what an earlier start has left in `out`.
    pub(super) fn open(recipe: &'a Path, out: &'a Path, methods: &'a Methods) -> Result<Self> {
        let text = std::fs::read_to_string(recipe)
            .with_context(|| format!("recipe {}", recipe.display()))?;
        Ok(Study { recipe, text, out, methods, runs: Runs::open(out.join("runs.jsonl"))? })
    }

    /// The recipe with some of its values set.
    pub(super) fn recipe(&self, set: &[String]) -> Result<Recipe> {
        run_folder::read(self.recipe, &self.text, set, self.methods)
    }

    /// Where a condition is trained with a seed.
    pub(super) fn folder(&self, condition: &str, seed: u64) -> PathBuf {
        self.out.join(folder(condition)).join(format!("seed-{seed}"))
    }

    /// Trains and tests a condition with a seed, if that has not been done; a training that was
    /// stopped goes on.
    pub(super) fn run(&mut self, condition: &str, set: &[String], seed: u64) -> Result<Run> {
        let set = [set, &[format!("seed={seed}")]].concat();
        let place = || format!("{condition}, seed {seed}");
        let recipe = self.recipe(&set).with_context(place)?;
        let config = fingerprint(&Value::Object(recipe.values().clone()));
        if let Some(run) = self.runs.find(condition, seed, &config) {
            return Ok(run.clone());
        }
        let folder = self.folder(condition, seed);
        let clock = Instant::now();
        let mut loaded = Loaded::new(recipe, self.methods)?;
        run_folder::note(&folder, self.recipe, &self.text, &set)?;
        let mut bars = Bars::new(format!("{condition} seed {seed} "));
        let mut lines = JsonLines::append(folder.join("events.jsonl"))?;
        let held = RunFolder::hold(&folder).with_context(place)?;
        loaded
            .run(&held, self.methods, &mut Fanout(vec![&mut bars, &mut lines]))
            .with_context(place)?;
        let measured = measure(&loaded, None, Some(&folder))?;
        let (_, _, metrics) = measured.into_iter().next_back().context("nothing is held out")?;
        let run = Run {
            condition: condition.to_owned(),
            seed,
            config,
            metrics,
            seconds: clock.elapsed().as_secs_f64(),
            peak_rss_mb: peak_rss_mb(),
            modl: env!("CARGO_PKG_VERSION").to_owned(),
            commit: commit(),
        };
        self.runs.add(run.clone())?;
        Ok(run)
    }
}

/// The name of a condition's folder: what is neither letter nor digit in its label is one `-`, but for
/// signs.
pub(super) fn folder(label: &str) -> String {
    let parts = label.split(|c: char| !(c.is_ascii_alphanumeric() || "_.-".contains(c)));
    parts.filter(|p| !p.is_empty()).collect::<Vec<_>>().join("-")
}
