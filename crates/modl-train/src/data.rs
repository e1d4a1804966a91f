//! Examples and data sets.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use modl_core::{Device, Error, Result, Tensor, Tensors};
use sha2::{Digest, Sha256};

use crate::dense::DenseRows;
use crate::{Batch, TokenIds};

/// One example: a text as token ids, or a row of a data set's dense inputs, and what is to be said of
/// it.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// A name that is unique within its task.
    pub id: String,
    /// The task, data set or language that it belongs to.
    pub task: String,
    /// Token ids with the special tokens of the model; none where it is a row of numbers alone.
    pub ids: TokenIds,
    /// The target, in the task's own unit.
    pub target: f32,
}

/// Examples in order, none of them empty, with named inputs and features for each.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    pub(crate) examples: Vec<Example>,
    pub(crate) inputs: BTreeMap<String, DenseRows>,
    pub(crate) features: Tensors,
    /// What features are computed from, where they are.
    pub(crate) origins: BTreeMap<String, String>,
    pub(crate) pad: i64,
    pub(crate) fingerprint: OnceLock<String>,
}

impl Dataset {
    /// A data set whose batches are filled up with token 0.
    ///
    /// # Errors
    /// Where there is no example at all, or one without tokens.
    pub fn new(examples: Vec<Example>) -> Result<Self> {
        Dataset { examples, ..Dataset::default() }.checked()
    }

    /// A data set of images or other rows of numbers, `rows` `[examples, …]`: bytes, which batches
    /// have as f32 from 0 to 1, or floats. Examples need no tokens; either all of them have some, or
    /// none.
    ///
    /// ```
    /// use modl_core::{Device, Tensor};
    /// use modl_train::{Dataset, Example, TokenIds};
    /// let ids = TokenIds::default();
    /// let example =
    ///     |i: u32| Example { id: i.to_string(), task: "digits".into(), ids: ids.clone(), target: 1.0 };
    /// let images = Tensor::from_slice(&[0u8, 255, 51, 0], &[2, 2], Device::Cpu)?;
    /// let data = Dataset::dense(vec![example(0), example(1)], "pixel_values", images)?;
    /// let batch = data.batch(&[1], Device::Cpu)?;
    /// let pixels = batch.inputs.need("pixel_values")?.to_vec::<f64>()?;
    /// assert!((pixels[0] - 0.2).abs() < 1e-7 && pixels[1] == 0.0);
    /// # Ok::<(), modl_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Where there is no example, or not one row for each, or `rows` are neither bytes nor floats.
    pub fn dense(examples: Vec<Example>, name: impl Into<String>, rows: Tensor) -> Result<Self> {
        Dataset { examples, ..Dataset::default() }.with_input(name, rows)?.checked()
    }

    pub(crate) fn checked(self) -> Result<Self> {
        if self.examples.is_empty() {
            return Err(Error::invalid(
                "data set",
                "has no examples; check its files, its `limit` and its split",
            ));
        }
        let tokens = self.inputs.is_empty() || self.examples.iter().any(|e| !e.ids.is_empty());
        if let Some(e) = self.examples.iter().find(|e| tokens && e.ids.is_empty()) {
            return Err(Error::invalid(
                format!("example `{}` of `{}`", e.id, e.task),
                "has no tokens",
            ));
        }
        Ok(self)
    }

    /// A further dense input for each example, as in [`Dataset::dense`]: batches hand its rows to the
    /// backbone under this name.
    ///
    /// # Errors
    /// As [`Dataset::dense`].
    pub fn with_input(mut self, name: impl Into<String>, rows: Tensor) -> Result<Self> {
        let name = name.into();
        let rows = DenseRows::new(&name, rows, self.len())?;
        self.inputs.insert(name, rows);
        self.fingerprint = OnceLock::new();
        Ok(self)
    }

    /// Batches are filled up with this token.
    pub fn with_pad(self, pad: i64) -> Self {
        Dataset { pad, ..self }
    }

    /// The examples in order.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Whether there is none, which [`Dataset::new`] refuses.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// The tasks with their numbers of examples, sorted.
    pub fn tasks(&self) -> BTreeMap<&str, usize> {
        let mut tasks = BTreeMap::new();
        for e in &self.examples {
            *tasks.entry(e.task.as_str()).or_default() += 1;
        }
        tasks
    }

    /// The examples that `keep` takes, in order, with their features.
    ///
    /// # Errors
    /// Where it takes none.
    pub fn filter(&self, keep: impl Fn(&Example) -> bool) -> Result<Dataset> {
        let kept = self.examples.iter().enumerate().filter(|(_, e)| keep(e));
        self.rows(&kept.map(|(i, _)| i).collect::<Vec<_>>())
    }

