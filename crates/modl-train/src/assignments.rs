//! Choices that are kept for each example over the steps of a training.
//!
//! The partial E-step of modular networks (Kirsch, Kunze, Barber 2018, arXiv 1811.05249, algorithm 1):
//! beside those that are drawn, an example's own best assignment so far is tried again, and the best
//! of all is the one that is kept. Assignments are part of a saved state.

use std::collections::{BTreeMap, HashMap};

use modl_core::{ASSIGNED, Device, Error, Kind, Result, Tensor, Trace};

use crate::{Batch, Dataset};

/// What has no assignment yet.
const NONE: i64 = -1;

/// The module of each example, by router.
#[derive(Debug)]
pub(crate) struct Assignments {
    /// The place of each example by task and id.
    places: HashMap<(String, String), usize>,
    /// By the name under which a router notes its choices.
    kept: BTreeMap<String, Vec<i64>>,
}

impl Assignments {
    /// None yet.
    ///
    /// # Errors
    /// Where two examples cannot be told apart.
    pub(crate) fn new(data: &Dataset) -> Result<Self> {
        let mut places = HashMap::new();
        for (place, e) in data.examples().iter().enumerate() {
            if places.insert((e.task.clone(), e.id.clone()), place).is_some() {
                let problem = format!("there are two examples `{}` of `{}`", e.id, e.task);
                return Err(Error::invalid("passes.keep", problem));
            }
        }
        Ok(Assignments { places, kept: BTreeMap::new() })
    }

    fn rows(&self, batch: &Batch) -> Result<Vec<usize>> {
        let place = |(task, id): (&String, &String)| {
            let found = self.places.get(&(task.clone(), id.clone())).copied();
            found
                .ok_or_else(|| Error::invalid("batch", format!("has an example `{id}` of its own")))
        };
        batch.tasks.iter().zip(&batch.ids).map(place).collect()
    }

    /// Features `[batch]` by which routers take up what is kept; none where nothing is kept for any
    /// row.
    pub(crate) fn of(&self, batch: &Batch, device: Device) -> Result<Vec<(String, Tensor)>> {
        let rows = self.rows(batch)?;
        let mut features = Vec::new();
        for (name, all) in &self.kept {
            let own: Vec<i64> = rows.iter().map(|r| all.get(*r).copied().unwrap_or(NONE)).collect();
            if own.iter().any(|j| *j != NONE) {
                features
                    .push((name.clone(), Tensor::from_slice(&own, &[own.len() as i64], device)?));
            }
        }
        Ok(features)
    }

    /// Keeps for each row what routers chose in the pass that is its best: `best` `[passes, batch]` is
    /// 1 there.
    ///
    /// # Errors
    /// Where no router notes a choice for each row.
    pub(crate) fn keep(&mut self, batch: &Batch, passes: &[&Trace], best: &Tensor) -> Result<()> {
        let rows = self.rows(batch)?;
        let examples = self.places.len();
        let mut any = false;
        for (pass, trace) in passes.iter().enumerate() {
            let best = best.select(0, pass as i64)?.to_vec::<f64>()?;
            for (site, routing) in trace.routings.iter().filter(|(_, r)| !r.repeated) {
                for (name, choice) in routing.noted.iter().filter(|(n, _)| n.starts_with(ASSIGNED))
                {
                    any = true;
                    let choice = choice.to_kind(Kind::Int64)?.to_vec::<i64>()?;
                    if choice.len() != rows.len() {
                        let problem = format!("{} choices for {} rows", choice.len(), rows.len());
                        return Err(Error::invalid(site, problem));
                    }
                    let kept =
                        self.kept.entry(name.to_owned()).or_insert_with(|| vec![NONE; examples]);
                    for ((row, j), best) in rows.iter().zip(choice).zip(&best) {
                        if let Some(slot) = kept.get_mut(*row).filter(|_| *best > 0.0) {
                            *slot = j;
                        }
                    }
                }
            }
        }
        match any {
            true => Ok(()),
            false => Err(Error::unsupported(
                "passes.keep with routers that have no assignment of an example to keep",
                "route by `modular_network`, and a row, not each token",
            )),
        }
    }

    /// All, `[examples]` by router.
    pub(crate) fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let tensor = |(name, all): (&String, &Vec<i64>)| {
            let t = Tensor::from_slice(all, &[all.len() as i64], Device::Cpu)?;
            Ok((name.clone(), t))
        };
        self.kept.iter().map(tensor).collect()
    }

    /// Takes up what was saved.
    ///
    /// # Errors
    /// Where it is of another data set.
    pub(crate) fn load(&mut self, saved: Vec<(String, Tensor)>) -> Result<()> {
        for (name, t) in saved {
            let all = t.to_vec::<i64>()?;
            if all.len() != self.places.len() {
                let problem = format!("{} for {} examples", all.len(), self.places.len());
                return Err(Error::invalid(format!("saved {name}"), problem));
            }
            self.kept.insert(name, all);
        }
        Ok(())
    }
}
