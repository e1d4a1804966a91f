//! Taking a [`Tensor`] apart into views. In the backward pass the gradients of the parts are joined,
//! where those of single `narrow`s and `select`s would each be as large as the whole.

use crate::tensor::op_error;
use crate::{Result, Tensor};

impl Tensor {
    /// Parts of these lengths along `dim`, one after the other; together they are self's.
    pub fn split(&self, lengths: &[i64], dim: i64) -> Result<Vec<Tensor>> {
        self.views("split", self.0.f_split_with_sizes(lengths, dim))
    }

    /// All entries along `dim`, which disappears.
    pub fn unbind(&self, dim: i64) -> Result<Vec<Tensor>> {
        self.views("unbind", self.0.f_unbind(dim))
    }

    /// Whether both start at the same place in memory, so that a change of one is one of the other.
    pub fn shares(&self, other: &Tensor) -> bool {
        self.0.data_ptr() == other.0.data_ptr()
    }

    fn views(
        &self,
        op: &'static str,
        result: Result<Vec<tch::Tensor>, tch::TchError>,
    ) -> Result<Vec<Tensor>> {
        let all = result.map_err(|e| op_error(op, &[&self.0], e))?;
        Ok(all.into_iter().map(Tensor).collect())
    }
}
