//! What a forward pass knows besides x: tasks, features, training or not, seeds; and the trace of
//! what was routed where.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::{ActivationCheckpoints, Cache, Error, Result, Routing, Seed, Tensor};

/// What happened during a forward pass.
#[derive(Debug, Default)]
pub struct Trace {
    /// Site and routing, in the order in which sites were passed.
    pub routings: Vec<(String, Routing)>,
}

impl Trace {
    /// The auxiliary losses of all routers, added up by name.
    pub fn losses(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, loss) in self.routings.iter().flat_map(|(_, r)| &r.losses) {
            let sum = match sums.get(name) {
                Some(s) => s.add(loss)?,
                None => loss.clone(),
            };
            sums.insert(name.clone(), sum);
        }
        Ok(sums)
    }
}

/// The labels that say which task a row is of.
const TASK: &str = "task";

/// Everything that modules, routers and aggregators may look at besides x. One value serves one
/// forward pass; clones and parts of it share the trace.
#[derive(Debug, Clone)]
pub struct Context {
    /// Training (dropout, noise) or evaluation.
    pub train: bool,
    /// The step of training, part of every random draw.
    pub step: u64,
    /// Where noise and dropout come from.
    pub seed: Seed,
    labels: BTreeMap<String, Arc<[Arc<str>]>>,
    features: BTreeMap<String, Tensor>,
    past: Option<Cache>,
    checkpoints: Option<ActivationCheckpoints>,
    trace: Rc<RefCell<Trace>>,
    cache: Rc<RefCell<BTreeMap<String, Routing>>>,
}

impl Context {
    /// Evaluation: no dropout, no noise.
    pub fn eval() -> Self {
        Context {
            train: false,
            step: 0,
            seed: Seed(0),
            labels: BTreeMap::new(),
            features: BTreeMap::new(),
            past: None,
            checkpoints: None,
            trace: Rc::default(),
            cache: Rc::default(),
        }
    }

    /// One step of training.
    pub fn train(seed: Seed, step: u64) -> Self {
        Context { train: true, step, seed, ..Self::eval() }
    }

    /// With a task name for each row of the batch.
    pub fn with_tasks<S: AsRef<str>>(self, tasks: impl IntoIterator<Item = S>) -> Self {
        self.with_labels(TASK, tasks)
    }

    /// With a name of some kind for each row of the batch: its `language`, its `domain`. The names
    /// of kind `task` are the tasks.
    pub fn with_labels<S: AsRef<str>>(
        mut self,
        kind: impl Into<String>,
        rows: impl IntoIterator<Item = S>,
    ) -> Self {
        let rows = rows.into_iter().map(|name| Arc::from(name.as_ref())).collect();
        self.labels.insert(kind.into(), rows);
        self
    }

    /// With a named tensor that has one row for each row of the batch: a sentence embedding, a
    /// task vector, the `mask` `[batch, seq]` of real tokens.
    pub fn with_feature(mut self, name: impl Into<String>, rows: Tensor) -> Self {
        self.features.insert(name.into(), rows);
        self
    }

    /// With what a decoder has seen before, and where it keeps what it sees in this pass.
    pub fn with_cache(self, cache: Cache) -> Self {
        Context { past: Some(cache), ..self }
    }

    /// What a decoder has seen before, where the pass is one of several.
    pub fn cache(&self) -> Option<&Cache> {
        self.past.as_ref()
    }

    /// The number of tokens that were seen before this pass: 0 in a first or only one, and so for
    /// what is to happen once in a sequence.
    pub fn past(&self) -> i64 {
        self.past.as_ref().map_or(0, Cache::past)
    }

    /// With a place to keep hidden states in, instead of the whole graph of the pass.
    pub fn with_activation_checkpoints(self, kept: ActivationCheckpoints) -> Self {
        Context { checkpoints: Some(kept), ..self }
    }

    pub(crate) fn activation_checkpoints(&self) -> Option<&ActivationCheckpoints> {
        self.checkpoints.as_ref()
    }

    /// This context for a part of the pass that is computed once more: routers decide anew, and
    /// what they decide is not recorded a second time.
    pub(crate) fn again(&self) -> Self {
        Context { trace: Rc::default(), cache: Rc::default(), ..self.clone() }
    }

