//! PackNet: several tasks in one network, each with weights of its own.
//!
//! An ownership map gives each weight to a task t, or to nobody (0). Task t trains what is free,
//! gives back the smallest share p of it by magnitude, and trains the rest; from then on these
//! weights are fixed. It computes with the weights of the tasks 1 … t: θ' = w where t owns, the
//! earlier tasks' values where they own, and 0 where nobody does.
//!
//! Each task is a module of its own in the same bank. A module holds the map and the earlier
//! values as buffers, which no optimiser touches: earlier tasks stay what they were bit for bit,
//! whatever weight decay or momentum does. Biases, and the gains of normalisations, are trained by
//! the first task, which owns them whole, and are the same for all tasks.
//!
//! Mallya and Lazebnik 2018, *PackNet: Adding Multiple Tasks to a Single Network by Iterative
//! Pruning*, arXiv 1711.05769. Survey §3.1, parameter composition.

use modl_core::{
    Attachment, Error, Kind, Modular, Module, ModuleConfig, ParamStore, Result, Scope, SiteKind,
    Step, Tensor, Tensors, no_grad,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::full::{Form, effective, learned};
use super::masked::part;
use super::top_k::{check_share, share, step_at, top_k};

const OWN: &str = "own";
const OWNER: &str = "owner";
const EARLIER: &str = "earlier";
const WEIGHT: &str = "weight";

/// Configuration of one task of PackNet at sites that have parameters. Attach the first as it is,
/// and further ones with [`pack_next`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PackNet {
    /// t, from 1; default 1.
    pub task: u8,
    /// p, the share of what a task owns at a site that it gives back, in (0, 1]; default 0.5.
    pub prune: f64,
    /// The share of the training steps after which it does so, in (0, 1]; default 0.5. It does so
    /// once.
    pub prune_at: f64,
}

impl Default for PackNet {
    fn default() -> Self {
        PackNet { task: 1, prune: 0.5, prune_at: 0.5 }
    }
}

impl ModuleConfig for PackNet {
    fn kind(&self) -> &'static str {
        "pack_net"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        check_share("pack_net.prune", self.prune)?;
        check_share("pack_net.prune_at", self.prune_at)?;
        if self.task == 0 {
            return Err(Error::invalid("pack_net.task", "is 0, wants at least 1"));
        }
        let theta = learned(at, |_| true)?;
        let norm = matches!(at.site.kind, SiteKind::Norm | SiteKind::BatchNorm);
        let (mut packed, mut whole) = (None, Tensors::new());
        for (name, t) in theta.iter() {
            if name == WEIGHT && !norm {
                let all = f64::from(self.task);
                let owner = Tensor::full(&t.size(), all, Kind::Uint8, t.device())?;
                let own = scope.sub(OWN).param_from(WEIGHT, t)?;
                packed = Some(Packed {
                    task: self.task,
                    owner: scope.sub(OWNER).buffer(WEIGHT, &owner)?,
                    earlier: scope.sub(EARLIER).buffer(WEIGHT, &own.detach()?.zeros_like()?)?,
                    own,
                });
            } else if self.task == 1 {
                whole.set(name.to_owned(), scope.sub(OWN).param_from(name, t)?);
            } else {
                let t = t.to_kind(scope.kind())?;
                whole.set(name.to_owned(), scope.sub(EARLIER).buffer(name, &t)?);
            }
        }
        Ok(Box::new(PackedSite { packed, whole }))
    }

    fn after_step(&self, params: &ParamStore, step: &Step) -> Result<()> {
        let owners = part(params, OWNER);
        if step.done != step_at(self.prune_at, step.total) || has_free(&owners)? {
            return Ok(());
        }
        let own = part(params, OWN);
        for (key, owner) in owners.iter() {
            let mine = owner.eq_scalar(f64::from(self.task))?;
            let count = mine.sum()?.item()? as usize;
            let size = own.need(key)?.abs()?;
            let scores = size.where_else(&mine, &size.ones_like()?.neg()?)?;
            let kept = top_k(&scores, count - share(self.prune, count))?;
            // Others' weights stay theirs; of mine, those that are not kept are free.
            let others = mine.eq_scalar(0.0)?;
            owner.clone().copy_from(&owner.mul(&kept.logical_or(&others)?)?)?;
        }
        Ok(())
    }
}

