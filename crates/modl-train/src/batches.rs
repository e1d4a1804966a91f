//! The order in which examples are seen: shuffled by seed and epoch, and grouped by length so that
//! little padding is computed.
//!
//! An epoch's shuffled examples are cut into chunks of 32 batches; within a chunk they are sorted
//! by length and cut into batches, and the batches of all chunks are shuffled again. The order
//! depends on the seed and the epoch alone, so that a cursor of two numbers restores it.
//!
//! With [`Sampling`] an epoch has as many examples as before, but each is of a task that is drawn: the
//! next one of the task's own shuffled examples, which begin again where they are used up.

use std::collections::BTreeMap;

use modl_core::{Device, Error, Result, Seed};
use rand::Rng;
use rand::distributions::{Distribution, WeightedIndex};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::{Batch, Dataset, Sampling};

/// Batches that are sorted by length together.
const CHUNK: usize = 32;

/// Where in the data a run is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Epochs that are finished.
    pub epoch: u64,
    /// Batches of this epoch that are finished.
    pub batch: usize,
}

/// Batches of a data set without end, epoch after epoch.
#[derive(Debug)]
pub struct Batches<'a> {
    data: &'a Dataset,
    size: usize,
    seed: Seed,
    device: Device,
    cursor: Cursor,
    sampling: Option<Sampling>,
    order: Vec<Vec<usize>>,
}

impl<'a> Batches<'a> {
    /// Batches of `size` examples from `cursor` on; the last one of an epoch may be smaller.
    ///
    /// # Errors
    /// Where `size` is 0, there are no examples, or the cursor lies beyond an epoch's end.
    pub fn new(
        data: &'a Dataset,
        size: usize,
        seed: Seed,
        device: Device,
        cursor: Cursor,
    ) -> Result<Self> {
        if size == 0 || data.is_empty() {
            return Err(Error::invalid(
                "batches",
                format!(
                    "of {size} examples from {} cannot be made; both are to be 1 at least",
                    data.len()
                ),
            ));
        }
        let sampling = None;
        let mut all = Batches { data, size, seed, device, cursor, sampling, order: Vec::new() };
        all.shuffle()?;
        if cursor.batch > all.order.len() {
            let problem = format!("is at batch {} of {}", cursor.batch, all.order.len());
            return Err(Error::invalid("data cursor", format!("{problem}; the data has changed")));
        }
        Ok(all)
    }

    /// The same with tasks drawn by `sampling`, where there is any.
    ///
    /// # Errors
    /// Where its number is out of its range.
    pub fn sampled(mut self, sampling: Option<Sampling>) -> Result<Self> {
        if sampling.is_some() {
            self.sampling = sampling;
            self.shuffle()?;
        }
        Ok(self)
    }

    fn shuffle(&mut self) -> Result<()> {
        let mut rng = self.seed.child("batches").nth(self.cursor.epoch).rng();
        let mut index: Vec<usize> = match self.sampling {
            Some(sampling) => self.drawn(sampling, &mut rng)?,
            None => (0..self.data.len()).collect(),
        };
        index.shuffle(&mut rng);
        let length = |i: &usize| self.data.examples().get(*i).map_or(0, |e| e.ids.len());
        self.order.clear();
        for chunk in index.chunks_mut(self.size * CHUNK) {
            chunk.sort_by_key(length);
            self.order.extend(chunk.chunks(self.size).map(<[usize]>::to_vec));
        }
        self.order.shuffle(&mut rng);
        Ok(())
    }

    /// As many examples as there are, each of a task drawn by `sampling`.
    fn drawn(&self, sampling: Sampling, rng: &mut impl Rng) -> Result<Vec<usize>> {
        sampling.check()?;
        let mut tasks: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (i, example) in self.data.examples().iter().enumerate() {
            tasks.entry(&example.task).or_default().push(i);
        }
        let mut tasks: Vec<(Vec<usize>, usize)> = tasks.into_values().map(|own| (own, 0)).collect();
        let counts: Vec<usize> = tasks.iter().map(|(own, _)| own.len()).collect();
        let draws = WeightedIndex::new(sampling.probabilities(&counts));
        let draws = draws.map_err(|e| Error::invalid("sampling", e.to_string()))?;
        let mut index = Vec::with_capacity(self.data.len());
        while index.len() < self.data.len() {
            let Some((own, next)) = tasks.get_mut(draws.sample(rng)) else { break };
            if *next == 0 {
                own.shuffle(rng);
            }
            index.extend(own.get(*next));
            *next = (*next + 1) % own.len().max(1);
        }
        Ok(index)
    }

    /// The number of batches of an epoch.
    pub fn per_epoch(&self) -> u64 {
        self.order.len() as u64
    }

    /// Where the next batch is.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next batch.
    pub fn advance(&mut self) -> Result<Batch> {
        if self.cursor.batch >= self.order.len() {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, batch: 0 };
            self.shuffle()?;
        }
        let rows = self.order.get(self.cursor.batch).map(Vec::as_slice).unwrap_or_default();
        let batch = self.data.batch(rows, self.device)?;
        self.cursor.batch += 1;
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Example;

