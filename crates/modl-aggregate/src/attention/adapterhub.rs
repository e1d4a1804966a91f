//! Fusion folders of AdapterHub's `adapters` library: `adapter_fusion_config.json` +
//! `model_adapter_fusion.safetensors`, or `pytorch_model_adapter_fusion.bin`.
//!
//! | setting | here |
//! |---|---|
//! | `key`, `query`, `value`, `value_initialized`, `residual_before` | as they are |
//! | `query_before_ln` | the query is `output`; without it `norm` over adapters behind the norm |
//! | `temperature` | from 50 to 1 in 980 steps of training |
//! | `regularization` | 0.01, or 0; what is not 0 is written as `true` |
//! | `dropout_prob` | none and 0 are the dropout of the backbone's attention |
//! | `value_before_softmax` | both ways are the same function; written as `true` |
//!
//! There, the settings of the last adapter say what all see, and modules see the residual twice where
//! they stand beside the sub-layer. So the adapters have to agree, and parallel ones are refused.

use std::collections::HashMap;
use std::path::Path;

use modl_core::{Error, Modular, ModuleConfig, ParamStore, Result, Select, Tensors, checkpoint};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::fusion::{Fusion, QuerySource, ValueStart};
use super::temperature::Temperature;

const CONFIG_FILE: &str = "adapter_fusion_config.json";
const WEIGHTS_FILE: &str = "model_adapter_fusion.safetensors";
const PICKLE_FILE: &str = "pytorch_model_adapter_fusion.bin";
/// The version whose fields are written.
const VERSION: &str = "adapters.1.3.0";

/// `adapter_fusion_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// Missing in old files, where `name` has them.
    #[serde(default)]
    adapter_names: Option<Vec<String>>,
    config: Settings,
    hidden_size: i64,
    model_class: Value,
    #[serde(default)]
    model_name: Value,
    model_type: String,
    name: String,
    #[serde(default)]
    version: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    #[serde(default)]
    dropout_prob: Option<f64>,
    key: bool,
    query: bool,
    query_before_ln: bool,
    regularization: bool,
    residual_before: bool,
    temperature: bool,
    value: bool,
    #[serde(default = "yes")]
    value_before_softmax: bool,
    value_initialized: Switch,
}

fn yes() -> bool {
    true
}

/// A truth value, or the text of one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Switch {
    Bool(bool),
    Text(String),
}

/// Gives a model the fusion of an AdapterHub folder as its aggregator, and returns the names of the
/// adapters that it fuses, which are to be attached already. A router that names them, each with the
/// same weight, makes it what it was there.
///
/// # Errors
/// Where an adapter is not attached or is none that AdapterHub fuses as modl does, the backbone is
/// another one, or the tensors are not exactly those that it has to have; then the model is as it was.
pub fn load_fusion(model: &mut Modular, dir: impl AsRef<Path>) -> Result<Vec<String>> {
    let dir = dir.as_ref();
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path)
        .map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?;
    let header: Header = serde_json::from_value(modl_core::parse_json(&path, &text)?)
        .map_err(|e| Error::file(&path, format!("is not a fusion of AdapterHub: {e}")))?;
    let of = |key: &str| model.backbone().config().get(key).cloned().unwrap_or(Value::Null);
    let (kind, width) = (of("model_type"), of("hidden_size"));
    if kind != json!(header.model_type) || width != json!(header.hidden_size) {
        let problem = format!(
            "was made for a {} of width {}, this backbone is a {kind} of width {width}",
            header.model_type, header.hidden_size
        );
        return Err(Error::file(path, problem));
    }
    let split = || header.name.split(',').map(str::to_owned).collect();
    let names = header.adapter_names.clone().unwrap_or_else(split);
    let config = header.config.read(behind_norm(model, &names)?, attention_dropout(model))?;
    let params = model.aggregator_parameters_of(&config)?;
    let mut by_key = ParamStore::new();
    for (param, p) in params.iter().filter(|(_, p)| !p.is_buffer()) {
        by_key.insert(key(param, &header.name)?, p.tensor().clone())?;
    }
    let file = checkpoint::open_first(dir, &[WEIGHTS_FILE, PICKLE_FILE])?;
    let found = file.tensors(model.device())?.into_iter();
    let found = found.map(|(key, t)| (model.backbone().canonical(&key), t));
    let found = Tensors::distinct(found)?;
    by_key.load(&file.path().display().to_string(), found.iter(), &Select::all())?;
    model.aggregate_with(Box::new(config), &params)?;
    Ok(names)
}

