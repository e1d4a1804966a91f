//! The k-th largest by counting: how many numbers have each upper half of the bits, then each lower
//! half. It is exact, takes two passes, and holds a table for each ranking, however many numbers there
//! are.

use modl_core::Result;

use super::largest::{Kth, magnitude};
use super::{Chunk, Group};

/// Buckets of a pass: one for each half of the bits.
pub(super) const BUCKETS: usize = 1 << 16;

/// The k-th of each ranking by counting.
pub(super) fn by_counts(
    groups: &[&Group],
    k: &[u64],
    rank: &(impl Fn(&Group, &Chunk, usize, &mut [f32]) + Send + Sync),
) -> Result<Vec<Option<Kth>>> {
    let upper = count(groups, k.len(), rank, |_, bits| Some(bits >> 16))?;
    let halves = upper.chunks(BUCKETS).zip(k).map(|(counts, k)| (*k > 0).then(|| kth(counts, *k)));
    let halves: Vec<Option<(usize, u64)>> = halves.collect();
    let lower = count(groups, k.len(), rank, |r, bits| {
        let half = halves.get(r).copied().flatten().map(|(half, _)| half as u32);
        (half == Some(bits >> 16)).then_some(bits & 0xFFFF)
    })?;
    let found = halves.into_iter().zip(lower.chunks(BUCKETS)).enumerate();
    let found = found.map(|(r, (half, counts))| {
        let Some((half, left)) = half else { return Ok(None) };
        let (low, left) = kth(counts, left);
        let equal = counts.get(low).copied().unwrap_or_default();
        let bits = (half as u32) << 16 | low as u32;
        let before = if left == equal { Vec::new() } else { before(groups, r, rank, bits)? };
        Ok(Some(Kth { bits, left, equal, before }))
    });
    found.collect()
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

/// How many places of each ranking have each bucket, ranking after ranking.
fn count(
    groups: &[&Group],
    rankings: usize,
    rank: &(impl Fn(&Group, &Chunk, usize, &mut [f32]) + Send + Sync),
    bucket: impl Fn(usize, u32) -> Option<u32> + Send + Sync,
) -> Result<Vec<u64>> {
    let mut all = vec![0; rankings * BUCKETS];
    for group in groups {
        let counts = group.counts(all.len(), |chunk, counts, scratch| {
            scratch.resize(chunk.len(), 0.0);
            for (r, counts) in counts.chunks_exact_mut(BUCKETS).enumerate() {
                rank(group, chunk, r, scratch);
                let buckets = scratch.iter().filter_map(|x| bucket(r, magnitude(*x)));
                for b in buckets {
                    if let Some(c) = counts.get_mut(b as usize) {
                        *c += 1;
                    }
                }
            }
        })?;
        all.iter_mut().zip(counts).for_each(|(a, c)| *a += c);
    }
    Ok(all)
}

/// How many numbers of exactly these bits come before each piece, and before the end.
fn before(
    groups: &[&Group],
    r: usize,
    rank: &(impl Fn(&Group, &Chunk, usize, &mut [f32]) + Send + Sync),
    bits: u32,
) -> Result<Vec<u64>> {
    let mut counts = Vec::new();
    for group in groups {
        counts.extend(group.each(|chunk| {
            let mut values = vec![0.0; chunk.len()];
            rank(group, chunk, r, &mut values);
            Ok(values.iter().filter(|x| magnitude(**x) == bits).count() as u64)
        })?);
    }
    Ok(sums(counts.into_iter()))
}

/// How much comes before each, and before the end.
pub(super) fn sums(counts: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut all = vec![0];
    let mut total = 0;
    all.extend(counts.map(|n| {
        total += n;
        total
    }));
    all
}
