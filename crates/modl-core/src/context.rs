//! What a forward pass knows besides x: tasks, features, training or not, seeds; and the trace of
//! what was routed where.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::of_rows::{Decisions, OfRows};
use crate::tensor::is_float;
use crate::{
    ActivationCheckpoints, Cache, Error, Result, ResultExt, Routing, Seed, Tensor, Tensors,
};

/// What happened during a forward pass.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Trace {
    /// Site and routing, in the order in which sites were passed.
    pub routings: Vec<(String, Routing)>,
    /// The losses of the backbone's own ([`crate::Backbone::own_losses`]), by name.
    pub backbone: Vec<(String, Tensor)>,
    /// The names of those of the backbone's own losses that the pass did not give.
    pub left_out: Vec<String>,
    /// What the backbone has said aside, until it takes it up again.
    said: Vec<(String, Tensor)>,
}

impl Trace {
    /// What was routed, by site.
    pub fn of(routings: Vec<(String, Routing)>) -> Self {
        Trace { routings, ..Self::default() }
    }

    /// The auxiliary losses of all routers and those of the backbone's own, added up by name.
    pub fn losses(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        let routers = self.routings.iter().flat_map(|(_, r)| &r.losses);
        for (name, loss) in routers.chain(&self.backbone) {
            let sum = match sums.get(name) {
                Some(s) => s.add(loss)?,
                None => loss.clone(),
            };
            sums.insert(name.clone(), sum);
        }
        Ok(sums)
    }
}