    /// The examples at `index`, in that order, with their inputs and features.
    ///
    /// # Errors
    /// Where an index is out of range, or there is none.
    pub fn rows(&self, index: &[usize]) -> Result<Dataset> {
        let examples: Option<Vec<Example>> =
            index.iter().map(|i| self.examples.get(*i).cloned()).collect();
        let examples = examples.ok_or_else(|| {
            let problem = format!("are wanted beyond the {} that there are", self.len());
            Error::invalid("examples", problem)
        })?;
        let inputs = self.inputs.iter().map(|(name, rows)| (name.clone(), rows.pick(index)));
        let (inputs, features) = (inputs.collect(), self.feature_rows(index)?);
        let (origins, pad) = (self.origins.clone(), self.pad);
        Dataset { examples, inputs, features, origins, pad, ..Dataset::default() }.checked()
    }

    /// The examples of `self`, then those of `other`, with their inputs and features.
    ///
    /// # Errors
    /// Where the two do not have the same inputs and features, or they differ in shape or kind.
    pub fn and(&self, other: &Dataset) -> Result<Dataset> {
        let names = |d: &Dataset| -> Vec<String> {
            d.inputs
                .keys()
                .map(String::as_str)
                .chain(d.features.names())
                .map(str::to_owned)
                .collect()
        };
        let (own, others) = (names(self), names(other));
        if own != others {
            let problem = format!("have other inputs and features: {own:?} and {others:?}");
            return Err(Error::invalid("data sets", problem));
        }
        let both = |(name, rows): (&String, &DenseRows)| match other.inputs.get(name) {
            Some(more) => Ok((name.clone(), rows.and(more)?)),
            None => Ok((name.clone(), rows.clone())),
        };
        let both_features = |name: &str, t: &Tensor| {
            Tensor::cat(&[t.clone(), other.features.need(name)?.clone()], 0)
        };
        let of_both = |(name, origin): &(String, String)| other.origins.get(name) == Some(origin);
        Dataset {
            examples: self.examples.iter().chain(&other.examples).cloned().collect(),
            inputs: self.inputs.iter().map(both).collect::<Result<_>>()?,
            features: self.features.map(both_features)?,
            origins: self.origins.clone().into_iter().filter(of_both).collect(),
            pad: self.pad,
            fingerprint: OnceLock::new(),
        }
        .checked()
    }

    /// The examples of one task.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the tasks that there are.
    pub fn of_task(&self, task: &str) -> Result<Dataset> {
        if !self.examples.iter().any(|e| e.task == task) {
            return Err(Error::unknown("task of the data set", task, self.tasks().keys()));
        }
        self.filter(|e| e.task == task)
    }

    /// The examples of some tasks, in order.
    ///
    /// # Errors
    /// Where the data set does not have one of them.
    pub fn of_tasks(&self, wanted: &[String]) -> Result<Dataset> {
        let tasks = self.tasks();
        if let Some(unknown) = wanted.iter().find(|t| !tasks.contains_key(t.as_str())) {
            return Err(Error::unknown("task of the data set", unknown, tasks.keys()));
        }
        self.filter(|e| wanted.contains(&e.task))
    }

    /// The examples for training and those held out: [`held_out`] by `TASK/ID`.
    ///
    /// # Errors
    /// Where one of the two would be empty.
    pub fn split(&self, seed: u64, share: f64) -> Result<(Dataset, Dataset)> {
        let out = |e: &Example| held_out(&format!("{}/{}", e.task, e.id), seed, share);
        Ok((self.filter(|e| !out(e))?, self.filter(out)?))
    }

    /// The examples at `index` as tensors on `device`, filled up to the longest.
    ///
    /// # Errors
    /// Where an index is out of range, or tokens or numbers that stand in a file cannot be read.
    pub fn batch(&self, index: &[usize], device: Device) -> Result<Batch> {
        let rows: Option<Vec<&Example>> = index.iter().map(|i| self.examples.get(*i)).collect();
        let rows = rows.ok_or_else(|| {
            Error::invalid("batch", format!("wants examples beyond the {} there are", self.len()))
        })?;
        let longest = rows.iter().map(|e| e.ids.len()).max().unwrap_or(0);
        let mut ids = Vec::with_capacity(rows.len() * longest);
        let mut mask = Vec::with_capacity(rows.len() * longest);
        for e in &rows {
            e.ids.add_to(&mut ids)?;
            mask.extend(std::iter::repeat_n(1i64, e.ids.len()));
            ids.extend(std::iter::repeat_n(self.pad, longest - e.ids.len()));
            mask.extend(std::iter::repeat_n(0i64, longest - e.ids.len()));
        }
        let n = rows.len() as i64;
        let mut inputs = Tensors::new();
        if longest > 0 {
            let shape = [n, longest as i64];
            inputs.set("input_ids", Tensor::from_slice(&ids, &shape, device)?);
            inputs.set("attention_mask", Tensor::from_slice(&mask, &shape, device)?);
        }
        for (name, dense) in &self.inputs {
            inputs.set(name.clone(), dense.rows(index, device)?);
        }
        let targets: Vec<f32> = rows.iter().map(|e| e.target).collect();
        Ok(Batch {
            inputs,
            targets: Tensor::from_slice(&targets, &[n], device)?,
            tasks: rows.iter().map(|e| e.task.clone()).collect(),
            ids: rows.iter().map(|e| e.id.clone()).collect(),
            features: self.feature_rows(index)?.map(|_, t| t.to_device(device))?,
        })
    }

