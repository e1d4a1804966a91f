//! Adapter folders of AdapterHub's `adapters` library: `adapter_config.json` +
//! `adapter.safetensors`.
//!
//! The file of settings has the name of PEFT's; [`is_folder`] tells the two apart. Reading is as
//! strict as that of [`peft`](crate::peft): a setting that would change the result is honoured or
//! refused by name, and tensors have to fit one by one.
//!
//! A further method is one file with a `Method` and one line in `METHODS`.

mod bottleneck;
mod compacter;
mod dora;
mod folder;
mod header;
mod ia3;
mod invertible;
mod lora;
mod parts;
mod places;
mod prefix;
mod prompt;
mod reft;
mod settings;
mod summary;
mod vera;

use modl_core::{ModuleConfig, Result, Targets, Tensors};
use serde_json::{Map, Value};

pub use folder::{is_folder, load, save};
pub use summary::{Summary, summary};

use crate::peft::Fields;
use header::Header;
use places::{Places, Standing};

/// The methods that modl reads and writes. Where settings ask for several, a union has them in
/// this order.
const METHODS: &[Method] = &[
    invertible::INVERTIBLE,
    bottleneck::BOTTLENECK,
    compacter::COMPACTER,
    lora::LORA,
    dora::DORA,
    ia3::IA3,
    vera::VERA,
    prefix::PREFIX_TUNING,
    prompt::PROMPT_TUNING,
    reft::REFT,
];

/// A configuration and its sites.
type Read = (Box<dyn ModuleConfig>, Targets);

/// From tensors under some keys to tensors under others, for a configuration in JSON.
type Repack = fn(Tensors, &Value, &Standing) -> Result<Tensors>;

/// One method: how its settings and its keys translate.
#[derive(Debug)]
struct Method {
    /// `architecture` in the settings; none for bottlenecks and what stands in their settings.
    architecture: Option<&'static str>,
    /// Whether settings of that architecture ask for it.
    asked: fn(&Map<String, Value>) -> bool,
    /// The kind of module that it writes.
    kind: &'static str,
    /// Takes the settings that it understands.
    read: fn(&mut Fields, &Header) -> Result<Read>,
    /// The settings of a configuration of `kind` in JSON.
    write: fn(Value, &Standing) -> Result<Map<String, Value>>,
    /// The key of a parameter.
    key: fn(&Param) -> String,
    /// From the tensors of a file to those that `key` names, where the two differ.
    unpack: Option<Repack>,
    /// From the tensors that `key` names to those of a file.
    pack: Option<Repack>,
}

/// A parameter of a module and the words that its key is made of.
#[derive(Debug)]
struct Param<'a> {
    /// What the paths of the backbone start with: `bert.`, or nothing.
    model: &'a str,
    /// The path of the site; nothing for what all sites share.
    site: &'a str,
    /// Its name there.
    own: &'a str,
    /// The adapter's name.
    adapter: &'a str,
}