    /// Whether a router has given a loss or a note so far.
    pub(crate) fn has_losses(&self) -> bool {
        let more = |r: &Routing| !(r.losses.is_empty() && r.noted.is_empty());
        self.trace.borrow().routings.iter().any(|(_, r)| more(r))
    }

    /// The task name of each row.
    ///
    /// # Errors
    /// Where none were given.
    pub fn tasks(&self) -> Result<&[Arc<str>]> {
        self.labels.get(TASK).map(AsRef::as_ref).ok_or_else(|| {
            Error::invalid(
                "tasks",
                "there is none, where a task name for each row is needed; give them with \
                 Context::with_tasks",
            )
        })
    }

    /// The name of that kind of each row.
    ///
    /// # Errors
    /// Where none were given.
    pub fn labels(&self, kind: &str) -> Result<&[Arc<str>]> {
        match self.labels.get(kind) {
            Some(rows) => Ok(rows),
            None if kind == TASK => self.tasks(),
            None => {
                let kinds = self.labels.keys();
                Err(Error::unknown("labels (give them with Context::with_labels)", kind, kinds))
            }
        }
    }

    /// A named tensor with one row for each row of the batch.
    ///
    /// # Errors
    /// Where it was not given.
    pub fn feature(&self, name: &str) -> Result<&Tensor> {
        self.find(name).ok_or_else(|| {
            Error::unknown(
                "feature (give it with Context::with_feature)",
                name,
                self.features.keys(),
            )
        })
    }

    /// A named tensor with one row for each row of the batch, where it was given.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.features.get(name)
    }

    /// The seed for a draw at `path` in this step.
    pub fn draw(&self, path: &str) -> Seed {
        self.seed.nth(self.step).child(path)
    }

    /// The context of some rows of the batch only.
    pub fn select_rows(&self, index: &[i64]) -> Result<Context> {
        let mut part = self.clone();
        for (kind, rows) in &mut part.labels {
            let pick = |i: &i64| rows.get(usize::try_from(*i).ok()?).cloned();
            let picked: Option<Arc<[_]>> = index.iter().map(pick).collect();
            *rows = picked.ok_or_else(|| {
                Error::invalid(kind, format!("{} names for a larger batch", rows.len()))
            })?;
        }
        for rows in part.features.values_mut() {
            let at = Tensor::from_slice(index, &[index.len() as i64], rows.device())?;
            *rows = rows.index_select(0, &at)?;
        }
        part.past = self.past.as_ref().map(|c| c.select_rows(index)).transpose()?;
        let mut cache = BTreeMap::new();
        for (key, routing) in &*self.cache.borrow() {
            cache.insert(key.clone(), routing.select_rows(index)?);
        }
        part.cache = Rc::new(RefCell::new(cache));
        Ok(part)
    }

    /// Notes what a router decided at a site.
    pub fn record(&self, site: &str, routing: &Routing) {
        self.trace.borrow_mut().routings.push((site.to_owned(), routing.clone()));
    }

    /// Takes out what has been recorded, and forgets it.
    pub fn take_trace(&self) -> Trace {
        std::mem::take(&mut self.trace.borrow_mut())
    }

    /// The routing under `key`, worked out on the first call of this forward pass.
    pub(crate) fn once(
        &self,
        key: &str,
        work: impl FnOnce() -> Result<Routing>,
    ) -> Result<Routing> {
        if let Some(known) = self.cache.borrow().get(key) {
            // Its losses and notes were counted at the first site.
            return Ok(known.with_weights(known.weights.clone()));
        }
        let routing = work()?;
        self.cache.borrow_mut().insert(key.to_owned(), routing.clone());
        Ok(routing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_every_kind_go_with_their_rows() {
        let cx = Context::eval().with_tasks(["pos", "ner", "qa"]);
        let cx = cx.with_labels("language", ["en", "tr", "fi"]);
        let part = cx.select_rows(&[2, 0]).unwrap();
        let names = |cx: &Context, kind: &str| cx.labels(kind).unwrap().join(" ");
        assert_eq!(
            (names(&part, "task"), names(&part, "language")),
            ("qa pos".into(), "fi en".into())
        );
        assert_eq!(part.tasks().unwrap(), part.labels("task").unwrap());
        let e = part.labels("languages").unwrap_err().to_string();
        assert!(e.contains("did you mean `language`"), "{e}");
        assert!(Context::eval().labels("task").unwrap_err().to_string().contains("with_tasks"));
        assert!(cx.select_rows(&[3]).is_err());
    }
}
