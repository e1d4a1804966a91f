//! A graph of modules: each takes what others give as its base function.
//!
//! A node's value is its module with the join of the nodes that it comes from as the base function,
//! v = f'(x; join(v₁, …), φ); without a module it is the join itself. `base` is f_θ(x). A chain of
//! nodes is a stack; two nodes from `base` and one from both are parallel branches. A module may stand
//! at several nodes: its parameters are shared, and their gradients add up. Every node is computed
//! once, in an order in which each comes after those it comes from; a circle is refused, with its
//! nodes.
//!
//! The router says which modules are active, each with the same weight; a module that does not stand
//! at a site leaves the join as it is. Andreas, Rohrbach, Darrell, Klein 2016, *Neural Module
//! Networks*, arXiv 1511.02799; survey §5.3.

use std::collections::BTreeMap;

use modl_core::{
    Aggregator, AggregatorConfig, Context, Error, Host, Module, Order, Outputs, Result, Routing,
    Scope, Signal, Site, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::stack::in_order;

/// The name of f_θ(x) among the nodes.
const BASE: &str = "base";

/// What several inputs of a node become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Join {
    /// Their mean.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// A node of a graph.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name, other than `base`.
    pub name: String,
    /// Its module, by default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// The nodes that it comes from, by default f_θ(x).
    #[serde(default = "from_base")]
    pub from: Vec<String>,
    /// What they become. Default: `mean`.
    #[serde(default)]
    pub join: Join,
}

fn from_base() -> Vec<String> {
    vec![BASE.to_owned()]
}

/// A graph of modules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Graph {
    /// In any order.
    pub nodes: Vec<Node>,
    /// The node whose value comes out. Default: `base`.
    pub output: String,
}

impl Default for Graph {
    fn default() -> Self {
        Graph { nodes: Vec::new(), output: BASE.to_owned() }
    }
}

impl AggregatorConfig for Graph {
    fn kind(&self) -> &'static str {
        "graph"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("graph", self)
    }

    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        self.sorted().map(|graph| Box::new(graph) as Box<dyn Aggregator>)
    }
}

/// Where a node's input comes from.
#[derive(Debug, Clone, Copy)]
enum From {
    Base,
    Node(usize),
}

/// A node in its place.
#[derive(Debug)]
struct Placed {
    module: Option<String>,
    from: Vec<From>,
    join: Join,
}

/// The nodes that the output takes, each after those it comes from.
#[derive(Debug)]
struct Sorted {
    nodes: Vec<Placed>,
    output: From,
}

/// A node while the order is sought.
#[derive(Clone, Copy, PartialEq)]
enum Seen {
    Not,
    /// It is among those that led to the one that is looked at.
    Open,
    At(usize),
}

impl Graph {
    /// # Errors
    /// Where a name is there twice, is unknown, or the output takes no notice of a node; where there
    /// is a circle.
    fn sorted(&self) -> Result<Sorted> {
        let mut places = BTreeMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            if node.name == BASE || places.insert(node.name.as_str(), i).is_some() {
                return Err(Error::Duplicate { kind: "node of a graph", name: node.name.clone() });
            }
            if node.from.is_empty() {
                let problem = "comes from no node; `from` is to name one, or `base`";
                return Err(Error::invalid(format!("graph node `{}`", node.name), problem));
            }
        }
        let find = |name: &str| -> Result<Option<usize>> {
            match places.get(name) {
                Some(i) => Ok(Some(*i)),
                None if name == BASE => Ok(None),
                None => {
                    let known = places.keys().copied().chain([BASE]);
                    Err(Error::unknown("node of a graph", name, known))
                }
            }
        };
        // Depth first, with a stack of its own: graphs may be long.
        let mut seen = vec![Seen::Not; self.nodes.len()];
        let mut sorted = Sorted { nodes: Vec::new(), output: From::Base };
        let mut open: Vec<(usize, usize)> = Vec::new();
        if let Some(i) = find(&self.output)? {
            open.push((i, 0));
            seen[i] = Seen::Open;
        }
        while let Some((i, next)) = open.pop() {
            let node = &self.nodes[i];
            if let Some(name) = node.from.get(next) {
                open.push((i, next + 1));
                let Some(j) = find(name)? else { continue };
                match seen[j] {
                    Seen::At(_) => {}
                    Seen::Not => {
                        seen[j] = Seen::Open;
                        open.push((j, 0));
                    }
                    Seen::Open => {
                        let from = open.iter().position(|(k, _)| *k == j).unwrap_or(0);
                        let mut circle: Vec<&str> = open[from..]
                            .iter()
                            .map(|(k, _)| self.nodes[*k].name.as_str())
                            .collect();
                        circle.push(name);
                        let problem = format!("comes from itself: {}", circle.join(" ← "));
                        return Err(Error::invalid(format!("graph node `{name}`"), problem));
                    }
                }
                continue;
            }
            let mut from = Vec::with_capacity(node.from.len());
            for name in &node.from {
                from.push(match find(name)?.map(|j| seen[j]) {
                    Some(Seen::At(place)) => From::Node(place),
                    _ => From::Base,
                });
            }
            seen[i] = Seen::At(sorted.nodes.len());
            sorted.nodes.push(Placed { module: node.module.clone(), from, join: node.join });
        }
        if let Some(i) = seen.iter().position(|s| *s == Seen::Not) {
            let problem = format!("leads nowhere: the output `{}` takes no notice", self.output);
            return Err(Error::invalid(format!("graph node `{}`", self.nodes[i].name), problem));
        }
        if let Some(last) = sorted.nodes.len().checked_sub(1) {
            sorted.output = From::Node(last);
        }
        Ok(sorted)
    }
}

