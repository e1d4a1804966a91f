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
    Active, Aggregator, AggregatorConfig, Context, Error, Host, Module, Order, Outputs, Result,
    Routing, Scope, Signal, Site, Tensors, Weights,
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
            let modules = in_order("stack", active)?;
            run(h.host(), h.host().theta(), &modules, x, cx)
        })
    }
}

/// The active modules by name, in the order in which the router names them.
///
/// # Errors
/// Where it names no order, or weighs places in it.
pub(crate) fn in_order<'a>(
    kind: &str,
    active: &Active<'a>,
) -> Result<Vec<(&'a str, &'a dyn Module)>> {
    let Weights::Fixed(order) = &active.routing().weights else {
        return Err(Error::unsupported(
            format!("`{kind}` of modules without an order"),
            "choose a router that names modules in order: `fixed`",
        ));
    };
    check_places(kind, order)?;
    let mut modules = Vec::with_capacity(order.len());
    for (j, _) in order {
        modules.extend(active.modules().find(|(k, ..)| k == j).map(|(_, name, m)| (name, m)));
    }
    Ok(modules)
}

/// # Errors
/// Where places in an order are weighed.
pub(crate) fn check_places(kind: &str, order: &[(usize, f64)]) -> Result<()> {
    // Of a list of n names, some of which may not stand here, each has 1 ⁄ n.
    let place = |w: f64| {
        let n = w.recip().round();
        w == 1.0 || (n >= order.len() as f64 && w == n.recip())
    };
    let first = order.first().map_or(1.0, |(_, w)| *w);
    match order.iter().find(|(_, w)| *w != first || !place(*w)) {
        None => Ok(()),
        Some((_, weight)) => {
            let problem = format!("a module has weight {weight}, and `{kind}` has no weights");
            Err(Error::invalid(kind, problem))
        }
    }
}

/// The last module with the ones before it as its base function.
fn run(
    f: &Host,
    theta: &Tensors,
    modules: &[(&str, &dyn Module)],
    x: &Signal,
    cx: &Context,
) -> Result<Signal> {
    let Some(((_, last), before)) = modules.split_last() else { return f.call_with(theta, x, cx) };
    let base = |theta: &Tensors, x: &Signal, cx: &Context| run(f, theta, before, x, cx);
    last.forward(&f.around(theta, &base), x, cx)
}
