//! Event files that TensorBoard opens: scalars of a run by training and step.
//!
//! Each training of a run (`fit`, `fit/news`) has a folder of its own, which TensorBoard shows as a run
//! with the curves `loss`, `lr`, `grad_norm`, `seconds`, `aux/NAME`, `routing/NAME` and what was
//! measured. A file is a row of records (TFRecord), each a length `n` (u64, little-endian), the masked
//! CRC-32C of these eight bytes, `n` bytes, and their masked CRC-32C; the bytes are a `tensorflow.Event`
//! in the encoding of protocol buffers:
//!
//! ```text
//! Event   { 1: wall_time f64, 2: step i64, 3: file_version, 5: Summary, 7: SessionLog { 1: START } }
//! Summary { 1: Value { 1: tag, 2: simple_value f32 } … }
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use modl_core::{Error, Result};

use crate::{Event, Sink};

/// Writes the scalars of a run below a folder.
#[derive(Debug)]
pub struct TensorBoard {
    root: PathBuf,
    open: Option<Open>,
}

/// The file of the training that goes on.
#[derive(Debug)]
struct Open {
    training: String,
    path: PathBuf,
    file: File,
    /// The last step.
    step: u64,
}

impl TensorBoard {
    /// Below `root`, which is made with the first training.
    pub fn below(root: impl AsRef<Path>) -> Self {
        TensorBoard { root: root.as_ref().to_owned(), open: None }
    }

    /// A new file for the training `name`, which goes on after `step`: what an earlier file has of later
    /// steps does not count.
    fn begin(&mut self, name: &str, step: u64) -> Result<()> {
        let folder = self.root.join(name);
        let failed = |e: std::io::Error| Error::file(&folder, format!("cannot be written: {e}"));
        fs::create_dir_all(&folder).map_err(failed)?;
        let (seconds, process) = (now() as u64, std::process::id());
        let mut n = 0;
        let (path, file) = loop {
            let path = folder.join(format!("events.out.tfevents.{seconds:010}.modl.{process}.{n}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => n += 1,
                Err(e) => return Err(failed(e)),
            }
        };
        self.open = Some(Open { training: name.to_owned(), path, file, step });
        self.write(&version(now()))?;
        self.write(&session_start(now(), step + 1))
    }

    fn scalars(&mut self, step: u64, scalars: &[(String, f64)]) -> Result<()> {
        if scalars.is_empty() {
            return Ok(());
        }
        self.write(&summary(now(), step, scalars))
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        let Some(Open { path, file, .. }) = &mut self.open else { return Ok(()) };
        let written = file.write_all(&record(event));
        written.map_err(|e| Error::file(path, format!("cannot be written: {e}")))
    }
}

impl Sink for TensorBoard {
    fn event(&mut self, event: &Event) -> Result<()> {
        let named = |prefix: &str, all: &std::collections::BTreeMap<String, f64>| {
            all.iter().map(|(name, v)| (format!("{prefix}{name}"), *v)).collect::<Vec<_>>()
        };
        match event {
            Event::Started { name, step, .. } => self.begin(name, *step),
            Event::Step { step, loss, aux, lr, grad_norm, seconds } => {
                if let Some(open) = &mut self.open {
                    open.step = *step;
                }
                let mut all: Vec<(String, f64)> =
                    [("loss", loss), ("lr", lr), ("grad_norm", grad_norm), ("seconds", seconds)]
                        .map(|(name, v)| (name.to_owned(), *v))
                        .into();
                all.extend(named("aux/", aux));
                self.scalars(*step, &all)
            }
            Event::Routed { step, metrics } => self.scalars(*step, &named("routing/", metrics)),
            Event::Evaluated { name, step, metrics } => {
                let Some(open) = &self.open else { return Ok(()) };
                // The folder says which training it is.
                let own = name.strip_prefix(&open.training).and_then(|n| n.strip_prefix('/'));
                let tag = format!("{}/", own.unwrap_or(name));
                self.scalars(step.unwrap_or(open.step), &named(&tag, metrics))
            }
            _ => Ok(()),
        }
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// What a file starts with.
fn version(time: f64) -> Vec<u8> {
    let mut event = head(time, 0);
    bytes(&mut event, 3, b"brain.Event:2");
    event
}

/// Events from `step` on that are in files of before do not count.
fn session_start(time: f64, step: u64) -> Vec<u8> {
    let mut event = head(time, step);
    bytes(&mut event, 7, &[1 << 3, 1]);
    event
}

fn summary(time: f64, step: u64, scalars: &[(String, f64)]) -> Vec<u8> {
    let mut values = Vec::new();
    for (tag, value) in scalars {
        let mut one = Vec::new();
        bytes(&mut one, 1, tag.as_bytes());
        one.push(2 << 3 | 5);
        one.extend((*value as f32).to_le_bytes());
        bytes(&mut values, 1, &one);
    }
    let mut event = head(time, step);
    bytes(&mut event, 5, &values);
    event
}

fn head(time: f64, step: u64) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(time.to_le_bytes());
    if step > 0 {
        event.push(2 << 3);
        varint(&mut event, step);
    }
    event
}

/// A field of bytes with its length.
fn bytes(to: &mut Vec<u8>, field: u8, value: &[u8]) {
    to.push(field << 3 | 2);
    varint(to, value.len() as u64);
    to.extend(value);
}

fn varint(to: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        to.push(n as u8 | 0x80);
        n >>= 7;
    }
    to.push(n as u8);
}

/// An event as it stands in a file.
fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut all = length.to_vec();
    all.extend(masked_crc(&length).to_le_bytes());
    all.extend(event);
    all.extend(masked_crc(event).to_le_bytes());
    all
}

