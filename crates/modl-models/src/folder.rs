//! Hugging Face folders: `config.json` and the tensors beside it, in one file or in shards.
//!
//! Loading is strict: names and shapes are compared before the first tensor is read, and all that
//! does not fit is in one error.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use modl_core::checkpoint::{self, TensorFile};
use modl_core::shards::Index;
use modl_core::{Error, Kind, Mismatch, ParamStore, Result, ResultExt, is_float, nearest};
use serde_json::Value;

use crate::LoadOptions;

pub(crate) const CONFIG: &str = "config.json";
/// What the files with the tensors that are written are called, before `.safetensors`.
pub(crate) const STEM: &str = "model";
/// The tensors in one file, and the index of several; the first that is there is read.
pub(crate) const WEIGHTS: [(&str, &str); 2] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
];

/// Names and shapes of an architecture's parameters.
pub(crate) type Shapes = BTreeMap<String, Vec<i64>>;

/// Reads `config.json`.
pub(crate) fn read_config(dir: &Path) -> Result<Value> {
    read_json(&dir.join(CONFIG))
}

/// Reads a file of JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(|e| {
        Error::file(
            path,
            format!("cannot be read: {e}; a model folder has {CONFIG} and its weights"),
        )
    })?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("is not JSON: {e}")))
}

/// The tensors of a folder under the names that the architecture gives them.
#[derive(Debug)]
pub(crate) struct Weights {
    source: String,
    files: Vec<Box<dyn TensorFile>>,
    /// By the architecture's name: the file and the name there.
    found: BTreeMap<String, (usize, String)>,
    /// How the names of those end that are kept in f32 at least.
    wide: &'static [&'static str],
}

impl Weights {
    /// Opens the files. `canonical` says how the architecture names a stored tensor, or `None` for
    /// one that is not part of it.
    pub(crate) fn open(dir: &Path, canonical: impl Fn(&str) -> Option<String>) -> Result<Self> {
        Self::of(dir, files(dir)?, canonical)
    }

    /// [`Weights::open`] for files that are open; `source` is for errors.
    pub(crate) fn of(
        source: &Path,
        files: Vec<Box<dyn TensorFile>>,
        canonical: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let mut found = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for stored in file.names() {
                let Some(name) = canonical(&stored) else { continue };
                if let Some((_, other)) = found.insert(name, (i, stored.clone())) {
                    let problem = format!("holds the same parameter as `{stored}` and `{other}`");
                    return Err(Error::file(file.path(), problem));
                }
            }
        }
        Ok(Weights { source: source.display().to_string(), files, found, wide: &[] })
    }

    /// Keeps parameters whose names end so in f32 at least.
    pub(crate) fn wide(self, ends: &'static [&'static str]) -> Self {
        Weights { wide: ends, ..self }
    }

    /// Whether there is a parameter of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.found.contains_key(name)
    }

    /// Reads the parameters, which have to be exactly the wanted ones, converted as `options` say;
    /// without a wish all get the kind in which `leading` is stored.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with all that is missing, unexpected or misshapen.
    pub(crate) fn load(
        &self,
        wanted: &Shapes,
        leading: &str,
        options: &LoadOptions,
    ) -> Result<ParamStore> {
        self.fit(wanted)?;
        let kind = match options.kind {
            Some(kind) => kind,
            None => self.info(leading)?.1,
        };
        if !is_float(kind) {
            return Err(Error::unsupported(
                format!("computing in {kind:?}"),
                "set LoadOptions::kind to Kind::Float or Kind::BFloat16",
            ));
        }
        let mut params = ParamStore::new();
        for (name, (file, stored)) in &self.found {
            let tensor = self.file(*file)?.tensor(stored, options.device)?;
            let kind = match self.wide.iter().any(|end| name.ends_with(end)) {
                true if kind != Kind::Double => Kind::Float,
                _ => kind,
            };
            params.insert(name.as_str(), tensor.to_kind(kind).at(name)?)?;
        }
        Ok(params)
    }

    fn fit(&self, wanted: &Shapes) -> Result<()> {
        let free = || self.found.keys().map(String::as_str).filter(|n| !wanted.contains_key(*n));
        let open = || wanted.keys().map(String::as_str).filter(|n| !self.has(n));
        let mut m = Mismatch { source: self.source.clone(), ..Mismatch::default() };
        for name in open() {
            m.missing.push((name.to_owned(), nearest(name, free()).map(str::to_owned)));
        }
        for name in free() {
            m.unexpected.push((name.to_owned(), nearest(name, open()).map(str::to_owned)));
        }
        for (name, shape) in wanted.iter().filter(|(n, _)| self.has(n)) {
            let (found, _) = self.info(name)?;
            if found != *shape {
                m.misshapen.push((name.clone(), shape.clone(), found));
            }
        }
        if m.is_empty() { Ok(()) } else { Err(m.into()) }
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        let known = || Error::unknown("parameter", name, self.found.keys());
        let (file, stored) = self.found.get(name).ok_or_else(known)?;
        self.file(*file)?.info(stored)
    }

    fn file(&self, i: usize) -> Result<&dyn TensorFile> {
        self.files
            .get(i)
            .map(AsRef::as_ref)
            .ok_or_else(|| Error::file(&self.source, "has lost one of its files"))
    }
}

/// The files with the tensors of a folder: one, or those that the index names.
pub(crate) fn files(dir: &Path) -> Result<Vec<Box<dyn TensorFile>>> {
    let there = |name: &str| dir.join(name).exists();
    match WEIGHTS.iter().find(|(whole, index)| there(whole) || there(index)) {
        Some((whole, index)) if !there(whole) => shards(&dir.join(index)),
        _ => Ok(vec![checkpoint::open_first(dir, &WEIGHTS.map(|(whole, _)| whole))?]),
    }
}

/// The files that the index names.
fn shards(path: &Path) -> Result<Vec<Box<dyn TensorFile>>> {
    Index::read(path)?.files().into_iter().map(checkpoint::open).collect()
}
