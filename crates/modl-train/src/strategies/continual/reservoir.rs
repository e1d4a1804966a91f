//! A memory of fixed size in which each example that was ever offered has the same chance to be.
//! Vitter 1985, *Random sampling with a reservoir*, algorithm R.

use modl_core::{Device, Error, Result, Seed, Tensor};
use rand::Rng;

use crate::Dataset;

/// Examples of a data set by their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reservoir {
    size: usize,
    /// How many have been offered.
    offered: u64,
    kept: Vec<i64>,
}

impl Reservoir {
    pub(super) fn new(size: usize) -> Result<Self> {
        if size == 0 {
            return Err(Error::invalid("memory", "is to hold 1 example or more"));
        }
        Ok(Reservoir { size, offered: 0, kept: Vec::new() })
    }

    /// Offers examples in order.
    pub(super) fn offer(&mut self, examples: impl IntoIterator<Item = usize>, seed: Seed) {
        let mut rng = seed.rng();
        for example in examples {
            self.offered += 1;
            if self.kept.len() < self.size {
                self.kept.push(example as i64);
                continue;
            }
            let at = rng.gen_range(0..self.offered);
            if let Some(slot) = usize::try_from(at).ok().and_then(|at| self.kept.get_mut(at)) {
                *slot = example as i64;
            }
        }
    }

    /// What is kept, as data; `None` where nothing is.
    pub(super) fn of(&self, data: &Dataset) -> Result<Option<Dataset>> {
        if self.kept.is_empty() {
            return Ok(None);
        }
        let rows: Vec<usize> = self.kept.iter().filter_map(|i| usize::try_from(*i).ok()).collect();
        data.rows(&rows).map(Some)
    }

    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let kept = Tensor::from_slice(&self.kept, &[self.kept.len() as i64], Device::Cpu)?;
        let offered = Tensor::from_slice(&[self.offered as i64], &[1], Device::Cpu)?;
        Ok(vec![("kept".to_owned(), kept), ("offered".to_owned(), offered)])
    }

    pub(super) fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        for (name, t) in state {
            let values = t.to_vec::<i64>()?;
            match name.as_str() {
                "kept" => self.kept = values,
                "offered" => self.offered = values.first().map_or(0, |n| *n as u64),
                _ => {
                    let problem = format!("holds `{name}`, no part of a memory");
                    return Err(Error::invalid("saved state", problem));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After any number of offers, in any number of parts, each example is kept with probability
    /// size ⁄ offered: χ² over 100 examples and 4,000 draws.
    #[test]
    fn each_example_is_kept_with_the_same_probability() {
        let (size, n, draws) = (20, 100, 4000);
        let mut counts = vec![0f64; n];
        for draw in 0..draws {
            let mut all = Reservoir::new(size).unwrap();
            all.offer(0..30, Seed(5).nth(draw).child("a"));
            all.offer(30..70, Seed(5).nth(draw).child("b"));
            all.offer(70..n, Seed(5).nth(draw).child("c"));
            assert_eq!(all.kept.len(), size);
            for i in &all.kept {
                counts[*i as usize] += 1.0;
            }
        }
        let (p, draws) = (size as f64 / n as f64, draws as f64);
        // Counts have the variance draws · p (1 − p) and one linear condition.
        let chi2: f64 =
            counts.iter().map(|c| (c - draws * p).powi(2) / (draws * p * (1.0 - p))).sum();
        // 99 degrees of freedom: 0.1 % above 148.2, 0.1 % below 60.
        assert!((60.0..148.2).contains(&chi2), "{chi2}");
    }

    #[test]
    fn a_small_stream_is_kept_whole_and_comes_back_from_its_state() {
        let mut all = Reservoir::new(5).unwrap();
        all.offer([3, 1, 2], Seed(1));
        let mut again = Reservoir::new(5).unwrap();
        again.load_state(all.state().unwrap()).unwrap();
        assert_eq!((again.kept.as_slice(), again.offered), ([3, 1, 2].as_slice(), 3));
        assert!(Reservoir::new(0).is_err());
    }
}
