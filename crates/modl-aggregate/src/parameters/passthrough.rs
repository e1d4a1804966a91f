//! One model's tensors as they are, or scaled: what puts slices of models one after the other.

use modl_core::Result;

use super::combination::combination;
use crate::merge::{Blend, Group, MergeMethod, Setting, Settings, Spec};

/// s θ.
#[derive(Debug, Clone, Copy, Default)]
pub struct Passthrough;

const SETTINGS: &[Setting] = &[Setting::each_or("scale", 1.0, "factor of the tensor")];

impl MergeMethod for Passthrough {
    fn spec(&self) -> Spec {
        Spec::new("passthrough", "One model as it is", "mergekit").settings(SETTINGS).models(1..=1)
    }

    fn prepare<'a>(&self, _: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        Ok(combination(&settings.each("scale")?, 1.0))
    }
}
