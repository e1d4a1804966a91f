//! A stack: modules one on the other, in the order in which the router names them.
//!
//! h₁ = f'(x; θ, φ₁) with the base function f, then h₂ with h₁ as its base function, and so on;
//! y = hₖ. MAD-X puts a task adapter on a language adapter in this way (Pfeiffer, Vulić, Gurevych,
//! Ruder 2020, arXiv 2005.00052); survey §5.3. For modules that add a change which does not depend on
//! f, such as LoRA, it is the sum of the changes; for others the order matters.
//!
//! A place in a stack has no weight: those of the router are to be 1, or all 1⁄k as of a list of k
//! names. Routers that name modules in an order are those that look them up, such as `fixed`.

use modl_core::{
    Aggregator, AggregatorConfig, Context, Error, Host, Module, Order, Outputs, Result, Routing,
    Scope, Signal, Site, Tensors, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Modules one on the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stack {}

impl AggregatorConfig for Stack {
    fn kind(&self) -> &'static str {
        "stack"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("stack", self)
    }

    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(*self))
    }
}

impl Aggregator for Stack {
    fn kind(&self) -> &'static str {
        "stack"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        h.active().per_alpha(h.input(), h.context(), |active, x, cx| {
            let Weights::Fixed(order) = &active.routing().weights else {
                return Err(Error::unsupported(
                    "a stack of modules without an order",
                    "choose a router that names modules in order: `fixed`",
                ));
            };
            let mut modules: Vec<&dyn Module> = Vec::with_capacity(order.len());
            for (j, weight) in order {
                if *weight != 1.0 && *weight != 1.0 / order.len() as f64 {
                    let problem =
                        format!("a module has weight {weight}, and a stack has no weights");
                    return Err(Error::invalid("stack", problem));
                }
                modules.extend(active.modules().find(|(k, ..)| k == j).map(|(_, _, m)| m));
            }
            run(h.host(), h.host().theta(), &modules, x, cx)
        })
    }
}

/// The last module with the ones before it as its base function.
fn run(
    f: &Host,
    theta: &Tensors,
    modules: &[&dyn Module],
    x: &Signal,
    cx: &Context,
) -> Result<Signal> {
    let Some((last, before)) = modules.split_last() else { return f.call_with(theta, x, cx) };
    let base = |theta: &Tensors, x: &Signal, cx: &Context| run(f, theta, before, x, cx);
    last.forward(&f.around(theta, &base), x, cx)
}
