//! The parts of a step's loss, weighed and added up.

use modl_core::Result;

use crate::StepLoss;

impl StepLoss {
    /// `factor` times all of it.
    ///
    /// # Errors
    /// Where libtorch refuses it.
    pub fn times(mut self, factor: f64) -> Result<StepLoss> {
        self.loss = self.loss.mul_scalar(factor)?;
        self.total = self.total.mul_scalar(factor)?;
        self.aux.values_mut().for_each(|v| *v *= factor);
        self.passed.iter_mut().for_each(|p| p.counts *= factor);
        Ok(self)
    }

    /// The sum of what there is so far, if anything, and this part of a step.
    pub(crate) fn after(self, sum: Option<StepLoss>) -> Result<StepLoss> {
        match sum {
            Some(sum) => sum.and(self),
            None => Ok(self),
        }
    }

    /// The sum of two parts of a step.
    ///
    /// # Errors
    /// Where they are not of one kind and place.
    pub fn and(mut self, other: StepLoss) -> Result<StepLoss> {
        self.loss = self.loss.add(&other.loss)?;
        self.total = self.total.add(&other.total)?;
        other.aux.into_iter().for_each(|(name, v)| *self.aux.entry(name).or_default() += v);
        self.passed.extend(other.passed);
        Ok(self)
    }
}
