//! Routing: which modules are active for this input.

use std::fmt::Debug;

use serde_json::Value;

use crate::{Bank, Context, Error, Result, Routing, Scope, Signal, Site, Tensor};

/// α = r_ρ(x, t).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no router",
    label = "is to implement `modl_core::Router`",
    note = "a router has a `kind` and a `route`, which gives a `Routing` for a `Signal` and a `Bank`"
)]
pub trait Router: Debug + Send {
    /// The name of the kind, as in the registry: `top_k`.
    fn kind(&self) -> &'static str;

    /// Scores for the modules of `bank`, in its order.
    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing>;

    /// Whether α of a token depends on tokens that follow it. Such a router is refused where the
    /// backbone is [causal](crate::Backbone::causal).
    fn looks_ahead(&self) -> bool {
        false
    }

    /// Whether it looks at the ids of the tokens: the feature `input_ids` `[batch, seq]` of the
    /// context, which [`crate::Modular::forward`] then takes from the inputs.
    fn reads_ids(&self) -> bool {
        false
    }

    /// What its losses count where a recipe does not say, by name: the weights of its paper. A loss
    /// that is not among them has to be given a weight.
    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[]
    }

    /// A loss by its name that takes knowing what became of a choice: that of REINFORCE. It is
    /// asked for in training, before gradients are computed, once for each time that this router
    /// decided. `routing` is what it decided, with what it noted.
    fn credit(&self, _routing: &Routing, _outcome: &Outcome) -> Result<Option<(String, Tensor)>> {
        Ok(None)
    }

    /// Learns without gradients what became of a choice: a table, a count, a bias. It is called in
    /// training after each step, in the order of the choices. What is learned has to survive a
    /// restart, and so is a [buffer](Scope::buffer), which is written in place.
    fn learn(&self, _routing: &Routing, _outcome: &Outcome) -> Result<()> {
        Ok(())
    }

    /// This router for a bank that has grown to `modules` modules, with what was learned about the
    /// first ones. The parameters of this one are in `scope`, to be [replaced](Scope::replace).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the router cannot.
    fn grown(&self, _modules: usize, _scope: &mut Scope) -> Result<Box<dyn Router>> {
        Err(Error::unsupported(
            format!("adding a module under a `{}` router", self.kind()),
            "attach all modules before the router is made",
        ))
    }
}

/// What became of a forward pass in training.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Outcome<'a> {
    /// The loss of each row, `[batch]`, without its graph.
    pub loss: &'a Tensor,
    /// What the pass knew.
    pub cx: &'a Context,
    /// 1 for each row whose loss counts and 0 for the others, `[batch]`, where of several passes
    /// the best is taken; `None` where all count.
    pub chosen: Option<&'a Tensor>,
}

impl<'a> Outcome<'a> {
    /// Of a pass with such losses, `[batch]`.
    pub fn new(loss: &'a Tensor, cx: &'a Context) -> Self {
        Outcome { loss, cx, chosen: None }
    }
}

/// A recipe for routers.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no configuration of routers",
    label = "is to implement `modl_core::RouterConfig`",
    note = "what is registered is the configuration, with a `kind`, `to_json` and a `build` that makes the router of a site"
)]
pub trait RouterConfig: Debug + Send {
    /// The name of the kind, as in the registry.
    fn kind(&self) -> &'static str;

    /// The configuration as in recipes and files, without `type`.
    fn to_json(&self) -> Result<Value>;

    /// Makes the router of `site` over the modules of `bank`.
    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>>;
}

/// One router for many sites: the first site that is passed decides, the others follow.
#[derive(Debug)]
pub struct Shared {
    key: String,
    leader: Option<Box<dyn Router>>,
}

impl Shared {
    /// The router that decides.
    pub fn lead(key: impl Into<String>, router: Box<dyn Router>) -> Self {
        Shared { key: key.into(), leader: Some(router) }
    }

    /// A place that takes over what was decided under `key`.
    pub fn follow(key: impl Into<String>) -> Self {
        Shared { key: key.into(), leader: None }
    }
}

impl Router for Shared {
    fn kind(&self) -> &'static str {
        self.leader.as_ref().map_or("shared", |r| r.kind())
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        cx.once(&self.key, || match &self.leader {
            Some(router) => router.route(x, bank, cx),
            None => Err(Error::invalid(
                format!("router `{}`", self.key),
                "its first site was not passed in this forward pass",
            )),
        })
    }

    fn looks_ahead(&self) -> bool {
        self.leader.as_ref().is_some_and(|r| r.looks_ahead())
    }

    fn reads_ids(&self) -> bool {
        self.leader.as_ref().is_some_and(|r| r.reads_ids())
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        self.leader.as_ref().map_or(&[], |r| r.loss_weights())
    }

    // Followers have no leader: it hears of what they took over once.
    fn credit(&self, routing: &Routing, outcome: &Outcome) -> Result<Option<(String, Tensor)>> {
        self.leader.as_ref().map_or(Ok(None), |r| r.credit(routing, outcome))
    }

    fn learn(&self, routing: &Routing, outcome: &Outcome) -> Result<()> {
        self.leader.as_ref().map_or(Ok(()), |r| r.learn(routing, outcome))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let leader = self.leader.as_ref().map(|r| r.grown(modules, scope)).transpose()?;
        Ok(Box::new(Shared { key: self.key.clone(), leader }))
    }
}
