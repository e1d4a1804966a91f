//! PyTorch's own files (`.bin`, `.pt`, `.pth`), as `torch.save` writes them: tensors in
//! dictionaries, read without executing anything.
//!
//! Since version 1.6 such a file is a zip archive with a pickle, `NAME/data.pkl`, and the bytes of
//! each storage in `NAME/data/KEY`. Before, it was five pickles one after the other (a mark, a
//! version, the machine, the object, the storages' keys), then for each storage its length and its
//! elements. Both are read. The file is mapped, and nothing is allocated for a number in it that
//! its length does not bear out.

mod archive;
mod bytes;
mod heap;
mod names;
mod pickle;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::checkpoint::{Mapped, TensorFile};
use crate::{Device, Error, Kind, Result, Tensor};

use bytes::Bytes;
use heap::{Heap, Storage, Value, View};

/// The start of a file from before version 1.6: a pickle of a number, which is the mark.
const OLD: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
/// The name of the pickle in an archive.
const PICKLE: &str = "data.pkl";
const OLD_VERSION: i64 = 1001;

/// All tensors together have at most so many times the file's bytes: some share their storage.
const MOST_SHARING: u64 = 32;

const WAY_OUT: &str = "open it in Python, where you trust it, and save its tensors with \
                       `safetensors.torch.save_file`";

/// A file of `torch.save`, mapped into memory: tensors are copied out one by one.
///
/// Tensors in nested dictionaries and lists have names with dots, `model_state.lstm.bias`;
/// numbers and texts beside them are left out. Devices in the file do not matter.
///
/// A file may hold nothing but dictionaries, lists, numbers, texts, tensors and parameters;
/// anything else would need its Python classes, and is refused by name.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    map: Mapped,
    tensors: BTreeMap<String, Info>,
}

/// Where a tensor is.
#[derive(Debug, Clone)]
struct Info {
    kind: Kind,
    shape: Vec<i64>,
    /// In elements.
    stride: Vec<i64>,
    /// The bytes from its first element to its last.
    place: Range<usize>,
    contiguous: bool,
}

/// Why a file is not read.
#[derive(Debug)]
enum Refusal {
    /// It is not what `torch.save` wrote.
    Broken(String),
    /// It holds something that is not known here.
    Foreign(String),
}

impl From<String> for Refusal {
    fn from(problem: String) -> Self {
        Refusal::Broken(problem)
    }
}

impl From<&str> for Refusal {
    fn from(problem: &str) -> Self {
        Refusal::Broken(problem.to_owned())
    }
}

impl TorchFile {
    /// Whether a file that starts so is one of PyTorch's.
    pub(crate) fn starts(bytes: &[u8]) -> bool {
        archive::is_archive(bytes) || bytes.starts_with(OLD)
    }

    /// Opens a file and checks all that it says about its tensors.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be read, is cut off, or is no file of `torch.save`;
    /// [`Error::Unsupported`] where it holds anything but tensors in dictionaries and lists.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let map = Mapped::open(&path)?;
        let tensors = parse(&map).map_err(|refusal| match refusal {
            Refusal::Broken(problem) => {
                let problem =
                    format!("is not a whole file of PyTorch's: {problem}; fetch it again");
                Error::file(&path, problem)
            }
            Refusal::Foreign(problem) => {
                let what = format!("{}: {problem}, and nothing is executed here", path.display());
                Error::unsupported(what, WAY_OUT)
            }
        })?;
        Ok(TorchFile { path, map, tensors })
    }

    /// The tensors whose names start with `prefix` and a dot, without that.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the parts that there are.
    pub fn below(mut self, prefix: &str) -> Result<Self> {
        let own = |name: &str| Some(name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned());
        let part = self.tensors.iter().filter_map(|(name, info)| Some((own(name)?, info.clone())));
        let part: BTreeMap<String, Info> = part.collect();
        if part.is_empty() {
            let mut parts: Vec<&str> =
                self.tensors.keys().filter_map(|n| Some(n.split_once('.')?.0)).collect();
            parts.dedup();
            return Err(Error::unknown(format!("part of {}", self.path.display()), prefix, parts));
        }
        self.tensors = part;
        Ok(self)
    }

    /// The bytes of a tensor in the file, where its elements lie there one after the other, in order.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name; [`Error::Unsupported`] where they lie otherwise.
    pub fn bytes_of(&self, name: &str) -> Result<Range<usize>> {
        let info = self.find(name)?;
        if !info.contiguous {
            let what =
                format!("`{name}` in {}, whose elements are not in order", self.path.display());
            return Err(Error::unsupported(what, "save it again as `tensor.contiguous()`"));
        }
        Ok(info.place.clone())
    }

    fn find(&self, name: &str) -> Result<&Info> {
        let known = || {
            Error::unknown(format!("tensor in {}", self.path.display()), name, self.tensors.keys())
        };
        self.tensors.get(name).ok_or_else(known)
    }
}

