//! Tensors in files: safetensors, mapped for reading, replaced whole when written; PyTorch's own
//! files, read.

use std::collections::HashMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::{Device, Error, Kind, Result, Tensor};

pub use crate::torch_file::TorchFile;
pub use crate::whole_file::{remove_unfinished, write_whole};

/// A file of named tensors.
pub trait TensorFile: Debug {
    /// The file.
    fn path(&self) -> &Path;

    /// The tensors' names, sorted.
    fn names(&self) -> Vec<String>;

    /// Shape and kind of a tensor.
    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)>;

    /// A tensor in the kind in which it is stored.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    fn tensor(&self, name: &str, device: Device) -> Result<Tensor>;

    /// The free text that the file carries, if any.
    fn metadata(&self) -> HashMap<String, String> {
        HashMap::new()
    }

    /// All tensors by name, sorted.
    fn tensors(&self, device: Device) -> Result<Vec<(String, Tensor)>> {
        self.names().into_iter().map(|n| Ok((n.clone(), self.tensor(&n, device)?))).collect()
    }
}

/// Opens a safetensors file or one of PyTorch's; what is in it tells which.
///
/// # Errors
/// What [`Checkpoint::open`] and [`TorchFile::open`] give.
pub fn open(path: impl AsRef<Path>) -> Result<Box<dyn TensorFile>> {
    let path = path.as_ref();
    if TorchFile::starts(&Mapped::open(path)?) {
        return Ok(Box::new(TorchFile::open(path)?));
    }
    Ok(Box::new(Checkpoint::open(path)?))
}

/// [`open`]s the first of `names` that is in the folder.
///
/// # Errors
/// Where none is there, or it cannot be read.
pub fn open_first(dir: impl AsRef<Path>, names: &[&str]) -> Result<Box<dyn TensorFile>> {
    let dir = dir.as_ref();
    match names.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        Some(path) => open(path),
        None => Err(Error::file(dir, format!("has no {}", names.join(" and no ")))),
    }
}

/// A safetensors file, mapped into memory: tensors are copied out one by one.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    map: Mmap,
    header: usize,
    metadata: Metadata,
}

impl Checkpoint {
    /// Opens a file and checks its header against its length.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be read, is cut off or is not safetensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let map = crate::ffi::map_file(&path)?;
        let (n, metadata) = SafeTensors::read_metadata(&map).map_err(|e| broken(&path, &e))?;
        // Of two entries of one name the reader would take the last.
        let header = map.get(8..8 + n).unwrap_or_default();
        crate::parse_json(&path, &String::from_utf8_lossy(header))?;
        // Checks the data section's length, too.
        SafeTensors::deserialize(&map).map_err(|e| broken(&path, &e))?;
        Ok(Checkpoint { path, map, header: n + 8, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.metadata.offset_keys();
        names.sort();
        names
    }

    /// The free text that the file carries.
    pub fn metadata(&self) -> HashMap<String, String> {
        self.metadata.metadata().clone().unwrap_or_default()
    }

    /// Shape and kind of a tensor.
    pub fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        let info = self.find(name)?;
        Ok((info.shape.iter().map(|n| *n as i64).collect(), self.kind(name, info.dtype)?))
    }

