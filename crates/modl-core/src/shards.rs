//! A model in several files of limited size, as transformers saves it: `model-00001-of-00003.safetensors`
//! and so on, and `model.safetensors.index.json`, which says in which file each tensor is; one file
//! `model.safetensors` where all fits into one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Value, json};

use crate::checkpoint::encode;
use crate::whole_file::{Pending, remove, write_whole};
use crate::{Error, Result, Tensor};

/// How many bytes of tensors go into one file at most: `50GB` where nothing is said, as in
/// transformers 5. A single tensor that is larger has a file to itself.
///
/// Read from a number of bytes or a number with a unit: `KB`, `MB`, `GB`, `TB` are powers of 1000,
/// `KiB`, `MiB`, `GiB`, `TiB` of 1024; case does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardSize(u64);

const UNITS: [(&str, u64); 8] = [
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
];

impl ShardSize {
    /// 50 GB.
    pub const USUAL: ShardSize = ShardSize(50_000_000_000);

    /// At most so many bytes.
    ///
    /// # Errors
    /// Where it is 0.
    pub fn bytes(n: u64) -> Result<Self> {
        match n {
            0 => Err(Error::invalid("max_shard_size", "is to be at least 1 byte")),
            n => Ok(ShardSize(n)),
        }
    }
}

impl Default for ShardSize {
    fn default() -> Self {
        Self::USUAL
    }
}

impl FromStr for ShardSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let lower = text.trim().to_lowercase();
        let unit = UNITS.iter().find_map(|(u, n)| Some((lower.strip_suffix(u)?.trim_end(), *n)));
        let (number, unit) = unit.unwrap_or((&lower, 1));
        let bytes = match (number.parse::<u64>(), number.parse::<f64>()) {
            (Ok(n), _) => n.checked_mul(unit),
            // Beyond 2⁶⁴ a float becomes the largest number.
            (_, Ok(x)) if unit > 1 && x.is_finite() && x >= 0.0 => Some((x * unit as f64) as u64),
            _ => None,
        };
        let wrong = || format!("{text:?} is no size; write `5GB`, `300MB` or a number of bytes");
        Self::bytes(bytes.ok_or_else(|| Error::invalid("max_shard_size", wrong()))?)
    }
}

impl fmt::Display for ShardSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit =
            UNITS.iter().rev().find(|(u, n)| !u.ends_with("ib") && self.0.is_multiple_of(*n));
        match unit {
            Some((unit, n)) => write!(f, "{}{}", self.0 / n, unit.to_uppercase()),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Saves tensors by name, in the names' order, in `dir` as `STEM.safetensors` or, where they are
/// larger than `max` together, as shards with an index.
///
/// A reader finds the model of before or the new one, or, where the machine stops just while shards
/// of the same names are replaced, none; never parts of both. What is left of the one before is
/// removed when the new one stands.
///
/// # Errors
/// Where a name comes twice, an element type cannot be stored, or the disk refuses.
pub fn save<'a>(
    dir: impl AsRef<Path>,
    stem: &str,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: &HashMap<String, String>,
    max: ShardSize,
) -> Result<()> {
    let dir = dir.as_ref();
    let mut all = BTreeMap::new();
    for (name, tensor) in tensors {
        if all.insert(name, tensor).is_some() {
            return Err(Error::Duplicate { kind: "tensor", name: name.to_owned() });
        }
    }
    let (index, whole) = (index_path(dir, stem), dir.join(format!("{stem}.safetensors")));
    let all: Vec<(&str, &Tensor)> = all.into_iter().collect();
    let shards = divide(all.iter().map(|(_, t)| size(t)), max);
    let count = shards.len();
    let name = |n: usize| file_name(stem, n, count);
    let (mut pending, mut weight_map) = (Vec::new(), BTreeMap::new());
    for (n, shard) in shards.into_iter().enumerate() {
        let shard = all.get(shard).unwrap_or_default();
        let path = dir.join(name(n));
        let bytes = encode(&path, shard.iter().map(|(n, t)| (*n, *t)), metadata.clone())?;
        pending.push(Pending::write(&path, &bytes)?);
        weight_map.extend(shard.iter().map(|(tensor, _)| (*tensor, name(n))));
    }
    if count > 1 && (0..count).any(|n| dir.join(name(n)).exists()) {
        // An index that stands would find old and new shards under the names that it knows.
        remove(&index)?;
    }
    pending.into_iter().try_for_each(Pending::put)?;
    if count > 1 {
        let total_size: u64 = all.iter().map(|(_, t)| size(t)).sum();
        let total_parameters: usize = all.iter().map(|(_, t)| t.numel()).sum();
        let metadata = json!({"total_parameters": total_parameters, "total_size": total_size});
        write_index(dir, stem, &metadata, &weight_map)?;
        remove(&whole)?;
    } else {
        remove(&index)?;
    }
    let names: BTreeSet<String> = (0..count).map(name).collect();
    for stale in shards_in(dir, stem)?.into_iter().filter(|n| !names.contains(n)) {
        remove(&dir.join(stale))?;
    }
    Ok(())
}

