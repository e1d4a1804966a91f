//! Adapter folders of Hugging Face's PEFT: `adapter_config.json` + `adapter_model.safetensors`.
//!
//! Reading is strict where PEFT warns: a field that would change the result is either honoured or
//! refused by name, and tensors have to fit one by one. What is written is read by PEFT 0.21
//! without a warning.
//!
//! A further kind of PEFT adapter is one file with a `PeftType` and one line in `TYPES`.

mod adalora;
mod alone;
mod beside;
mod boft;
mod config;
mod fields;
mod folder;
mod former_names;
mod fourierft;
mod ia3;
mod ln_tuning;
mod loha;
mod lokr;
mod lora;
mod oft;
mod prompts;
mod provenance;
mod same_names;
mod trainable_tokens;
mod vera;

use modl_core::{ModuleConfig, ParamStore, Result, Targets, Tensors};
use serde_json::{Map, Value};

pub use alone::{Folder, LoraForm, LoraSite, where_they_stand, write_folder, write_lora};
pub use config::{AdapterConfig, read_config};
pub use folder::{load, save};
pub use provenance::{PromptDimensions, Provenance, Saved};

pub(crate) use fields::{Fields, number};
use lora::lora_fields;

/// The kinds of PEFT adapters that modl reads and writes.
const TYPES: &[PeftType] = &[
    lora::LORA,
    lora::DORA,
    adalora::ADALORA,
    boft::BOFT,
    fourierft::FOURIERFT,
    ia3::IA3,
    ln_tuning::LN_TUNING,
    loha::LOHA,
    lokr::LOKR,
    oft::OFT,
    prompts::P_TUNING,
    prompts::PREFIX_TUNING,
    prompts::PROMPT_TUNING,
    trainable_tokens::TRAINABLE_TOKENS,
    vera::VERA,
];

type Unpack = fn(Tensors, &ParamStore) -> Result<Tensors>;
type Pack = fn(Tensors, &mut Map<String, Value>) -> Result<Tensors>;

/// What a configuration says: the recipe of the module and its sites.
type Read = (Box<dyn ModuleConfig>, Targets);

/// The table that a literal is.
pub(crate) fn object(literal: Value) -> Map<String, Value> {
    match literal {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// PEFT's fields of one adapter.
type Written = (Map<String, Value>, Provenance);

/// One `peft_type`: how its configuration and its keys translate.
#[derive(Debug)]
struct PeftType {
    /// As in `peft_type`: `LORA`.
    name: &'static str,
    /// The kind of module: `lora`.
    kind: &'static str,
    /// Takes the fields that it understands, and makes the configuration and says where it stands
    /// (with [`read_targets`], where PEFT says it so).
    read: fn(&mut Fields, Provenance) -> Result<Read>,
    /// PEFT's fields of a configuration of `kind` in JSON, without those that all types share.
    write: fn(Value) -> Result<Written>,
    /// The key in the file of the parameter `SITE.PARAM`.
    key: fn(&str) -> String,
    /// From the tensors of the file to those that `key` names for the given parameters, where a
    /// file may hold them otherwise: what is not needed is left out, what is cut is made whole.
    unpack: Option<Unpack>,
    /// From the tensors that `key` names to those of the file, with what `write` said.
    pack: Option<Pack>,
}

impl PeftType {
    /// A type whose parameters stand in the file as they are, where the user's model has the site.
    const fn in_model(
        name: &'static str,
        kind: &'static str,
        read: fn(&mut Fields, Provenance) -> Result<Read>,
        write: fn(Value) -> Result<Written>,
    ) -> PeftType {
        let key = |param: &str| format!("{PREFIX}{param}");
        PeftType { name, kind, read, write, key, unpack: None, pack: None }
    }
}

/// PEFT wraps a model twice: `base_model` is its own object, `model` the user's.
const PREFIX: &str = "base_model.model.";

/// Where an adapter stands, in PEFT's fields.
fn read_targets(fields: &mut Fields) -> Result<Targets> {
    Ok(Targets {
        names: fields.required("target_modules")?,
        exclude: fields.optional("exclude_modules")?,
        layers: fields.one_or_many("layers_to_transform")?,
        layers_pattern: fields.one_or_many("layers_pattern")?.unwrap_or_default(),
    })
}
