//! `adapter_config.json`: what kind of adapter, and where it stands.

use std::fs;
use std::path::Path;

use modl_core::{Error, ModuleConfig, Names, Result, Site, Targets};
use serde_json::{Map, Value, json};

use super::beside::{Beside, Layout, Taken};
use super::fields::Fields;
use super::{PeftType, Provenance, TYPES};

pub(super) const CONFIG_FILE: &str = "adapter_config.json";

/// The version whose fields are written.
const PEFT_VERSION: &str = "0.21.2";

/// The types of PEFT 0.21.2 that modl knows by name only.
const NOT_YET: &[&str] = &[
    "ADAMSS",
    "ADAPTION_PROMPT",
    "BEFT",
    "BONE",
    "C3A",
    "CARTRIDGE",
    "CPT",
    "DEFT",
    "DELORA",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "LILY",
    "MISS",
    "MULTITASK_PROMPT_TUNING",
    "OSF",
    "PEANUT",
    "POLY",
    "PSOFT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHADOW",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "WAVEFT",
    "XLORA",
];

/// What an adapter folder says of its adapter.
#[derive(Debug)]
pub struct AdapterConfig {
    pub(super) layout: Layout,
    /// The recipe of the module.
    pub module: Box<dyn ModuleConfig>,
    /// The sites that it was trained at.
    pub targets: Targets,
}

impl AdapterConfig {
    /// `LORA`.
    pub fn peft_type(&self) -> &'static str {
        self.layout.of.name
    }
}

/// Reads the configuration of an adapter folder, strictly.
///
/// # Errors
/// Where there is none, it is another project's or of a kind that modl does not have, or it asks
/// for something that modl would not do; every such field is named.
pub fn read_config(dir: impl AsRef<Path>) -> Result<AdapterConfig> {
    let path = dir.as_ref().join(CONFIG_FILE);
    parse(&path, read_fields(&path)?)
}

/// All that the file at `path` says.
pub(super) fn read_fields(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(|e| {
        Error::file(
            path,
            format!("cannot be read: {e}; PEFT keeps adapters that are not called `default` in a folder of their name below"),
        )
    })?;
    serde_json::from_str(&text)
        .map_err(|e| Error::file(path, format!("is not a table in JSON: {e}")))
}

/// What the fields of the file at `path` say of its adapter.
pub(super) fn parse(path: &Path, fields: Map<String, Value>) -> Result<AdapterConfig> {
    let of = find_type(path, &fields)?;
    let mut fields = Fields::new(path, fields);
    for name in ["peft_type", "peft_version", "inference_mode"] {
        fields.ignore(name);
    }
    let beside = Beside::read(&mut fields)?;
    let provenance = Provenance::read(&mut fields)?;
    let saved = provenance.saved.clone();
    let adapter = (of.read)(&mut fields, provenance)?;
    fields.finish()?;
    let (module, targets) = beside.join(saved.as_ref(), adapter)?;
    Ok(AdapterConfig { layout: Layout::new(of, module.as_ref())?, module, targets })
}

fn find_type(path: &Path, fields: &Map<String, Value>) -> Result<&'static PeftType> {
    let Some(name) = fields.get("peft_type").and_then(Value::as_str) else {
        // AdapterHub's file has the same name.
        if fields.contains_key("config") && fields.contains_key("hidden_size") {
            return Err(Error::unsupported(
                format!("{}, which is AdapterHub's and not PEFT's", path.display()),
                "read it with modl_compute::adapterhub::load",
            ));
        }
        return Err(Error::file(path, "has no `peft_type`; is it a PEFT adapter?"));
    };
    if let Some(found) = TYPES.iter().find(|t| t.name == name) {
        return Ok(found);
    }
    let here: Vec<&str> = TYPES.iter().map(|t| t.name).collect();
    if NOT_YET.contains(&name) {
        return Err(Error::unsupported(
            format!("the PEFT type {name} in {}", path.display()),
            format!("modl does not have it yet; it has {}", here.join(", ")),
        ));
    }
    Err(Error::unknown("peft_type", name, here.iter().chain(NOT_YET)))
}

/// PEFT's fields for a module at some of `sites`, all that the backbone has.
///
/// # Errors
/// [`Error::Unsupported`] where PEFT has no such kind.
pub(super) fn write_config(
    module: &dyn ModuleConfig,
    targets: &Targets,
    sites: &[Site],
) -> Result<(Layout, Provenance, Map<String, Value>)> {
    let taken = Taken::apart(module, targets)?;
    let kind = &taken.kind;
    let of = TYPES.iter().find(|t| t.kind == *kind).ok_or_else(|| {
        Error::unsupported(
            format!("saving a module of kind `{kind}` as a PEFT folder"),
            "PEFT has no format for it; use Modular::save_module",
        )
    })?;
    let (mut fields, provenance) = (of.write)(taken.config.clone())?;
    let common = json!({
        "auto_mapping": provenance.auto_mapping,
        "base_model_name_or_path": provenance.base_model_name_or_path,
        "inference_mode": true,
        "peft_type": of.name,
        "peft_version": PEFT_VERSION,
        "revision": provenance.revision,
        "task_type": provenance.task_type,
    });
    fields.extend(common.as_object().cloned().unwrap_or_default());
    // Each type has some of them, which its `write` has left open.
    let has_layers = fields.contains_key("layers_to_transform");
    let own = match &taken.targets {
        Some(targets) => write_targets(targets, &targets.select(sites)?, has_layers),
        None => write_targets(&Targets::names([""; 0]), &[], has_layers),
    };
    let stored = ("fan_in_fan_out".to_owned(), json!(provenance.fan_in_fan_out));
    let own = own.into_iter().chain([stored]);
    let own: Vec<_> = own.filter(|(name, _)| fields.contains_key(name)).collect();
    fields.extend(own);
    taken.write(provenance.saved.as_ref(), sites, &mut fields)?;
    Ok((Layout::new(of, module)?, provenance, fields))
}

/// The text of the file, with the keys sorted as PEFT sorts them.
pub(super) fn render(mut fields: Map<String, Value>) -> Result<String> {
    // Only the top level: in a pattern table the order has a meaning.
    fields.sort_keys();
    serde_json::to_string_pretty(&Value::Object(fields))
        .map_err(|e| Error::invalid("adapter_config.json", e.to_string()))
}

fn write_targets(targets: &Targets, sites: &[&Site], has_layers: bool) -> Map<String, Value> {
    // What is "all" depends on who reads it, so it is written out, as PEFT does; and so it is where
    // the type cannot say which layers.
    let all = match &targets.names {
        Names::Pattern(p) => p.starts_with("all-"),
        Names::Any(_) => true,
        Names::List(_) => false,
    };
    let names = if all || (targets.layers.is_some() && !has_layers) {
        Names::List(sites.iter().map(|s| s.path.clone()).collect())
    } else {
        targets.names.clone()
    };
    let pattern = (!targets.layers_pattern.is_empty()).then_some(&targets.layers_pattern);
    Map::from_iter([
        ("target_modules".to_owned(), json!(names)),
        ("exclude_modules".to_owned(), json!(targets.exclude)),
        ("layers_to_transform".to_owned(), json!(targets.layers)),
        ("layers_pattern".to_owned(), json!(pattern)),
    ])
}