impl TensorFile for TorchFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        self.find(name).map(|info| (info.shape.clone(), info.kind))
    }

    fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        let info = self.find(name)?;
        let bytes = self.map.get(info.place.clone());
        let bytes = bytes.ok_or_else(|| Error::file(&self.path, format!("`{name}` is cut off")))?;
        if info.kind == Kind::Bool && bytes.iter().any(|b| *b > 1) {
            return Err(Error::file(&self.path, format!("`{name}` is neither true nor false")));
        }
        if info.contiguous {
            return Tensor::from_bytes(bytes, &info.shape, info.kind)?.to_device(device);
        }
        let elements = bytes.len() / info.kind.elt_size_in_bytes();
        let row = Tensor::from_bytes(bytes, &[elements as i64], info.kind)?;
        let view = Tensor::op("as_strided", &[&row], |t| {
            t[0].f_as_strided(info.shape.as_slice(), info.stride.as_slice(), 0)
        })?;
        // Otherwise it would keep what lies between its elements.
        view.contiguous()?.copy()?.to_device(device)
    }
}

fn parse(bytes: &[u8]) -> Result<BTreeMap<String, Info>, Refusal> {
    if archive::is_archive(bytes) {
        parse_archive(bytes)
    } else if bytes.starts_with(OLD) {
        parse_old(bytes)
    } else {
        Err("it starts like none".into())
    }
}

fn parse_archive(bytes: &[u8]) -> Result<BTreeMap<String, Info>, Refusal> {
    let entries = archive::entries(bytes)?;
    let in_folder = |name: &&String| name.split_once('/').is_some_and(|(_, n)| n == PICKLE);
    let name = entries.keys().find(in_folder).ok_or("it is a zip archive without a `data.pkl`")?;
    let folder = name.strip_suffix(PICKLE).unwrap_or_default();
    let entry = |name: &str| entries.get(&format!("{folder}{name}")).cloned();
    let content = |name: &str| entry(name).and_then(|place| bytes.get(place));
    if entry("constants.pkl").is_some() {
        return Err(Refusal::Foreign("it is a program (TorchScript)".into()));
    }
    check_order(content("byteorder") != Some(b"big"))?;
    let pickle = content(PICKLE).unwrap_or_default();
    let mut heap = Heap::default();
    let (root, _) = pickle::read(pickle, &mut heap)?;
    let place = |storage: &Storage| entry(&format!("data/{}", storage.key));
    views(&heap, root, [pickle.len(), bytes.len()], place)
}

fn check_order(little_endian: bool) -> Result<(), Refusal> {
    if little_endian {
        return Ok(());
    }
    Err(Refusal::Foreign("it comes from a machine with the other byte order".into()))
}

