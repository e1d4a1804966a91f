//! Magnitude pruning and lottery tickets: θ' = m ⊙ w.
//!
//! w starts at θ and is trained. After each round the smallest |w| of what is left are masked out,
//! for good, and w goes back to what it was at the start or a little later (rewinding); after the
//! last round the ticket is trained. One round without rewinding is plain magnitude pruning,
//! several are gradual pruning.
//!
//! Frankle and Carbin 2019, *The Lottery Ticket Hypothesis*, arXiv 1803.03635; rewinding to a later
//! step: Frankle et al. 2020, *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, arXiv
//! 1912.05671. Survey §3.1, parameter composition.

use modl_core::{
    Attachment, Error, Module, ModuleConfig, ParamStore, Result, Scope, Step, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::full::{Form, effective, learned};
use super::masked::{MASK, names_of, open_mask, part};
use super::top_k::{share, top_k, top_k_across};

/// What is trained, and what it goes back to.
const TRAINED: &str = "trained";
const START: &str = "start";

/// Configuration of lottery tickets at sites with a `weight`. Weights are pruned; biases are
/// trained and go back with them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LotteryTicket {
    /// The share of the weights left that each round prunes, in (0, 1); default 0.2. After r rounds
    /// ⌊(1 − this)^r · n⌋ of n are left.
    pub prune: f64,
    /// The number of rounds, at least 1; default 1. Rounds and the last training share the steps
    /// evenly.
    pub rounds: u64,
    /// Whether w, and with it the state of the optimiser, goes back after each round; default true.
    pub rewind: bool,
    /// w goes back to what it was after so many steps; default 0, which is θ. It has to be before
    /// the first round ends.
    pub rewind_to: u64,
    /// Whether all sites are ranked together instead of each by itself; default false. A site can
    /// lose all of its weights then.
    pub across: bool,
}

impl Default for LotteryTicket {
    fn default() -> Self {
        LotteryTicket { prune: 0.2, rounds: 1, rewind: true, rewind_to: 0, across: false }
    }
}

impl LotteryTicket {
    /// The step after which round `r` of `rounds` ends.
    fn end_of(&self, r: u64, total: u64) -> u64 {
        total * r / (self.rounds + 1)
    }

    fn prune(&self, params: &ParamStore, round: u64) -> Result<()> {
        let (masks, trained) = (part(params, MASK), part(params, TRAINED));
        // What is pruned already comes last.
        let scores = masks.map(|key, m| {
            let size = trained.need(key)?.abs()?;
            size.where_else(m, &size.ones_like()?.neg()?)
        })?;
        let left = (1.0 - self.prune).powi(round as i32);
        let kept = if self.across {
            top_k_across(&scores, share(left, scores.iter().map(|(_, t)| t.numel()).sum()))?
        } else {
            scores.map(|_, s| top_k(s, share(left, s.numel())))?
        };
        for (key, mask) in masks.iter() {
            mask.clone().copy_from(&kept.need(key)?.mul(mask)?)?;
        }
        if self.rewind {
            copy_all(&trained, &part(params, START))?;
        }
        Ok(())
    }
}

fn copy_all(to: &Tensors, from: &Tensors) -> Result<()> {
    to.iter().try_for_each(|(key, t)| t.clone().copy_from(from.need(key)?))
}

impl ModuleConfig for LotteryTicket {
    fn kind(&self) -> &'static str {
        "lottery_ticket"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if !(self.prune > 0.0 && self.prune < 1.0) {
            let problem = format!("is {}, wants a share between 0 and 1", self.prune);
            return Err(Error::invalid("lottery_ticket.prune", problem));
        }
        if self.rounds == 0 {
            return Err(Error::invalid("lottery_ticket.rounds", "is 0, wants at least 1"));
        }
        let weight = learned(at, |name| name == "weight")?;
        let theta = learned(at, |_| true)?;
        let mut places = scope.sub(TRAINED);
        let trained = theta.map(|name, t| places.param_from(name, t))?;
        let kind = scope.kind();
        let mut places = scope.sub(START);
        theta.iter().try_for_each(|(n, t)| places.buffer(n, &t.to_kind(kind)?).map(drop))?;
        Ok(Box::new(Ticket { trained, mask: open_mask(&weight, scope)? }))
    }

    fn after_step(&self, params: &ParamStore, step: &Step) -> Result<()> {
        if self.rewind && self.rewind_to > 0 {
            if self.rewind_to >= self.end_of(1, step.total) {
                let end = self.end_of(1, step.total);
                let problem = format!(
                    "is {}, but the first of {} rounds ends after {end} of {} steps",
                    self.rewind_to, self.rounds, step.total
                );
                return Err(Error::invalid("lottery_ticket.rewind_to", problem));
            }
            if step.done == self.rewind_to {
                copy_all(&part(params, START), &part(params, TRAINED))?;
            }
        }
        let ends = |r: &u64| step.done == self.end_of(*r, step.total);
        match (1..=self.rounds).rev().find(ends) {
            Some(round) => {
                self.prune(params, round)?;
                if self.rewind {
                    names_of(params, TRAINED).into_iter().for_each(|name| step.restart(name));
                }
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// m ⊙ w at one site.
#[derive(Debug)]
struct Ticket {
    /// By θ's names.
    trained: Tensors,
    /// Bool, of `weight` alone.
    mask: Tensors,
}

impl Ticket {
    /// What the mask leaves of the parameter `own` of that name.
    fn left(&self, name: &str, own: &Tensor) -> Result<Tensor> {
        match self.mask.get(name) {
            Some(mask) => own.where_else(mask, &Tensor::zeros(&[1], own.kind(), own.device())?),
            None => Ok(own.clone()),
        }
    }
}

impl Module for Ticket {
    fn kind(&self) -> &'static str {
        "lottery_ticket"
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let mut all = theta.clone();
        for (name, own) in self.trained.iter() {
            let left = self.left(name, own)?;
            all.set(name.to_owned(), left.to_kind(theta.need(name)?.kind())?);
        }
        Ok(Some(all))
    }

    /// m ⊙ w: masks of modules that are averaged may differ.
    fn phi(&self) -> Tensors {
        // Where it fails `with_phi` misses the names.
        self.trained.map(|name, own| self.left(name, own)).unwrap_or_default()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        effective(self.kind(), Form::Copy, &self.trained, phi)
    }
}
