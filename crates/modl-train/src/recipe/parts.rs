//! The tables of a recipe.

use std::collections::BTreeMap;

use modl_core::{Device, Error, Kind, Names, Registry, Result, Targets};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::source::Source;

/// The top of a recipe: tables that are read one by one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Top {
    #[serde(default)]
    pub seed: u64,
    pub backbone: Value,
    pub data: Value,
    #[serde(default)]
    pub modules: Map<String, Value>,
    pub router: Option<Value>,
    pub aggregator: Option<Value>,
    pub head: Value,
    #[serde(default)]
    pub loss_weights: BTreeMap<String, f64>,
    #[serde(default)]
    pub phases: Vec<Value>,
}

/// An element type of weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the range of 32.
    Bf16,
}

impl From<Dtype> for Kind {
    fn from(dtype: Dtype) -> Kind {
        match dtype {
            Dtype::F32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
        }
    }
}

/// A device by name.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Place(pub Device);

impl Default for Place {
    fn default() -> Self {
        Place(Device::Cpu)
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let cuda = match name.split_once(':') {
            Some(("cuda", n)) => n.parse().ok(),
            _ => (name == "cuda").then_some(0),
        };
        match cuda {
            Some(n) => Ok(Place(Device::Cuda(n))),
            None if name == "cpu" => Ok(Place(Device::Cpu)),
            None => Err(format!("`{name}` is no device; known: cpu, cuda, cuda:0, cuda:1")),
        }
    }
}

impl From<Place> for String {
    fn from(place: Place) -> String {
        match place.0 {
            Device::Cuda(n) => format!("cuda:{n}"),
            _ => "cpu".into(),
        }
    }
}

/// A module: its method, its settings, and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleSpec {
    /// Its name.
    pub name: String,
    /// The method's configuration with its `type`.
    pub config: Value,
    /// The sites that it is attached to.
    pub targets: Targets,
}

/// The keys of a module's table that are not the method's.
#[derive(Debug, Deserialize)]
struct Where {
    targets: Names,
    exclude: Option<Names>,
    layers: Option<Vec<i64>>,
    #[serde(default)]
    layers_pattern: Vec<String>,
}

impl ModuleSpec {
    pub(super) fn read(
        source: &Source,
        name: &str,
        table: &Value,
        registry: &Registry,
    ) -> Result<Self> {
        let keys = ["modules".to_owned(), name.to_owned()];
        let own = ["targets", "exclude", "layers", "layers_pattern"];
        let (targets, config) = source.read_by(&keys, table, |v| {
            let (place, config) = divide(v, &own)?;
            // First, because what it takes for an unknown key may be meant for one of ours.
            let keys = |c: &Value| registry.modules.parse(c)?.to_json();
            registry.modules.parse(&config).map_err(|e| allowing(&e, &config, &keys, &own))?;
            let at: Where = serde_json::from_value(place).map_err(|e| e.to_string())?;
            let Where { targets, exclude, layers, layers_pattern } = at;
            Ok((Targets { names: targets, exclude, layers, layers_pattern }, config))
        })?;
        Ok(ModuleSpec { name: name.to_owned(), config, targets })
    }
}

/// A router and how far it reaches.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSpec {
    /// The method's configuration with its `type`.
    pub config: Value,
    /// One router for all sites (`scope = "global"`), or one for each (`local`, the default).
    pub global: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reach {
    Global,
    #[default]
    Local,
}

#[derive(Debug, Deserialize)]
struct RouterReach {
    #[serde(default)]
    scope: Reach,
}

impl RouterSpec {
    pub(super) fn read(
        source: &Source,
        keys: &[String],
        table: &Value,
        registry: &Registry,
    ) -> Result<Self> {
        let own = ["scope"];
        source.read_by(keys, table, |v| {
            let (reach, config) = divide(v, &own)?;
            let reach: RouterReach = serde_json::from_value(reach).map_err(|e| e.to_string())?;
            let keys = |c: &Value| registry.routers.parse(c)?.to_json();
            registry.routers.parse(&config).map_err(|e| allowing(&e, &config, &keys, &own))?;
            Ok(RouterSpec { config, global: matches!(reach.scope, Reach::Global) })
        })
    }
}

/// Reads the configuration of an aggregator, to see whether it is one.
pub(super) fn read_aggregator(
    source: &Source,
    keys: &[String],
    table: &Value,
    registry: &Registry,
) -> Result<()> {
    let known = |c: &Value| registry.aggregators.parse(c)?.to_json();
    source.read_by(keys, table, |v| {
        registry.aggregators.parse(v).map(drop).map_err(|e| allowing(&e, v, &known, &[]))
    })
}

/// The keys of a table that are `own`, and the others.
pub(super) fn divide(table: &Value, own: &[&str]) -> Result<(Value, Value), String> {
    let table = table.as_object().ok_or("is to be a table")?;
    let all = table.iter().map(|(k, v)| (k.clone(), v.clone()));
    let (mine, rest): (Map<_, _>, Map<_, _>) = all.partition(|(k, _)| own.contains(&k.as_str()));
    Ok((mine.into(), rest.into()))
}

/// What a method says of its table, where `own` keys are allowed, too. Not every method lists the
/// keys that it knows; then they are those of its default configuration.
pub(super) fn allowing(
    e: &Error,
    config: &Value,
    to_json: &dyn Fn(&Value) -> Result<Value>,
    own: &[&str],
) -> String {
    let complaint = e.to_string();
    if complaint.contains("unknown field") && !complaint.contains("expected") {
        let kind = config.get("type").cloned().unwrap_or_default();
        let default = to_json(&Value::from_iter([("type", kind)])).unwrap_or_default();
        let known = default.as_object().into_iter().flat_map(Map::keys).map(String::as_str);
        let known: Vec<&str> = known.chain(own.iter().copied()).collect();
        return with_allowed(&complaint, config, &known);
    }
    with_allowed(&complaint, config, own)
}

/// serde's complaint about an unknown key of `table` itself, with further keys that are allowed.
pub(super) fn with_allowed(complaint: &str, table: &Value, keys: &[&str]) -> String {
    let mut own = table.as_object().into_iter().flat_map(Map::keys);
    match own.any(|k| complaint.contains(&format!("unknown field `{k}`"))) {
        true => complaint.to_owned() + &keys.iter().map(|k| format!(", `{k}`")).collect::<String>(),
        false => complaint.to_owned(),
    }
}
