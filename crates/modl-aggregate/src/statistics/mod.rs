//! What some methods of merging ask for beside the models, measured on data: files of tensors that go
//! by the names of the model's own.

mod fisher;
mod gram;

pub use fisher::{diagonal_fisher, normalized};
pub use gram::gram;

use std::collections::HashMap;
use std::path::Path;

use modl_core::{Result, Tensors, checkpoint};

use crate::merge::Statistics;

/// Writes what [`diagonal_fisher`] or [`gram`] gave beside a model, under the name that a merge looks
/// for.
///
/// # Errors
/// Where the disk refuses.
pub fn save(kind: Statistics, folder: impl AsRef<Path>, found: &Tensors) -> Result<()> {
    checkpoint::save(folder.as_ref().join(kind.file()), found.iter(), HashMap::new())
}
