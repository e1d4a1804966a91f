//! Adapter folders of AdapterHub's `adapters` library: `adapter_config.json` +
//! `adapter.safetensors`.
//!
//! The file of settings has the name of PEFT's; [`is_folder`] tells the two apart. Reading is as
//! strict as that of [`peft`](crate::peft): a setting that would change the result is honoured or
//! refused by name, and tensors have to fit one by one.
//!
//! A further method is one file with a `Method` and one line in `METHODS`.

mod bottleneck;
mod folder;
mod header;
mod lora;
mod places;

use modl_core::{ModuleConfig, Result, Targets};
use serde_json::{Map, Value};

pub use folder::{is_folder, load, save};

use crate::peft::Fields;
use header::Header;
use places::Places;

/// The methods that modl reads and writes.
const METHODS: &[Method] = &[bottleneck::BOTTLENECK, lora::LORA];

/// A configuration and its sites.
type Read = (Box<dyn ModuleConfig>, Targets);

/// One method: how its settings and its keys translate.
#[derive(Debug)]
struct Method {
    /// `architecture` in the settings; none for bottlenecks.
    architecture: Option<&'static str>,
    /// The kind of module that it writes.
    kind: &'static str,
    /// Takes the settings that it understands.
    read: fn(&mut Fields, &Header) -> Result<Read>,
    /// The settings of a configuration of `kind` in JSON at these places.
    write: fn(Value, &Places) -> Result<Map<String, Value>>,
    /// The key of the parameter that is called `param` at `site`, for the adapter `name`.
    key: fn(site: &str, param: &str, name: &str) -> String,
}
