//! A model on disk as named tensors: one file, or the shards that an index names, of safetensors' or
//! PyTorch's own format.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use modl_core::checkpoint::{TensorFile as _, TorchFile, dtype};
use modl_core::shards::Index;
use modl_core::{Error, Result, parse_json};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;

use super::Elements;
use super::elements::{Adapted, Stored, read_at, width, with_bytes};

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
    /// The adapter that is merged into it as it is read: paths, lengths and times of its files.
    adapter: Vec<String>,
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
    adapted: Option<Arc<dyn Adapted>>,
}

impl Source {
    /// Opens a folder with `model.safetensors`, the index of its shards, `adapter_model.safetensors`, or
    /// `pytorch_model.bin` or the index of such; or a file of one of these formats.
    ///
    /// # Errors
    /// [`Error::File`] where there is none, a shard is missing or cut off, or two hold one name;
    /// [`Error::Unsupported`] where a file of PyTorch's holds anything but tensors in order.
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
        Ok(Source { name, path, config, beside: None, files, tensors, adapter: Vec::new() })
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Place> {
        &self.tensors
    }

    /// Its files of tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|f| f.path.as_path())
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
        Ok(opened.elements(place, rounded))
    }

    /// Merges an adapter into it from now on: what is done to the tensors of these names as they are read.
    ///
    /// # Errors
    /// Where a name is unknown, is named twice, or is of no tensor of floats.
    pub fn adapt(
        &mut self,
        adapter: &Path,
        changes: impl IntoIterator<Item = (String, Arc<dyn Adapted>)>,
    ) -> Result<()> {
        for (name, change) in changes {
            self.place(&name)?;
            let Some(place) = self.tensors.get_mut(&name) else { continue };
            if width(place.dtype).is_none() || place.adapted.is_some() {
                let problem = format!("changes `{name}` twice, or it holds no floats");
                return Err(Error::file(adapter, problem));
            }
            place.adapted = Some(change);
        }
        self.adapter.extend(identity(adapter));
        Ok(())
    }

    /// Whether an adapter is merged into it as it is read: its folder is not all of it.
    pub fn is_adapted(&self) -> bool {
        !self.adapter.is_empty()
    }

    /// Bytes of memory that its adapter holds.
    pub(crate) fn held(&self) -> u64 {
        self.tensors.values().filter_map(|p| p.adapted.as_ref()).map(|a| a.bytes()).sum()
    }

    /// Reads the bytes of a tensor from one place on.
    pub(crate) fn bytes(&self, place: &Place, at: u64, out: &mut [u8]) -> Result<()> {
        let opened = self.file(place)?;
        if let (Some(_), Some(width)) = (&place.adapted, width(place.dtype)) {
            let mut values = vec![0.0; out.len() / width];
            opened.elements(place, None).read(at as usize / width, &mut values)?;
            with_bytes(&values, place.dtype, |bytes| out.copy_from_slice(bytes));
            return Ok(());
        }
        read_at(&opened.file, &opened.path, out, place.offset + at)
    }

    /// What tells these files from others: paths, lengths and times of change.
    pub(crate) fn identity(&self) -> Vec<String> {
        let one = |f: &Opened| {
            let changed = f.file.metadata().and_then(|m| m.modified());
            format!("{} {} {changed:?}", f.path.display(), f.bytes)
        };
        let beside = self.beside.iter().flat_map(|s| &s.files);
        let files = self.files.iter().chain(beside).map(one);
        files.chain(self.adapter.iter().cloned()).collect()
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

    fn elements<'a>(&'a self, place: &'a Place, rounded: Option<Dtype>) -> Stored<'a> {
        let (file, path, offset) = (&self.file, self.path.as_path(), place.offset);
        Stored {
            file,
            path,
            offset,
            dtype: place.dtype,
            rounded,
            adapted: place.adapted.as_deref(),
        }
    }

    /// Where the tensors are.
    fn places(&self, file: usize) -> Result<Vec<(String, Place)>> {
        let torch =
            self.path.extension().is_some_and(|e| ["bin", "pt", "pth"].iter().any(|t| e == *t));
        if torch { self.in_torch(file) } else { self.in_header(file) }
    }

    /// A file of PyTorch's has the numbers of a tensor in one place, too; nothing in it is executed.
    fn in_torch(&self, file: usize) -> Result<Vec<(String, Place)>> {
        let torch = TorchFile::open(&self.path)?;
        let one = |name: String| {
            let ((shape, kind), range) = (torch.info(&name)?, torch.bytes_of(&name)?);
            let place = Place {
                dtype: dtype(&name, kind)?,
                shape: shape.iter().map(|n| *n as usize).collect(),
                bytes: range.len() as u64,
                file,
                offset: range.start as u64,
                adapted: None,
            };
            Ok((name, place))
        };
        torch.names().into_iter().map(one).collect()
    }

    /// The header's tensors, checked against the file's length.
    fn in_header(&self, file: usize) -> Result<Vec<(String, Place)>> {
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
            let (dtype, shape) = (info.dtype, info.shape.clone());
            (name, Place { dtype, shape, bytes, file, offset, adapted: None })
        };
        Ok(metadata.tensors().into_iter().map(place).collect())
    }
}

/// What tells a folder's files from changed ones: their names, lengths and times.
pub fn identity(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let one = |path: PathBuf| {
        let known = std::fs::metadata(&path).map(|m| (m.len(), m.modified().ok()));
        format!("{} {known:?}", path.display())
    };
    let mut known: Vec<String> = files.map(|f| one(f.path())).collect();
    known.sort();
    known
}

/// The files with the tensors of a folder.
fn weights(dir: &Path) -> Result<Vec<PathBuf>> {
    for whole in ["model.safetensors", "adapter_model.safetensors"] {
        if dir.join(whole).is_file() {
            return Ok(vec![dir.join(whole)]);
        }
    }
    let indices = ["model.safetensors.index.json", "pytorch_model.bin.index.json"];
    let index = indices.iter().map(|name| dir.join(name)).find(|path| path.is_file());
    let Some(index) = index else {
        let whole = dir.join("pytorch_model.bin");
        if whole.is_file() {
            return Ok(vec![whole]);
        }
        let problem = "has no model.safetensors, no pytorch_model.bin and no index of shards";
        return Err(Error::file(dir, problem));
    };
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