/// How much of a trace there was at some moment.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Recorded {
    routings: usize,
    said: usize,
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
    labels: BTreeMap<String, OfRows<Arc<[Arc<str>]>>>,
    features: BTreeMap<String, OfRows<Tensor>>,
    past: Option<Cache>,
    checkpoints: Option<ActivationCheckpoints>,
    /// The number of the pass among several of a batch, and the seed that all of them know.
    among: Option<(u64, Seed)>,
    trace: Rc<RefCell<Trace>>,
    decided: Rc<Decisions>,
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
            among: None,
            trace: Rc::default(),
            decided: Rc::default(),
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
        self.labels.insert(kind.into(), OfRows::new(rows));
        self
    }

    /// With a named tensor that has one row for each row of the batch: a sentence embedding, a
    /// task vector, the `mask` `[batch, seq]` of real tokens.
    pub fn with_feature(mut self, name: impl Into<String>, rows: Tensor) -> Self {
        self.features.insert(name.into(), OfRows::new(rows));
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
        Context { trace: Rc::default(), decided: Rc::default(), ..self.clone() }
    }

    /// How much has been recorded so far.
    pub(crate) fn recorded(&self) -> Recorded {
        let trace = self.trace.borrow();
        Recorded { routings: trace.routings.len(), said: trace.said.len() }
    }

    /// What a part of the pass recorded after `before` and gradients may flow through: losses and
    /// notes of routers, and what was said aside. Each becomes what `change` makes of it.
    pub(crate) fn change_recorded(
        &self,
        before: Recorded,
        mut change: impl FnMut(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let mut trace = self.trace.borrow_mut();
        let Trace { routings, said, .. } = &mut *trace;
        for (_, routing) in routings.iter_mut().skip(before.routings) {
            for (_, loss) in &mut routing.losses {
                *loss = change(loss)?;
            }
            let mut noted = Tensors::new();
            for (name, t) in routing.noted.iter() {
                let t = if is_float(t.kind()) { change(t)? } else { t.clone() };
                noted.set(name.to_owned(), t);
            }
            routing.noted = noted;
        }
        for (_, t) in said.iter_mut().skip(before.said) {
            *t = change(t)?;
        }
        Ok(())
    }

    /// The task name of each row.
    ///
    /// # Errors
    /// Where none were given.
    pub fn tasks(&self) -> Result<&[Arc<str>]> {
        let rows = self.labels.get(TASK).ok_or_else(|| {
            Error::invalid(
                "tasks",
                "there is none, where a task name for each row is needed; give them with \
                 Context::with_tasks",
            )
        })?;
        Ok(rows.get()?)
    }

    /// The name of that kind of each row.
    ///
    /// # Errors
    /// Where none were given.
    pub fn labels(&self, kind: &str) -> Result<&[Arc<str>]> {
        match self.labels.get(kind) {
            Some(rows) => Ok(rows.get()?),
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
        let given = self.features.get(name).ok_or_else(|| {
            Error::unknown(
                "feature (give it with Context::with_feature)",
                name,
                self.features.keys(),
            )
        })?;
        given.get()
    }

    /// A named tensor with one row for each row of the batch, where it was given.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.features.get(name)?.get().ok()
    }

    /// The seed for a draw at `path` in this step.
    pub fn draw(&self, path: &str) -> Seed {
        self.seed.nth(self.step).child(path)
    }

    /// As the `number`-th pass, from 0, of several of a batch, which know `seed` together beside their
    /// own ones.
    pub fn as_pass(self, number: u64, seed: Seed) -> Self {
        Context { among: Some((number, seed)), ..self }
    }

    /// The number of this pass among several of a batch, and the seed for a draw at `path` that all
    /// of them make alike: 0 and that of [`Context::draw`] where there is but one.
    pub fn pass(&self, path: &str) -> (u64, Seed) {
        let (number, seed) = self.among.unwrap_or((0, self.seed));
        (number, seed.nth(self.step).child(path))
    }

    /// The context of some rows of the batch only. Their labels and features are picked when
    /// somebody asks for them.
    ///
    /// # Errors
    /// Where a row is not there.
    pub fn select_rows(&self, index: &[i64]) -> Result<Context> {
        let rows: Rc<[i64]> = index.into();
        let mut part = self.clone();
        for (kind, names) in &mut part.labels {
            *names = names.select(&rows).at(kind)?;
        }
        for (name, feature) in &mut part.features {
            *feature = feature.select(&rows).at(name)?;
        }
        part.past = self.past.as_ref().map(|c| c.select_rows(index)).transpose()?;
        part.decided = Rc::new(Decisions::select(&self.decided, &rows));
        Ok(part)
    }

    /// Notes what a router decided at a site.
    pub fn record(&self, site: &str, routing: &Routing) {
        self.trace.borrow_mut().routings.push((site.to_owned(), routing.clone()));
    }

    /// Puts something aside that a part of the backbone says, for the end of the pass: a mixture the
    /// logits of its router. Gradients flow through it also with activation checkpointing.
    pub fn say(&self, name: impl Into<String>, t: Tensor) {
        self.trace.borrow_mut().said.push((name.into(), t));
    }

    /// Takes up what was said aside, in order.
    pub fn take_said(&self) -> Vec<(String, Tensor)> {
        std::mem::take(&mut self.trace.borrow_mut().said)
    }

    /// Notes a loss of the backbone's own, or that there is none.
    pub(crate) fn record_own(&self, name: String, loss: Option<Tensor>) {
        let mut trace = self.trace.borrow_mut();
        match loss {
            Some(loss) => trace.backbone.push((name, loss)),
            None => trace.left_out.push(name),
        }
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
        if let Some(known) = self.decided.find(key)? {
            return Ok(known.repeated());
        }
        let routing = work()?;
        self.decided.set(key, routing.clone());
        Ok(routing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Weights};

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
        let e = cx.select_rows(&[3]).unwrap_err().to_string();
        assert!(e.contains("language") && e.contains("there are 3"), "{e}");
    }

    #[test]
    fn features_of_a_part_of_a_part_are_those_of_its_rows() {
        let column = |v: &[f32]| Tensor::from_slice(v, &[v.len() as i64, 1], Device::Cpu).unwrap();
        let cx = Context::eval().with_feature("x", column(&[0., 1., 2., 3.]));
        let part = cx.select_rows(&[3, 1, 1]).unwrap().with_feature("y", column(&[7., 8., 9.]));
        let inner = part.select_rows(&[2, 0]).unwrap();
        let values = |cx: &Context, name| cx.feature(name).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(values(&inner, "x"), [1., 3.]);
        assert_eq!(values(&inner, "y"), [9., 7.]);
        assert_eq!(values(&part, "x"), [3., 1., 1.]);
        assert!(part.select_rows(&[3]).is_err() && cx.select_rows(&[-1]).is_err());
    }

    #[test]
    fn what_was_decided_for_all_rows_is_decided_for_a_part() {
        let all = Weights::Rows((0..3).map(|j| vec![(j, 1.0)]).collect());
        let cx = Context::eval();
        let routing = Routing::new(all, 3);
        let later = cx.select_rows(&[2]).unwrap();
        cx.once("key", || Ok(routing)).unwrap();
        let again = || -> Result<Routing> { Err(Error::invalid("key", "is decided again")) };
        let part = cx.select_rows(&[2, 0]).unwrap().select_rows(&[0]).unwrap();
        for part in [part, later] {
            let found = part.once("key", again).unwrap();
            assert_eq!(found.support().unwrap(), [2]);
        }
        // What a part decides is its own.
        let own = Routing::new(Weights::Fixed(vec![(1, 1.0)]), 3);
        cx.select_rows(&[0]).unwrap().once("other", || Ok(own)).unwrap();
        assert!(cx.once("other", again).is_err());
    }
}
