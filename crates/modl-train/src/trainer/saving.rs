//! What of a training is saved, and taken up again.

use std::cell::RefCell;

use modl_core::{Error, ParamStore, Result, ResultExt, Select};

use super::Trainer;
use super::writing::Writing;
use crate::assignments::Assignments;
use crate::not_finite::Broken;
use crate::state::{self, Parts, RunState};
use crate::{Cursor, Dataset, Event, Sink, StepRule};

impl Trainer<'_> {
    /// Ends a training whose numbers are not finite any more. Where no state has been saved on the
    /// way, that before the step is, if it is whole itself; `before` is where its data went on.
    pub(super) fn stop(
        &mut self,
        broken: &Broken,
        before: Cursor,
        assignments: Option<&RefCell<Assignments>>,
        rule: &dyn StepRule,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        self.finish_writing(sink)?;
        if self.saved.is_none() && self.step > 0 && self.is_finite()? {
            self.save(before, assignments, rule, sink)?;
            self.finish_writing(sink)?;
        }
        let place = format!("{}, step {}", self.name, self.step + 1);
        Err(broken.error(&self.kept_state())).at(place)
    }

    fn is_finite(&self) -> Result<bool> {
        for (_, t) in &self.kept {
            // The sum of absolute values is finite where all of them are; one that overflows is no
            // state to go on from either.
            if modl_core::is_float(t.kind()) && !t.detach()?.abs()?.sum()?.item()?.is_finite() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn kept_state(&self) -> String {
        match (&self.folder, self.saved) {
            (Some(f), Some(step)) => format!("the state of step {step} is in {}", f.display()),
            _ => "no state had been saved".to_owned(),
        }
    }

    /// Begins to write the state of this step, once that of an earlier one is written.
    pub(super) fn save(
        &mut self,
        cursor: Cursor,
        assignments: Option<&RefCell<Assignments>>,
        rule: &dyn StepRule,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        self.finish_writing(sink)?;
        let (Some(folder), Some(own)) = (&self.folder, &self.own) else { return Ok(()) };
        let state = own.at(self.step, cursor, self.skipped, self.given.record());
        let assigned = assignments.map(|all| all.borrow().tensors()).transpose()?;
        let mut tensors = Parts {
            params: self.kept.clone(),
            optimizer: self.optimizer.state()?,
            assignments: assigned.unwrap_or_default(),
            rule: rule.state()?,
            ..Parts::default()
        };
        self.given.save(&mut tensors);
        self.writing = Some(Writing::begin(folder, state, tensors)?);
        Ok(())
    }

    /// Says that a state is written, where one is by now.
    pub(super) fn look_at_writing(&mut self, sink: &mut dyn Sink) -> Result<()> {
        match &self.writing {
            Some(writing) if writing.is_done() => self.finish_writing(sink),
            _ => Ok(()),
        }
    }

    /// Waits until a state that is on its way is written.
    pub(super) fn finish_writing(&mut self, sink: &mut dyn Sink) -> Result<()> {
        let (Some(writing), Some(folder)) = (self.writing.take(), &self.folder) else {
            return Ok(());
        };
        let step = writing.step;
        writing.finish().map_err(|e| {
            let kept = self.kept_state();
            let problem = format!("the state of step {step} is not saved: {e}");
            Error::file(folder, format!("{problem}; {kept}; make room and go on from there"))
        })?;
        self.saved = Some(step);
        sink.event(&Event::Saved { path: folder.clone(), step })
    }

    /// Takes up the saved state, if there is one: where the data goes on, and what may differ.
    pub(super) fn take_up(
        &mut self,
        data: &Dataset,
        assignments: Option<&mut Assignments>,
        rule: &mut dyn StepRule,
    ) -> Result<(Cursor, Option<String>)> {
        let Some(folder) = &self.folder else { return Ok(Default::default()) };
        let own = RunState::new(self.seed, &self.config, self.model, data)?;
        let own = self.own.insert(own);
        let Some(saved) = state::load(folder, self.model.device())? else {
            return Ok(Default::default());
        };
        let note = saved.state.check(own, data, folder)?;
        state::remove_others(folder, &saved.state.file);
        let mut store = ParamStore::new();
        for (name, t) in &self.kept {
            store.insert(name.clone(), t.clone())?;
        }
        let (state, tensors) = (saved.state, saved.tensors);
        self.given.load(state.step - state.skipped.min(state.step), state.watched, &tensors)?;
        self.optimizer.load_state(self.masters.all(), tensors.optimizer)?;
        if let Some(all) = assignments {
            all.load(tensors.assignments)?;
        }
        rule.load_state(tensors.rule)?;
        let params = tensors.params.iter().map(|(n, t)| (n.as_str(), t));
        store.load(&folder.display().to_string(), params, &Select::all())?;
        self.masters.round()?;
        (self.step, self.skipped) = (state.step, state.skipped);
        self.saved = Some(self.step);
        Ok((state.cursor, note))
    }
}
