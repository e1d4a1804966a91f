//! Adapters named on the command line: `[NAME=]PATH`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result};
use modl_compute::{adapterhub, peft};
use modl_core::{Modular, Registry};

/// An adapter: a folder of PEFT's or AdapterHub's, or a module file of modl's.
#[derive(Debug, Clone)]
pub(crate) struct AdapterArg {
    pub(crate) name: Option<String>,
    pub(crate) path: PathBuf,
}

impl FromStr for AdapterArg {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.split_once('=') {
            Some((name, path)) if !name.contains('/') => {
                AdapterArg { name: Some(name.into()), path: path.into() }
            }
            _ => AdapterArg { name: None, path: text.into() },
        })
    }
}

impl AdapterArg {
    /// Attaches it, and says under which name.
    pub(crate) fn attach(&self, model: &mut Modular, registry: &Registry) -> Result<String> {
        let name = self.name.as_deref();
        let attached = if adapterhub::is_folder(&self.path) {
            adapterhub::load(model, &self.path, name)
        } else if self.path.is_dir() {
            peft::load(model, &self.path, name)
        } else {
            model.load_module(&self.path, name, registry)
        };
        attached.with_context(|| format!("adapter {}", self.path.display()))
    }
}

/// Whether a folder holds an adapter and not a model.
pub(crate) fn is_adapter(path: &Path) -> bool {
    path.join("adapter_config.json").is_file()
}
