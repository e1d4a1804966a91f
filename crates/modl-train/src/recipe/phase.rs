//! The phases of a recipe.

use std::collections::BTreeMap;

use modl_core::Result;
use serde::Deserialize;
use serde_json::Value;

use super::Head;
use super::parts::{RouterSpec, divide, read_aggregator, with_allowed};
use super::source::Source;
use crate::{Methods, TrainConfig};

/// A part of the training: a strategy with its settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// Its name, of which folders are made.
    pub name: String,
    /// The strategy's configuration with its `type`.
    pub strategy: Value,
    /// Whether it is another task for PathNet (`next_task = true`): before it, the modules of the
    /// paths that won in the phases before stay as they are and all others begin again
    /// ([`modl_route::next_task_after`]); of the modules only these are trained. Default: false.
    pub next_task: bool,
    /// The tasks on whose examples it trains (`tasks = ["news"]`). Default: all.
    pub tasks: Option<Vec<String>>,
    /// So many examples of each task only, chosen by the data's `split_seed` (`limit = 16`). Default: all.
    pub limit: Option<usize>,
    /// What is predicted in this phase. Default: what the recipe says.
    pub head: Option<Head>,
    /// The router of this phase. Default: the recipe's.
    pub router: Option<RouterSpec>,
    /// The aggregator of this phase, its configuration with its `type`. Default: the recipe's.
    pub aggregator: Option<Value>,
    /// How it trains.
    pub train: TrainConfig,
}

#[derive(Debug, Deserialize)]
struct PhaseName {
    name: String,
    strategy: Value,
    #[serde(default)]
    next_task: bool,
    tasks: Option<Vec<String>>,
    limit: Option<usize>,
    head: Option<Value>,
    router: Option<Value>,
    aggregator: Option<Value>,
}

/// What a recipe says for all of its phases.
pub(super) struct OfRecipe<'a> {
    pub(super) loss_weights: &'a BTreeMap<String, f64>,
    pub(super) head: &'a Head,
    /// Whether a phase has a head of its own.
    pub(super) several: bool,
}

impl Phase {
    pub(super) fn read(
        source: &Source,
        index: usize,
        table: &Value,
        all: &OfRecipe,
        methods: &Methods,
    ) -> Result<Self> {
        let own =
            ["name", "strategy", "next_task", "tasks", "limit", "head", "router", "aggregator"];
        let keys = ["phases".to_owned(), index.to_string()];
        let (named, mut train, own_train) = source.read_by(&keys, table, |v| {
            let (named, rest) = divide(v, &own)?;
            let own_train = rest.get("train").is_some();
            let train: TrainConfig = serde_json::from_value(rest.clone())
                .map_err(|e| with_allowed(&e.to_string(), &rest, &own))?;
            train.check().map_err(|e| e.to_string())?;
            let named: PhaseName = serde_json::from_value(named).map_err(|e| e.to_string())?;
            Ok((named, train, own_train))
        })?;
        let at = |key: &str| [keys.as_slice(), &[key.to_owned()]].concat();
        let PhaseName { name, strategy, next_task, tasks, limit, head, router, aggregator } = named;
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c)) {
            let problem = "`name` is to be made of letters, digits, `_` and `-`";
            return Err(source.error(&at("name"), problem));
        }
        // `strategy = "joint"` is short for `strategy = { type = "joint" }`.
        let strategy = match strategy {
            Value::String(kind) => Value::from_iter([("type", kind)]),
            table => table,
        };
        let parsed = source.read_by(&at("strategy"), &strategy, |v| {
            methods.strategies.parse(v).map_err(|e| e.to_string())
        })?;
        for (name, weight) in all.loss_weights {
            train.loss_weights.entry(name.clone()).or_insert(*weight);
        }
        train.check().map_err(|e| source.error(&["loss_weights".to_owned()], e.to_string()))?;
        if next_task && index == 0 {
            let problem = "`next_task` is for what follows another phase";
            return Err(source.error(&at("next_task"), problem));
        }
        if limit == Some(0) {
            return Err(source.error(&at("limit"), "`limit` is 0; give it the examples of a task"));
        }
        let registry = &methods.registry;
        let head = head.map(|v| Head::read(source, &at("head"), &v)).transpose()?;
        if !own_train {
            train.train = parsed.trains();
            if all.several {
                // Of several heads that of this phase alone.
                let own = head.as_ref().unwrap_or(all.head).name();
                let of_head = |p: String| match p.as_str() {
                    "heads.*" => own.map(|name| format!("heads.{name}.*")),
                    _ => Some(p),
                };
                train.train = train.train.into_iter().filter_map(of_head).collect();
            }
        }
        let router = router.map(|v| RouterSpec::read(source, &at("router"), &v, registry));
        if let Some(table) = &aggregator {
            read_aggregator(source, &at("aggregator"), table, registry)?;
        }
        let router = router.transpose()?;
        Ok(Phase { name, strategy, next_task, tasks, limit, head, router, aggregator, train })
    }
}