/// TFRecord's masked CRC: a file may hold CRCs of CRCs.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: events are short.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_has_the_values_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn records_are_those_of_tensorboards_own_writer() {
        let golden = include_bytes!("../tests/fixtures/tensorboard.tfevents");
        let scalars = [("loss", 0.125), ("routing/load_cv2", -3.5e-3), ("großes ü", 1e30)];
        let scalars = scalars.map(|(tag, v)| (tag.to_owned(), v));
        let mine = [
            version(1_700_000_000.25),
            session_start(1_700_000_001.5, 301),
            summary(1_700_000_002.75, 300, &scalars),
            summary(1_700_000_003.0, 1 << 40, &scalars[..1]),
        ];
        let mine: Vec<u8> = mine.iter().flat_map(|event| record(event)).collect();
        assert_eq!(mine, golden);
    }

    #[test]
    fn each_training_has_a_folder_and_each_start_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let started = |step| Event::Started {
            name: "fit/a".into(),
            step,
            steps: 9,
            trained: 1,
            examples: 1,
            note: None,
            losses: Default::default(),
        };
        let step = Event::Step {
            step: 1,
            loss: 0.5,
            aux: [("balance".to_owned(), 2.0)].into(),
            lr: 0.1,
            grad_norm: 1.0,
            seconds: 0.2,
        };
        for after in [0, 1] {
            let mut board = TensorBoard::below(dir.path());
            // Before any training there is nothing to write to.
            board.event(&step).unwrap();
            board.event(&started(after)).unwrap();
            board.event(&step).unwrap();
            let metrics = [("mae".to_owned(), 0.25)].into();
            let name = "fit/a/watched".into();
            board.event(&Event::Evaluated { name, step: Some(1), metrics }).unwrap();
        }
        let files: Vec<PathBuf> =
            fs::read_dir(dir.path().join("fit/a")).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(files.len(), 2);
        for file in files {
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            assert!(name.starts_with("events.out.tfevents."), "{name}");
            let text = String::from_utf8_lossy(&fs::read(file).unwrap()).into_owned();
            // Before the last the length of its tag.
            for part in ["brain.Event:2", "loss", "aux/balance", "\u{b}watched/mae"] {
                assert!(text.contains(part), "{part:?}");
            }
        }
    }
}
