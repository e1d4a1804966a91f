//! Files of examples: tables of texts or of numbers, and images.
//!
//! | format | a file | an example |
//! |---|---|---|
//! | `tsv` | text | `id<TAB>score<TAB>text`, without a header |
//! | `csv` | text with a header | a column for the id, one for the score, and one with a text or many with numbers |
//! | `jsonl` | an object in each line | keys `id`, `score`, and `text` or `input` with a list of numbers |
//! | `parquet` | a table, with the feature `parquet` | columns `id`, `score`, and `text`, `input` with lists of numbers, or numbers |
//! | `safetensors` | tensors | a row of `input_values` or `pixel_values`, a number of `score` |
//! | `idx` | images and labels, as MNIST has them | the number of the image, its label, its pixels |
//!
//! The score is a class or a prompt where the head says so. Files of text and of images may be packed by gzip.

mod delimited;
mod idx;
mod jsonl;
mod numbers;
mod objects;
mod parquet;
mod tensors;
mod tsv;

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use modl_core::{Device, Error, Result, Seed, Tensor};
use serde::{Deserialize, Serialize};

pub(crate) use idx::held_out_images;
pub(crate) use numbers::finite;
pub use tsv::{Row, read_tsv, sample};

/// How a file of examples is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// `id<TAB>score<TAB>text`; the second column is a class or a prompt where the head says so.
    #[default]
    Tsv,
    /// Comma-separated columns with a header.
    Csv,
    /// A JSON object in each line.
    Jsonl,
    /// An Apache Parquet table; read where modl is built with the feature `parquet`.
    Parquet,
    /// Tensors: `input_values` or `pixel_values`, and a number for each of their rows.
    Safetensors,
    /// Images and labels as MNIST has them: a folder with `train-images-idx3-ubyte` and
    /// `train-labels-idx1-ubyte` (and `t10k-…`, which are held out), or a file of images beside the
    /// one of their labels.
    Idx,
}

/// How the columns or keys of an example are called.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// The one with the id; `id` where nothing is said, or the number of the line where there is
    /// none.
    pub id: Option<String>,
    /// The one with what is right; `score`, `class` or `prompt`, by the head, where nothing is said.
    pub label: Option<String>,
    /// The one with the text; `text` where nothing is said. A table without it has numbers: all
    /// other columns, or the list under `input`.
    pub text: Option<String>,
}

/// What is looked for in a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub columns: &'a Columns,
    /// What the head calls what is right: `score`.
    pub label: &'static str,
    /// Whether it may be left out, as a prompt may be empty.
    pub optional: bool,
}

impl Wanted<'_> {
    fn id(&self) -> &str {
        self.columns.id.as_deref().unwrap_or("id")
    }

    fn label(&self) -> &str {
        self.columns.label.as_deref().unwrap_or(self.label)
    }

    /// Whether what is right may be left out: where nobody has said how it is called.
    fn may_lack_label(&self) -> bool {
        self.optional && self.columns.label.is_none()
    }

    fn text(&self) -> &str {
        self.columns.text.as_deref().unwrap_or("text")
    }
}

/// An example as it stands in a file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    /// Its line in the file, or the number of the image, from 1.
    number: usize,
    pub id: String,
    pub label: String,
    pub text: String,
}

/// The examples of a file.
#[derive(Debug)]
pub(crate) struct Table {
    path: PathBuf,
    /// What a line looks like, for errors.
    form: String,
    pub lines: Vec<Line>,
    /// What a network reads instead of texts: the name of the input, and a row for each line.
    pub numbers: Option<(&'static str, Tensor)>,
}

impl Table {
    /// The error for a line.
    pub(crate) fn wrong(&self, line: &Line, what: impl std::fmt::Display) -> Error {
        let place = format!("{}:{}", self.path.display(), line.number);
        Error::invalid(place, format!("{what}; {}", self.form))
    }

    /// `n` of the examples, chosen by seed and id and left in their order; all where there are no
    /// more.
    pub(crate) fn sample(mut self, n: usize, seed: u64) -> Result<Self> {
        let chosen = chosen(self.lines.iter().map(|l| l.id.as_str()), n, seed);
        if let Some((name, rows)) = self.numbers {
            let index: Vec<i64> = chosen.iter().map(|i| *i as i64).collect();
            let index = Tensor::from_slice(&index, &[index.len() as i64], Device::Cpu)?;
            self.numbers = Some((name, rows.index_select(0, &index)?));
        }
        let lines = self.lines.into_iter().enumerate();
        self.lines = lines.filter(|(i, _)| chosen.contains(i)).map(|(_, line)| line).collect();
        Ok(self)
    }
}

/// The places of `n` of some ids, chosen by seed and id. The first ones of a file would be no fair
/// choice: many files are sorted.
pub(crate) fn chosen<'a>(
    ids: impl Iterator<Item = &'a str>,
    n: usize,
    seed: u64,
) -> BTreeSet<usize> {
    let mut ranked: Vec<(u64, usize)> =
        ids.enumerate().map(|(i, id)| (Seed(seed).child(id).0, i)).collect();
    ranked.sort_unstable();
    ranked.into_iter().take(n).map(|(_, i)| i).collect()
}

/// Reads the examples of a file, or of the images of a folder that are for training.
///
/// # Errors
/// With file and line where something is missing or does not fit.
pub(crate) fn read(format: DataFormat, path: &Path, wanted: Wanted) -> Result<Table> {
    match format {
        DataFormat::Tsv => tsv::read(path, wanted),
        DataFormat::Csv => delimited::read(path, wanted),
        DataFormat::Jsonl => jsonl::read(path, wanted),
        DataFormat::Parquet => parquet::read(path, wanted),
        DataFormat::Safetensors => tensors::read(path, wanted),
        DataFormat::Idx => idx::read(path),
    }
}

/// What is right in each example, for a list of classes.
///
/// # Errors
/// As [`read`].
pub(crate) fn labels(format: DataFormat, path: &Path, wanted: Wanted) -> Result<Vec<String>> {
    match format {
        DataFormat::Idx => idx::labels(path),
        _ => Ok(read(format, path, wanted)?.lines.into_iter().map(|line| line.label).collect()),
    }
}

/// The bytes of a file, unpacked where it is packed by gzip.
fn bytes(path: &Path) -> Result<Vec<u8>> {
    let raw = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    if !raw.starts_with(&[0x1f, 0x8b]) {
        return Ok(raw);
    }
    let mut all = Vec::new();
    let unpacked = MultiGzDecoder::new(raw.as_slice()).read_to_end(&mut all);
    unpacked.map_err(|e| Error::file(path, format!("cannot be unpacked: {e}")))?;
    Ok(all)
}

/// The text of a file.
fn text(path: &Path) -> Result<String> {
    String::from_utf8(bytes(path)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::file(path, format!("is not UTF-8 from its byte {at} on; write it as UTF-8"))
    })
}
