//! Less padding within a batch: its rows in groups of similar length, each with its own padding.
//!
//! A batch of n rows costs n times its longest row. Cut into groups, it costs the sum of
//! (rows + overhead) · longest over the groups; the cut with the lowest cost is found by dynamic
//! programming over the rows in the order of their lengths. The loss is the mean over all rows as
//! before, so that gradients are equal up to rounding.

use std::borrow::Cow;

use modl_core::{Kind, Result};

use crate::Batch;

/// What a further pass through the model costs beside its rows, in rows of the group's length.
const OVERHEAD: usize = 4;

/// The rows of a batch in groups of similar length, as indices; one group where a cut does not
/// pay. `lengths` are the numbers of real tokens.
///
/// ```
/// use modl_train::length_groups;
/// assert_eq!(length_groups(&[9, 100, 8, 95]), [vec![2, 0], vec![3, 1]]);
/// assert_eq!(length_groups(&[10, 10, 11]).len(), 1);
/// ```
pub fn length_groups(lengths: &[usize]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|i| (lengths[*i], *i));
    // best[n]: the lowest cost of the n shortest rows, and where their last group starts.
    let mut best = vec![(0usize, 0usize)];
    for end in 1..=order.len() {
        let longest = lengths[order[end - 1]];
        let cost = |start: usize| best[start].0 + (end - start + OVERHEAD) * longest;
        let start = (0..end).min_by_key(|s| cost(*s)).unwrap_or(0);
        best.push((cost(start), start));
    }
    let mut groups = Vec::new();
    let mut end = order.len();
    while end > 0 {
        let start = best[end].1;
        groups.push(order[start..end].to_vec());
        end = start;
    }
    groups.reverse();
    groups
}

impl Batch {
    /// The batch in groups of similar length ([`length_groups`]), each filled up to its own longest
    /// row; itself alone where it has no tokens. Rows are expected to have their padding at the end.
    ///
    /// # Errors
    /// Where an input does not have the batch's rows.
    pub fn by_length(&self) -> Result<Vec<Batch>> {
        let Some(lengths) = self.lengths()? else { return Ok(vec![self.clone()]) };
        let groups = length_groups(&lengths);
        if groups.len() <= 1 {
            return Ok(vec![self.clone()]);
        }
        groups.iter().map(|rows| self.rows_filled(rows, Some(&lengths))).collect()
    }

