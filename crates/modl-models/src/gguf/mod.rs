//! GGUF, the file format of llama.cpp (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>),
//! versions 2 and 3: metadata and tensors, most of them quantised, in one file.
//!
//! A file is mapped, not read; nothing is allocated for a number in it that its length does not
//! bear out.

mod blocks;
mod reader;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use modl_core::checkpoint::Mapped;
use modl_core::{Device, Error, Kind, Result, Tensor};
use serde_json::{Map, Value};

pub(crate) use blocks::Format;
pub(crate) use reader::Reader;
pub(crate) use tokenizer::description;

const MAGIC: &[u8] = b"GGUF";

/// Tensors have at most so many dimensions.
const MOST_DIMS: u32 = 4;

/// Where data starts unless the file says otherwise.
const ALIGNMENT: u64 = 32;

/// A GGUF file.
#[derive(Debug)]
pub(crate) struct Gguf {
    path: PathBuf,
    map: Mapped,
    metadata: Map<String, Value>,
    tensors: BTreeMap<String, Info>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Info {
    /// The slowest dimension first.
    shape: Vec<i64>,
    format: Format,
    /// The bytes in the file.
    from: usize,
    to: usize,
}

impl Gguf {
    /// Whether `path` is a file that is called so.
    pub(crate) fn is_at(path: &Path) -> bool {
        path.is_file() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
    }

    /// Opens a file and checks all that it says about itself.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be read, is cut off, or is not GGUF of a version that is
    /// known.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let map = Mapped::open(path)?;
        let (metadata, tensors) = parse(&map).map_err(|problem| {
            Error::file(path, format!("is not a whole GGUF file: {problem}; fetch it again"))
        })?;
        Ok(Gguf { path: path.to_owned(), map, metadata, tensors })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says besides its tensors.
    pub(crate) fn metadata(&self) -> &Map<String, Value> {
        &self.metadata
    }

    /// The metadata under `key`.
    ///
    /// # Errors
    /// Where there is none.
    pub(crate) fn need(&self, key: &str) -> Result<&Value> {
        self.metadata
            .get(key)
            .ok_or_else(|| Error::file(&self.path, format!("does not say `{key}`")))
    }

    /// The tensors' names, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// Shape of a tensor and the kind that it gets.
    pub(crate) fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        self.find(name).map(|info| (info.shape.clone(), info.format.kind()))
    }

    /// A tensor; a quantised one as f32.
    pub(crate) fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        let info = self.find(name)?;
        let bytes = self.map.get(info.from..info.to);
        let bytes = bytes.ok_or_else(|| Error::file(&self.path, format!("`{name}` is cut off")))?;
        info.format.read(bytes, &info.shape)?.to_device(device)
    }

    fn find(&self, name: &str) -> Result<&Info> {
        let known = || {
            Error::unknown(format!("tensor in {}", self.path.display()), name, self.tensors.keys())
        };
        self.tensors.get(name).ok_or_else(known)
    }
}

type Parsed = (Map<String, Value>, BTreeMap<String, Info>);

fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let mut r = Reader::new(bytes);
    if r.take(4)? != MAGIC {
        return Err("it does not start with GGUF".into());
    }
    let version = r.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("it is of version {version}, and 2 and 3 are known"));
    }
    let (tensors, entries) = (r.u64()?, r.u64()?);
    let mut metadata = Map::new();
    for _ in 0..entries {
        let key = r.string()?;
        let value = r.value()?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("it says `{key}` twice"));
        }
    }
    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(info(&mut r)?);
    }
    let alignment = metadata.get("general.alignment").map_or(Some(ALIGNMENT), Value::as_u64);
    let alignment = alignment.filter(|a| a.is_power_of_two()).ok_or("its alignment is none")?;
    let start = (r.position() as u64).checked_next_multiple_of(alignment);
    let mut all = BTreeMap::new();
    for (name, shape, format, offset) in infos {
        let cut = || format!("`{name}` reaches beyond its end");
        let elements = shape.iter().try_fold(1u64, |n, len| n.checked_mul(*len));
        let size = elements.and_then(|n| format.size(n, shape.last().copied().unwrap_or(1)));
        let size = size.ok_or_else(|| format!("`{name}` has a shape {shape:?} that is none"))?;
        if offset % alignment != 0 {
            return Err(format!("`{name}` is not aligned"));
        }
        let from = start.and_then(|s| s.checked_add(offset)).ok_or_else(cut)?;
        let to = from.checked_add(size).filter(|to| *to <= bytes.len() as u64).ok_or_else(cut)?;
        let shape = shape.into_iter().map(|n| i64::try_from(n).map_err(|_| cut()));
        let shape = shape.collect::<Result<_, _>>()?;
        let place = Info { shape, format, from: from as usize, to: to as usize };
        if all.insert(name.clone(), place).is_some() {
            return Err(format!("it has `{name}` twice"));
        }
    }
    Ok((metadata, all))
}