    /// A tensor in the kind in which it is stored.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name, or where its element type is not supported.
    pub fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        let (shape, kind) = self.info(name)?;
        Tensor::from_bytes(self.bytes(name)?, &shape, kind)?.to_device(device)
    }

    /// Entries of a tensor along its first dimension, in the order of `index`; the others are not
    /// read.
    ///
    /// # Errors
    /// What [`Checkpoint::tensor`] gives, or where an index is out of range.
    pub fn rows(&self, name: &str, index: &[i64], device: Device) -> Result<Tensor> {
        let (mut shape, kind) = self.info(name)?;
        let all = self.bytes(name)?;
        let count = shape.first().map_or(0, |n| *n as usize);
        let size = all.len().checked_div(count).unwrap_or(0);
        let mut bytes = Vec::with_capacity(size * index.len());
        for i in index {
            let at = usize::try_from(*i).ok().filter(|i| *i < count);
            let row = at.and_then(|i| all.get(i * size..(i + 1) * size));
            bytes.extend_from_slice(row.ok_or_else(|| {
                Error::invalid(name, format!("has {count} rows, and {i} is asked for"))
            })?);
        }
        if let Some(first) = shape.first_mut() {
            *first = index.len() as i64;
        }
        Tensor::from_bytes(&bytes, &shape, kind)?.to_device(device)
    }

    fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (from, to) = self.find(name)?.data_offsets;
        let bytes = self.map.get(self.header + from..self.header + to);
        bytes.ok_or_else(|| Error::file(&self.path, format!("`{name}` is cut off")))
    }

    /// All tensors by name, sorted.
    pub fn tensors(&self, device: Device) -> Result<Vec<(String, Tensor)>> {
        self.names().into_iter().map(|n| Ok((n.clone(), self.tensor(&n, device)?))).collect()
    }

    fn find(&self, name: &str) -> Result<&TensorInfo> {
        let known =
            || Error::unknown(format!("tensor in {}", self.path.display()), name, self.names());
        self.metadata.info(name).ok_or_else(known)
    }

    fn kind(&self, name: &str, dtype: Dtype) -> Result<Kind> {
        Ok(match dtype {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::F16 => Kind::Half,
            Dtype::I64 => Kind::Int64,
            Dtype::I32 => Kind::Int,
            Dtype::I16 => Kind::Int16,
            Dtype::I8 => Kind::Int8,
            Dtype::U8 => Kind::Uint8,
            Dtype::BOOL => Kind::Bool,
            other => {
                let problem =
                    format!("`{name}` has elements of type {other:?}, which libtorch lacks");
                return Err(Error::file(&self.path, problem));
            }
        })
    }
}

impl TensorFile for Checkpoint {
    fn path(&self) -> &Path {
        self.path()
    }

    fn names(&self) -> Vec<String> {
        self.names()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        self.info(name)
    }

    fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        self.tensor(name, device)
    }

    fn metadata(&self) -> HashMap<String, String> {
        self.metadata()
    }
}

/// A file of another format, mapped into memory: its bytes.
#[derive(Debug)]
pub struct Mapped(Mmap);

impl Mapped {
    /// Maps a file for reading.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        crate::ffi::map_file(path.as_ref()).map(Mapped)
    }
}

impl std::ops::Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

fn broken(path: &Path, e: &safetensors::SafeTensorError) -> Error {
    Error::file(path, format!("is not a whole safetensors file ({e}); fetch or save it again"))
}

/// What elements of a kind are called in a safetensors file.
///
/// # Errors
/// Where it has no name there.
pub fn dtype(name: &str, kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Int16 => Dtype::I16,
        Kind::Int8 => Dtype::I8,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::BOOL,
        other => {
            return Err(Error::unsupported(
                format!("saving `{name}` with elements of kind {other:?}"),
                "convert it with Tensor::to_kind first",
            ));
        }
    })
}

/// Writes tensors, sorted by name, with free text as metadata. The file appears whole or not at
/// all: it is written beside, synced, and renamed.
///
/// # Errors
/// Where a name comes twice, an element type cannot be stored, or the disk refuses.
pub fn save<'a>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    write_whole(path, &encode(path, tensors, metadata)?)
}

