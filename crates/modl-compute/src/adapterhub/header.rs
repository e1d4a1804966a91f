//! What stands around the settings in `adapter_config.json`.

use std::path::Path;

use modl_core::{Backbone, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub(super) const CONFIG_FILE: &str = "adapter_config.json";

/// The version whose fields are written.
const VERSION: &str = "adapters.1.3.0";

/// The file without the settings themselves.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    /// The settings of the method.
    pub(super) config: Map<String, Value>,
    pub(super) hidden_size: i64,
    pub(super) model_class: String,
    #[serde(default)]
    pub(super) model_name: Option<String>,
    pub(super) model_type: String,
    /// The name under which the adapter stands in the keys.
    pub(super) name: String,
    /// Of the library; missing in the files of its predecessor.
    #[serde(default)]
    pub(super) version: Option<String>,
}

/// # Errors
/// Where it is not known what AdapterHub calls the parts of a backbone.
pub(super) fn check_family(backbone: &dyn Backbone) -> Result<()> {
    let kind = backbone.config().get("model_type").and_then(Value::as_str).unwrap_or("?");
    if kind.contains("bert") {
        return Ok(());
    }
    Err(Error::unsupported(
        format!("adapters of AdapterHub on a {kind}"),
        "its names are known for BERT and its kin; use PEFT's format, or Modular::save_module",
    ))
}

impl Header {
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path)
            .map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?;
        let value = modl_core::parse_json(&path, &text)?;
        if value.get("peft_type").is_some() {
            let advice = "read it with modl_compute::peft::load";
            return Err(Error::unsupported(format!("{}, which is PEFT's", path.display()), advice));
        }
        serde_json::from_value(value)
            .map_err(|e| Error::file(&path, format!("is not an adapter of AdapterHub: {e}")))
    }

    /// Whether a version of the library before this one wrote the file.
    pub(super) fn is_before(&self, wanted: [u32; 2]) -> bool {
        let own = self.version.as_deref().and_then(|v| v.strip_prefix("adapters."));
        let Some(own) = own else { return false };
        let mut parts = own.split('.').map(|n| n.parse().unwrap_or(0));
        [parts.next().unwrap_or(0), parts.next().unwrap_or(0)] < wanted
    }

    /// Refuses a backbone of another architecture or width.
    pub(super) fn check(&self, path: &Path, backbone: &dyn Backbone) -> Result<()> {
        let of = |key: &str| backbone.config().get(key).cloned().unwrap_or(Value::Null);
        let (kind, width) = (of("model_type"), of("hidden_size"));
        check_family(backbone)?;
        if kind == json!(self.model_type) && width == json!(self.hidden_size) {
            return Ok(());
        }
        let problem = format!(
            "was made for a {} of width {}, this backbone is a {kind} of width {width}",
            self.model_type, self.hidden_size
        );
        Err(Error::file(path, problem))
    }

    /// For an adapter called `name` on `backbone`.
    pub(super) fn write(name: &str, config: Map<String, Value>, backbone: &dyn Backbone) -> Value {
        let known = backbone.config();
        let of = |key: &str| known.get(key).cloned().unwrap_or(Value::Null);
        let class = known.pointer("/architectures/0").cloned().unwrap_or(Value::Null);
        json!({
            "config": config,
            "hidden_size": of("hidden_size"),
            "model_class": class,
            "model_name": of("_name_or_path").as_str().unwrap_or(""),
            "model_type": of("model_type"),
            "name": name,
            "version": VERSION,
        })
    }
}
