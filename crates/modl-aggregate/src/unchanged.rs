//! What is left where no module is active: f_θ itself.

use modl_core::{Context, Host, Module, Result, Signal, Tensors};

/// h = f_θ(x).
#[derive(Debug)]
pub(crate) struct Unchanged;

impl Module for Unchanged {
    fn kind(&self) -> &'static str {
        "unchanged"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        f.call(x, cx)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        Ok(Some(theta.clone()))
    }
}
