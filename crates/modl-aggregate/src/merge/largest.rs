//! The k largest of many numbers by selection: two passes that count, and nothing is sorted or kept.
//!
//! Magnitudes of f32 have the order of their bits. A first pass counts how many have each upper half
//! of the bits, a second how many have each lower half among those with the upper half where the k-th
//! lies. Among equal magnitudes those are taken that come first (or last), as a stable sort would.

use modl_core::Result;

use super::{Chunk, Group};

/// Buckets of a pass: one for each half of the bits.
const BUCKETS: usize = 1 << 16;

/// Which numbers are among the k largest.
#[derive(Debug, Clone)]
pub struct Largest {
    /// The bits of the k-th largest magnitude.
    bits: u32,
    /// The equal ones that are among them, by their number in the order of the tensor.
    taken: std::ops::Range<u64>,
    /// How many equal ones come before each piece; empty where all of them are taken.
    before: Vec<u64>,
    /// None at all.
    none: bool,
}

/// Which of equal magnitudes are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ties {
    /// Those that come first in the tensor, as a stable sort from large to small has it.
    First,
    /// Those that come last, as a stable sort from small to large has it.
    Last,
}

/// What is ranked: writes the magnitudes of a piece, for one of several rankings.
pub trait Ranked: Fn(&Chunk, usize, &mut [f32]) + Send + Sync {}
impl<F: Fn(&Chunk, usize, &mut [f32]) + Send + Sync> Ranked for F {}

/// The `k` largest for each of some rankings of a group's places.
///
/// # Errors
/// Where a tensor cannot be read.
pub fn largest(group: &Group, k: &[usize], ties: Ties, rank: impl Ranked) -> Result<Vec<Largest>> {
    let n = group.len();
    let wanted: Vec<usize> = (0..k.len()).collect();
    let upper = count(group, &wanted, &rank, |_, bits| Some(bits >> 16))?;
    let mut found = Vec::with_capacity(k.len());
    for (counts, k) in upper.iter().zip(k) {
        let k = (*k).min(n);
        found.push(if k == 0 { None } else { Some(kth(counts, k as u64)) });
    }
    let lower = count(group, &wanted, &rank, |r, bits| {
        let half = found.get(r).copied().flatten().map(|(half, _)| half as u32);
        (half == Some(bits >> 16)).then_some(bits & 0xFFFF)
    })?;
    let mut all = Vec::with_capacity(k.len());
    for ((r, found), counts) in found.iter().enumerate().zip(&lower) {
        let Some((half, left)) = *found else {
            all.push(Largest { bits: 0, taken: 0..0, before: Vec::new(), none: true });
            continue;
        };
        let (low, left) = kth(counts, left);
        let bits = (half as u32) << 16 | low as u32;
        let equal = counts.get(low).copied().unwrap_or_default();
        let taken = match ties {
            Ties::First => 0..left,
            Ties::Last => equal - left..equal,
        };
        let before = if left == equal { Vec::new() } else { before(group, r, &rank, bits)? };
        all.push(Largest { bits, taken, before, none: false });
    }
    Ok(all)
}

/// The bucket of the k-th largest, and how many of that bucket are among the k.
fn kth(counts: &[u64], k: u64) -> (usize, u64) {
    let mut left = k;
    for (bucket, count) in counts.iter().enumerate().rev() {
        if *count >= left {
            return (bucket, left);
        }
        left -= count;
    }
    (0, left)
}

/// How many places of each ranking have each bucket.
fn count(
    group: &Group,
    wanted: &[usize],
    rank: &impl Ranked,
    bucket: impl Fn(usize, u32) -> Option<u32> + Send + Sync,
) -> Result<Vec<Vec<u64>>> {
    group
        .counts(wanted.len() * BUCKETS, |chunk, counts, scratch| {
            scratch.resize(chunk.len(), 0.0);
            for (r, counts) in counts.chunks_exact_mut(BUCKETS).enumerate() {
                rank(chunk, r, scratch);
                for x in scratch.iter() {
                    if let Some(c) =
                        bucket(r, magnitude(*x)).and_then(|b| counts.get_mut(b as usize))
                    {
                        *c += 1;
                    }
                }
            }
        })
        .map(|counts| counts.chunks(BUCKETS).map(<[u64]>::to_vec).collect())
}

/// How many numbers of exactly these bits come before each piece.
fn before(group: &Group, r: usize, rank: &impl Ranked, bits: u32) -> Result<Vec<u64>> {
    let mut total = 0;
    let counts = group.each(|chunk| {
        let mut values = vec![0.0; chunk.len()];
        rank(chunk, r, &mut values);
        Ok(values.iter().filter(|x| magnitude(**x) == bits).count() as u64)
    })?;
    Ok(counts
        .into_iter()
        .map(|n| {
            total += n;
            total - n
        })
        .collect())
}

fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7FFF_FFFF
}

impl Largest {
    /// The smallest magnitude that is among them.
    pub fn least(&self) -> f32 {
        f32::from_bits(self.bits)
    }

    /// Sets to 0 what is not among them. The values are those of one piece, as they were ranked.
    pub fn keep(&self, chunk: &Chunk, values: &mut [f32]) {
        if self.before.is_empty() && !self.none {
            let least = self.bits;
            values.iter_mut().for_each(|x| *x = if magnitude(*x) >= least { *x } else { 0.0 });
            return;
        }
        let among = self.among(chunk, values);
        values.iter_mut().zip(among).filter(|(_, among)| !among).for_each(|(x, _)| *x = 0.0);
    }

    /// Which values of a piece are among them.
    pub fn among(&self, chunk: &Chunk, values: &[f32]) -> Vec<bool> {
        if self.none {
            return vec![false; values.len()];
        }
        if self.before.is_empty() {
            return values.iter().map(|x| magnitude(*x) >= self.bits).collect();
        }
        let mut equal = self.before.get(chunk.index).copied().unwrap_or_default();
        let one = |x: &f32| {
            let bits = magnitude(*x);
            if bits != self.bits {
                return bits > self.bits;
            }
            equal += 1;
            self.taken.contains(&(equal - 1))
        };
        values.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use modl_core::Seed;
    use proptest::prelude::*;

    use super::*;
    use crate::merge::Input;

    proptest! {
        /// A stable sort is the reference.
        #[test]
        fn selection_is_what_a_stable_sort_gives(
            values in prop::collection::vec(-4i8..4, 1..300),
            k in 0usize..300,
            last in any::<bool>(),
        ) {
            // Few different values, so that there are many ties.
            let values: Vec<f32> = values.iter().map(|v| f32::from(*v) * 0.37).collect();
            let shape = [values.len()];
            let inputs = vec![Input { model: "m", elements: &values }];
            let group = Group::new("t", &shape, inputs, Seed(0));
            let ties = if last { Ties::Last } else { Ties::First };
            let rank = |c: &Chunk, _: usize, out: &mut [f32]| out.copy_from_slice(c.of(0));
            let found = largest(&group, &[k], ties, rank).unwrap();

            let k = k.min(values.len());
            let mut order: Vec<usize> = (0..values.len()).collect();
            if last {
                order.sort_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs()));
                order.reverse();
            } else {
                order.sort_by(|a, b| values[*b].abs().total_cmp(&values[*a].abs()));
            }
            let mut expected = vec![0.0; values.len()];
            order[..k].iter().for_each(|i| expected[*i] = values[*i]);
            let mut kept = group.each(|c| {
                let mut v = c.of(0).to_vec();
                found[0].keep(c, &mut v);
                Ok(v)
            }).unwrap();
            prop_assert_eq!(kept.remove(0), expected);
        }
    }
}
