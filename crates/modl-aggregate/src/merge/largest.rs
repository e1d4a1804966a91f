//! The k largest of many numbers by selection: nothing is sorted, and little is kept.
//!
//! Magnitudes of f32 have the order of their bits. A sample says between which two the k-th is all but
//! certain to lie; one pass counts those above and keeps those between, a few in a hundred, of which the
//! k-th is then selected. Where it does not lie there (the sample was no fair one), two passes count
//! instead: how many have each upper half of the bits, and then each lower half. Either is exact. Among
//! equal magnitudes those are taken that come first (or last), as a stable sort would.

use modl_core::Result;
use rayon::prelude::*;

use super::counting::{BUCKETS, by_counts, sums};
use super::{Chunk, Group};

/// Which numbers are among the k largest.
#[derive(Debug, Clone)]
pub struct Largest {
    /// The bits of the k-th largest magnitude.
    bits: u32,
    /// The equal ones that are among them, by their number in the order of the tensor.
    taken: std::ops::Range<u64>,
    /// How many equal ones come before each piece, and before the end; empty where all are taken.
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

/// Bytes of memory at most for some rankings of so many numbers, beside the pieces that are ranked: a
/// table for each and each thread, or twice what lies between the bounds that a sample gives.
pub(super) fn bytes(len: usize, rankings: usize, threads: usize) -> u64 {
    let tables = 2 * (threads + 1) * BUCKETS * 8;
    let between = (len as f64 * 2.0 * AROUND) as usize * 2 * 4;
    (rankings * (tables + between)) as u64
}

/// What is ranked: writes the magnitudes of a piece, for one of several rankings.
pub trait Ranked: Fn(&Chunk, usize, &mut [f32]) + Send + Sync {}
impl<F: Fn(&Chunk, usize, &mut [f32]) + Send + Sync> Ranked for F {}

/// Numbers of a piece that are in the sample, at least; rows are whole.
const SAMPLED: usize = 512;
/// How far around its place in the sample the k-th is looked for, as a share of all numbers: so much at
/// least, since numbers of one row are alike, so that a sample of rows says less than its size promises,
/// and so many deviations of a place in a sample of n, of which ½ ⁄ √n is the largest.
const AROUND: f64 = 0.02;
const DEVIATIONS: f64 = 4.0;

/// The `k` largest for each of some rankings of a group's places.
///
/// # Errors
/// Where a tensor cannot be read.
pub fn largest(group: &Group, k: &[usize], ties: Ties, rank: impl Ranked) -> Result<Vec<Largest>> {
    let k: Vec<u64> = k.iter().map(|k| (*k).min(group.len()) as u64).collect();
    let mut places = by_sample(group, &k, &rank)?;
    if places.iter().zip(&k).any(|(place, k)| *k > 0 && place.is_none()) {
        places = by_counts(&[group], &k, &|_: &Group, c: &Chunk, r, out: &mut [f32]| {
            rank(c, r, out);
        })?;
    }
    Ok(places.into_iter().map(|place| Largest::of(place, ties)).collect())
}

/// The `k` largest of all groups together, as if they were one after the other; for each group those
/// of each ranking. Little is kept, however large they are, and all is read two or three times.
///
/// # Errors
/// Where a tensor cannot be read.
pub fn largest_over(
    groups: &[&Group],
    k: &[usize],
    ties: Ties,
    rank: impl Fn(&Group, &Chunk, usize, &mut [f32]) + Send + Sync,
) -> Result<Vec<Vec<Largest>>> {
    let len: usize = groups.iter().map(|g| g.len()).sum();
    let k: Vec<u64> = k.iter().map(|k| (*k).min(len) as u64).collect();
    let places = by_counts(groups, &k, &rank)?;
    let all: Vec<Largest> = places.into_iter().map(|place| Largest::of(place, ties)).collect();
    let mut piece = 0;
    let one = |group: &&Group| {
        let pieces = piece..piece + group.chunks();
        piece = pieces.end;
        let own = |largest: &Largest| {
            let before = largest.before.get(pieces.start..=pieces.end);
            let before = before.unwrap_or_default().to_vec();
            Largest { before, ..largest.clone() }
        };
        all.iter().map(own).collect()
    };
    Ok(groups.iter().map(one).collect())
}

/// The k-th largest magnitude.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Kth {
    pub(super) bits: u32,
    /// How many of this magnitude are among the k.
    pub(super) left: u64,
    /// How many there are of this magnitude.
    pub(super) equal: u64,
    /// How many of this magnitude come before each piece, and before the end; empty where all of them
    /// are among the k.
    pub(super) before: Vec<u64>,
}