    /// The batch in `n` parts of consecutive rows, as equal in number as can be, each filled up to its
    /// own longest row. Where there are fewer rows there are fewer parts.
    pub(crate) fn in_parts(&self, n: u64) -> Result<Cow<'_, [Batch]>> {
        let (rows, n) = (self.len(), (n as usize).clamp(1, self.len().max(1)));
        if n == 1 {
            return Ok(Cow::Borrowed(std::slice::from_ref(self)));
        }
        let lengths = self.lengths()?;
        let part = |i: usize| {
            let own: Vec<usize> = (i * rows / n..(i + 1) * rows / n).collect();
            self.rows_filled(&own, lengths.as_deref())
        };
        (0..n).map(part).collect::<Result<_>>().map(Cow::Owned)
    }

    /// All rows, filled up to the longest of them.
    pub(crate) fn trimmed(&self) -> Result<Batch> {
        let all: Vec<usize> = (0..self.len()).collect();
        self.rows_filled(&all, self.lengths()?.as_deref())
    }

    /// The real tokens of each row; `None` where there are no tokens.
    fn lengths(&self) -> Result<Option<Vec<usize>>> {
        let Some(mask) = self.inputs.get("attention_mask") else { return Ok(None) };
        let lengths = mask.sum_dims(&[1], false)?.to_vec::<i64>()?;
        Ok(Some(lengths.iter().map(|n| *n as usize).collect()))
    }

    /// Some rows, filled up to the longest of them.
    fn rows_filled(&self, rows: &[usize], lengths: Option<&[usize]>) -> Result<Batch> {
        let all = self.rows(rows)?;
        let (Some(lengths), Some(mask)) = (lengths, self.inputs.get("attention_mask")) else {
            return Ok(all);
        };
        let longest = rows.iter().filter_map(|r| lengths.get(*r)).max().copied().unwrap_or(0);
        let width = mask.len_of(1);
        // Dense inputs are floats.
        let inputs = all.inputs.map(|_, t| match t.kind() {
            Kind::Int64 if t.dim() == 2 && t.len_of(1) == width => t.narrow(1, 0, longest as i64),
            _ => Ok(t.clone()),
        })?;
        Ok(Batch { inputs, ..all })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modl_core::{Device, Tensor};
    use proptest::prelude::*;

    fn cost(groups: &[Vec<usize>], lengths: &[usize]) -> usize {
        let longest = |g: &Vec<usize>| g.iter().map(|i| lengths[*i]).max().unwrap_or(0);
        groups.iter().map(|g| (g.len() + OVERHEAD) * longest(g)).sum()
    }

    proptest! {
        #[test]
        fn groups_are_a_partition_and_no_cut_of_the_sorted_rows_is_cheaper(
            lengths in prop::collection::vec(1usize..60, 1..10)
        ) {
            let groups = length_groups(&lengths);
            let mut all: Vec<usize> = groups.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            // Every way to cut, one bit for each gap.
            let mut order: Vec<usize> = (0..lengths.len()).collect();
            order.sort_by_key(|i| lengths[*i]);
            for cuts in 0..1u32 << (lengths.len() - 1) {
                let mut other = vec![vec![order[0]]];
                for (gap, row) in order.iter().skip(1).enumerate() {
                    match cuts >> gap & 1 {
                        1 => other.push(vec![*row]),
                        _ => other.last_mut().unwrap().push(*row),
                    }
                }
                prop_assert!(cost(&groups, &lengths) <= cost(&other, &lengths));
            }
        }
    }

    #[test]
    fn a_group_keeps_what_belongs_to_its_rows() {
        let ids = [1i64, 0, 0, 0, 2, 3, 4, 5, 6, 0, 0, 0];
        let mask = ids.map(|i| i64::from(i > 0));
        let tensor = |v: &[i64]| Tensor::from_slice(v, &[3, 4], Device::Cpu).unwrap();
        let words = |w: [&str; 3]| w.map(str::to_owned).to_vec();
        let batch = Batch {
            inputs: modl_core::Tensors::new()
                .with("input_ids", tensor(&ids))
                .with("attention_mask", tensor(&mask))
                .with("pixel_values", tensor(&ids).to_kind(Kind::Float).unwrap()),
            targets: Tensor::from_slice(&[0.0f32, 1.0, 2.0], &[3], Device::Cpu).unwrap(),
            tasks: words(["a", "b", "c"]),
            ids: words(["x", "y", "z"]),
            features: modl_core::Tensors::new(),
        };
        let [short, long] = <[Batch; 2]>::try_from(batch.by_length().unwrap()).unwrap();
        let ids = |b: &Batch| b.inputs.need("input_ids").unwrap().to_vec::<i64>().unwrap();
        assert_eq!((ids(&short), ids(&long)), (vec![1, 6], vec![2, 3, 4, 5]));
        let pixels = long.inputs.need("pixel_values").unwrap().to_vec::<f32>().unwrap();
        assert_eq!(pixels, [2.0, 3.0, 4.0, 5.0]);
        let pixels = short.inputs.need("pixel_values").unwrap().size();
        assert_eq!(pixels, [2, 4], "a dense input has no padding to lose");
        assert_eq!(short.targets.to_vec::<f32>().unwrap(), [0.0, 2.0]);
        assert_eq!(
            (short.tasks, short.ids, long.ids),
            (
                vec!["a".to_owned(), "c".into()],
                vec!["x".to_owned(), "z".into()],
                vec!["y".to_owned()],
            )
        );
    }
}
