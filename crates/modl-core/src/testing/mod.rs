//! The testing kit: the contract that every module, router and aggregator passes, for modl's own
//! methods and for yours.
//!
//! ```no_run
//! # use modl_core::{testing, Registry, RouterConfig};
//! # fn my_router() -> Box<dyn RouterConfig> { todo!() }
//! // In a test of your router crate:
//! let registry = Registry::new(); // .with(register)
//! testing::check_router(&my_router, &testing::RouterClaims::soft(), &registry);
//! ```
//!
//! The checks run on [`TinyBackbone`], which has a site of every kind, and panic with all that is
//! wrong. [`standins`] are minimal methods of every family of the survey.

mod aggregator_laws;
mod backbone;
mod given;
mod module_contract;
mod router_claims;
mod router_laws;
pub mod standins;

pub use aggregator_laws::{AggregatorClaims, check_aggregator};
pub use backbone::TinyBackbone;
pub use given::{Given, PlainSum, Sum};
pub use module_contract::{Identity, ModuleClaims, check_module};
pub use router_claims::RouterClaims;
pub use router_laws::check_router;

use crate::{Init, Modular, Result, Seed, Select, Tensor, no_grad};

/// Adds normal noise to all selected parameters, so that nothing tested is zero by chance.
pub fn perturb(model: &Modular, select: &Select, std: f64, seed: Seed) -> Result<()> {
    for (name, p) in model.params().iter().filter(|(n, p)| !p.is_buffer() && select.matches(n)) {
        let t = p.tensor();
        let noise = Init::Normal(std).tensor(&t.size(), seed.child(name), t.kind(), t.device())?;
        no_grad(|| t.clone().add_in_place(&noise))?;
    }
    Ok(())
}

/// Some fixed numbers of `shape` in the kind and on the device of `like`.
pub(crate) fn noise_like(shape: &[i64], like: &Tensor, seed: Seed) -> Result<Tensor> {
    Init::Normal(1.0).tensor(shape, seed, like.kind(), like.device())
}

/// The findings of a check: all of them, so that one run shows the whole state.
#[derive(Default)]
pub(crate) struct Findings(Vec<String>);

impl Findings {
    pub(crate) fn expect(&mut self, law: &str, holds: Result<bool>) {
        match holds {
            Ok(true) => {}
            Ok(false) => self.0.push(law.to_owned()),
            Err(e) => self.0.push(format!("{law}: {e}")),
        }
    }

    /// Panics with everything that was found.
    #[allow(clippy::panic)]
    pub(crate) fn conclude(self, what: &str) {
        if !self.0.is_empty() {
            panic!("{what} breaks {} of its laws:\n  {}", self.0.len(), self.0.join("\n  "));
        }
    }
}