fn parse_old(bytes: &[u8]) -> Result<BTreeMap<String, Info>, Refusal> {
    let (mut heap, mut at) = (Heap::default(), OLD.len());
    let version = next(bytes, &mut at, &mut heap)?;
    if version != Value::Int(OLD_VERSION) {
        return Err(Refusal::Foreign(format!("it is of version {version:?}")));
    }
    let machine = next(bytes, &mut at, &mut heap)?;
    let little = (Value::Text("little_endian"), Value::Bool(true));
    check_order(heap.entries(machine).contains(&little))?;
    let root = next(bytes, &mut at, &mut heap)?;
    let keys = next(bytes, &mut at, &mut heap)?;
    let kinds: HashMap<&str, Kind> = heap.storages.iter().map(|s| (s.key, s.kind)).collect();
    let mut r = Bytes::new(bytes);
    r.skip(at as u64)?;
    let mut places = HashMap::new();
    for key in heap.row(keys) {
        let Value::Text(key) = *key else { return Err("a storage in it has no name".into()) };
        let kind = kinds.get(key).ok_or("a storage in it is nobody's")?;
        let size = r.u64()?.checked_mul(kind.elt_size_in_bytes() as u64);
        let from = r.position();
        r.skip(size.ok_or("a storage in it has no size")?)?;
        places.insert(key, from..r.position());
    }
    views(&heap, root, [at, bytes.len()], |storage| places.get(storage.key).cloned())
}

/// The next pickle.
fn next<'a>(bytes: &'a [u8], at: &mut usize, heap: &mut Heap<'a>) -> Result<Value<'a>, Refusal> {
    let (value, len) = pickle::read(bytes.get(*at..).unwrap_or_default(), heap)?;
    *at += len;
    Ok(value)
}

/// The tensors below `root`, checked against the places of their storages; `lens` are those of the
/// pickle and the file.
fn views(
    heap: &Heap,
    root: Value,
    lens: [usize; 2],
    place: impl Fn(&Storage) -> Option<Range<usize>>,
) -> Result<BTreeMap<String, Info>, Refusal> {
    let [pickle, file] = lens;
    let mut all = BTreeMap::new();
    let mut sum = 0u64;
    for (name, view) in names::tensors(heap, root, pickle)? {
        let storage = place(&view.storage).ok_or_else(|| format!("`{name}` is not in it"))?;
        let info = info(view, storage).map_err(|problem| format!("`{name}` {problem}"))?;
        sum = sum.saturating_add(info.place.len() as u64);
        if all.contains_key(&name) {
            return Err(format!("it has `{name}` twice").into());
        }
        all.insert(name, info);
    }
    if sum > (file as u64).saturating_mul(MOST_SHARING) {
        return Err(format!("its tensors share so much that they have {sum} bytes").into());
    }
    Ok(all)
}

/// A tensor whose storage is at `storage`.
fn info(view: &View, storage: Range<usize>) -> Result<Info, &'static str> {
    let beyond = "reaches beyond its storage";
    let (kind, elements) = (view.storage.kind, view.storage.elements);
    let width = kind.elt_size_in_bytes() as u64;
    if elements.checked_mul(width) != Some(storage.len() as u64) {
        return Err("has a storage of another size");
    }
    let signed = |all: &[u64]| all.iter().map(|n| i64::try_from(*n)).collect::<Result<Vec<_>, _>>();
    let (shape, stride) = (signed(&view.size), signed(&view.stride));
    let (shape, stride) = (shape.map_err(|_| beyond)?, stride.map_err(|_| beyond)?);
    let count = view.size.iter().try_fold(1u64, |n, len| n.checked_mul(*len)).ok_or(beyond)?;
    if count > elements {
        return Err("has more elements than are stored; save it again as `tensor.contiguous()`");
    }
    if count == 0 {
        let place = storage.start..storage.start;
        return Ok(Info { kind, shape, stride, place, contiguous: true });
    }
    let steps = || view.size.iter().zip(&view.stride);
    let last = steps().try_fold(view.offset, |at, (len, stride)| {
        at.checked_add(stride.checked_mul(len - 1)?).filter(|at| *at < elements)
    });
    let last = last.filter(|at| *at < elements).ok_or(beyond)?;
    let mut dense = 1;
    let contiguous = steps().rev().all(|(len, stride)| {
        let fits = *len == 1 || *stride == dense;
        dense *= len;
        fits
    });
    // Within the storage, and so within what the machine can count.
    let byte = |at: u64| storage.start + (at * width) as usize;
    let place = byte(view.offset)..byte(last + 1);
    Ok(Info { kind, shape, stride, place, contiguous })
}
