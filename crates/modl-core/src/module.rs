//! Computation: what a module does to the base function at its site.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Debug;

use serde_json::Value;

use crate::{
    Context, Error, Host, ParamStore, Result, Scope, Signal, Site, SiteKind, Targets, Tensor,
    Tensors,
};

/// A module f_φ at a site: h = f'(x; θ, φ).
///
/// Implement the one method that says what the module is; [`Module::forward`] follows from it:
/// - [`Module::compose`] for parameter composition, f_{θ⊕φ}(x);
/// - [`Module::delta`] for what is added to the output, f_θ(x) + δ_φ(x);
/// - [`Module::forward`] itself for input and function composition.
///
/// A module holds its parameters as [`Tensor`]s made by a [`Scope`]; saving, loading, freezing and
/// optimising them is the store's business, not the module's.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no module",
    label = "is to implement `modl_core::Module`",
    note = "a module has a `kind` and one of `compose`, `delta` and `forward`"
)]
pub trait Module: Debug + Send {
    /// The name of the kind, as in the registry: `lora`.
    fn kind(&self) -> &'static str;

    /// h = f'(x; θ, φ).
    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if let Some(delta) = self.delta(f, x, cx)? {
            let y = f.call(x, cx)?;
            return Ok(y.replace(y.x.add(&delta)?));
        }
        match self.compose(f.theta())? {
            Some(theta) => f.call_with(&theta, x, cx),
            None => Err(Error::unsupported(
                format!("module `{}` without forward, delta or compose", self.kind()),
                "implement one of them",
            )),
        }
    }

    /// h − f_θ(x) where the module knows it without running f_θ, else `None`. It has the shape of
    /// the site's output.
    fn delta(&self, _f: &Host, _x: &Signal, _cx: &Context) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// θ ⊕ φ where the module changes parameters, else `None`. It is what merging writes into the
    /// backbone.
    fn compose(&self, _theta: &Tensors) -> Result<Option<Tensors>> {
        Ok(None)
    }

    /// The change of `weight` as a low-rank product, where it is one in this context (dropout in
    /// front of it makes it none).
    fn low_rank(&self, _cx: &Context) -> Option<LowRank> {
        None
    }

    /// What training adds to the loss for this module, a scalar whose factor is in it already: a
    /// sparsity or orthogonality penalty. Most have none.
    fn penalty(&self, _cx: &Context) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// The vectors that it puts before the tokens, `[p, dim]`, where this is all that it does, else
    /// `None`: for aggregators that combine prompts.
    fn virtual_tokens(&self, _cx: &Context) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// This module with other vectors before the tokens, `[p, dim]`, or `[batch, p, dim]` where each
    /// row has its own. Gradients flow through them.
    fn with_virtual_tokens(&self, _tokens: Tensor) -> Result<Box<dyn Module>> {
        Err(Error::unsupported(
            format!("other virtual tokens for module `{}`", self.kind()),
            "combine prompts: modules that have virtual tokens",
        ))
    }

    /// φ by name, for aggregators that work on parameters.
    fn phi(&self) -> Tensors {
        Tensors::new()
    }

    /// This module with other parameters, through which gradients flow.
    fn with_phi(&self, _phi: &Tensors) -> Result<Box<dyn Module>> {
        Err(Error::unsupported(
            format!("replacing the parameters of module `{}`", self.kind()),
            "choose an aggregator of outputs",
        ))
    }

    /// Whether [`Module::forward`] makes its output from x and [`Module::phi`] alone, row by row:
    /// without f, the context, companions of x, chance, or any other tensor that has gradients. Such
    /// modules, the experts of a mixture among them, are computed side by side, each by a copy that
    /// [`Module::with_phi`] has made.
    fn stands_alone(&self) -> bool {
        false
    }

    /// The module that this one is for the rows of `cx`, where it makes its parameters from the
    /// context, as hypernetworks do; `None` for all that have parameters of their own.
    ///
    /// # Errors
    /// Where it is not the same one for all rows.
    fn settled(&self, _cx: &Context) -> Result<Option<Box<dyn Module>>> {
        Ok(None)
    }

    /// What has to agree before parameters of two modules can be averaged: the kind, the shapes,
    /// and the settings that φ does not hold.
    fn signature(&self) -> String {
        let shapes: Vec<String> =
            self.phi().iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
        format!("{}({})", self.kind(), shapes.join(", "))
    }
}

/// A recipe for modules: the configuration that is written in files.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no configuration of modules",
    label = "is to implement `modl_core::ModuleConfig`",
    note = "what is registered and attached is the configuration, with a `kind`, `to_json` and a `build` that makes the module of a site"
)]
pub trait ModuleConfig: Debug + Send {
    /// The name of the kind, as in the registry.
    fn kind(&self) -> &'static str;

    /// The configuration as in recipes and files, without `type`.
    fn to_json(&self) -> Result<Value>;