/// Whether any weight is nobody's.
fn has_free(owners: &Tensors) -> Result<bool> {
    for (_, owner) in owners.iter() {
        if owner.eq_scalar(0.0)?.sum()?.item()? > 0.0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Attaches the task that follows `previous` as module `name`, at the same sites: it owns all that
/// is free, from 0, and sees what the tasks before it own.
///
/// # Errors
/// Where `previous` is not a module of kind `pack_net` or has left nothing free (it has not been
/// pruned yet, or the network is full), or `name` cannot be attached.
pub fn pack_next(model: &mut Modular, previous: &str, name: &str) -> Result<()> {
    let problem = |text: String| Error::invalid(format!("module `{previous}`"), text);
    let (recipe, targets) = model.recipe(previous)?;
    if recipe.kind() != "pack_net" {
        return Err(problem(format!("is of kind `{}`, wants `pack_net`", recipe.kind())));
    }
    let before: PackNet = serde_json::from_value(recipe.to_json()?)
        .map_err(|e| Error::invalid("pack_net", e.to_string()))?;
    let targets = targets.clone();
    let params = |model: &Modular, name: &str| model.params().below(&format!("modules.{name}."));
    let old = params(model, previous);
    let owners = part(&old, OWNER);
    if !has_free(&owners)? {
        return Err(problem("leaves no weight free; train it past `prune_at` first".into()));
    }
    let full = || problem(format!("is task {}, the last that a map can hold", before.task));
    let task = before.task.checked_add(1).ok_or_else(full)?;
    model.attach(name, Box::new(PackNet { task, ..before.clone() }), &targets)?;
    let new = params(model, name);
    let (own, earlier) = (part(&old, OWN), part(&old, EARLIER));
    let (new_own, new_owner, new_earlier) =
        (part(&new, OWN), part(&new, OWNER), part(&new, EARLIER));
    no_grad(|| {
        for (key, owner) in owners.iter() {
            let free = owner.eq_scalar(0.0)?;
            let all_mine = new_owner.need(key)?.copy()?;
            new_owner.need(key)?.clone().copy_from(&all_mine.where_else(&free, owner)?)?;
            let mine = owner.eq_scalar(f64::from(before.task))?;
            let values = own.need(key)?.where_else(&mine, earlier.need(key)?)?;
            new_earlier.need(key)?.clone().copy_from(&values)?;
            new_own.need(key)?.clone().zero_in_place()?;
        }
        // What the first task owns whole.
        for (key, fixed) in new_earlier.iter().filter(|(key, _)| owners.get(key).is_none()) {
            let before = own.get(key).map_or_else(|| earlier.need(key), Ok)?;
            fixed.clone().copy_from(before)?;
        }
        Ok(())
    })
}

/// One task at one site.
#[derive(Debug)]
struct PackedSite {
    /// The weight, where it is shared among tasks.
    packed: Option<Packed>,
    /// What the first task owns whole, by θ's names: trained by it, buffers for later ones.
    whole: Tensors,
}

/// A weight; all of its shape.
#[derive(Debug)]
struct Packed {
    task: u8,
    own: Tensor,
    /// u8: the task that owns a weight, 0 for none.
    owner: Tensor,
    /// What tasks before this one have fixed, 0 elsewhere.
    earlier: Tensor,
}

impl Packed {
    fn weight(&self) -> Result<Tensor> {
        let mine = self.owner.eq_scalar(f64::from(self.task))?;
        self.own.where_else(&mine, &self.earlier)
    }
}

impl PackedSite {
    /// θ' of this task.
    fn all(&self) -> Result<Tensors> {
        match &self.packed {
            Some(packed) => Ok(self.whole.clone().with(WEIGHT, packed.weight()?)),
            None => Ok(self.whole.clone()),
        }
    }
}

impl Module for PackedSite {
    fn kind(&self) -> &'static str {
        "pack_net"
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let mut all = theta.clone();
        for (name, own) in self.all()?.iter() {
            all.set(name.to_owned(), own.to_kind(theta.need(name)?.kind())?);
        }
        Ok(Some(all))
    }

    /// The whole weight: tasks that are averaged own different parts of it.
    fn phi(&self) -> Tensors {
        // Where it fails `with_phi` misses the names.
        self.all().unwrap_or_default()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let mut names = self.whole.clone();
        if let Some(packed) = &self.packed {
            names.set(WEIGHT, packed.own.clone());
        }
        effective(self.kind(), Form::Copy, &names, phi)
    }
}
