//! Nothing is done against forgetting: the lower bound that other methods are measured by.
//! McCloskey and Cohen 1989, *Catastrophic interference in connectionist networks*.

use modl_core::Result;
use serde::Deserialize;

use super::{Continual, Learner};
use crate::Plain;

/// One task after the other, and nothing else.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Naive {}

impl Continual for Naive {
    fn kind(&self) -> &'static str {
        "naive"
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        Ok(Box::new(Plain))
    }
}

impl Learner for Plain {}