/// The k-th of each ranking out of those that lie where a sample says that it is; `None` where it does
/// not.
fn by_sample(group: &Group, k: &[u64], rank: &impl Ranked) -> Result<Vec<Option<Kth>>> {
    let sampled = group.sample(SAMPLED, |chunk| {
        let mut values = vec![0.0; chunk.len()];
        let ranked = (0..k.len()).map(|r| {
            rank(chunk, r, &mut values);
            values.iter().map(|x| magnitude(*x)).collect()
        });
        ranked.collect::<Vec<Vec<u32>>>()
    })?;
    let ranges: Vec<(u32, u32)> = ranked(group, k, |r, k| {
        let mut bits: Vec<u32> =
            sampled.iter().filter_map(|s| s.get(r)).flatten().copied().collect();
        let (share, n) = (k as f64 / group.len().max(1) as f64, bits.len() as f64);
        let around = AROUND.max(DEVIATIONS * 0.5 / n.max(1.0).sqrt());
        let mut at = |share: f64| {
            let place = (share * n) as usize;
            let found = (place < bits.len()).then(|| bits.select_nth_unstable_by(place, larger));
            found.map(|(_, found, _)| *found)
        };
        let high = if share < around { None } else { at(share - around) };
        (at(share + around).unwrap_or(0), high.unwrap_or(u32::MAX))
    });
    // Of each piece: how many lie above, and those that lie between.
    let parts = group.each(|chunk| {
        let mut values = vec![0.0; chunk.len()];
        let mut between = vec![0; chunk.len()];
        let one = |(r, (low, high)): (usize, &(u32, u32))| {
            rank(chunk, r, &mut values);
            let (mut above, mut found) = (0, 0);
            let width = high.wrapping_sub(*low);
            // Every number is written where the next one of those between belongs: a branch for the
            // few in a hundred would be guessed wrongly too often.
            for x in &values {
                let bits = magnitude(*x);
                above += u64::from(bits > *high);
                if let Some(next) = between.get_mut(found) {
                    *next = bits;
                }
                found += usize::from(bits.wrapping_sub(*low) <= width);
            }
            (above, between.get(..found).unwrap_or_default().to_vec())
        };
        Ok(ranges.iter().enumerate().map(one).collect::<Vec<_>>())
    })?;
    let found = ranked(group, k, |r, k| {
        let parts = parts.iter().filter_map(|p| p.get(r));
        let above: u64 = parts.clone().map(|(above, _)| above).sum();
        let mut between: Vec<u32> =
            parts.clone().flat_map(|(_, between)| between).copied().collect();
        let left = k.checked_sub(above).filter(|left| *left > 0)?;
        let at = usize::try_from(left - 1).ok().filter(|at| *at < between.len())?;
        let (first, bits, others) = between.select_nth_unstable_by(at, larger);
        let bits = *bits;
        let same = |all: &[u32]| all.iter().filter(|b| **b == bits).count() as u64;
        let left = same(first) + 1;
        let equal = left + same(others);
        let before =
            if left == equal { Vec::new() } else { sums(parts.map(|(_, between)| same(between))) };
        Some(Kth { bits, left, equal, before })
    });
    Ok(found)
}

/// What `work` gives for each ranking: those of a large tensor side by side.
fn ranked<T: Send>(
    group: &Group,
    k: &[u64],
    work: impl Fn(usize, u64) -> T + Send + Sync,
) -> Vec<T> {
    match group.chunks() {
        0 | 1 => k.iter().enumerate().map(|(r, k)| work(r, *k)).collect(),
        _ => k.par_iter().enumerate().map(|(r, k)| work(r, *k)).collect(),
    }
}

/// The order from large to small.
fn larger(a: &u32, b: &u32) -> std::cmp::Ordering {
    b.cmp(a)
}

pub(super) fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7FFF_FFFF
}