impl Aggregator for Sorted {
    fn kind(&self) -> &'static str {
        "graph"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        h.active().per_alpha(h.input(), h.context(), |active, x, cx| {
            let modules: BTreeMap<&str, &dyn Module> =
                in_order("graph", active)?.into_iter().collect();
            let stands = |name: &str| self.nodes.iter().any(|n| n.module.as_deref() == Some(name));
            if let Some(name) = modules.keys().find(|name| !stands(name)) {
                return Err(Error::unsupported(
                    format!("a graph without the active module `{name}`"),
                    "give it a node, or route to the modules of the graph alone",
                ));
            }
            let f = h.host();
            f.sharing(x, || {
                Pass { graph: self, modules: &modules, f }.value(self.output, f.theta(), x, cx)
            })
        })
    }
}

/// The modules of one pass.
struct Pass<'a> {
    graph: &'a Sorted,
    modules: &'a BTreeMap<&'a str, &'a dyn Module>,
    f: &'a Host<'a>,
}

impl Pass<'_> {
    /// The value of a node for some θ and x, all nodes before it computed once.
    fn value(&self, of: From, theta: &Tensors, x: &Signal, cx: &Context) -> Result<Signal> {
        let From::Node(last) = of else { return self.base(theta, x, cx) };
        let mut known: Vec<Signal> = Vec::with_capacity(last + 1);
        for node in self.graph.nodes.iter().take(last + 1) {
            let join = |known: &[Signal]| -> Result<Signal> {
                let each = node.from.iter().map(|from| match from {
                    From::Base => self.base(theta, x, cx),
                    From::Node(j) => {
                        known.get(*j).cloned().map_or_else(|| self.base(theta, x, cx), Ok)
                    }
                });
                joined(&each.collect::<Result<Vec<_>>>()?, node.join)
            };
            let module = node.module.as_deref().and_then(|name| self.modules.get(name));
            let value = match module {
                None => join(&known)?,
                Some(module) => {
                    // A module that calls f on something else makes the nodes before anew.
                    let before = |t: &Tensors, s: &Signal, cx: &Context| {
                        if std::ptr::eq(s, x) && std::ptr::eq(t, theta) {
                            return join(&known);
                        }
                        let each = node.from.iter().map(|from| self.value(*from, t, s, cx));
                        joined(&each.collect::<Result<Vec<_>>>()?, node.join)
                    };
                    module.forward(&self.f.around(theta, &before), x, cx)?
                }
            };
            known.push(value);
        }
        known.pop().map_or_else(|| self.base(theta, x, cx), Ok)
    }

    fn base(&self, theta: &Tensors, x: &Signal, cx: &Context) -> Result<Signal> {
        match std::ptr::eq(theta, self.f.theta()) {
            true => self.f.call(x, cx),
            false => self.f.call_with(theta, x, cx),
        }
    }
}

fn joined(all: &[Signal], join: Join) -> Result<Signal> {
    let Some((first, others)) = all.split_first() else {
        return Err(Error::invalid("graph", "a node comes from no node"));
    };
    if others.is_empty() {
        return Ok(first.clone());
    }
    let mut sum: Tensor = first.x.clone();
    for other in others {
        if other.x.size() != sum.size() {
            return Err(Error::unsupported(
                format!("joining {:?} with {:?}", sum.size(), other.x.size()),
                "give all branches the same length",
            ));
        }
        sum = sum.add(&other.x)?;
    }
    Ok(first.replace(match join {
        Join::Sum => sum,
        Join::Mean => sum.mul_scalar(1.0 / all.len() as f64)?,
    }))
}
