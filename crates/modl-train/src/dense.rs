//! Dense inputs: images and other rows of numbers that a network reads instead of tokens.

use std::ops::{Add, Mul};
use std::sync::{Arc, OnceLock};

use modl_core::{Device, Element, Error, Kind, Result, Tensor, is_float};
use sha2::{Digest, Sha256};

use crate::rearranged::Rearranged;
use crate::stored_rows::StoredRows;

/// One row of numbers for each example. The rows themselves are shared by all data sets that were
/// cut out of one, each of which knows which are its own and how it sees them.
#[derive(Debug, Clone)]
pub(crate) struct DenseRows {
    /// `[rows, …]`, u8 or floats.
    values: StoredRows,
    /// Of the values; known once it has been asked for, and the same one wherever they are the same.
    digest: Arc<OnceLock<String>>,
    /// Each example's row.
    index: Vec<i64>,
    /// Each example's view; nothing where there are none.
    view: Vec<usize>,
    /// Ways to see a row; `None` is as it is.
    views: Vec<Option<Rearranged>>,
    /// The mean that is taken off, and the standard deviation that is divided by.
    normal: Option<(f64, f64)>,
}

impl DenseRows {
    /// The rows of `examples` in order.
    ///
    /// # Errors
    /// Where there is not one row for each example, or they are neither bytes nor floats.
    pub(crate) fn new(name: &str, values: Tensor, examples: usize) -> Result<Self> {
        let values = values.detach()?.to_device(Device::Cpu)?.contiguous()?;
        DenseRows::of(name, StoredRows::Whole(values), examples)
    }

    /// [`DenseRows::new`] of rows that may stand in a file.
    ///
    /// # Errors
    /// As [`DenseRows::new`].
    pub(crate) fn of(name: &str, values: StoredRows, examples: usize) -> Result<Self> {
        let wrong = |problem| Err(Error::invalid(format!("input `{name}`"), problem));
        if matches!(name, "input_ids" | "attention_mask") {
            return wrong("is what tokens become; give it another name".to_owned());
        }
        let size = values.size();
        if size.len() < 2 || size.first() != Some(&(examples as i64)) {
            return wrong(format!("has shape {size:?} for {examples} examples"));
        }
        if values.kind() != Kind::Uint8 && !is_float(values.kind()) {
            return wrong(format!("{} is to be made of bytes or of floats", values.describe()));
        }
        Ok(DenseRows {
            values,
            digest: Arc::default(),
            index: (0..examples as i64).collect(),
            view: Vec::new(),
            views: Vec::new(),
            normal: None,
        })
    }

    /// The shape of a row.
    pub(crate) fn shape(&self) -> Vec<i64> {
        self.values.size().split_off(1)
    }

    /// The numbers of a row.
    pub(crate) fn width(&self) -> i64 {
        self.shape().iter().product()
    }

    /// The same rows with this mean taken off and divided by this standard deviation.
    pub(crate) fn normalized(self, mean: f64, deviation: f64) -> Self {
        DenseRows { normal: Some((mean, deviation)), ..self }
    }

    /// All examples once for each view, one view after the other.
    ///
    /// # Errors
    /// Where they have views already.
    pub(crate) fn seen(&self, views: Vec<Option<Rearranged>>) -> Result<Self> {
        if !self.view.is_empty() {
            return Err(Error::unsupported("a stream of a stream", "make it of the data itself"));
        }
        let n = self.index.len();
        let view = (0..views.len()).flat_map(|v| std::iter::repeat_n(v, n)).collect();
        let index = self.index.repeat(views.len());
        Ok(DenseRows { index, view, views, ..self.clone() })
    }

    /// Those of some examples, which have to be there.
    pub(crate) fn pick(&self, examples: &[usize]) -> Self {
        let index = examples.iter().filter_map(|i| self.index.get(*i).copied()).collect();
        let view = examples.iter().filter_map(|i| self.view.get(*i).copied()).collect();
        let (values, digest) = (self.values.clone(), self.digest.clone());
        DenseRows { values, digest, index, view, views: self.views.clone(), normal: self.normal }
    }

