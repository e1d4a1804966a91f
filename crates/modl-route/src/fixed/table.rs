//! Fixed routing: α is looked up, not learned.
//!
//! α = table\[t\] for the task t of each row, or one constant for all rows: the active adapters of a
//! model. Survey §4.1. Without a table each task has a module of its own (private); a constant is one
//! module for all (shared); a table says anything between the two (custom). By a label that says
//! which module is right it is the oracle that learned routers are measured against.
//!
//! - DEMix (Gururangan et al. 2021, arXiv 2108.05036): `label = "domain"`.
//! - MAD-X (Pfeiffer, Vulić, Gurevych, Ruder 2020, arXiv 2005.00052): `label = ["language", "task"]`
//!   names for each row the module of its language and then that of its task, of weight 1 each; the
//!   aggregator `stack` puts one on the other in this order.
//!
//! ```toml
//! router = { type = "fixed" }                                # the module named like the task
//! router = { type = "fixed", label = "domain" }              # the module named like the domain
//! router = { type = "fixed", table = { tweets = "social", news = ["en", "formal"] } }
//! router = { type = "fixed", modules = ["tweets"] }          # for all rows, whatever their task
//! router = { type = "fixed", modules = { en = 1.0, formal = 0.5 } }
//! ```

use std::collections::BTreeMap;

use modl_core::{
    Bank, Context, Error, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Modules with their weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "is to be the name of a module, a list of names, or a table of names and weights"
)]
pub enum Choice {
    /// One module with weight 1.
    One(String),
    /// n modules with weight 1⁄n each; none at all leaves the base function.
    Equal(Vec<String>),
    /// Modules with weights of their own. All of weight 1 add up, as active adapters of PEFT do.
    Weighted(BTreeMap<String, f64>),
}

impl Choice {
    fn named(&self) -> Vec<(&str, f64)> {
        match self {
            Choice::One(name) => vec![(name, 1.0)],
            Choice::Equal(names) => {
                names.iter().map(|n| (n.as_str(), 1.0 / names.len() as f64)).collect()
            }
            Choice::Weighted(weights) => weights.iter().map(|(n, w)| (n.as_str(), *w)).collect(),
        }
    }
}

/// Kinds of labels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "is to be a kind of label, or a list of kinds")]
pub enum Labels {
    /// Labels of one kind.
    One(String),
    /// Those of several kinds one after the other.
    Several(Vec<String>),
}

impl Default for Labels {
    fn default() -> Self {
        Labels::One("task".into())
    }
}

impl Labels {
    fn kinds(&self) -> &[String] {
        match self {
            Labels::One(kind) => std::slice::from_ref(kind),
            Labels::Several(kinds) => kinds,
        }
    }

    fn is_default(&self) -> bool {
        *self == Labels::default()
    }
}

/// Routing by the task of each row, or to one set of modules for all.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fixed {
    /// The kind of label that is looked up: `task`, `language`, `domain`. Of a list of kinds each
    /// adds its modules, in the order of the list. Default: `task`.
    #[serde(skip_serializing_if = "Labels::is_default")]
    pub label: Labels,
    /// The modules of each task. Without a table a task has the module of its own name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<BTreeMap<String, Choice>>,
    /// The same modules for all rows; then tasks are not looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules: Option<Choice>,
    /// Leaves out modules that do not stand at a site instead of refusing their names: for modules
    /// that were attached at different sites. Default: false.
    pub skip_absent: bool,
}

impl Fixed {
    /// These modules for all rows, with weight 1⁄n each.
    pub fn modules<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Fixed { modules: Some(Choice::Equal(names)), ..Self::default() }
    }

    /// Names to places in the bank.
    fn places(&self, choice: &Choice, bank: &Bank) -> Result<Vec<(usize, f64)>> {
        let mut places = Vec::new();
        for (name, weight) in choice.named() {
            match bank.position(name) {
                Ok(j) => places.push((j, weight)),
                Err(_) if self.skip_absent => {}
                Err(e) => return Err(e),
            }
        }
        Ok(places)
    }

    fn by_task(&self, task: &str, bank: &Bank) -> Result<Vec<(usize, f64)>> {
        match &self.table {
            None => self.places(&Choice::One(task.to_owned()), bank),
            Some(table) => match table.get(task) {
                Some(choice) => self.places(choice, bank),
                None => Err(Error::unknown("task in the router's table", task, table.keys())),
            },
        }
    }

    fn by_labels(&self, rows: i64, bank: &Bank, cx: &Context) -> Result<Vec<Vec<(usize, f64)>>> {
        let mut found = vec![Vec::new(); usize::try_from(rows).unwrap_or(0)];
        for kind in self.label.kinds() {
            let names = cx.labels(kind)?;
            if names.len() != found.len() {
                let problem = format!("{} names for {rows} rows", names.len());
                return Err(Error::invalid(format!("{kind}s"), problem));
            }
            for (row, name) in found.iter_mut().zip(names) {
                for (j, weight) in self.by_task(name, bank)? {
                    if row.iter().any(|(k, _)| *k == j) {
                        let problem = format!("{:?} name a module twice", self.label.kinds());
                        return Err(Error::invalid("fixed.label", problem));
                    }
                    row.push((j, weight));
                }
            }
        }
        Ok(found)
    }
}

impl RouterConfig for Fixed {
    fn kind(&self) -> &'static str {
        "fixed"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, _: &Site, bank: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        if self.table.is_some() && self.modules.is_some() {
            let problem = "takes either a `table` by task or `modules` for all rows, not both";
            return Err(Error::invalid("fixed", problem));
        }
        if self.label.kinds().is_empty() {
            return Err(Error::invalid("fixed.label", "is to name at least one kind"));
        }
        for choice in self.table.iter().flat_map(|t| t.values()).chain(&self.modules) {
            self.places(choice, bank)?;
        }
        Ok(Box::new(FixedRouter(self.clone())))
    }
}

/// The names are looked up anew in each pass, so that a bank may grow.
#[derive(Debug)]
struct FixedRouter(Fixed);

impl Router for FixedRouter {
    fn kind(&self) -> &'static str {
        "fixed"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let weights = match &self.0.modules {
            Some(choice) => Weights::Fixed(self.0.places(choice, bank)?),
            None => {
                let rows = self.0.by_labels(x.rows(), bank, cx)?;
                match rows.split_first() {
                    // One α for the whole batch spares its division.
                    Some((first, others)) if others.iter().all(|r| r == first) => {
                        Weights::Fixed(first.clone())
                    }
                    _ => Weights::Rows(rows),
                }
            }
        };
        Ok(Routing::new(weights, bank.len()))
    }

    fn grown(&self, _: usize, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(FixedRouter(self.0.clone())))
    }
}
