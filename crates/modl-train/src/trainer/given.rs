//! The parameters that a training gives in the end, where they are not those of its last step: their
//! average, and those that were best.

use modl_core::{Modular, Result, ResultExt, Seed, Tensor};

use super::every;
use super::masters::Masters;
use crate::average::{Average, copies, put};
use crate::early_stop::{Record, Watch};
use crate::state::Parts;
use crate::{Dataset, Describe, Event, Objective, Sink, TrainConfig};

/// What is kept beside the parameters in training.
#[derive(Debug, Default)]
pub(super) struct Given {
    average: Option<Average>,
    watch: Option<Watch>,
}

/// What a measurement on the way needs.
pub(super) struct Measuring<'a> {
    pub(super) name: &'a str,
    pub(super) model: &'a Modular,
    pub(super) objective: &'a dyn Objective,
    pub(super) batch_size: usize,
    pub(super) describe: &'a Describe<'a>,
    /// Masters and buffers.
    pub(super) kept: &'a [(String, Tensor)],
    pub(super) masters: &'a Masters,
}

impl Measuring<'_> {
    /// Gives the model other values.
    fn put(&self, values: &[(String, Tensor)]) -> Result<()> {
        put(self.kept, values)?;
        self.masters.round()
    }
}

impl Given {
    /// For parameters at their start. Of the data it takes what is watched; what is left is trained on.
    pub(super) fn new(
        config: &TrainConfig,
        seed: Seed,
        params: &[(String, Tensor)],
        data: &Dataset,
    ) -> Result<(Self, Option<Dataset>)> {
        let average = config.ema.map(|decay| Average::new(decay, params)).transpose()?;
        let Some(stop) = &config.stop else { return Ok((Given { average, watch: None }, None)) };
        let (left, watched) = data.split(seed.child("stop").0, stop.share).at("stop.share")?;
        Ok((Given { average, watch: Some(Watch::new(stop.clone(), watched)) }, Some(left)))
    }

    /// Whether training has ended before its time.
    pub(super) fn stopped(&self) -> bool {
        self.watch.as_ref().is_some_and(|w| w.record.stopped)
    }

    /// Takes in what step `step` has come to.
    pub(super) fn after_step(
        &mut self,
        step: u64,
        last: bool,
        by: &Measuring,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        if let Some(average) = &mut self.average {
            average.take(by.masters.all())?;
        }
        let Some(watch) = &mut self.watch else { return Ok(()) };
        if !last && !every(watch.stop.every, step) {
            return Ok(());
        }
        // The average stands in for the parameters while it is measured.
        let raw = match &self.average {
            Some(average) => {
                let raw = copies(by.kept)?;
                by.put(average.means())?;
                Some(raw)
            }
            None => None,
        };
        let Measuring { model, objective, batch_size, describe, .. } = *by;
        let measured = watch.stop.measure(model, objective, &watch.data, batch_size, describe);
        if let Ok(value) = measured
            && watch.take(value, step)
        {
            watch.best = copies(by.kept)?;
        }
        if let Some(raw) = raw {
            by.put(&raw)?;
        }
        let metrics = [(watch.stop.metric.clone(), measured.at("stop")?)].into();
        let name = format!("{}/watched", by.name);
        sink.event(&Event::Evaluated { name, step: Some(step), metrics })?;
        match watch.record.stopped {
            true => sink.event(&Event::Notice { step, text: watch.said() }),
            false => Ok(()),
        }
    }

    /// Puts into `kept` what the training gives: the best parameters, else the average.
    pub(super) fn publish(&self, kept: &[(String, Tensor)]) -> Result<()> {
        match (&self.watch, &self.average) {
            (Some(watch), _) if !watch.best.is_empty() => put(kept, &watch.best),
            (_, Some(average)) => put(kept, average.means()),
            _ => Ok(()),
        }
    }

    pub(super) fn record(&self) -> Option<Record> {
        self.watch.as_ref().map(|w| w.record)
    }

    /// Adds what has to be saved.
    pub(super) fn save(&self, parts: &mut Parts) {
        parts.average = self.average.as_ref().map(|a| a.means().to_vec()).unwrap_or_default();
        parts.best = self.watch.as_ref().map(|w| w.best.clone()).unwrap_or_default();
    }

    /// Takes up what was saved after `steps` steps that were not left out.
    pub(super) fn load(&mut self, steps: u64, record: Option<Record>, parts: &Parts) -> Result<()> {
        if let Some(average) = &mut self.average {
            average.load(steps, &parts.average)?;
        }
        if let (Some(watch), Some(record)) = (&mut self.watch, record) {
            watch.record = record;
            watch.best = parts.best.clone();
        }
        Ok(())
    }
}