/// Tensors of these sizes one after the other, a new shard where the next one does not fit; one shard at
/// least.
pub fn divide(sizes: impl IntoIterator<Item = u64>, max: ShardSize) -> Vec<Range<usize>> {
    let mut shards = Vec::new();
    let (mut start, mut end, mut filled) = (0, 0, 0u64);
    for own in sizes {
        if end > start && filled.saturating_add(own) > max.0 {
            shards.push(start..end);
            (start, filled) = (end, 0);
        }
        filled = filled.saturating_add(own);
        end += 1;
    }
    shards.push(start..end);
    shards
}

/// The name of the `n`th of `count` shards, from 0; of one, that of a whole file.
pub fn file_name(stem: &str, n: usize, count: usize) -> String {
    match count {
        1 => format!("{stem}.safetensors"),
        _ => format!("{stem}-{:05}-of-{count:05}.safetensors", n + 1),
    }
}

/// Writes the index of shards: in which file each tensor is.
///
/// # Errors
/// Where the disk refuses.
pub fn write_index(
    dir: &Path,
    stem: &str,
    metadata: &Value,
    weight_map: &BTreeMap<&str, String>,
) -> Result<()> {
    let path = index_path(dir, stem);
    let text = json!({"metadata": metadata, "weight_map": weight_map});
    let text = serde_json::to_string_pretty(&text).map_err(|e| Error::file(&path, e))?;
    write_whole(&path, (text + "\n").as_bytes())
}

fn size(t: &Tensor) -> u64 {
    (t.numel() * t.kind().elt_size_in_bytes()) as u64
}

fn index_path(dir: &Path, stem: &str) -> PathBuf {
    dir.join(format!("{stem}.safetensors.index.json"))
}

/// The names of the shards of that stem in the folder, whatever their number.
fn shards_in(dir: &Path, stem: &str) -> Result<Vec<String>> {
    let cannot = |e: std::io::Error| Error::file(dir, format!("cannot be read: {e}"));
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(cannot)? {
        let name = entry.map_err(cannot)?.file_name().to_string_lossy().into_owned();
        let digits = |part: &str| part.len() >= 5 && part.bytes().all(|b| b.is_ascii_digit());
        let numbers = || {
            let rest = name.strip_prefix(stem)?.strip_prefix('-')?;
            rest.strip_suffix(".safetensors")?.split_once("-of-")
        };
        if numbers().is_some_and(|(n, of)| digits(n) && digits(of)) {
            names.push(name);
        }
    }
    Ok(names)
}

/// What an index says, of shards in safetensors or in PyTorch's format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    path: PathBuf,
    /// The name of the file with each tensor.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads an index.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be read, has no `weight_map` from names to names, or names a
    /// file that is not beside it.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = fs::read_to_string(path)
            .map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        let index = crate::parse_json(path, &text)?;
        let map = index.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| Error::file(path, "has no `weight_map`"))?;
        let mut weight_map = BTreeMap::new();
        for (tensor, file) in map {
            let beside = |f: &&str| Path::new(f).file_name().is_some_and(|own| own == *f);
            let file = file.as_str().filter(beside).ok_or_else(|| {
                Error::file(path, format!("says that `{tensor}` is in {file}, no file beside it"))
            })?;
            weight_map.insert(tensor.clone(), file.to_owned());
        }
        Ok(Index { path: path.to_owned(), weight_map })
    }

    /// The files, each once, sorted.
    pub fn files(&self) -> Vec<PathBuf> {
        let names: BTreeSet<&String> = self.weight_map.values().collect();
        names.into_iter().map(|name| self.path.with_file_name(name)).collect()
    }
}