/// Saves the fusion that is a model's aggregator as an AdapterHub folder, which is made where it does
/// not exist. `names` are the adapters that it fuses. Each file appears whole or not at all.
///
/// # Errors
/// Where the aggregator is no fusion, AdapterHub has no setting for it, an adapter is none that it
/// fuses as modl does, or the disk refuses.
pub fn save_fusion(model: &Modular, names: &[&str], dir: impl AsRef<Path>) -> Result<()> {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let aggregator = model.aggregator_recipe().filter(|a| a.kind() == "fusion");
    let aggregator = aggregator.ok_or_else(|| {
        Error::unsupported("a model without a fusion", "choose the aggregator `fusion` first")
    })?;
    let config: Fusion = modl_core::from_json("fusion", aggregator.to_json()?)?;
    let settings = Settings::write(&config, behind_norm(model, &names)?, attention_dropout(model))?;
    let known = model.backbone().config();
    let of = |key: &str| known.get(key).cloned().unwrap_or(Value::Null);
    let wrong = |what: &str| {
        Error::unsupported(format!("a backbone without `{what}`"), "use Modular::save_routing")
    };
    let header = Header {
        name: names.join(","),
        adapter_names: Some(names),
        config: settings,
        hidden_size: of("hidden_size").as_i64().ok_or_else(|| wrong("hidden_size"))?,
        model_class: known.pointer("/architectures/0").cloned().unwrap_or(Value::Null),
        model_name: json!(of("_name_or_path").as_str().unwrap_or("")),
        model_type: of("model_type").as_str().ok_or_else(|| wrong("model_type"))?.to_owned(),
        version: Some(VERSION.to_owned()),
    };
    let mut tensors = Tensors::new();
    for (full, p) in model.params().below("aggregators.").iter().filter(|(_, p)| !p.is_buffer()) {
        tensors.set(key(full, &header.name)?, p.tensor().clone());
    }
    let dir = dir.as_ref();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    checkpoint::save(dir.join(WEIGHTS_FILE), tensors.iter(), metadata)?;
    let text = serde_json::to_string_pretty(&header)
        .map_err(|e| Error::invalid(CONFIG_FILE, e.to_string()))?;
    // Last: a folder without it is no fusion yet.
    checkpoint::write_whole(dir.join(CONFIG_FILE), text.as_bytes())
}

impl Settings {
    fn read(&self, behind_norm: bool, attention_dropout: f64) -> Result<Fusion> {
        if !(self.key || self.query || self.value) {
            return Err(Error::unsupported(
                "a fusion of AdapterHub without query, key and value",
                "it has a layer there that it never uses; set one of the three",
            ));
        }
        let initialized = match &self.value_initialized {
            Switch::Bool(on) => *on,
            Switch::Text(t) => t.eq_ignore_ascii_case("true"),
        };
        Ok(Fusion {
            query: self.query,
            key: self.key,
            value: match (self.value, initialized) {
                (false, _) => ValueStart::None,
                (true, true) => ValueStart::NearIdentity,
                (true, false) => ValueStart::Normal,
            },
            query_source: match behind_norm && !self.query_before_ln {
                true => QuerySource::Norm,
                false => QuerySource::Output,
            },
            residual_before: self.residual_before,
            temperature: match self.temperature {
                true => Temperature::adapterhub(),
                false => Temperature::default(),
            },
            regularisation: if self.regularization { 0.01 } else { 0.0 },
            dropout: self.dropout_prob.filter(|p| *p > 0.0).unwrap_or(attention_dropout),
        })
    }