/// The bytes of a file with tensors and free text; `path` is for errors.
pub(crate) fn encode<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    for (name, t) in tensors {
        if data.iter().any(|(n, ..): &(String, _, _, _)| n == name) {
            return Err(Error::Duplicate { kind: "tensor", name: name.to_owned() });
        }
        let shape: Vec<usize> = t.size().iter().map(|n| *n as usize).collect();
        data.push((name.to_owned(), dtype(name, t.kind())?, shape, t.to_bytes()?));
    }
    data.sort_by(|a, b| a.0.cmp(&b.0));
    let views = data.iter().map(|(name, dtype, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes);
        view.map(|v| (name.as_str(), v))
    });
    let views: Vec<_> = views.collect::<Result<_, _>>().map_err(|e| Error::file(path, e))?;
    let metadata = (!metadata.is_empty()).then_some(metadata);
    let mut bytes = safetensors::serialize(views, metadata).map_err(|e| Error::file(path, e))?;
    sort_metadata(&mut bytes);
    Ok(bytes)
}

/// Puts the free text in the order of its keys: it comes from a hash map, and the same tensors are
/// to give the same bytes. The header keeps its length.
fn sort_metadata(file: &mut [u8]) {
    let Some((length, rest)) = file.split_first_chunk::<8>() else { return };
    let length = u64::from_le_bytes(*length) as usize;
    let Some(header) = rest.get(..length) else { return };
    let Ok(Value::Object(mut header)) = serde_json::from_slice(header) else { return };
    if let Some(Value::Object(text)) = header.get_mut("__metadata__") {
        text.sort_keys();
    }
    let sorted = Value::Object(header).to_string();
    // What is left of the length is padding already.
    if sorted.len() <= length
        && let Some(place) = file.get_mut(8..8 + sorted.len())
    {
        place.copy_from_slice(sorted.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn t(v: &[f32]) -> Tensor {
        Tensor::from_slice(v, &[v.len() as i64], Device::Cpu).unwrap()
    }

    #[test]
    fn what_is_saved_is_read_back_bit_for_bit_with_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.safetensors");
        let b = t(&[1.5, -0.0, f32::NAN]).to_kind(Kind::BFloat16).unwrap();
        let meta = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        save(&path, [("z", &t(&[1.0, 2.0])), ("a", &b)], meta.clone()).unwrap();
        let c = Checkpoint::open(&path).unwrap();
        assert_eq!(c.names(), ["a", "z"]);
        assert_eq!(c.metadata(), meta);
        assert!(c.tensor("a", Device::Cpu).unwrap().bit_equal(&b).unwrap());
        let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "no temporary file is left");
    }

    #[test]
    fn the_same_tensors_and_texts_are_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let text = |i: i32| (format!("key {i}"), format!("é {i}"));
            // A hash map of its own has an order of its own.
            save(dir.path().join(name), [("a", &t(&[1.0, 2.0]))], (0..9).map(text).collect())
                .unwrap();
            fs::read(dir.path().join(name)).unwrap()
        };
        let first = write("x");
        assert!((0..5).all(|i| write(&i.to_string()) == first));
        let file = Checkpoint::open(dir.path().join("x")).unwrap();
        assert_eq!(file.metadata()["key 7"], "é 7");
        assert_eq!(file.tensor("a", Device::Cpu).unwrap().to_vec::<f32>().unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn a_cut_off_or_foreign_file_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, [("a", &t(&[1.0; 100]))], HashMap::new()).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in [0, 7, 20, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            let e = Checkpoint::open(&path).unwrap_err().to_string();
            assert!(e.contains("x.safetensors"), "{e}");
        }
        fs::write(&path, b"not a checkpoint at all, but long enough").unwrap();
        assert!(Checkpoint::open(&path).is_err());
        assert!(matches!(Checkpoint::open(dir.path().join("none")), Err(Error::File { .. })));
    }

    #[test]
    fn a_refused_save_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, [("a", &t(&[1.0]))], HashMap::new()).unwrap();
        let before = fs::read(&path).unwrap();
        assert!(save(&path, [("a", &t(&[2.0])), ("a", &t(&[3.0]))], HashMap::new()).is_err());
        assert_eq!(fs::read(&path).unwrap(), before);
    }
}