    /// Those of some examples as floats `[examples, …]`: bytes 0 … 255 become 0 … 1.
    pub(crate) fn rows(&self, examples: &[usize], device: Device) -> Result<Tensor> {
        let index: Vec<i64> = examples.iter().filter_map(|i| self.index.get(*i).copied()).collect();
        let rows = match self.values.kind() {
            Kind::Uint8 => {
                let bytes = self.values.bytes(&index)?;
                self.through_views(&bytes, |b| f32::from(b) * (1.0 / 255.0), examples)?
            }
            _ if self.view.is_empty() => self.values.pick(&index)?,
            Kind::Double => {
                let rows = self.values.pick(&index)?.to_vec::<f64>()?;
                self.through_views(&rows, |x| x, examples)?
            }
            kind => {
                let rows = self.values.pick(&index)?.to_vec::<f32>()?;
                self.through_views(&rows, |x| x, examples)?.to_kind(kind)?
            }
        };
        let rows = match self.normal {
            Some((mean, deviation)) => rows.add_scalar(-mean)?.mul_scalar(1.0 / deviation)?,
            None => rows,
        };
        rows.to_device(device)
    }

    /// What `number` makes of some examples' rows, one after the other, as the examples see them.
    fn through_views<S: Copy, T>(
        &self,
        rows: &[S],
        number: impl Fn(S) -> T,
        examples: &[usize],
    ) -> Result<Tensor>
    where
        T: Element + Copy + Default + From<f32> + Mul<Output = T> + Add<Output = T>,
    {
        let width = (self.width() as usize).max(1);
        let mut seen: Vec<T> = Vec::with_capacity(rows.len());
        let mut one: Vec<T> = Vec::with_capacity(width);
        for (row, example) in rows.chunks(width).zip(examples) {
            let view = self.view.get(*example).and_then(|v| self.views.get(*v)?.as_ref());
            let numbers = row.iter().map(|x| number(*x));
            match view {
                Some(view) => {
                    one.clear();
                    one.extend(numbers);
                    view.push(&one, &mut seen);
                }
                None => seen.extend(numbers),
            }
        }
        let size = [&[examples.len() as i64], self.shape().as_slice()].concat();
        Tensor::from_slice(&seen, &size, Device::Cpu)
    }

    /// The rows of `self`, then those of `other`.
    ///
    /// # Errors
    /// Where they differ in shape, kind or normalisation, or only one of them is a stream.
    pub(crate) fn and(&self, other: &DenseRows) -> Result<Self> {
        let (a, b) = (&self.values, &other.values);
        if a.kind() != b.kind()
            || self.shape() != other.shape()
            || self.normal != other.normal
            || self.view.is_empty() != other.view.is_empty()
        {
            let (a, b) = (a.describe(), b.describe());
            let problem = format!("{a} and {b} cannot be joined, or are seen in other ways");
            return Err(Error::invalid("data sets", problem));
        }
        let mut all = self.clone();
        let shared = Arc::ptr_eq(&self.digest, &other.digest);
        if !shared {
            all.values = a.and(b)?;
            all.digest = Arc::default();
        }
        let start = if shared { 0 } else { a.size().first().copied().unwrap_or(0) };
        all.index.extend(other.index.iter().map(|i| i + start));
        let same = |(a, b): (&Option<Rearranged>, &Option<Rearranged>)| match (a, b) {
            (Some(a), Some(b)) => a.is(b),
            (a, b) => a.is_none() && b.is_none(),
        };
        let views = self.views.len();
        let same = views == other.views.len() && self.views.iter().zip(&other.views).all(same);
        let start = if same { 0 } else { views };
        if !same {
            all.views.extend(other.views.iter().cloned());
        }
        all.view.extend(other.view.iter().map(|v| v + start));
        Ok(all)
    }