    fn write(config: &Fusion, behind_norm: bool, attention_dropout: f64) -> Result<Self> {
        let no = |what: String| {
            Error::unsupported(format!("{what} in a fusion folder"), "use Modular::save_routing")
        };
        let query_before_ln = match (config.query_source, behind_norm) {
            (QuerySource::Output, behind) => behind,
            (QuerySource::Norm, true) => false,
            (source, _) => {
                return Err(no(format!("`query_source` {source:?} over these adapters")));
            }
        };
        let temperature = match config.temperature {
            t if t == Temperature::default() => false,
            t if t == Temperature::adapterhub() => true,
            t => return Err(no(format!("{t:?}"))),
        };
        Ok(Settings {
            dropout_prob: (config.dropout != attention_dropout).then_some(config.dropout),
            key: config.key,
            query: config.query,
            query_before_ln,
            regularization: config.regularisation > 0.0,
            residual_before: config.residual_before,
            temperature,
            value: config.value != ValueStart::None,
            value_before_softmax: true,
            value_initialized: Switch::Bool(matches!(
                config.value,
                ValueStart::NearIdentity | ValueStart::Identity
            )),
        })
    }
}

/// The dropout of the backbone's attention.
fn attention_dropout(model: &Modular) -> f64 {
    let p = model.backbone().config().get("attention_probs_dropout_prob");
    p.and_then(Value::as_f64).unwrap_or(0.0)
}

/// The key of `SITE.PARAM`, where the last two parts are the parameter's.
fn key(param: &str, fusion: &str) -> Result<String> {
    let mut dots = param.rmatch_indices('.').map(|(at, _)| at);
    let at = dots.nth(1).ok_or_else(|| Error::invalid(param, "is no parameter of a fusion"))?;
    let (site, own) = param.split_at(at);
    Ok(format!("{site}.adapter_fusion_layer.{fusion}{own}"))
}

/// Whether the adapters stand behind the norm, `original_ln_before`.
///
/// # Errors
/// Where one is none that AdapterHub fuses as modl does, or they do not agree.
fn behind_norm(model: &Modular, names: &[String]) -> Result<bool> {
    let mut all = Vec::with_capacity(names.len());
    for name in names {
        let (config, _) = model.recipe(name)?;
        all.push(adapter(name, config)?);
    }
    match all.split_last() {
        None => Err(Error::invalid("fusion", "names no adapter")),
        Some((last, others)) if others.iter().all(|o| o == last) => Ok(*last),
        Some(_) => Err(Error::unsupported(
            "fusing adapters before and behind the norm as AdapterHub does",
            "it puts all of them where the last one stands; give them one `original_ln_before`",
        )),
    }
}

/// `original_ln_before` of an adapter.
fn adapter(name: &str, config: &dyn ModuleConfig) -> Result<bool> {
    const SETTING: &str = "original_ln_before";
    let settings = config.to_json()?;
    let no = |problem: &str| {
        Err(Error::unsupported(
            format!(
                "module `{name}`, a `{}`, in a fusion folder of AdapterHub: {problem}",
                config.kind()
            ),
            "choose the aggregator `fusion` and Modular::save_routing",
        ))
    };
    let Some(behind) = settings.get(SETTING).and_then(Value::as_bool) else {
        return no("it fuses bottleneck adapters alone");
    };
    if settings.get("is_parallel") == Some(&json!(true)) {
        return no("beside the sub-layer it adds the residual twice");
    }
    if settings.get("residual_before_ln").is_some_and(|r| r != &json!(true)) {
        return no("it fuses before the residual connection, which stands elsewhere");
    }
    Ok(behind)
}
