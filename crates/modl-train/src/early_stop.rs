//! Early stopping (Prechelt 1998, *Early stopping – but when?*): training ends where a metric on
//! examples that are not trained on has not become better for a while, and the best parameters are
//! kept.

use modl_core::{Context, Error, Modular, Result, Tensor, no_grad};
use serde::{Deserialize, Serialize};

use crate::{Dataset, Describe, Objective, evaluate};

/// When training ends before its time. The examples that are watched are a part of those for training
/// (chosen by seed and name), never of the held-out test data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stop {
    /// What is measured: `loss`, the mean of the objective's over examples, or a metric of the
    /// objective (`accuracy`). Of `loss`, `mae` and `perplexity` less is better, of all others more.
    /// Default: `loss`.
    pub metric: String,
    /// It is measured each so many steps, and after the last. Default: 50.
    pub every: u64,
    /// Training ends after so many measurements without a better one. Default: 3.
    pub patience: u64,
    /// By how much a value has to be better to count. Default: 0.
    pub min_delta: f64,
    /// The share of the examples that is watched and not trained on. Default: 0.1.
    pub share: f64,
}

impl Default for Stop {
    fn default() -> Self {
        Stop { metric: "loss".into(), every: 50, patience: 3, min_delta: 0.0, share: 0.1 }
    }
}

/// Metrics of which less is better.
const LESS: [&str; 3] = ["loss", "mae", "perplexity"];

/// Whether a smaller value of a metric is the better one: of `loss`, `mae` and `perplexity`.
pub fn less_is_better(metric: &str) -> bool {
    LESS.contains(&metric)
}

impl Stop {
    /// Checks the numbers.
    ///
    /// # Errors
    /// By name.
    pub fn check(&self) -> Result<()> {
        for (key, fits, wanted) in [
            ("stop.every", self.every > 0, "1 or more"),
            ("stop.patience", self.patience > 0, "1 or more"),
            ("stop.min_delta", self.min_delta >= 0.0 && self.min_delta.is_finite(), "0 or more"),
            ("stop.share", self.share > 0.0 && self.share < 1.0, "between 0 and 1"),
        ] {
            if !fits {
                return Err(Error::invalid(key, format!("is to be {wanted}")));
            }
        }
        Ok(())
    }

    /// The metric's value; NaN where it is not defined.
    pub(crate) fn measure(
        &self,
        model: &Modular,
        objective: &dyn Objective,
        data: &Dataset,
        batch_size: usize,
        describe: &Describe,
    ) -> Result<f64> {
        if self.metric == "loss" {
            return mean_loss(model, objective, data, batch_size, describe);
        }
        let known = objective.metrics().iter().map(|m| m.key);
        if !known.clone().any(|key| key == self.metric) {
            return Err(Error::unknown("metric", &self.metric, ["loss"].into_iter().chain(known)));
        }
        let said = evaluate(model, objective, data, batch_size, describe)?;
        let scores = objective.scores(&said.iter().collect::<Vec<_>>());
        Ok(scores.get(&self.metric).copied().unwrap_or(f64::NAN))
    }
}

/// The mean of the objective's loss over all examples.
fn mean_loss(
    model: &Modular,
    objective: &dyn Objective,
    data: &Dataset,
    batch_size: usize,
    describe: &Describe,
) -> Result<f64> {
    let mut order: Vec<usize> = (0..data.len()).collect();
    order.sort_by_key(|i| data.examples().get(*i).map(|e| e.ids.len()));
    let mut sum = 0.0;
    for rows in order.chunks(batch_size.max(1)) {
        let batch = data.batch(rows, model.device())?;
        let cx = describe(&batch, Context::eval())?;
        let losses =
            no_grad(|| objective.losses(&objective.predict(model, &batch, &cx)?, &batch)?.sum())?;
        sum += losses.item()?;
    }
    Ok(sum / data.len().max(1) as f64)
}

