//! Modular networks: a controller whose choices are latent, trained by expectation maximisation.
//!
//! p(y | x) = Σₐ p(a | x) p(y | x, a) with p(a | x) = softmax(ℓ), a module for each row or token.
//! Generalised Viterbi EM: the partial E-step draws S assignments from the controller and takes for
//! each row a* = the one with the largest ln p(y | x, a) + ln p(a | x); the M-step is a step on
//! −ln p(y | x, a*) − ln p(a* | x). No balance is asked for: what explains a row better gets it.
//!
//! In a recipe the S draws are passes of which the best is taken, and the second term is the loss
//! `controller`, which counts 1 unless a recipe says otherwise:
//!
//! ```toml
//! router = { type = "modular_network" }
//! passes = { count = 10, combine = "best" }
//! ```
//!
//! The loss of a row has to be in nats, as a cross entropy is. Squared errors that are small beside
//! ln p(a | x) leave the controller to its own preferences, and it goes to one module: scale them.
//!
//! With a single pass there is nothing to take the best of (E ∇ln p(a | x) = 0 for an a of its own
//! drawing), and so it is refused. In the paper a row also keeps the best assignment that it has had
//! ([`keep_better`]): so do examples with `passes = { count = 10, combine = "best", keep = true }`, where
//! what is kept is tried again in a pass of its own, in each step under the parameters as they are then.
//! (Rows have one, tokens do not.) In evaluation α = onehot(argmax ℓ).
//!
//! Kirsch, Kunze, Barber 2018, *Modular networks: learning to decompose neural computation*,
//! arXiv 1811.05249; survey §4.2.2.

use modl_core::{
    ASSIGNED, Bank, Context, Error, Outcome, Result, Router, RouterConfig, Routing, Scope, Signal,
    Site, Tensor,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::policy::{Policy, mean_of_rows, per_row};
use crate::Scores;

/// Draws from a controller that learns the best of several draws.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModularNetwork {
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl RouterConfig for ModularNetwork {
    fn kind(&self) -> &'static str {
        "modular_network"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let policy = Policy::build(&self.scores, self.seed, "modular_network", site, bank, scope)?;
        Ok(Box::new(ModularNetworkRouter(policy)))
    }
}

#[derive(Debug)]
struct ModularNetworkRouter(Policy);

impl Router for ModularNetworkRouter {
    fn kind(&self) -> &'static str {
        "modular_network"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("controller", 1.0)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        match cx.train {
            true => {
                let kept = format!("{ASSIGNED}{}", self.0.path());
                let drawn = self.0.draw(x, cx)?.or_kept(cx.find(&kept))?;
                let routing = drawn.routing(bank.len())?;
                Ok(match drawn.index.dim() {
                    2 => routing.note(kept, drawn.index),
                    _ => routing,
                })
            }
            false => self.0.mode(x, bank, cx),
        }
    }

    fn credit(&self, routing: &Routing, outcome: &Outcome) -> Result<Option<(String, Tensor)>> {
        if outcome.chosen.is_none() {
            return Err(Error::unsupported(
                "a `modular_network` router with one pass of a batch",
                "say passes = { count = 10, combine = \"best\" }",
            ));
        }
        let log_prob = per_row(routing.noted.need("log_prob")?)?;
        Ok(Some(("controller".into(), mean_of_rows(&log_prob.neg()?, outcome)?)))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(ModularNetworkRouter(self.0.grown(modules, scope)?)))
    }
}

/// The partial E-step: for each of n rows the best of the assignment that it has and of S that were
/// drawn. `stored` is `[n, sites]` and `drawn` `[S, n, sites]`, the module of each site; their scores
/// `[n]` and `[S, n]` are ln p(y | x, a) + ln p(a | x) under the same parameters. Gives assignments
/// and scores of the same shapes as the stored ones. No score falls, and where all assignments are
/// given the result is that of hard EM. Of equal ones the stored one stays.
///
/// # Errors
/// Where shapes do not fit, or a score is NaN or infinite.
pub fn keep_better(
    stored: (&Tensor, &Tensor),
    drawn: (&Tensor, &Tensor),
) -> Result<(Tensor, Tensor)> {
    let (n, sites, s) = (stored.0.len_of(0), stored.0.len_of(1), drawn.0.len_of(0));
    for (what, found, wanted) in [
        ("stored assignments", stored.0, vec![n, sites]),
        ("scores of stored assignments", stored.1, vec![n]),
        ("drawn assignments", drawn.0, vec![s, n, sites]),
        ("scores of drawn assignments", drawn.1, vec![s, n]),
    ] {
        if found.size() != wanted {
            return Err(Error::invalid(what, format!("are {found:?}, not {wanted:?}")));
        }
    }
    let scores = Tensor::cat(&[stored.1.unsqueeze(0)?, drawn.1.clone()], 0)?.detach()?; // [1 + s, n]
    scores.check_finite("scores of assignments")?;
    let all = Tensor::cat(&[stored.0.unsqueeze(0)?, drawn.0.clone()], 0)?;
    let best = scores.argsort(0, true)?.narrow(0, 0, 1)?; // stable: the stored one is the first
    let at = best.unsqueeze(-1)?.expand(&[1, n, sites])?;
    Ok((all.gather(0, &at)?.squeeze(0)?, scores.gather(0, &best)?.squeeze(0)?))
}
