//! A module that is not there: f' = f_θ. It stands at the sites of a method that leaves some of its
//! sites out, and has no parameters.

use modl_core::{Context, Host, Module, Result, Signal, Tensors};

/// Changes nothing.
#[derive(Debug)]
pub(crate) struct Absent;

impl Module for Absent {
    fn kind(&self) -> &'static str {
        "absent"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        f.call(x, cx)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        Ok(Some(theta.clone()))
    }

    fn with_phi(&self, _: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Absent))
    }
}
