//! The phases of a recipe.

use std::collections::BTreeMap;

use modl_core::Result;
use serde::Deserialize;
use serde_json::Value;

use super::parts::{divide, with_allowed};
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
}

impl Phase {
    pub(super) fn read(
        source: &Source,
        index: usize,
        table: &Value,
        loss_weights: &BTreeMap<String, f64>,
        methods: &Methods,
    ) -> Result<Self> {
        let own = ["name", "strategy", "next_task", "tasks"];
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
        let PhaseName { name, strategy, next_task, tasks } = named;
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
        for (name, weight) in loss_weights {
            train.loss_weights.entry(name.clone()).or_insert(*weight);
        }
        train.check().map_err(|e| source.error(&["loss_weights".to_owned()], e.to_string()))?;
        if !own_train {
            train.train = parsed.trains();
        }
        if next_task && index == 0 {
            let problem = "`next_task` is for what follows another phase";
            return Err(source.error(&at("next_task"), problem));
        }
        Ok(Phase { name, strategy, next_task, tasks, train })
    }
}
