//! Batches: examples as tensors, some rows of them, their rows by task, and several as one.

use modl_core::{Context, Error, Kind, Result, Tensor, Tensors};

/// Some examples as tensors.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `input_ids` and `attention_mask`, both `[batch, seq]` i64, where there are tokens; dense
    /// inputs `[batch, …]` by name.
    pub inputs: Tensors,
    /// `[batch]` f32.
    pub targets: Tensor,
    /// The task of each row.
    pub tasks: Vec<String>,
    /// The id of each row.
    pub ids: Vec<String>,
    /// Features, `[batch, …]` each.
    pub features: Tensors,
}

/// What a forward pass is told of a batch. [`Batch::describe`] tells everything; a phase that hides
/// the tasks or adds features has a function of its own.
pub type Describe<'a> = dyn Fn(&Batch, Context) -> Result<Context> + 'a;

impl Batch {
    /// Tells `cx` all that the batch knows: tasks, features and, where there are tokens, the `mask`
    /// `[batch, seq]` of real ones, in f32.
    pub fn describe(&self, cx: Context) -> Result<Context> {
        self.describe_without_tasks(cx.with_tasks(&self.tasks))
    }

    /// The same but for the tasks, which nobody is to know.
    pub fn describe_without_tasks(&self, mut cx: Context) -> Result<Context> {
        if let Some(mask) = self.inputs.get("attention_mask") {
            cx = cx.with_feature("mask", mask.to_kind(Kind::Float)?);
        }
        Ok(self.features.iter().fold(cx, |cx, (name, rows)| cx.with_feature(name, rows.clone())))
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Some of the rows, as wide as they are.
    ///
    /// # Errors
    /// Where there is no such row.
    pub fn rows(&self, rows: &[usize]) -> Result<Batch> {
        let index: Vec<i64> = rows.iter().map(|r| *r as i64).collect();
        let index = Tensor::from_slice(&index, &[index.len() as i64], self.targets.device())?;
        let named = |all: &[String]| rows.iter().filter_map(|r| all.get(*r).cloned()).collect();
        Ok(Batch {
            inputs: self.inputs.map(|_, t| t.index_select(0, &index))?,
            targets: self.targets.index_select(0, &index)?,
            tasks: named(&self.tasks),
            ids: named(&self.ids),
            features: self.features.map(|_, t| t.index_select(0, &index))?,
        })
    }

    /// The rows of each task, in the order in which the tasks appear.
    ///
    /// # Errors
    /// Where libtorch refuses it.
    pub fn by_task(&self) -> Result<Vec<(String, Batch)>> {
        let mut tasks: Vec<(String, Vec<usize>)> = Vec::new();
        for (row, task) in self.tasks.iter().enumerate() {
            match tasks.iter_mut().find(|(t, _)| t == task) {
                Some((_, rows)) => rows.push(row),
                None => tasks.push((task.clone(), vec![row])),
            }
        }
        if let [(task, _)] = tasks.as_slice() {
            return Ok(vec![(task.clone(), self.clone())]);
        }
        tasks.into_iter().map(|(task, rows)| Ok((task, self.rows(&rows)?))).collect()
    }

    /// The rows of this batch and those of another after them. Sequences of token ids are filled up
    /// to the longer one with 0, under the mask.
    ///
    /// # Errors
    /// Where one of them has inputs or features that the other lacks.
    pub fn and(self, other: Batch) -> Result<Batch> {
        let all = |a: &Tensors, b: &Tensors| -> Result<Tensors> {
            if a.len() != b.len() {
                let problem = "have different inputs or features; they cannot be one batch";
                return Err(Error::invalid("two batches", problem));
            }
            a.map(|name, t| after_one_another(t, b.need(name)?))
        };
        Ok(Batch {
            inputs: all(&self.inputs, &other.inputs)?,
            features: all(&self.features, &other.features)?,
            targets: Tensor::cat(&[self.targets, other.targets], 0)?,
            tasks: self.tasks.into_iter().chain(other.tasks).collect(),
            ids: self.ids.into_iter().chain(other.ids).collect(),
        })
    }
}

/// `[a, …]` and `[b, …]` to `[a + b, …]`; integers `[rows, seq]` are filled up to the longer.
fn after_one_another(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dim() != 2 || a.kind() != Kind::Int64 || a.len_of(1) == b.len_of(1) {
        return Tensor::cat(&[a.clone(), b.clone()], 0);
    }
    let longest = a.len_of(1).max(b.len_of(1));
    let filled = |t: &Tensor| {
        let rest = Tensor::zeros(&[t.len_of(0), longest - t.len_of(1)], t.kind(), t.device())?;
        Tensor::cat(&[t.clone(), rest], 1)
    };
    Tensor::cat(&[filled(a)?, filled(b)?], 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dataset, Example};
    use modl_core::Device;

    fn batch(rows: &[(&str, &[i64])]) -> Batch {
        let example = |(i, (task, ids)): (usize, &(&str, &[i64]))| Example {
            id: i.to_string(),
            task: (*task).to_owned(),
            ids: ids.to_vec().into(),
            target: i as f32,
        };
        let all: Vec<usize> = (0..rows.len()).collect();
        let data = Dataset::new(rows.iter().enumerate().map(example).collect()).unwrap();
        data.batch(&all, Device::Cpu).unwrap()
    }

    #[test]
    fn rows_are_told_apart_by_task_and_put_together_again() {
        let whole = batch(&[("b", &[1, 2]), ("a", &[3]), ("b", &[4])]);
        let parts = whole.by_task().unwrap();
        let named: Vec<(&str, Vec<f32>)> =
            parts.iter().map(|(t, b)| (t.as_str(), b.targets.to_vec().unwrap())).collect();
        assert_eq!(named, [("b", vec![0., 2.]), ("a", vec![1.])]);
        let both = parts[0].1.clone().and(batch(&[("c", &[7, 8, 9])])).unwrap();
        assert_eq!(both.tasks, ["b", "b", "c"]);
        let of = |name: &str| both.inputs.need(name).unwrap().to_vec::<i64>().unwrap();
        assert_eq!(of("input_ids"), [1, 2, 0, 4, 0, 0, 7, 8, 9]);
        assert_eq!(of("attention_mask"), [1, 1, 0, 1, 0, 0, 1, 1, 1]);
        let one = batch(&[("a", &[1])]).by_task().unwrap();
        assert_eq!((one.len(), one[0].1.len()), (1, 1));
    }

    #[test]
    fn batches_of_other_inputs_are_not_put_together() {
        let mut other = batch(&[("a", &[1])]);
        other.features.set("more", Tensor::zeros(&[1, 2], Kind::Float, Device::Cpu).unwrap());
        assert!(batch(&[("a", &[1])]).and(other).is_err());
    }
}
