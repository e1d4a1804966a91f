//! Aggregation: one result of several modules.

use std::fmt::Debug;

use serde_json::Value;

use crate::{
    Active, Bank, Context, Error, Module, Outputs, Result, Routing, Scope, Signal, Site, Tensor,
    Tensors,
};

/// Whether modules are computed before they are aggregated, or after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Compute → aggregate: y = g(α, {f'(x; θ, φⱼ)}).
    Outputs,
    /// Aggregate → compute: φ̄ = g(α, {φⱼ}), y = f'(x; θ, φ̄).
    Parameters,
}

/// g_γ. Implement the method of the order that [`Aggregator::order`] names.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no aggregator",
    label = "is to implement `modl_core::Aggregator`",
    note = "an aggregator has a `kind`, an `order` and the method that the order names: `outputs` or `parameters`"
)]
pub trait Aggregator: Debug + Send {
    /// The name of the kind, as in the registry: `weighted_sum`.
    fn kind(&self) -> &'static str;

    /// Before or after computation.
    fn order(&self) -> Order;

    /// y = g(α, {hⱼ}).
    fn outputs(&self, _alpha: &Routing, _h: &Outputs) -> Result<Signal> {
        Err(Error::unsupported(format!("`{}` on outputs", self.kind()), "it merges parameters"))
    }

    /// φ̄ = g(α, {φⱼ}) for an α without batch dimension ([`Active::alpha`]).
    fn parameters(&self, _phi: &Active, _theta: &Tensors) -> Result<Box<dyn Module>> {
        Err(Error::unsupported(format!("`{}` on parameters", self.kind()), "it combines outputs"))
    }

    /// Whether what comes out at a token depends on tokens that follow it. Such an aggregator is
    /// refused where the backbone is [causal](crate::Backbone::causal).
    fn looks_ahead(&self) -> bool {
        false
    }

    /// What training adds to the loss for γ, a scalar whose factor is in it already. Most have none.
    fn penalty(&self, _cx: &Context) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What it does after each step of training besides what the optimiser does, such as lowering a
    /// temperature: `done` of `total` steps are done. What has to survive a restart is a
    /// [buffer](Scope::buffer), which is written in place.
    fn after_step(&self, _done: u64, _total: u64) -> Result<()> {
        Ok(())
    }
}

/// A recipe for aggregators.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no configuration of aggregators",
    label = "is to implement `modl_core::AggregatorConfig`",
    note = "what is registered is the configuration, with a `kind`, `to_json` and a `build` that makes the aggregator of a site"
)]
pub trait AggregatorConfig: Debug + Send {
    /// The name of the kind, as in the registry.
    fn kind(&self) -> &'static str;

    /// The configuration as in recipes and files, without `type`.
    fn to_json(&self) -> Result<Value>;

    /// Makes the aggregator of `site`.
    fn build(&self, site: &Site, scope: &mut Scope) -> Result<Box<dyn Aggregator>>;

    /// Makes the aggregator of `site` over the modules that stand there, for one that has parameters
    /// of each.
    fn build_over(
        &self,
        site: &Site,
        _bank: &Bank,
        scope: &mut Scope,
    ) -> Result<Box<dyn Aggregator>> {
        self.build(site, scope)
    }
}
