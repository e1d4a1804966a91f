//! What is read off predictions, traces, events and files.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use modl_core::checkpoint::Checkpoint;
use modl_core::{Context, Device, Kind};
use modl_train::{Event, Prediction, Sink, scores};

use super::data::DOMAINS;
use super::results::Score;

/// The scores of some predictions by domain.
pub(super) fn by_domain(predictions: &[Prediction]) -> Result<BTreeMap<String, Score>> {
    let domain = |domain: &&str| -> Result<(String, Score)> {
        let metrics = scores(predictions.iter().filter(|p| p.task == *domain), 0.0);
        let get = |name: &str| {
            metrics.get(name).copied().with_context(|| format!("{name} of {domain} is not defined"))
        };
        let score = Score { accuracy: get("sign_accuracy")?, spearman: get("spearman")? };
        Ok((domain.to_string(), score))
    };
    DOMAINS.iter().map(domain).collect()
}

/// The mean α at the first site over the texts of each domain.
pub(super) fn mean_alpha(traces: &[(Vec<String>, Context)]) -> Result<Vec<Vec<f64>>> {
    let m = DOMAINS.len();
    let mut sums = vec![vec![0.0; m]; m];
    let mut counts = vec![0.0; m];
    for (tasks, cx) in traces {
        let trace = cx.take_trace();
        let (_, routing) = trace.routings.first().context("no routing was recorded")?;
        let alpha = routing.dense(Kind::Double, Device::Cpu)?.to_vec::<f64>()?;
        for (task, row) in tasks.iter().zip(alpha.chunks(m)) {
            let Some(d) = DOMAINS.iter().position(|name| name == task) else { continue };
            counts[d] += 1.0;
            for (sum, a) in sums[d].iter_mut().zip(row) {
                *sum += a;
            }
        }
    }
    for (row, n) in sums.iter_mut().zip(counts) {
        row.iter_mut().for_each(|v| *v /= f64::max(n, 1.0));
    }
    Ok(sums)
}

/// Adds up the seconds of the steps, so that an interruption counts once.
#[derive(Debug, Default)]
pub(super) struct Clock {
    pub(super) seconds: f64,
}

impl Sink for Clock {
    fn event(&mut self, event: &Event) -> modl_core::Result<()> {
        if let Event::Step { seconds, .. } = event {
            self.seconds += seconds;
        }
        Ok(())
    }
}

/// The numbers in a tensor file.
pub(super) fn count(file: &Path) -> Result<usize> {
    let file = Checkpoint::open(file)?;
    let n = |name: String| Ok(file.info(&name)?.0.iter().product::<i64>() as usize);
    file.names().into_iter().map(n).sum()
}

pub(super) fn size(file: &Path) -> Result<u64> {
    Ok(std::fs::metadata(file).with_context(|| file.display().to_string())?.len())
}

pub(super) fn seconds(file: &Path) -> Result<f64> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    text.trim().parse().with_context(|| format!("{}: is no number", file.display()))
}
