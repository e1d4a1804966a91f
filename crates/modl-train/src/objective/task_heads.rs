//! A head for each task, over the classes of the task (task-incremental learning).

use modl_core::{Context, Error, Kind, Modular, Result, Tensor};

use super::{make_head, sentence_vectors};
use crate::{Batch, Classification};

/// The heads of some tasks. What they say has a column for each class of all tasks, then those of
/// superfluous outputs; a row has the logits of its own task's head in its columns and
/// [`Classification::ABSENT`] in all others.
#[derive(Debug)]
pub(super) struct TaskHeads<'a> {
    tasks: &'a [(String, Vec<usize>)],
    /// Classes of all tasks.
    classes: usize,
    /// Outputs of each head; as many as it has classes where `None`.
    outputs: Option<usize>,
}

impl<'a> TaskHeads<'a> {
    /// # Errors
    /// Where a task has classes that are not there, or more than outputs.
    pub(super) fn new(
        tasks: &'a [(String, Vec<usize>)],
        classes: usize,
        outputs: Option<usize>,
    ) -> Result<Self> {
        let heads = TaskHeads { tasks, classes, outputs };
        for (task, own) in tasks {
            if own.is_empty() || own.iter().any(|class| *class >= classes) {
                let problem = format!("has the classes {own:?} of {classes}");
                return Err(Error::invalid(format!("head of `{task}`"), problem));
            }
            if heads.outputs_of(own) < own.len() {
                let problem = format!("has {:?} outputs for {} classes", outputs, own.len());
                return Err(Error::invalid(format!("head of `{task}`"), problem));
            }
        }
        Ok(heads)
    }

    fn outputs_of(&self, own: &[usize]) -> usize {
        self.outputs.unwrap_or(own.len())
    }

    /// The columns of what is said.
    fn width(&self) -> usize {
        let superfluous = self.tasks.iter().map(|(_, own)| self.outputs_of(own) - own.len());
        self.classes + superfluous.max().unwrap_or(0)
    }

    /// For each column the head's output, or the number after the last where it has none.
    fn columns(&self, own: &[usize]) -> Vec<i64> {
        let outputs = self.outputs_of(own);
        let of = |column: usize| match column.checked_sub(self.classes) {
            None => own.iter().position(|class| *class == column).unwrap_or(outputs),
            Some(n) => (own.len() + n).min(outputs),
        };
        (0..self.width()).map(|column| of(column) as i64).collect()
    }

    /// Makes `heads.NAME.TASK.weight` `[outputs, dim]` and `heads.NAME.TASK.bias` `[outputs]`.
    pub(super) fn make(&self, model: &mut Modular, name: &str, dim: i64) -> Result<()> {
        let make = |(task, own): &(String, Vec<usize>)| {
            make_head(model, &format!("{name}.{task}"), self.outputs_of(own) as i64, dim)
        };
        self.tasks.iter().try_for_each(make)
    }

    /// What each row's head says, `[batch, width]` f32.
    ///
    /// # Errors
    /// Where a row is of a task without a head.
    pub(super) fn apply(
        &self,
        model: &Modular,
        name: &str,
        batch: &Batch,
        cx: &Context,
    ) -> Result<Tensor> {
        let vectors = sentence_vectors(&model.forward(&batch.inputs, cx)?, batch)?;
        let mut places: Vec<(&str, Vec<i64>)> = Vec::new();
        for (row, task) in batch.tasks.iter().enumerate() {
            match places.iter_mut().find(|(t, _)| t == task) {
                Some((_, rows)) => rows.push(row as i64),
                None => places.push((task, vec![row as i64])),
            }
        }
        let index = |all: &[i64]| Tensor::from_slice(all, &[all.len() as i64], vectors.device());
        if let [(task, _)] = places.as_slice() {
            return self.of(model, name, task, &vectors);
        }
        let (mut said, mut order) = (Vec::new(), Vec::new());
        for (task, rows) in &places {
            said.push(self.of(model, name, task, &vectors.index_select(0, &index(rows)?)?)?);
            order.extend(rows);
        }
        // The row at which each of the batch now stands.
        let mut back: Vec<(i64, i64)> = order.into_iter().zip(0..).collect();
        back.sort_unstable();
        let back: Vec<i64> = back.into_iter().map(|(_, place)| place).collect();
        Tensor::cat(&said, 0)?.index_select(0, &index(&back)?)
    }

    fn of(&self, model: &Modular, name: &str, task: &str, vectors: &Tensor) -> Result<Tensor> {
        let known = || Error::unknown("task with a head", task, self.tasks.iter().map(|(t, _)| t));
        let (_, own) = self.tasks.iter().find(|(t, _)| t == task).ok_or_else(known)?;
        let weight = model.params().get(&format!("heads.{name}.{task}.weight"))?;
        let bias = model.params().get(&format!("heads.{name}.{task}.bias"))?;
        let logits = vectors.linear(weight, Some(bias))?;
        let size = [vectors.len_of(0), 1];
        let absent = Tensor::full(&size, Classification::ABSENT, Kind::Float, vectors.device())?
            .to_kind(logits.kind())?;
        let columns = self.columns(own);
        let columns = Tensor::from_slice(&columns, &[columns.len() as i64], vectors.device())?;
        Tensor::cat(&[logits, absent], 1)?.index_select(1, &columns)
    }
}