impl Largest {
    fn of(place: Option<Kth>, ties: Ties) -> Self {
        let Some(Kth { bits, left, equal, before }) = place else {
            return Largest { bits: 0, taken: 0..0, before: Vec::new(), none: true };
        };
        let taken = match ties {
            Ties::First => 0..left,
            Ties::Last => equal - left..equal,
        };
        Largest { bits, taken, before, none: false }
    }

    /// The smallest magnitude that is among them.
    pub fn least(&self) -> f32 {
        f32::from_bits(self.bits)
    }

    /// The bits from which on all magnitudes of a piece are among them, and no smaller ones; `None` where
    /// only some of equal ones are, so that their order counts.
    fn threshold(&self, piece: usize) -> Option<u32> {
        if self.none {
            return Some(u32::MAX);
        }
        let (Some(from), Some(to)) = (self.before.get(piece), self.before.get(piece + 1)) else {
            return Some(self.bits);
        };
        if from >= to || (self.taken.start <= *from && *to <= self.taken.end) {
            return Some(self.bits);
        }
        (*to <= self.taken.start || self.taken.end <= *from).then_some(self.bits + 1)
    }

    /// Whether the order of a piece's numbers counts.
    pub(crate) fn has_order(&self, piece: usize) -> bool {
        self.threshold(piece).is_none()
    }

    /// Sets to 0 what is not among them. The values are those of one piece, as they were ranked.
    pub fn keep(&self, chunk: &Chunk, values: &mut [f32]) {
        if let Some(least) = self.threshold(chunk.index) {
            values.iter_mut().for_each(|x| *x = if magnitude(*x) >= least { *x } else { 0.0 });
            return;
        }
        let among = self.among(chunk, values);
        values.iter_mut().zip(among).filter(|(_, among)| !among).for_each(|(x, _)| *x = 0.0);
    }

    /// Which values of a piece are among them.
    pub fn among(&self, chunk: &Chunk, values: &[f32]) -> Vec<bool> {
        if let Some(least) = self.threshold(chunk.index) {
            return values.iter().map(|x| magnitude(*x) >= least).collect();
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

    /// The numbers of the first input.
    fn first(_: &Group, c: &Chunk, _: usize, out: &mut [f32]) {
        out.copy_from_slice(c.of(0));
    }

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
            let inputs = vec![Input::new("m", &values)];
            let group = Group::new("t", &shape, inputs, Seed(0));
            let ties = if last { Ties::Last } else { Ties::First };
            let rank = |c: &Chunk, r: usize, out: &mut [f32]| first(&group, c, r, out);
            let found = largest(&group, &[k], ties, rank).unwrap();
            let wanted = [k.min(values.len()) as u64];
            let counted = by_counts(&[&group], &wanted, &first).unwrap();
            prop_assert_eq!(by_sample(&group, &wanted, &rank).unwrap(), counted);

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

    /// Large tensors whose sample is fair, and one that is not: the numbers that come first in each
    /// piece are small.
    #[test]
    fn large_tensors_are_selected_alike_by_sample_and_by_counts() {
        let n = 300_001;
        let fair: Vec<f32> = (0..n).map(|i| ((i * 7919) % 100_003) as f32 - 5e4).collect();
        let small = |(i, x): (usize, &f32)| if i % (1 << 15) < 600 { 0.0 } else { *x };
        let unfair: Vec<f32> = fair.iter().enumerate().map(small).collect();
        for (values, fair) in [(fair, true), (unfair, false)] {
            let shape = [n];
            let inputs = || vec![Input::new("m", &values)];
            let group = Group::new("t", &shape, inputs(), Seed(0));
            let rank = |c: &Chunk, r: usize, out: &mut [f32]| first(&group, c, r, out);
            let mut sorted: Vec<f32> = values.iter().map(|x| x.abs()).collect();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let mut missed = 0;
            for k in [1, 3, 1000, n / 2, n - 1, n] {
                let counted = by_counts(&[&group], &[k as u64], &first).unwrap();
                assert_eq!(f32::from_bits(counted[0].as_ref().unwrap().bits), sorted[k - 1]);
                let sampled = by_sample(&group, &[k as u64], &rank).unwrap();
                missed += usize::from(sampled[0].is_none());
                assert!(sampled == counted || sampled[0].is_none());
                let found = largest(&group, &[k], Ties::First, rank).unwrap();
                assert_eq!(found[0].least(), sorted[k - 1]);
            }
            assert_eq!(missed == 0, fair, "{missed}");
        }
    }
}
