//! What a hypernetwork generates from: z, put together from what the context says of a row and
//! from where the site is.

use modl_core::{Context, Error, Result, Tensor, Tensors};
use serde::{Deserialize, Serialize};

/// What tells rows apart. In text, a list of names or a table with `feature` and `width`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Condition {
    /// Each row has one of these names ([`Context::labels`]), and each name a learned embedding.
    Names(Vec<String>),
    /// Each row has a vector of its own ([`Context::feature`]), for instance of a language's
    /// typology. The initial scale of what is generated is right for a mean square of 1.
    Feature {
        /// The feature's name.
        feature: String,
        /// The number of its columns.
        width: i64,
    },
}

impl Default for Condition {
    /// No names, which is refused: there is no telling what a user's tasks are called.
    fn default() -> Self {
        Condition::Names(Vec::new())
    }
}

impl Condition {
    /// Those names.
    pub fn names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Condition::Names(names.into_iter().map(Into::into).collect())
    }

    /// That feature of so many columns.
    pub fn feature(feature: impl Into<String>, width: i64) -> Self {
        Condition::Feature { feature: feature.into(), width }
    }
}

/// A part of z.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// The row of a table that belongs to a row's label.
    Label { kind: String, names: Vec<String>, table: String },
    /// A row's feature as it is.
    Feature { name: String, width: i64 },
    /// A row of a table, the same for all rows of the batch: the site's.
    Site { table: String, row: i64 },
}

/// Rows that have one z `[1, width]`.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) rows: Vec<i64>,
    pub(super) z: Tensor,
}

impl Source {
    fn by_row(&self) -> bool {
        !matches!(self, Source::Site { .. })
    }

    /// For each row of the batch, something that is equal where z is.
    fn keys(&self, cx: &Context) -> Result<Option<Vec<Vec<u64>>>> {
        Ok(match self {
            Source::Site { .. } => None,
            Source::Label { kind, names, .. } => {
                let key = |label: &std::sync::Arc<str>| {
                    let at = names.iter().position(|n| **n == **label);
                    at.map(|at| vec![at as u64]).ok_or_else(|| Error::unknown(kind, label, names))
                };
                Some(cx.labels(kind)?.iter().map(key).collect::<Result<_>>()?)
            }
            Source::Feature { name, width } => {
                let rows = cx.feature(name)?;
                if rows.dim() != 2 || rows.len_of(1) != *width {
                    let problem = format!("is {rows:?}, wants {width} numbers for each row");
                    return Err(Error::invalid(format!("feature `{name}`"), problem));
                }
                let bits: Vec<u64> = rows.to_vec::<f64>()?.iter().map(|v| v.to_bits()).collect();
                let width = (*width).max(1) as usize;
                Some(bits.chunks(width).map(<[u64]>::to_vec).collect())
            }
        })
    }

    /// This part of the z of `row`, `[1, width]`, where `key` is that row's.
    fn vector(&self, key: &[u64], row: i64, eta: &Tensors, cx: &Context) -> Result<Tensor> {
        match (self, key) {
            (Source::Label { table, .. }, [at, ..]) => eta.need(table)?.narrow(0, *at as i64, 1),
            (Source::Site { table, row }, _) => eta.need(table)?.narrow(0, *row, 1),
            (Source::Feature { name, .. }, _) => cx.feature(name)?.narrow(0, row, 1),
            (Source::Label { kind, .. }, []) => Err(Error::invalid(kind, "has no row")),
        }
    }
}

/// Whether all rows have one z, whatever the context.
pub(super) fn is_static(sources: &[Source]) -> bool {
    !sources.iter().any(Source::by_row)
}

/// The rows of the batch by their z, in the order of first appearance. A static z has no rows.
///
/// # Errors
/// Where the context does not say what is asked for, or not of the same number of rows.
pub(super) fn groups(
    sources: &[Source],
    eta: &Tensors,
    like: &Tensor,
    cx: &Context,
) -> Result<Vec<Group>> {
    let keys: Vec<_> = sources.iter().map(|s| s.keys(cx)).collect::<Result<_>>()?;
    let mut lengths = keys.iter().flatten().map(Vec::len);
    let rows = lengths.next();
    if let (Some(rows), Some(other)) = (rows, lengths.find(|n| Some(*n) != rows)) {
        let problem = format!("speaks of {rows} rows in one place and of {other} in another");
        return Err(Error::invalid("context", problem));
    }
    let key = |source: &Option<Vec<Vec<u64>>>, row: usize| -> Vec<u64> {
        source.as_ref().and_then(|rows| rows.get(row)).cloned().unwrap_or_default()
    };
    let mut found: Vec<(Vec<Vec<u64>>, Vec<i64>)> = Vec::new();
    for row in 0..rows.unwrap_or(0) {
        let own: Vec<Vec<u64>> = keys.iter().map(|source| key(source, row)).collect();
        match found.iter_mut().find(|(k, _)| *k == own) {
            Some((_, members)) => members.push(row as i64),
            None => found.push((own, vec![row as i64])),
        }
    }
    if rows.is_none() {
        found.push((vec![Vec::new(); sources.len()], Vec::new()));
    }
    let group = |(keys, rows): (Vec<Vec<u64>>, Vec<i64>)| {
        let first = rows.first().copied().unwrap_or(0);
        let mut parts = Vec::with_capacity(sources.len());
        for (source, key) in sources.iter().zip(&keys) {
            let part = source.vector(key, first, eta, cx)?;
            parts.push(part.to_kind(like.kind())?.to_device(like.device())?);
        }
        let z = match parts.as_slice() {
            [] => Tensor::zeros(&[1, 0], like.kind(), like.device())?,
            parts => Tensor::cat(parts, 1)?,
        };
        Ok(Group { rows, z })
    };
    found.into_iter().map(group).collect()
}
