//! What BERT checks of its inputs, so that nothing reaches libtorch out of range.

use modl_core::{Error, Kind, Result, Tensor};

use super::Bert;

impl Bert {
    /// Checks `input_ids`.
    pub(super) fn check_ids(&self, ids: &Tensor) -> Result<()> {
        let size = ids.size();
        let fits = matches!(size.as_slice(), &[batch, seq] if batch > 0 && seq > 0);
        if !fits || ids.kind() != Kind::Int64 {
            let problem = format!("{ids:?}; wanted are i64 of shape [batch, seq]");
            return Err(Error::invalid("input_ids", problem));
        }
        let longest = self.settings.max_position_embeddings;
        if ids.len_of(1) > longest {
            let problem = format!(
                "{} tokens, but max_position_embeddings is {longest}; cut them when tokenising",
                ids.len_of(1)
            );
            return Err(Error::invalid("input_ids", problem));
        }
        in_range("input_ids", ids, self.settings.vocab_size).map(drop)
    }

    /// Checks `token_type_ids`; `None` where all are 0.
    pub(super) fn read_types(
        &self,
        types: Option<&Tensor>,
        ids: &Tensor,
    ) -> Result<Option<Tensor>> {
        let Some(types) = types else { return Ok(None) };
        if types.size() != ids.size() || types.kind() != Kind::Int64 {
            let problem = format!("{types:?}; wanted are i64 of shape {:?}", ids.size());
            return Err(Error::invalid("token_type_ids", problem));
        }
        let largest = in_range("token_type_ids", types, self.settings.type_vocab_size)?;
        (largest > 0).then(|| types.to_device(ids.device())).transpose()
    }
}

/// The largest of `ids`, which all have to be rows of a table of `rows`.
fn in_range(what: &str, ids: &Tensor, rows: i64) -> Result<i64> {
    let ids = ids.to_vec::<i64>()?;
    match ids.iter().find(|id| !(0..rows).contains(*id)) {
        Some(id) => Err(Error::invalid(what, format!("{id} is not in 0..{rows}"))),
        None => Ok(ids.into_iter().max().unwrap_or(0)),
    }
}
