//! Checks of ids, so that nothing reaches libtorch out of range.

use modl_core::{Error, Kind, Result, Tensor};

/// Checks that `ids` are i64 of shape `[batch, seq]`, and not empty.
pub(crate) fn check_shape(what: &str, ids: &Tensor) -> Result<()> {
    let size = ids.size();
    let fits = matches!(size.as_slice(), &[batch, seq] if batch > 0 && seq > 0);
    if fits && ids.kind() == Kind::Int64 {
        return Ok(());
    }
    Err(Error::invalid(what, format!("{ids:?}; wanted are i64 of shape [batch, seq]")))
}

/// The largest of `ids`, which all have to be rows of a table of `rows`.
pub(crate) fn in_range(what: &str, ids: &Tensor, rows: i64) -> Result<i64> {
    let ids = ids.to_vec::<i64>()?;
    match ids.iter().find(|id| !(0..rows).contains(*id)) {
        Some(id) => Err(Error::invalid(what, format!("{id} is not in 0..{rows}"))),
        None => Ok(ids.into_iter().max().unwrap_or(0)),
    }
}
