//! Relative positions (Raffel et al. 2020, arXiv 1910.10683, §2.1): a number for each head and each
//! bucket of distances, added to the attention scores.
//!
//! Half of the buckets are for single distances, the others for ranges that grow as powers up to
//! the largest distance; in the encoder each half of all buckets is for one direction.

use modl_core::{Device, Result, Tensor};

use super::T5Config;

/// How distances are put into buckets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buckets {
    /// Whether keys may also be ahead of the query.
    both_ways: bool,
    count: i64,
    farthest: i64,
}

impl Buckets {
    pub(super) fn new(settings: &T5Config, both_ways: bool) -> Self {
        let count = settings.relative_attention_num_buckets;
        Buckets { both_ways, count, farthest: settings.relative_attention_max_distance }
    }

    /// The bucket of a key that is `ahead` tokens after the query; before it where negative.
    fn of(self, ahead: i64) -> i64 {
        let (count, first, distance) = match self.both_ways {
            true => (self.count / 2, if ahead > 0 { self.count / 2 } else { 0 }, ahead.abs()),
            false => (self.count, 0, (-ahead).max(0)),
        };
        let single = count / 2;
        if distance < single {
            return first + distance;
        }
        // In f32, as the checkpoints were trained.
        let ratio = (self.farthest as f64 / single as f64).ln() as f32;
        let power = (distance as f32 / single as f32).ln() / ratio * (count - single) as f32;
        first + (single + power as i64).min(count - 1)
    }

    /// What is added to the scores of queries over keys by their positions, `[batch, seq]` and
    /// `[batch, keys]` i64: `[batch, heads, seq, keys]` by `table` `[buckets, heads]`.
    pub(super) fn bias(self, table: &Tensor, queries: &Tensor, keys: &Tensor) -> Result<Tensor> {
        let ahead = keys.unsqueeze(1)?.sub(&queries.unsqueeze(2)?)?;
        let reach = ahead.abs()?.largest()?.item()? as i64;
        let buckets: Vec<i64> = (-reach..=reach).map(|ahead| self.of(ahead)).collect();
        let buckets = Tensor::from_slice(&buckets, &[2 * reach + 1], Device::Cpu)?;
        let by_distance = table.embedding(&buckets.to_device(table.device())?)?;
        by_distance.embedding(&ahead.shift(reach)?)?.permute(&[0, 3, 1, 2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where transformers' `_relative_position_bucket` changes, for distances −400 … 400.
    fn changes(buckets: Buckets) -> Vec<(i64, i64)> {
        let all = (-400..=400).map(|ahead| (ahead, buckets.of(ahead)));
        all.fold(Vec::new(), |mut found: Vec<(i64, i64)>, (ahead, bucket)| {
            if found.last().is_none_or(|(_, last)| *last != bucket) {
                found.push((ahead, bucket));
            }
            found
        })
    }

    fn buckets(both_ways: bool, count: i64, farthest: i64) -> Buckets {
        Buckets { both_ways, count, farthest }
    }

    #[test]
    fn the_decoder_only_looks_back() {
        let wanted = [
            (-400, 31),
            (-112, 30),
            (-98, 29),
            (-86, 28),
            (-76, 27),
            (-66, 26),
            (-58, 25),
            (-51, 24),
            (-45, 23),
            (-39, 22),
            (-34, 21),
            (-30, 20),
            (-26, 19),
            (-23, 18),
            (-20, 17),
            (-18, 16),
            (-15, 15),
            (-14, 14),
            (-13, 13),
            (-12, 12),
            (-11, 11),
            (-10, 10),
            (-9, 9),
            (-8, 8),
            (-7, 7),
            (-6, 6),
            (-5, 5),
            (-4, 4),
            (-3, 3),
            (-2, 2),
            (-1, 1),
            (0, 0),
        ];
        assert_eq!(changes(buckets(false, 32, 128)), wanted);
    }

    #[test]
    fn the_encoder_looks_both_ways() {
        let wanted = [
            (-400, 15),
            (-90, 14),
            (-63, 13),
            (-45, 12),
            (-31, 11),
            (-22, 10),
            (-15, 9),
            (-11, 8),
            (-7, 7),
            (-6, 6),
            (-5, 5),
            (-4, 4),
            (-3, 3),
            (-2, 2),
            (-1, 1),
            (0, 0),
            (1, 17),
            (2, 18),
            (3, 19),
            (4, 20),
            (5, 21),
            (6, 22),
            (7, 23),
            (8, 24),
            (12, 25),
            (16, 26),
            (23, 27),
            (32, 28),
            (46, 29),
            (64, 30),
            (91, 31),
        ];
        assert_eq!(changes(buckets(true, 32, 128)), wanted);
    }

    #[test]
    fn odd_numbers_of_buckets_are_rounded_down() {
        let both = [
            (-400, 5),
            (-16, 4),
            (-6, 3),
            (-2, 2),
            (-1, 1),
            (0, 0),
            (1, 7),
            (2, 8),
            (3, 9),
            (7, 10),
            (17, 11),
        ];
        assert_eq!(changes(buckets(true, 13, 37)), both);
        let back = [(-400, 6), (-24, 5), (-12, 4), (-6, 3), (-2, 2), (-1, 1), (0, 0)];
        assert_eq!(changes(buckets(false, 7, 50)), back);
    }
}