/// Name, shape, format and offset of a tensor.
fn info(r: &mut Reader) -> Result<(String, Vec<u64>, Format, u64), String> {
    let name = r.string()?;
    let dims = r.u32()?;
    if dims > MOST_DIMS {
        return Err(format!("`{name}` has {dims} dimensions"));
    }
    let mut shape = (0..dims).map(|_| r.u64()).collect::<Result<Vec<_>, _>>()?;
    shape.reverse();
    let code = r.u32()?;
    let format = Format::of(code).ok_or_else(|| {
        format!("`{name}` has elements of type {code}, where {} are known", Format::known())
    })?;
    Ok((name, shape, format, r.u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with one entry and one tensor of two f32.
    fn file(count: u64, key: u64, dims: [u64; 2], code: u32, offset: u64) -> Vec<u8> {
        let mut b = b"GGUF\x03\0\0\0".to_vec();
        b.extend(count.to_le_bytes());
        b.extend(1u64.to_le_bytes());
        b.extend(key.to_le_bytes());
        b.extend(b"k\x04\0\0\0\x07\0\0\0");
        b.extend(1u64.to_le_bytes());
        b.extend(b"t\x02\0\0\0");
        dims.iter().for_each(|d| b.extend(d.to_le_bytes()));
        b.extend(code.to_le_bytes());
        b.extend(offset.to_le_bytes());
        b.resize(b.len().next_multiple_of(32), 0);
        b.extend([1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()));
        b
    }

    fn refusal(bytes: &[u8]) -> String {
        parse(bytes).unwrap_err()
    }

    #[test]
    fn a_small_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        std::fs::write(&path, file(1, 1, [2, 1], 0, 0)).unwrap();
        let found = Gguf::open(&path).unwrap();
        assert_eq!(found.need("k").unwrap(), 7);
        assert_eq!(found.info("t").unwrap(), (vec![1, 2], Kind::Float));
        let t = found.tensor("t", Device::Cpu).unwrap();
        assert_eq!(t.to_vec::<f32>().unwrap(), [1.5, -2.0]);
        assert!(found.need("l").is_err() && found.tensor("u", Device::Cpu).is_err());
    }

    #[test]
    fn numbers_that_the_length_does_not_bear_out_are_refused() {
        for (bytes, words) in [
            (file(u64::MAX, 1, [2, 1], 0, 0), "ends"),
            (file(1, u64::MAX, [2, 1], 0, 0), "ends"),
            (file(1, 1 << 40, [2, 1], 0, 0), "ends"),
            (file(1, 1, [u64::MAX, u64::MAX], 0, 0), "shape"),
            (file(1, 1, [1 << 40, 1], 0, 0), "beyond"),
            (file(1, 1, [2, 1], 0, u64::MAX - 31), "beyond"),
            (file(1, 1, [2, 1], 0, 32), "beyond"),
            (file(1, 1, [2, 1], 0, 4), "aligned"),
            (file(1, 1, [2, 1], 2, 0), "shape"),
            (file(1, 1, [2, 1], 99, 0), "type 99"),
            (b"GGUF\x01\0\0\0".to_vec(), "version 1"),
            (b"GGML\x03\0\0\0".to_vec(), "does not start"),
        ] {
            let e = refusal(&bytes);
            assert!(e.contains(words), "{e} does not say {words}");
        }
        let whole = file(1, 1, [2, 1], 0, 0);
        for cut in 0..whole.len() {
            assert!(parse(&whole[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn no_byte_can_be_changed_into_a_panic() {
        let whole = file(1, 1, [2, 1], 0, 0);
        for at in 0..whole.len() {
            for value in [0, 1, 9, 127, 128, 255] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                if let Ok((_, tensors)) = parse(&bytes) {
                    assert!(tensors.values().all(|t| t.to <= bytes.len()));
                }
            }
        }
    }
}