/// What has been measured so far.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    best: Option<f64>,
    /// The step of the best.
    at: u64,
    /// Measurements since.
    since: u64,
    pub(crate) stopped: bool,
}

/// A training that may end before its time.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) stop: Stop,
    pub(crate) data: Dataset,
    pub(crate) record: Record,
    /// The parameters of the best measurement.
    pub(crate) best: Vec<(String, Tensor)>,
}

impl Watch {
    pub(crate) fn new(stop: Stop, data: Dataset) -> Self {
        Watch { stop, data, record: Record::default(), best: Vec::new() }
    }

    /// Takes in the value after a step; whether it is the best so far.
    pub(crate) fn take(&mut self, value: f64, step: u64) -> bool {
        let (less, delta) = (less_is_better(&self.stop.metric), self.stop.min_delta);
        let better = match self.record.best {
            None => value.is_finite(),
            Some(best) if less => value < best - delta,
            Some(best) => value > best + delta,
        };
        if better {
            self.record = Record { best: Some(value), at: step, since: 0, stopped: false };
        } else {
            self.record.since += 1;
            self.record.stopped = self.record.since >= self.stop.patience;
        }
        better
    }

    /// What is said where it has ended before its time.
    pub(crate) fn said(&self) -> String {
        let (Stop { metric, .. }, Record { best, at, since, .. }) = (&self.stop, &self.record);
        let kept = match best {
            Some(best) => format!("the parameters of step {at}, where it was {best:.6}, are kept"),
            None => "it never was a number".to_owned(),
        };
        format!("stopped early: {metric} on watched examples was not better {since} times; {kept}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps at which the best was taken, and where it stopped, by the definition over the whole
    /// series.
    fn by_hand(values: &[f64], patience: usize, less: bool) -> (usize, Option<usize>) {
        let sign = if less { 1.0 } else { -1.0 };
        for end in 1..=values.len() {
            let seen = &values[..end];
            let best = (0..end).min_by(|a, b| (sign * seen[*a]).total_cmp(&(sign * seen[*b])));
            let best = best.unwrap();
            if end - 1 - best >= patience {
                return (best, Some(end - 1));
            }
            if end == values.len() {
                return (best, None);
            }
        }
        (0, None)
    }

    #[test]
    fn it_stops_where_the_best_is_so_long_ago() {
        let series = [5.0, 4.0, 4.5, 3.0, 3.5, 3.2, 3.1, 2.0];
        for (metric, less) in [("loss", true), ("accuracy", false)] {
            for patience in 1..6 {
                let stop = Stop { metric: metric.into(), patience, ..Stop::default() };
                let mut watch = Watch::new(stop, Dataset::default());
                let mut ended = None;
                for (step, value) in series.into_iter().enumerate() {
                    watch.take(value, step as u64);
                    if watch.record.stopped {
                        ended = Some(step);
                        break;
                    }
                }
                let (best, end) = by_hand(&series, patience as usize, less);
                assert_eq!((watch.record.at as usize, ended), (best, end), "{metric} {patience}");
            }
        }
    }

    #[test]
    fn what_is_hardly_better_or_no_number_does_not_count() {
        let stop = Stop { min_delta: 0.1, patience: 2, ..Stop::default() };
        let mut watch = Watch::new(stop, Dataset::default());
        assert!(!watch.take(f64::NAN, 1) && watch.take(1.0, 2) && !watch.take(0.95, 3));
        assert!(watch.take(0.85, 4) && !watch.take(f64::NAN, 5) && !watch.record.stopped);
        assert!(!watch.take(0.8, 6) && watch.record.stopped);
        assert!(watch.said().contains("step 4"), "{}", watch.said());
        for wrong in [
            Stop { every: 0, ..Stop::default() },
            Stop { patience: 0, ..Stop::default() },
            Stop { share: 1.0, ..Stop::default() },
            Stop { min_delta: -0.1, ..Stop::default() },
        ] {
            assert!(wrong.check().is_err());
        }
    }
}
