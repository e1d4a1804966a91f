//! Adapter folders: loading into a model, saving from one.

use std::collections::HashMap;
use std::path::Path;

use modl_core::checkpoint;
use modl_core::{Error, Modular, Result, ResultExt, Tensors, no_grad};
use serde_json::Value;

use super::header::{CONFIG_FILE, Header, check_family};
use super::parts::{self, Parts};
use super::settings;
use crate::adapter_folder::Keys;

pub(super) const WEIGHTS_FILE: &str = "adapter.safetensors";
/// What it writes unless it is told otherwise, by `torch.save`.
pub(super) const PICKLE_FILE: &str = "pytorch_adapter.bin";

/// Whether a folder holds an adapter of AdapterHub's, and not one of PEFT's, whose file of settings
/// has the same name.
pub fn is_folder(dir: impl AsRef<Path>) -> bool {
    let text = std::fs::read_to_string(dir.as_ref().join(CONFIG_FILE)).unwrap_or_default();
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    value.get("peft_type").is_none() && value.get("config").is_some_and(Value::is_object)
}

/// Attaches the adapter of an AdapterHub folder, under `name` or the name in the file, and returns
/// the name.
///
/// # Errors
/// Where a setting asks for something that modl would not do, the backbone is another one, or the
/// tensors are not exactly those that it has to have; then the model is as it was.
pub fn load(model: &mut Modular, dir: impl AsRef<Path>, name: Option<&str>) -> Result<String> {
    let dir = dir.as_ref();
    let path = dir.join(CONFIG_FILE);
    let header = Header::read(dir)?;
    header.check(&path, model.backbone())?;
    let read = settings::read(&path, &header)?;
    let (module, targets) = parts::join(read)?;
    let file = checkpoint::open_first(dir, &[WEIGHTS_FILE, PICKLE_FILE])?;
    let parts = Parts::new(module.as_ref(), &targets, &header.name, model.backbone())?;
    let name = name.unwrap_or(&header.name).to_owned();
    let keys = Keys {
        key: &|full| parts.key(full),
        canonical: &|backbone, key| backbone.canonical(key),
        unpack: &|found, _| no_grad(|| parts.unpack(found)),
    };
    keys.attach(model, &name, module, &targets, file.as_ref())?;
    Ok(name)
}

/// Saves an attached module as an AdapterHub folder, which is made where it does not exist. Each
/// file appears whole or not at all.
///
/// # Errors
/// Where there is no module of that name, AdapterHub has no format for its kind or its sites, or
/// the disk refuses.
pub fn save(model: &Modular, name: &str, dir: impl AsRef<Path>) -> Result<()> {
    let dir = dir.as_ref();
    let (module, targets) = model.recipe(name)?;
    check_family(model.backbone())?;
    let parts = Parts::new(module, targets, name, model.backbone())?;
    let header = Header::write(name, parts.settings()?, model.backbone());
    let mut tensors = Tensors::new();
    for (full, p) in model.params().below(&format!("modules.{name}.")).iter() {
        tensors.set(parts.key(full)?, p.tensor().clone());
    }
    let tensors = no_grad(|| parts.pack(tensors))?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    checkpoint::save(dir.join(WEIGHTS_FILE), tensors.iter(), metadata)?;
    let text = serde_json::to_string_pretty(&header)
        .map_err(|e| Error::invalid(CONFIG_FILE, e.to_string()))
        .at(name)?;
    // Last: a folder without it is no adapter yet.
    checkpoint::write_whole(dir.join(CONFIG_FILE), text.as_bytes())
}
