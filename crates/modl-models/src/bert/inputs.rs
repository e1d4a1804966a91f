//! What BERT checks of its inputs, so that nothing reaches libtorch out of range.

use modl_core::{Error, Kind, Result, Tensor};

use super::Bert;
use crate::ids::{check_shape, in_range};

impl Bert {
    /// Checks `input_ids`.
    pub(super) fn check_ids(&self, ids: &Tensor) -> Result<()> {
        check_shape("input_ids", ids)?;
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

    /// RoBERTa's positions `[batch, seq]`: padding has that of its id, the others count on from
    /// there. `None` where positions are 0, 1, ….
    pub(super) fn count_positions(&self, ids: &Tensor) -> Result<Option<Tensor>> {
        let Some(padding) = self.settings.padding() else { return Ok(None) };
        let real = ids.eq_scalar(padding as f64)?.eq_scalar(0.0)?.to_kind(Kind::Int64)?;
        real.cumsum(1)?.mul(&real)?.shift(padding).map(Some)
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
