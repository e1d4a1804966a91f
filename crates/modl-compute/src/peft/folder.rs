//! Adapter folders: loading into a model, saving from one.

use std::collections::HashMap;
use std::path::Path;

use modl_core::checkpoint;
use modl_core::{Error, Modular, Result, Site, Tensors, no_grad};

use super::beside::{narrow, refuse_tied_tokens};
use super::config::{CONFIG_FILE, parse, read_config, read_fields, render, write_config};
use super::prompts::stands;
use super::{PREFIX, PeftType, Provenance, former_names};
use crate::adapter_folder::Keys;

pub(super) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What older versions write, by `torch.save`.
pub(super) const PICKLE_FILE: &str = "adapter_model.bin";
/// The metadata key of the backbone's fingerprint. PEFT writes none and ignores it.
pub(super) const BASE_KEY: &str = "modl.base";

/// Attaches the adapter of a PEFT folder, under `name` or the folder's own name, and returns the
/// name. Tensors in f16 or bf16 become the kind in which the model trains modules.
///
/// # Errors
/// Where the configuration asks for something that modl would not do, the adapter was made for
/// another backbone, or the tensors are not exactly those that it has to have: all that are
/// missing, unexpected or misshapen are named. Then the model is as it was.
pub fn load(model: &mut Modular, dir: impl AsRef<Path>, name: Option<&str>) -> Result<String> {
    let dir = dir.as_ref();
    let mut config = read_config(dir)?;
    let file = checkpoint::open_first(dir, &[WEIGHTS_FILE, PICKLE_FILE])?;
    if former_names::used(&file.names(), model.backbone()) {
        let path = dir.join(CONFIG_FILE);
        let mut fields = read_fields(&path)?;
        former_names::translate(&mut fields, &config.targets, model.backbone())?;
        config = parse(&path, fields)?;
    }
    if let Some(base) = file.metadata().get(BASE_KEY) {
        model.check_base(file.path(), base)?;
    }
    let name = name.map_or_else(|| folder_name(dir), str::to_owned);
    let targets = narrow(config.module.as_ref(), config.targets)?;
    refuse_tied_tokens(config.module.as_ref(), &targets, model.backbone())?;
    let keys = Keys {
        key: &|param| Ok(config.layout.key(param).0),
        canonical: &|backbone, key| match key.strip_prefix(PREFIX) {
            Some(path) => format!("{PREFIX}{}", backbone.canonical(path)),
            None => key.to_owned(),
        },
        unpack: &|found, wanted| match config.layout.of.unpack {
            Some(unpack) => unpack(found, wanted),
            None => Ok(found),
        },
    };
    keys.attach(model, &name, config.module, &targets, file.as_ref())?;
    Ok(name)
}

/// The last part of a path as a module's name, or `default`, as PEFT calls an adapter.
fn folder_name(dir: &Path) -> String {
    let last = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let name: String = last.chars().map(|c| if fits(c) { c } else { '_' }).collect();
    if name.is_empty() { "default".into() } else { name }
}

/// Saves an attached module as a PEFT folder, which is made where it does not exist. Each file
/// appears whole or not at all.
///
/// # Errors
/// Where there is no module of that name, PEFT has no format for its kind, or the disk refuses.
pub fn save(model: &Modular, name: &str, dir: impl AsRef<Path>) -> Result<()> {
    let dir = dir.as_ref();
    let (module, targets) = model.recipe(name)?;
    let all = model.backbone().sites();
    let (layout, provenance, mut fields) = write_config(module, targets, all)?;
    if let Some(only) = stands(module, all)? {
        same_sites(layout.of.name, &targets.select(all)?, &only.select(all)?)?;
    }
    let (mut tensors, mut beside) = (Tensors::new(), Tensors::new());
    for (param, p) in model.params().below(&format!("modules.{name}.")).iter() {
        let (key, own) = layout.key(param);
        (if own { &mut tensors } else { &mut beside }).set(key, p.tensor().clone());
    }
    if let Some(pack) = layout.of.pack {
        tensors = no_grad(|| pack(tensors, &mut fields))?;
    }
    beside.iter().for_each(|(key, t)| tensors.set(key.to_owned(), t.clone()));
    let metadata = HashMap::from([
        ("format".to_owned(), "pt".to_owned()),
        (BASE_KEY.to_owned(), model.backbone().fingerprint()?),
    ]);
    checkpoint::save(dir.join(WEIGHTS_FILE), tensors.iter(), metadata)?;
    checkpoint::write_whole(dir.join("README.md"), card(layout.of, &provenance).as_bytes())?;
    // Last: a folder without it is no adapter yet.
    checkpoint::write_whole(dir.join(CONFIG_FILE), render(fields)?.as_bytes())
}

/// # Errors
/// Where a module stands at other sites than the only ones that its type can stand at.
fn same_sites(peft_type: &str, stands: &[&Site], can: &[&Site]) -> Result<()> {
    let missing = can.iter().find(|c| !stands.contains(c)).map(|s| ("not at", s.path.as_str()));
    let extra = || stands.iter().find(|s| !can.contains(s)).map(|s| ("at", s.path.as_str()));
    match missing.or_else(extra) {
        None => Ok(()),
        Some((how, path)) => Err(Error::unsupported(
            format!("a PEFT folder of {peft_type} for a module that is {how} `{path}`"),
            "the file does not say where it stands, and PEFT puts it everywhere; use \
             Modular::save_module",
        )),
    }
}

/// A model card with the front matter that PEFT writes.
pub(super) fn card(peft_type: &PeftType, provenance: &Provenance) -> String {
    let kind = peft_type.kind;
    let base = provenance.base_model_name_or_path.as_deref();
    // A string of JSON is one of YAML, whatever is in it.
    let yaml = |text: String| serde_json::Value::from(text).to_string();
    let of = base.map(|b| format!("base_model: {}\n", yaml(b.into()))).unwrap_or_default();
    let tag = base.map(|b| format!("- {}\n", yaml(format!("base_model:adapter:{b}"))));
    let tag = tag.unwrap_or_default();
    let base = base.unwrap_or("the backbone that it was trained on");
    format!(
        "---\n{of}library_name: peft\ntags:\n{tag}- {kind}\n---\n\n\
         # {} adapter\n\n\
         Made with modl for {base}, in PEFT's format:\n\n\
         ```python\n\
         from peft import PeftModel\n\n\
         model = PeftModel.from_pretrained(base_model, \"path/to/this/folder\")\n\
         ```\n",
        peft_type.name
    )
}
