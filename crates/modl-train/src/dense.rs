//! Dense inputs: images and other rows of numbers that a network reads instead of tokens.

use std::sync::{Arc, OnceLock};

use modl_core::{Device, Error, Kind, Result, Tensor, is_float};
use sha2::{Digest, Sha256};

/// One row of numbers for each example. The rows themselves are shared by all data sets that were
/// cut out of one, each of which knows which are its own.
#[derive(Debug, Clone)]
pub(crate) struct DenseRows {
    /// `[rows, …]`, u8 or floats.
    values: Tensor,
    /// Of the values; known once it has been asked for, and the same one wherever they are the same.
    digest: Arc<OnceLock<String>>,
    /// The row of each example.
    index: Vec<i64>,
}

impl DenseRows {
    /// The rows of `examples` in order.
    ///
    /// # Errors
    /// Where there is not one row for each example, or they are neither bytes nor floats.
    pub(crate) fn new(name: &str, values: Tensor, examples: usize) -> Result<Self> {
        let wrong = |problem| Err(Error::invalid(format!("input `{name}`"), problem));
        if matches!(name, "input_ids" | "attention_mask") {
            return wrong("is what tokens become; give it another name".to_owned());
        }
        if values.dim() < 2 || values.len_of(0) != examples as i64 {
            return wrong(format!("has shape {:?} for {examples} examples", values.size()));
        }
        if values.kind() != Kind::Uint8 && !is_float(values.kind()) {
            return wrong(format!("{values:?} is to be made of bytes or of floats"));
        }
        let values = values.detach()?.to_device(Device::Cpu)?.contiguous()?;
        Ok(DenseRows { values, digest: Arc::default(), index: (0..examples as i64).collect() })
    }

    /// Those of some examples, which have to be there.
    pub(crate) fn pick(&self, examples: &[usize]) -> Self {
        let index = examples.iter().filter_map(|i| self.index.get(*i).copied()).collect();
        DenseRows { values: self.values.clone(), digest: self.digest.clone(), index }
    }

    /// Those of some examples as floats `[examples, …]`: bytes 0 … 255 become 0 … 1.
    pub(crate) fn rows(&self, examples: &[usize], device: Device) -> Result<Tensor> {
        let index = self.pick(examples).index;
        let index = Tensor::from_slice(&index, &[index.len() as i64], Device::Cpu)?;
        let rows = self.values.index_select(0, &index)?.to_device(device)?;
        match rows.kind() {
            Kind::Uint8 => rows.to_kind(Kind::Float)?.mul_scalar(1.0 / 255.0),
            _ => Ok(rows),
        }
    }

    /// The rows of `self`, then those of `other`.
    ///
    /// # Errors
    /// Where they differ in shape or kind.
    pub(crate) fn and(&self, other: &DenseRows) -> Result<Self> {
        let mut index = self.index.clone();
        if Arc::ptr_eq(&self.digest, &other.digest) {
            index.extend(&other.index);
            return Ok(DenseRows {
                values: self.values.clone(),
                digest: self.digest.clone(),
                index,
            });
        }
        let (a, b) = (&self.values, &other.values);
        if a.kind() != b.kind() || a.size().get(1..) != b.size().get(1..) {
            return Err(Error::invalid("data sets", format!("{a:?} and {b:?} cannot be joined")));
        }
        index.extend(other.index.iter().map(|i| i + a.len_of(0)));
        let values = Tensor::cat(&[a.clone(), b.clone()], 0)?;
        Ok(DenseRows { values, digest: Arc::default(), index })
    }

    /// A text that changes with any number, and with the choice of rows.
    pub(crate) fn digest(&self) -> Result<String> {
        let hex = |hash: Sha256| hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let digest = match self.digest.get() {
            Some(known) => known,
            None => {
                let mut hash = Sha256::new();
                hash.update(format!("{:?}", self.values));
                hash.update(self.values.to_bytes()?);
                self.digest.get_or_init(|| hex(hash))
            }
        };
        let mut hash = Sha256::new();
        hash.update(digest);
        self.index.iter().for_each(|i| hash.update(i.to_le_bytes()));
        Ok(hex(hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dataset, Example};
    use modl_core::Context;

    fn example(id: usize, len: usize) -> Example {
        Example { id: id.to_string(), task: "t".into(), ids: vec![7; len], target: id as f32 }
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
