//! A model on disk as named tensors: one safetensors file, or the shards that an index names.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use modl_core::shards::Index;
use modl_core::{Error, Result, parse_json};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;

use super::elements::{Stored, read_at};

/// The largest header that safetensors allows.
const HEADER: u64 = 100_000_000;

/// A model's tensors, known by name and read piece by piece.
#[derive(Debug)]
pub struct Source {
    /// How the configuration names it.
    pub name: String,
    /// The folder, or the file.
    pub path: PathBuf,
    /// `config.json`; null where there is none.
    pub config: Value,
    /// What else is known of its tensors, by their names: the file that a method asks for.
    pub beside: Option<Box<Source>>,
    files: Vec<Opened>,
    tensors: BTreeMap<String, Place>,
}

/// A file of tensors.
#[derive(Debug)]
struct Opened {
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// Where a tensor is.
#[derive(Debug, Clone)]
pub struct Place {
    /// Of what its elements are.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: u64,
    file: usize,
    offset: u64,
}

impl Source {
    /// Opens a folder with `model.safetensors`, the index of its shards, or `adapter_model.safetensors`;
    /// or a safetensors file.
    ///
    /// # Errors
    /// [`Error::File`] where there is none, a shard is missing or cut off, or two hold one name.
    pub fn open(name: &str, path: &Path) -> Result<Self> {
        let paths = if path.is_dir() { weights(path)? } else { vec![path.to_owned()] };
        let config = path.join("config.json");
        let config = if config.is_file() { read_json(&config)? } else { Value::Null };
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        for path in paths {
            let opened = Opened::open(path)?;
            for (name, place) in opened.places(files.len())? {
                if tensors.insert(name.clone(), place).is_some() {
                    let problem = format!("holds `{name}`, which another shard holds, too");
                    return Err(Error::file(&opened.path, problem));
                }
            }
            files.push(opened);
        }
        let (name, path) = (name.to_owned(), path.to_owned());
        Ok(Source { name, path, config, beside: None, files, tensors })
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Place> {
        &self.tensors
    }

    /// Where a tensor is.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    pub fn place(&self, name: &str) -> Result<&Place> {
        let kind = || format!("tensor of {}", self.path.display());
        let known = || Error::unknown(kind(), name, self.tensors.keys());
        self.tensors.get(name).ok_or_else(known)
    }

    /// A tensor's numbers, rounded to `rounded` where that is narrower.
    ///
    /// # Errors
    /// What [`Source::place`] gives.
    pub fn elements(&self, name: &str, rounded: Option<Dtype>) -> Result<Stored<'_>> {
        let place = self.place(name)?;
        let opened = self.file(place)?;
        let (file, path) = (&opened.file, opened.path.as_path());
        Ok(Stored { file, path, offset: place.offset, dtype: place.dtype, rounded })
    }

    /// Reads the bytes of a tensor from one place on.
    pub(crate) fn bytes(&self, place: &Place, at: u64, out: &mut [u8]) -> Result<()> {
        let opened = self.file(place)?;
        read_at(&opened.file, &opened.path, out, place.offset + at)
    }

    /// What tells these files from others: paths, lengths and times of change.
    pub(crate) fn identity(&self) -> Vec<String> {
        let one = |f: &Opened| {
            let changed = f.file.metadata().and_then(|m| m.modified());
            format!("{} {} {changed:?}", f.path.display(), f.bytes)
        };
        let beside = self.beside.iter().flat_map(|s| &s.files);
        self.files.iter().chain(beside).map(one).collect()
    }

    /// Where the statistics of a tensor are, if there are any.
    pub(crate) fn statistics(&self, tensor: &str) -> Option<&Place> {
        self.beside.as_ref()?.tensors.get(tensor)
    }

    fn file(&self, place: &Place) -> Result<&Opened> {
        self.files.get(place.file).ok_or_else(|| Error::file(&self.path, "has lost a file"))
    }
}

impl Opened {
    fn open(path: PathBuf) -> Result<Self> {
        let broken = |e: std::io::Error| Error::file(&path, format!("cannot be read: {e}"));
        let file = File::open(&path).map_err(broken)?;
        let bytes = file.metadata().map_err(broken)?.len();
        Ok(Opened { path, file, bytes })
    }

    /// The header's tensors, checked against the file's length.
    fn places(&self, file: usize) -> Result<Vec<(String, Place)>> {
        let broken = |why: String| {
            let problem = format!("is not a whole safetensors file ({why}); fetch it again");
            Error::file(&self.path, problem)
        };
        let mut length = [0; 8];
        read_at(&self.file, &self.path, &mut length, 0).map_err(|_| broken("too short".into()))?;
        let length = u64::from_le_bytes(length);
        if length > HEADER || length + 8 > self.bytes {
            return Err(broken("its header is cut off".into()));
        }
        let mut header = vec![0; length as usize + 8];
        read_at(&self.file, &self.path, &mut header, 0)?;
        let text = header.get(8..).unwrap_or_default();
        let metadata: Metadata = serde_json::from_slice(text).map_err(|e| broken(e.to_string()))?;
        // Of two entries of one name the reader would take the last.
        parse_json(&self.path, &String::from_utf8_lossy(text))?;
        let start = length + 8;
        if start + metadata.data_len() as u64 != self.bytes {
            return Err(broken("its length is not what the header says".into()));
        }
        let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            let (from, to) = info.data_offsets;
            let (offset, bytes) = (start + from as u64, (to - from) as u64);
            (name, Place { dtype: info.dtype, shape: info.shape.clone(), bytes, file, offset })
        };
        Ok(metadata.tensors().into_iter().map(place).collect())
    }
}

/// The files with the tensors of a folder.
fn weights(dir: &Path) -> Result<Vec<PathBuf>> {
    for whole in ["model.safetensors", "adapter_model.safetensors"] {
        if dir.join(whole).is_file() {
            return Ok(vec![dir.join(whole)]);
        }
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.is_file() {
        let other = dir.join("pytorch_model.bin").is_file();
        let problem = match other {
            true => {
                "has PyTorch's own files only, which cannot be read piece by piece; save it as safetensors"
            }
            false => "has no model.safetensors and no model.safetensors.index.json",
        };
        return Err(Error::file(dir, problem));
    }
    let paths = Index::read(&index)?.files();
    let missing: Vec<String> = paths
        .iter()
        .filter(|p| !p.is_file())
        .filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned()))
        .collect();
    if !missing.is_empty() {
        let problem = format!("names shards that are not there: {}", missing.join(", "));
        return Err(Error::file(&index, problem));
    }
    Ok(paths)
}

/// A file of JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("is not JSON: {e}")))
}