    /// Makes the module for one site.
    ///
    /// # Errors
    /// Where the kind does not work at this kind of site, or the configuration does not fit it.
    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>>;

    /// Checks what the method has made at all the sites that it is attached to, by `SITE.PARAM`,
    /// before it counts as attached.
    ///
    /// # Errors
    /// Where a method that may leave sites out has left out all of them.
    fn check_built(&self, _params: &ParamStore) -> Result<()> {
        Ok(())
    }

    /// Where the method usually stands, for tables and for users who do not say.
    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-linear")
    }

    /// The same method with its width times `factor`, rounded to a whole width that is 1 at least:
    /// m modules whose outputs are added compute what one of them does that is m times as wide. `None`
    /// for methods that have no width, or whose cost does not follow it.
    fn widened(&self, _factor: f64) -> Option<Box<dyn ModuleConfig>> {
        None
    }

    /// What the method does after each step of training besides what the optimiser does: a budget
    /// that shrinks, a mask that is chosen. `params` are those of one attached module, named
    /// `SITE.PARAM`; what has to survive a restart is a [buffer](Scope::buffer) among them.
    fn after_step(&self, _params: &ParamStore, _step: &Step) -> Result<()> {
        Ok(())
    }
}

/// Where a module is built: one of the sites that it attaches to.
#[derive(Debug, Clone, Copy)]
pub struct Attachment<'a> {
    /// The site.
    pub site: &'a Site,
    /// Its frozen parameters.
    pub theta: &'a Tensors,
    /// All sites that the module attaches to, in the order of a forward pass.
    pub sites: &'a [Site],
}

impl<'a> Attachment<'a> {
    /// At one site and no other.
    pub fn alone(site: &'a Site, theta: &'a Tensors) -> Self {
        Attachment { site, theta, sites: std::slice::from_ref(site) }
    }
}

/// A step of training that has just been done.
#[derive(Debug)]
#[non_exhaustive]
pub struct Step {
    /// The number of steps that are done, at least 1.
    pub done: u64,
    /// The number of steps that there will be.
    pub total: u64,
    /// The gradients of this step by the parameters' names, as [`ModuleConfig::after_step`] has
    /// them; none where a parameter was not used.
    pub gradients: Tensors,
    restarted: RefCell<BTreeSet<String>>,
}

impl Step {
    /// Step number `done` of `total` with these gradients.
    pub fn new(done: u64, total: u64, gradients: Tensors) -> Self {
        Step { done, total, gradients, restarted: RefCell::default() }
    }

    /// Says that the parameter of that name (as [`ModuleConfig::after_step`] has it) starts anew, so
    /// that what an optimiser keeps of it (momentum, the count of steps) is to be forgotten.
    pub fn restart(&self, name: impl Into<String>) {
        self.restarted.borrow_mut().insert(name.into());
    }

    /// The parameters that start anew.
    pub fn restarted(&self) -> Vec<String> {
        self.restarted.borrow().iter().cloned().collect()
    }
}

/// A change of a weight as a product of two thin matrices: ΔW = scale · up · down.
///
/// It is a module itself: what merging low-rank modules gives.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, in]`, LoRA's A.
    pub down: Tensor,
    /// `[out, rank]`, LoRA's B.
    pub up: Tensor,
    /// The factor.
    pub scale: f64,
}

impl LowRank {
    /// scale · up · down, `[out, in]`.
    pub fn weight(&self) -> Result<Tensor> {
        self.up.matmul(&self.down)?.mul_scalar(self.scale)
    }

    /// scale · x downᵀ upᵀ in the kind of x.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let kind = x.kind();
        // The factor goes to the thin side: rank columns instead of the full width.
        let inner = x.linear(&self.down.to_kind(kind)?, None)?.mul_scalar(self.scale)?;
        inner.linear(&self.up.to_kind(kind)?, None)
    }
}

impl Module for LowRank {
    fn kind(&self) -> &'static str {
        "low_rank"
    }

    fn delta(&self, f: &Host, x: &Signal, _cx: &Context) -> Result<Option<Tensor>> {
        // At an embedding x are ids, and only the sum of the weights works.
        let linear = f.site().kind == SiteKind::Linear;
        linear.then(|| self.apply(&x.x)).transpose()
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        let sum = w.add(&self.weight()?.to_kind(w.kind())?)?;
        Ok(Some(theta.clone().with("weight", sum)))
    }

    fn low_rank(&self, _cx: &Context) -> Option<LowRank> {
        Some(self.clone())
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with("down", self.down.clone()).with("up", self.up.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let (down, up) = (phi.need("down")?.clone(), phi.need("up")?.clone());
        Ok(Box::new(LowRank { down, up, scale: self.scale }))
    }

    fn signature(&self) -> String {
        let (down, up) = (self.down.size(), self.up.size());
        format!("low_rank(down{down:?}, up{up:?}, scale {})", self.scale)
    }
}
