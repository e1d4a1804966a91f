//! What adapters change at a site.

use modl_core::{Kind, LowRank, Result, Tensor};

/// What one adapter changes at one site: ΔW, and what it adds to the output.
#[derive(Debug, Clone)]
pub struct Change {
    /// ΔW.
    pub weight: Delta,
    /// `[out]`, with the adapter's factor in it.
    pub bias: Option<Tensor>,
}

/// A change of a weight `[out, in]`.
#[derive(Debug, Clone)]
pub enum Delta {
    /// s · B A.
    Product(LowRank),
    /// As it is, where it is no product of thin matrices: DoRA's.
    Whole(Tensor),
}

/// What all adapters of a merge change at one site.
#[derive(Debug, Clone)]
pub struct SiteChanges {
    /// The site's path.
    pub path: String,
    /// One for each adapter; none where it does not stand here, which counts as a change of 0.
    pub changes: Vec<Option<Change>>,
}

impl Delta {
    /// `[out, in]`, in the kind in which it is held.
    ///
    /// # Errors
    /// Where A and B do not fit.
    pub fn whole(&self) -> Result<Tensor> {
        match self {
            Delta::Product(factors) => factors.weight(),
            Delta::Whole(t) => Ok(t.clone()),
        }
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [i64; 2] {
        match self {
            Delta::Product(p) => [p.up.len_of(0), p.down.len_of(1)],
            Delta::Whole(t) => [t.len_of(0), t.len_of(1)],
        }
    }

    /// The most linearly independent rows that it can have.
    pub fn rank(&self) -> i64 {
        match self {
            Delta::Product(p) => p.down.len_of(0),
            Delta::Whole(t) => t.len_of(0).min(t.len_of(1)),
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            Delta::Product(p) => p.up.kind(),
            Delta::Whole(t) => t.kind(),
        }
    }
}

impl SiteChanges {
    /// The changes that are there, with their numbers.
    pub fn present(&self) -> impl Iterator<Item = (usize, &Change)> {
        self.changes.iter().enumerate().filter_map(|(j, c)| Some((j, c.as_ref()?)))
    }
}

/// The kind in which results are held: f64 where an input is, else f32, so that a factor of a half
/// precision is not rounded again.
pub(crate) fn result_kind<'a>(changes: impl IntoIterator<Item = &'a Change>) -> Kind {
    let double = changes.into_iter().any(|c| c.weight.kind() == Kind::Double);
    if double { Kind::Double } else { Kind::Float }
}
