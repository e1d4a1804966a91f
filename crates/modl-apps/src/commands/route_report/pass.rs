//! Passes a run's examples and keeps what its routers choose.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result};
use modl_core::Context;
use modl_route::stats::{Recorder, RoutingTrace, Split};
use modl_train::{Batch, Dataset, Methods, evaluate};

use super::labels::{By, Labels};
use crate::commands::run_folder::{self, Loaded};

/// Rows of a batch.
const BATCH: usize = 64;

/// What the routers of a run choose for examples that it was trained on and for those held out, at
/// most `limit` of each task, with labels of rows or tokens.
pub(super) fn record(run: &Path, limit: usize, by: &By, methods: &Methods) -> Result<RoutingTrace> {
    let mut loaded = Loaded::new(run_folder::recipe_of(run, methods)?, methods)?;
    loaded.restore(run, None, methods)?;
    let labels = Labels::new(by, &loaded)?;
    let mut trace = RoutingTrace::default();
    let part = loaded.part(None);
    for (name, data) in [("test", &part.test), ("train", &part.train)] {
        trace.splits.push(split(name, &loaded, &some(data, limit)?, &labels)?);
    }
    let chosen = trace.splits.iter().map(Split::report).collect::<Result<Vec<_>, _>>()?;
    anyhow::ensure!(
        chosen.iter().any(|report| !report.sites().is_empty()),
        "{}: nothing was routed {}in this run; give its recipe [modules], a [router] and an \
         [aggregator]",
        run.display(),
        if labels.of_tokens() { "token by token " } else { "" }
    );
    Ok(trace)
}

/// At most `limit` examples of each task, evenly spaced: files are often sorted.
fn some(data: &Dataset, limit: usize) -> Result<Dataset> {
    let mut by_task: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for e in data.examples() {
        by_task.entry(&e.task).or_default().push(&e.id);
    }
    let mut kept = BTreeSet::new();
    for (task, ids) in &by_task {
        let n = limit.min(ids.len());
        kept.extend((0..n).filter_map(|i| ids.get(i * ids.len() / n)).map(|id| (*task, *id)));
    }
    Ok(data.filter(|e| kept.contains(&(e.task.as_str(), e.id.as_str())))?)
}

fn split(name: &str, loaded: &Loaded, data: &Dataset, labels: &Labels) -> Result<Split> {
    let recorder = RefCell::new(Recorder::new(name, &loaded.model));
    // A batch is described before its pass: what was routed is known when the next one comes.
    let last: RefCell<Option<(Vec<String>, Context)>> = RefCell::new(None);
    let keep_last = || -> modl_core::Result<()> {
        let Some((own, cx)) = last.borrow_mut().take() else { return Ok(()) };
        let (mut recorder, trace) = (recorder.borrow_mut(), cx.take_trace());
        match labels.of_tokens() {
            true => recorder.add_tokens(&trace, &own, cx.feature("mask")?),
            false => recorder.add(&trace, &own, cx.find("mask")),
        }
    };
    let describe = |batch: &Batch, cx: Context| {
        keep_last()?;
        let cx = batch.describe(cx)?;
        *last.borrow_mut() = Some((labels.of(batch)?, cx.clone()));
        Ok(cx)
    };
    evaluate(&loaded.model, loaded.part(None).objective.as_ref(), data, BATCH, &describe)
        .with_context(|| format!("passing the examples of `{name}`"))?;
    keep_last()?;
    Ok(recorder.into_inner().finish())
}