    /// Twelve hex digits that change with any example, so that a run is not resumed on other data.
    ///
    /// # Errors
    /// Where tokens or a dense input cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let text = self.hashed(|name| self.origins.get(name))?;
        Ok(self.fingerprint.get_or_init(|| text).clone())
    }

    /// The fingerprint by the numbers of all features, as it once was; nothing where it is the same.
    pub(crate) fn former_fingerprint(&self) -> Result<Option<String>> {
        (!self.origins.is_empty()).then(|| self.hashed(|_| None)).transpose()
    }

    fn hashed<'a>(&self, origin: impl Fn(&str) -> Option<&'a String>) -> Result<String> {
        let mut hash = Sha256::new();
        for e in &self.examples {
            let (target, ids) = (e.target.to_bits(), e.ids.to_vec()?);
            hash.update(format!("{}\0{}\0{target}\0{ids:?}\n", e.task, e.id));
        }
        for (name, rows) in &self.inputs {
            hash.update(format!("{name}\0{}\n", rows.digest()?));
        }
        for (name, rows) in self.features.iter() {
            hash.update(format!("{name}\0{:?}\n", rows.size()));
            match origin(name) {
                Some(origin) => hash.update(format!("{origin}\n")),
                None => hash.update(rows.to_bytes()?),
            }
        }
        Ok(hash.finalize().iter().take(6).map(|b| format!("{b:02x}")).collect())
    }
}

/// Whether the example called `key` is held out, for a share of all keys. It depends on seed and
/// key alone: the first 64 bits of SHA-256 of `SEED|KEY`, as a fraction, are below `share`.
///
/// ```
/// use modl_train::held_out;
/// let out = (0..1000).filter(|i| held_out(&format!("tweets/{i}"), 0, 0.2)).count();
/// assert!((170..230).contains(&out));
/// ```
pub fn held_out(key: &str, seed: u64, share: f64) -> bool {
    let digest = Sha256::digest(format!("{seed}|{key}"));
    let bits = digest.iter().take(8).fold(0u64, |all, byte| all << 8 | u64::from(*byte));
    (bits as f64) < share * 2f64.powi(64)
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn a_batch_is_padded_and_brings_its_features() {
        let rows = Tensor::from_slice(&[0f32, 1., 2.], &[3, 1], Device::Cpu).unwrap();
        let data = Dataset::new(vec![example(0, 1), example(1, 3), example(2, 2)]).unwrap();
        let data = data.with_pad(9).with_feature("embedding", rows).unwrap();
        let batch = data.filter(|e| e.id != "1").unwrap().batch(&[1, 0], Device::Cpu).unwrap();
        let get = |n: &str| batch.inputs.need(n).unwrap().to_vec::<i64>().unwrap();
        assert_eq!((get("input_ids"), get("attention_mask")), (vec![7, 7, 7, 9], vec![1, 1, 1, 0]));
        assert_eq!(batch.targets.to_vec::<f32>().unwrap(), [2.0, 0.0]);
        let cx = batch.describe(Context::eval()).unwrap();
        assert_eq!(cx.feature("embedding").unwrap().to_vec::<f32>().unwrap(), [2.0, 0.0]);
        assert_eq!(cx.tasks().unwrap().len(), 2);
    }

    #[test]
    fn nothing_to_train_on_is_refused_in_words() {
        let e = Dataset::new(vec![]).unwrap_err().to_string();
        assert!(e.contains("no examples"), "{e}");
        let data = Dataset::new(vec![example(0, 1)]).unwrap();
        let e = data.of_task("tt").unwrap_err().to_string();
        assert!(e.contains("did you mean `t`"), "{e}");
        assert!(Dataset::new(vec![example(0, 0)]).is_err());
    }

    #[test]
    fn a_split_is_a_partition_by_seed_and_id() {
        let data = Dataset::new((0..200).map(|i| example(i, 1)).collect()).unwrap();
        let (train, test) = data.split(3, 0.25).unwrap();
        assert_eq!(train.len() + test.len(), 200);
        let mut reversed = data.examples().to_vec();
        reversed.reverse();
        let (_, again) = Dataset::new(reversed).unwrap().split(3, 0.25).unwrap();
        let ids = |d: &Dataset| {
            let mut ids: Vec<_> = d.examples().iter().map(|e| e.id.clone()).collect();
            ids.sort();
            ids
        };
        assert_eq!(ids(&test), ids(&again));
        assert_ne!(ids(&test), ids(&data.split(4, 0.25).unwrap().1));
    }
}
