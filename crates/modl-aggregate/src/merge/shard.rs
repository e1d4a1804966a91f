//! One file of a result: its header first, then tensors from all threads, each at its place.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use modl_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::Output;
use super::elements::write_at;

/// A safetensors file that is being written under a temporary name.
#[derive(Debug)]
pub(crate) struct ShardFile {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    /// Where the first tensor starts.
    start: u64,
    crc: crc32fast::Hasher,
    /// Bytes whose sum is in `crc`.
    summed: u64,
}

/// What tells a finished file: its length and CRC-32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Sum {
    bytes: u64,
    crc32: u32,
}

impl ShardFile {
    /// Makes the file with the header of these tensors and the length that it will have.
    pub(crate) fn create(path: PathBuf, outputs: &[Output]) -> Result<Self> {
        let header = header(outputs);
        let temporary = path.with_extension("tmp");
        let failed = |e: std::io::Error| {
            Error::file(&path, format!("cannot be made: {e}; make room or choose another --out"))
        };
        let file = File::create(&temporary).map_err(failed)?;
        let start = header.len() as u64;
        let length = start + outputs.iter().map(Output::bytes).sum::<u64>();
        file.set_len(length).map_err(failed)?;
        write_at(&file, &temporary, &header, 0)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header);
        Ok(ShardFile { path, temporary, file, start, crc, summed: start })
    }

    /// Writes bytes of the data section from `at` on, from any thread; gives their sum.
    pub(crate) fn write(&self, bytes: &[u8], at: u64) -> Result<crc32fast::Hasher> {
        write_at(&self.file, &self.temporary, bytes, self.start + at)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(bytes);
        Ok(crc)
    }

    /// Adds the sums of pieces, in their order.
    pub(crate) fn sum(&mut self, pieces: impl IntoIterator<Item = (crc32fast::Hasher, u64)>) {
        for (crc, bytes) in pieces {
            self.crc.combine(&crc);
            self.summed += bytes;
        }
    }

    /// Lets the file appear under its name, once it is on the disk.
    pub(crate) fn finish(self) -> Result<Sum> {
        let finish = || -> std::io::Result<()> {
            self.file.sync_all()?;
            fs::rename(&self.temporary, &self.path)
        };
        finish().map_err(|e| {
            let problem = format!("cannot be finished: {e}; make room and start again to go on");
            Error::file(&self.path, problem)
        })?;
        Ok(Sum { bytes: self.summed, crc32: self.crc.finalize() })
    }
}

impl Sum {
    /// Reads a file and compares it.
    pub(crate) fn holds(self, path: &Path) -> bool {
        use std::io::Read;
        let Ok(mut file) = File::open(path) else { return false };
        if file.metadata().map(|m| m.len()).ok() != Some(self.bytes) {
            return false;
        }
        let (mut crc, mut buffer) = (crc32fast::Hasher::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return crc.finalize() == self.crc32,
                Ok(n) => crc.update(buffer.get(..n).unwrap_or_default()),
                Err(_) => return false,
            }
        }
    }
}

/// The header with its length in front, padded so that the data starts at a multiple of 8.
fn header(outputs: &[Output]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut offset = 0;
    for o in outputs {
        let end = offset + o.bytes();
        let entry = json!({ "dtype": o.dtype, "shape": o.shape, "data_offsets": [offset, end] });
        map.insert(o.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut all = (text.len() as u64).to_le_bytes().to_vec();
    all.extend(text);
    all
}
