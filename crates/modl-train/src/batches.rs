//! The order in which examples are seen: shuffled by seed and epoch, and grouped by length so that
//! little padding is computed.
//!
//! An epoch's shuffled examples are cut into chunks of 32 batches; within a chunk they are sorted
//! by length and cut into batches, and the batches of all chunks are shuffled again. The order
//! depends on the seed and the epoch alone, so that a cursor of two numbers restores it.

use modl_core::{Device, Error, Result, Seed};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::{Batch, Dataset};

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
        let mut all = Batches { data, size, seed, device, cursor, order: Vec::new() };
        all.shuffle();
        if cursor.batch > all.order.len() {
            let problem = format!("is at batch {} of {}", cursor.batch, all.order.len());
            return Err(Error::invalid("data cursor", format!("{problem}; the data has changed")));
        }
        Ok(all)
    }

    fn shuffle(&mut self) {
        let mut rng = self.seed.child("batches").nth(self.cursor.epoch).rng();
        let mut index: Vec<usize> = (0..self.data.len()).collect();
        index.shuffle(&mut rng);
        let length = |i: &usize| self.data.examples().get(*i).map_or(0, |e| e.ids.len());
        self.order.clear();
        for chunk in index.chunks_mut(self.size * CHUNK) {
            chunk.sort_by_key(length);
            self.order.extend(chunk.chunks(self.size).map(<[usize]>::to_vec));
        }
        self.order.shuffle(&mut rng);
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
            self.shuffle();
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
            ids: vec![1; 1 + i * 7 % 13],
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
