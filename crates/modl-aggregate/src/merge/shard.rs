//! One file of a result: its header first, then tensors from all threads, each at its place.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

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
    /// Bytes up to which the file has been sent to the disk, or is being sent.
    sent: u64,
    sending: Option<JoinHandle<io::Result<()>>>,
}

/// Bytes that are sent to the disk together, while others are computed.
const SENT: u64 = 32 << 20;

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
        Ok(ShardFile { path, temporary, file, start, crc, summed: start, sent: 0, sending: None })
    }

    /// Writes bytes of the data section from `at` on, from any thread; gives their sum.
    pub(crate) fn write(&self, bytes: &[u8], at: u64) -> Result<crc32fast::Hasher> {
        write_at(&self.file, &self.temporary, bytes, self.start + at)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(bytes);
        Ok(crc)
    }

    /// Adds the sums of pieces that are written, in their order.
    pub(crate) fn sum(
        &mut self,
        pieces: impl IntoIterator<Item = (crc32fast::Hasher, u64)>,
    ) -> Result<()> {
        for (crc, bytes) in pieces {
            self.crc.combine(&crc);
            self.summed += bytes;
        }
        let idle = self.sending.as_ref().is_none_or(JoinHandle::is_finished);
        if self.summed - self.sent < SENT || !idle {
            return Ok(());
        }
        let mut send = || -> io::Result<()> {
            sent(self.sending.take())?;
            let file = self.file.try_clone()?;
            self.sending = Some(std::thread::spawn(move || file.sync_data()));
            Ok(())
        };
        self.sent = self.summed;
        send().map_err(|e| unfinished(&self.path, &e))
    }

    /// Lets the file appear under its name, once it is on the disk.
    pub(crate) fn finish(self) -> Result<Sum> {
        let finish = || -> io::Result<()> {
            sent(self.sending)?;
            self.file.sync_all()?;
            fs::rename(&self.temporary, &self.path)
        };
        finish().map_err(|e| unfinished(&self.path, &e))?;
        Ok(Sum { bytes: self.summed, crc32: self.crc.finalize() })
    }
}

/// Waits for what is being sent: its error is told once, and not again when the whole file is sent.
fn sent(sending: Option<JoinHandle<io::Result<()>>>) -> io::Result<()> {
    match sending.map(JoinHandle::join) {
        Some(Err(_)) => Err(io::Error::other("the thread that sends it to the disk has ended")),
        Some(Ok(sent)) => sent,
        None => Ok(()),
    }
}

fn unfinished(path: &Path, e: &io::Error) -> Error {
    let problem = format!("cannot be finished: {e}; make room and start again to go on");
    Error::file(path, problem)
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
