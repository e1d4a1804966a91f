//! The page at the end of `modl train`: what was measured, and how the trainings went.

use std::path::Path;

use anyhow::Result;
use modl_core::checkpoint;

use super::run_events::{Training, of, thinned, trainings};
use crate::report::{Page, Table, curves};

/// Points of a curve; where there are more steps, each is the mean of several.
const POINTS: usize = 300;

/// Curves of one drawing.
const CURVES: usize = 8;

/// Writes `report.html` into the folder of a run. `measured` is the table of its held-out examples.
pub(super) fn write(run: &Path, recipe: &Path, measured: &Table) -> Result<std::path::PathBuf> {
    let trainings = trainings(run)?;
    let mut page = Page::new("modl train");
    page.paragraph(&format!("{} in {}.", recipe.display(), run.display()));
    page.heading("Held-out examples");
    page.table(measured);
    page.heading("Trainings");
    page.table(&table(&trainings));
    let caption =
        "Of the batch of a step; a point is the mean of several steps where there are many.";
    for (key, title) in
        [("loss", "loss"), ("grad_norm", "norm of the gradients"), ("lr", "learning rate")]
    {
        let series = |t: &Training| (t.name.clone(), thinned(&t.series(key), POINTS));
        draw(&mut page, title, &trainings.iter().map(series).collect::<Vec<_>>(), caption)?;
    }
    for t in &trainings {
        let names = |all: &std::collections::BTreeMap<u64, super::run_events::Numbers>| {
            let mut names: Vec<String> = all.values().flat_map(|n| n.keys().cloned()).collect();
            names.sort();
            names.dedup();
            names
        };
        let aux = names(&t.steps).into_iter().filter_map(|key| {
            let name = key.strip_prefix("aux/")?.to_owned();
            Some((name, thinned(&t.series(&key), POINTS)))
        });
        let title = format!("{}: further losses and numbers", t.name);
        draw(&mut page, &title, &aux.collect::<Vec<_>>(), caption)?;
        for key in names(&t.watched) {
            let title = format!("{}: {key} on watched examples", t.name);
            let series = [(key.clone(), thinned(&of(&t.watched, &key), POINTS))];
            draw(
                &mut page,
                &title,
                &series,
                "Examples of the training data that are not trained on.",
            )?;
        }
    }
    let path = run.join("report.html");
    checkpoint::write_whole(&path, page.html().as_bytes())?;
    Ok(path)
}

fn table(trainings: &[Training]) -> Table {
    let head = [
        "training",
        "examples",
        "trained parameters",
        "steps",
        "first loss",
        "last loss",
        "seconds",
    ];
    let mut table = Table::new(head);
    for t in trainings {
        let losses: Vec<f64> = t.series("loss").into_iter().map(|(_, v)| v).collect();
        // The mean of a tenth of the steps says more than one batch.
        let n = losses.len().div_ceil(10);
        let mean = |part: Option<&[f64]>| match part {
            Some(part) if !part.is_empty() => {
                format!("{:.4}", part.iter().sum::<f64>() / part.len() as f64)
            }
            _ => "–".to_owned(),
        };
        let done = t.steps.keys().next_back().copied().unwrap_or(0);
        let seconds: f64 = t.series("seconds").iter().map(|(_, s)| s).sum();
        table.row([
            t.name.clone(),
            t.examples.to_string(),
            t.trained.to_string(),
            if done == t.wanted { done.to_string() } else { format!("{done} of {}", t.wanted) },
            mean(losses.get(..n)),
            mean(losses.get(losses.len() - n..)),
            format!("{seconds:.1}"),
        ]);
    }
    table
}

/// Some curves in as many drawings as they need; none where none has two points.
fn draw(
    page: &mut Page,
    title: &str,
    series: &[(String, Vec<(f64, f64)>)],
    caption: &str,
) -> Result<()> {
    let series: Vec<(&str, Vec<(f64, f64)>)> = series
        .iter()
        .filter(|(_, points)| points.len() > 1)
        .map(|(name, points)| (name.as_str(), points.clone()))
        .collect();
    for part in series.chunks(CURVES) {
        page.figure(&curves(title, ["step", ""], part)?, caption);
    }
    Ok(())
}