    fn data(n: usize) -> Dataset {
        let example = |i: usize| Example {
            id: i.to_string(),
            task: "t".into(),
            ids: vec![1; 1 + i * 7 % 13].into(),
            target: 0.0,
        };
        Dataset::new((0..n).map(example).collect()).unwrap()
    }

    fn batches(data: &Dataset, seed: u64, cursor: Cursor) -> Batches<'_> {
        Batches::new(data, 4, Seed(seed), Device::Cpu, cursor).unwrap()
    }

    #[test]
    fn an_epoch_sees_every_example_once_and_the_next_in_another_order() {
        let data = data(10);
        let mut b = batches(&data, 1, Cursor::default());
        let mut epoch = || -> Vec<String> {
            (0..b.per_epoch()).flat_map(|_| b.advance().unwrap().ids).collect()
        };
        let (first, second) = (epoch(), epoch());
        assert_ne!(first, second);
        for mut seen in [first, second] {
            seen.sort_by_key(|i| i.parse::<usize>().unwrap());
            assert_eq!(seen, (0..10).map(|i| i.to_string()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_cursor_restores_the_order_exactly() {
        let data = data(23);
        let mut straight = batches(&data, 5, Cursor::default());
        for _ in 0..40 {
            let mut restored = batches(&data, 5, straight.cursor());
            assert_eq!(straight.advance().unwrap().ids, restored.advance().unwrap().ids);
            assert_eq!(straight.cursor(), restored.cursor());
        }
    }

    #[test]
    fn tasks_are_drawn_by_temperature_and_the_cursor_restores_that_too() {
        let tasks = [("a", 900usize), ("b", 90), ("c", 10)];
        let examples = tasks.iter().flat_map(|(task, n)| {
            (0..*n).map(|i| Example {
                id: i.to_string(),
                task: (*task).to_owned(),
                ids: vec![1; 1 + i % 3].into(),
                target: 0.0,
            })
        });
        let data = Dataset::new(examples.collect()).unwrap();
        for sampling in [Sampling::Temperature(1.0), Sampling::Temperature(5.0), Sampling::Uniform]
        {
            let sampled = |cursor| batches(&data, 3, cursor).sampled(Some(sampling)).unwrap();
            let (mut straight, mut seen) = (sampled(Cursor::default()), [0.0; 3]);
            let mut own: BTreeMap<String, usize> = BTreeMap::new();
            for step in 0..2 * straight.per_epoch() {
                let restored = (step % 101 == 7).then(|| sampled(straight.cursor()).advance());
                let batch = straight.advance().unwrap();
                if let Some(restored) = restored {
                    assert_eq!(restored.unwrap().ids, batch.ids);
                }
                for (task, id) in batch.tasks.iter().zip(&batch.ids) {
                    seen[tasks.iter().position(|(t, _)| t == task).unwrap()] += 1.0;
                    *own.entry(format!("{task}{id}")).or_default() += 1;
                }
            }
            let p = sampling.probabilities(&tasks.map(|(_, n)| n));
            let chi: f64 = seen.iter().zip(p).map(|(n, p)| (n - 2e3 * p).powi(2) / (2e3 * p)).sum();
            // χ² with two degrees of freedom is below 13.8 in 999 of 1000 cases.
            assert!(chi < 13.8, "{sampling:?}: {seen:?}");
            // Within a task examples come about equally often: once more or less in an epoch.
            let of_c: Vec<usize> =
                own.iter().filter(|(k, _)| k.starts_with('c')).map(|(_, n)| *n).collect();
            let (least, most) = (of_c.iter().min().unwrap(), of_c.iter().max().unwrap());
            assert!(most - least <= 2, "{sampling:?}: {of_c:?}");
        }
        let wrong = batches(&data, 3, Cursor::default()).sampled(Some(Sampling::Temperature(0.0)));
        assert!(wrong.unwrap_err().to_string().contains("sampling.temperature"));
    }

    #[test]
    fn grouping_by_length_saves_padding() {
        let data = data(400);
        let mut b = batches(&data, 1, Cursor::default());
        let (mut cells, mut real) = (0, 0.0);
        for _ in 0..b.per_epoch() {
            let mask = b.advance().unwrap().inputs.need("attention_mask").unwrap().clone();
            cells += mask.numel();
            real += mask.sum().unwrap().item().unwrap();
        }
        // Batches of 4 at random from lengths 1..=13 would fill about two thirds.
        assert!(real / cells as f64 > 0.95, "{real} of {cells}");
    }

    #[test]
    fn a_cursor_beyond_the_data_is_refused() {
        let data = data(4);
        let cursor = Cursor { epoch: 0, batch: 2 };
        assert!(Batches::new(&data, 4, Seed(0), Device::Cpu, cursor).is_err());
        assert!(Batches::new(&data, 0, Seed(0), Device::Cpu, Cursor::default()).is_err());
    }
}