    /// A text that changes with any number, the choice of rows, and how they are seen.
    pub(crate) fn digest(&self) -> Result<String> {
        let hex = |hash: Sha256| hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let digest = match self.digest.get() {
            Some(known) => known,
            None => {
                let mut hash = Sha256::new();
                hash.update(self.values.describe());
                self.values.digest(&mut hash)?;
                self.digest.get_or_init(|| hex(hash))
            }
        };
        let mut hash = Sha256::new();
        hash.update(format!("{digest} {:?}", self.normal));
        self.index.iter().for_each(|i| hash.update(i.to_le_bytes()));
        self.view.iter().for_each(|v| hash.update((*v as u64).to_le_bytes()));
        for view in self.views.iter().flatten() {
            view.digest(&mut hash);
        }
        Ok(hex(hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dataset, Example};
    use modl_core::Context;

    fn example(id: usize, len: usize) -> Example {
        Example {
            id: id.to_string(),
            task: "t".into(),
            ids: vec![7; len].into(),
            target: id as f32,
        }
    }

    #[test]
    fn dense_inputs_follow_their_examples_through_every_cut() {
        let values: Vec<u8> = (0..40).collect();
        let rows = Tensor::from_slice(&values, &[20, 2], Device::Cpu).unwrap();
        let task = |i: usize| if i.is_multiple_of(2) { "even" } else { "odd" };
        let all = (0..20).map(|i| Example { task: task(i).into(), ..example(i, 0) }).collect();
        let data = Dataset::dense(all, "pixel_values", rows).unwrap();
        // Example i has the bytes 2 i and 2 i + 1, wherever it is.
        let check = |d: &Dataset| {
            let index: Vec<usize> = (0..d.len()).rev().collect();
            let batch = d.batch(&index, Device::Cpu).unwrap();
            assert!(batch.inputs.get("input_ids").is_none());
            assert!(batch.describe(Context::eval()).unwrap().find("mask").is_none());
            let found = batch.inputs.need("pixel_values").unwrap().to_vec::<f32>().unwrap();
            for (id, pair) in batch.ids.iter().zip(found.chunks(2)) {
                let i: f32 = id.parse().unwrap();
                assert_eq!(
                    pair.to_vec(),
                    [2.0 * i * (1.0 / 255.0), (2.0 * i + 1.0) * (1.0 / 255.0)]
                );
            }
        };
        let (train, test) = data.split(0, 0.3).unwrap();
        let odd = train.of_task("odd").unwrap();
        let again = odd.and(&test).unwrap();
        // Of another store, too: bytes are copied then.
        let apart = Tensor::from_slice(&[10u8, 11], &[1, 2], Device::Cpu).unwrap();
        let apart = Dataset::dense(vec![example(5, 0)], "pixel_values", apart).unwrap();
        for d in [&data, &train, &test, &odd, &again, &apart.and(&again).unwrap()] {
            check(d);
        }
        assert_eq!(again.len(), odd.len() + test.len());
        let print = |d: &Dataset| d.fingerprint().unwrap();
        assert_eq!(print(&data.of_task("odd").unwrap()), print(&data.of_task("odd").unwrap()));
        assert_ne!(print(&train), print(&test));
    }

    #[test]
    fn any_number_of_a_dense_input_changes_the_fingerprint() {
        let data = |values: [f32; 4]| {
            let rows = Tensor::from_slice(&values, &[2, 2], Device::Cpu).unwrap();
            Dataset::dense(vec![example(0, 0), example(1, 0)], "input_values", rows).unwrap()
        };
        let print = |v: [f32; 4]| data(v).fingerprint().unwrap();
        assert_eq!(print([0.0, 1.0, 2.0, 3.0]), print([0.0, 1.0, 2.0, 3.0]));
        assert_ne!(print([0.0, 1.0, 2.0, 3.0]), print([0.0, 1.0, 2.0, 3.5]));
        assert_ne!(print([0.0, 1.0, 2.0, 3.0]), print([0.0, 1.0, 3.0, 2.0]));
    }

    #[test]
    fn dense_inputs_that_do_not_fit_are_refused() {
        let rows = |n: i64| Tensor::zeros(&[n, 2], Kind::Float, Device::Cpu).unwrap();
        let refused = |examples, name: &str, t: Tensor| {
            Dataset::dense(examples, name, t).unwrap_err().to_string()
        };
        let both = || vec![example(0, 0), example(1, 0)];
        assert!(refused(both(), "x", rows(3)).contains("for 2 examples"));
        assert!(refused(both(), "input_ids", rows(2)).contains("another name"));
        let whole = rows(2).to_kind(Kind::Int64).unwrap();
        assert!(refused(both(), "x", whole).contains("bytes or of floats"));
        let mixed = vec![example(0, 1), example(1, 0)];
        assert!(refused(mixed, "x", rows(2)).contains("example `1` of `t`"));
        assert!(refused(vec![], "x", rows(0)).contains("no examples"));
        let other = Dataset::new(vec![example(0, 1)]).unwrap();
        let data = Dataset::dense(both(), "x", rows(2)).unwrap();
        assert!(data.and(&other).unwrap_err().to_string().contains("other inputs"));
    }
}
