//! DELLA: drop numbers of the task vectors at random, small ones rather than large ones.
//!
//! In each row of τᵢ the probability to be kept rises with the rank of the magnitude, from
//! `density − epsilon` to `density + epsilon`; what is kept is rescaled to the L1 norm of the whole; then
//! signs are elected (`della`) or not (`della_linear`) (Deep et al. 2024, arXiv 2406.11617). What is
//! dropped depends on the seed, the tensor's name and the model's place alone.

use modl_core::Result;

use super::sparsity::by_rank;
use super::task_vectors::{
    DENSITY, Divisor, Election, INT8_MASK, LAMBDA, Rescale, TaskVectors, WEIGHT, normalize,
    rescale, sparse,
};
use crate::merge::{Base, Blend, Group, MergeMethod, Setting, Settings, Spec};

/// Drop small numbers rather than large ones.
#[derive(Debug, Clone, Copy)]
pub struct Della {
    /// Whether signs are elected.
    pub ties: bool,
}

const EPSILON: Setting =
    Setting::each_or("epsilon", 0.15, "how far probabilities differ from the density");

impl MergeMethod for Della {
    fn spec(&self) -> Spec {
        const TIES: &[Setting] =
            &[WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(true), rescale(true), INT8_MASK];
        const LINEAR: &[Setting] =
            &[WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(false), rescale(true), INT8_MASK];
        let (name, title, settings) = match self.ties {
            true => ("della", "Drop by rank, then elect signs", TIES),
            false => ("della_linear", "Drop by rank, then add", LINEAR),
        };
        Spec::new(name, title, "Deep et al. 2024").settings(settings).base(Base::Required).by_rows()
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let densities = settings.each("density")?;
        let keep = by_rank(group, &densities, &settings.each("epsilon")?)?;
        let kept = sparse(group, keep, Rescale::of(settings)?, &densities)?;
        let election = if self.ties { Election::Weighted } else { Election::None };
        TaskVectors::of(settings, kept, (election, Divisor::of(settings)?))?.blend(group)
    }
}
