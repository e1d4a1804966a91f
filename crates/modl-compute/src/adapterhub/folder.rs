//! Adapter folders: loading into a model, saving from one.

use std::collections::HashMap;
use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Error, Modular, ParamStore, Result, ResultExt, Select, Site, Tensors};
use serde_json::Value;

use super::header::{CONFIG_FILE, Header};
use super::{Fields, METHODS, Method, Places};

const WEIGHTS_FILE: &str = "adapter.safetensors";
const PICKLE_FILE: &str = "pytorch_adapter.bin";

/// Whether a folder holds an adapter of AdapterHub's, and not one of PEFT's, whose file of settings
/// has the same name.
pub fn is_folder(dir: impl AsRef<Path>) -> bool {
    let text = std::fs::read_to_string(dir.as_ref().join(CONFIG_FILE)).unwrap_or_default();
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    value.get("peft_type").is_none() && value.get("config").is_some_and(Value::is_object)
}

fn method(header: &Header, path: &Path) -> Result<&'static Method> {
    let wanted = header.config.get("architecture").and_then(Value::as_str);
    METHODS.iter().find(|m| m.architecture == wanted).ok_or_else(|| {
        let names: Vec<&str> =
            METHODS.iter().map(|m| m.architecture.unwrap_or("bottleneck")).collect();
        Error::unsupported(
            format!("the architecture {} in {}", wanted.unwrap_or("?"), path.display()),
            format!("of AdapterHub's, modl has {}", names.join(", ")),
        )
    })
}

/// The key of a parameter `SITE.PARAM` of an adapter that stands at `sites`.
fn key(method: &Method, sites: &[Site], full: &str, name: &str) -> Result<String> {
    let at = sites.iter().filter_map(|s| {
        let param = full.strip_prefix(s.path.as_str())?.strip_prefix('.')?;
        Some((s.path.as_str(), param))
    });
    match at.max_by_key(|(site, _)| site.len()) {
        Some((site, param)) => Ok((method.key)(site, param, name)),
        None => Err(Error::invalid(full, "is a parameter of no site")),
    }
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
    let method = method(&header, &path)?;
    header.check(&path, model.backbone())?;
    let mut settings = header.config.clone();
    settings.remove("architecture");
    let mut fields = Fields::new(&path, settings);
    let (module, targets) = (method.read)(&mut fields, &header)?;
    fields.finish()?;
    let weights = dir.join(WEIGHTS_FILE);
    if !weights.exists() && dir.join(PICKLE_FILE).exists() {
        return Err(Error::unsupported(
            format!("{}: a pickle file can run any code", dir.join(PICKLE_FILE).display()),
            "save the adapter again with `save_adapter(DIR, NAME, use_safetensors=True)`",
        ));
    }
    let file = Checkpoint::open(weights)?;
    let sites: Vec<Site> = targets.select(model.backbone().sites())?.into_iter().cloned().collect();
    let params = model.parameters_of(module.as_ref(), &targets)?;
    let mut by_key = ParamStore::new();
    for (full, p) in params.iter() {
        by_key.insert(key(method, &sites, full, &header.name)?, p.tensor().clone())?;
    }
    let found = file.tensors(model.device())?.into_iter();
    let found: Tensors = found.map(|(k, t)| (model.backbone().canonical(&k), t)).collect();
    by_key.load(&file.path().display().to_string(), found.iter(), &Select::all())?;
    let name = name.unwrap_or(&header.name).to_owned();
    model.attach_with(&name, module, &targets, &params)?;
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
    let method = METHODS.iter().find(|m| m.kind == module.kind()).ok_or_else(|| {
        Error::unsupported(
            format!("saving a module of kind `{}` as an AdapterHub folder", module.kind()),
            "AdapterHub has no format for it; use Modular::save_module",
        )
    })?;
    let all = model.backbone().sites();
    let sites: Vec<Site> = targets.select(all)?.into_iter().cloned().collect();
    let settings = (method.write)(module.to_json()?, &Places::new(&sites, all)?)?;
    let header = Header::write(name, settings, model.backbone());
    let prefix = format!("modules.{name}.");
    let select = Select::new(format!("{prefix}*"));
    let mut tensors = Tensors::new();
    for (full, t) in model.params().select(&select) {
        let own = full.strip_prefix(&prefix).unwrap_or(full);
        tensors.set(key(method, &sites, own, name)?, t.clone());
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    checkpoint::save(dir.join(WEIGHTS_FILE), tensors.iter(), metadata)?;
    let text = serde_json::to_string_pretty(&header)
        .map_err(|e| Error::invalid(CONFIG_FILE, e.to_string()))
        .at(name)?;
    // Last: a folder without it is no adapter yet.
    checkpoint::write_whole(dir.join(CONFIG_FILE), text.as_bytes())
}
