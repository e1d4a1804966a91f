//! Masters in f32 of parameters that have fewer bits: optimisers change the masters, in which small steps
//! add up, and the model computes with them rounded.
//!
//! Micikevicius et al. 2018, *Mixed Precision Training*, arXiv 1710.03740. Parameters in f32 and f64 are
//! their own masters.

use modl_core::{Error, Kind, Result, ResultExt, Tensor, no_grad};

/// What optimisers change, in the order of what is trained.
#[derive(Debug)]
pub(super) struct Masters {
    all: Vec<(String, Tensor)>,
    /// A parameter of the model and its master.
    rounded: Vec<(String, Tensor, Tensor)>,
}

impl Masters {
    /// Those of the trained parameters.
    ///
    /// # Errors
    /// Where one is not made of floating-point numbers.
    pub(super) fn of(params: &[(String, Tensor)]) -> Result<Self> {
        let (mut all, mut rounded) = (Vec::new(), Vec::new());
        for (name, t) in params {
            let master = match t.kind() {
                Kind::Float | Kind::Double => t.clone(),
                Kind::BFloat16 | Kind::Half => {
                    let master = t.detach()?.to_kind(Kind::Float)?;
                    rounded.push((name.clone(), t.clone(), master.clone()));
                    master
                }
                other => {
                    let problem = format!("has numbers of kind {other:?}, which have no gradient");
                    return Err(Error::invalid(format!("trained parameter `{name}`"), problem));
                }
            };
            all.push((name.clone(), master));
        }
        Ok(Masters { all, rounded })
    }

    pub(super) fn all(&self) -> &[(String, Tensor)] {
        &self.all
    }

    /// Gives the model what the masters have come to.
    pub(super) fn round(&self) -> Result<()> {
        let give =
            |(name, t, master): &(String, Tensor, Tensor)| t.clone().copy_from(master).at(name);
        no_grad(|| self.rounded.iter().try_for_each(give))
    }
}
