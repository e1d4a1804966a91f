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
//!
//! Files are read from their beginning to their end, and each example is handed out as it comes: no file
//! stands in memory.

mod delimited;
mod idx;
mod jsonl;
mod numbers;
mod objects;
mod packed;
mod parquet;
mod tensors;
mod tsv;

use std::collections::{BTreeSet, BinaryHeap};
use std::path::{Path, PathBuf};

use modl_core::{Error, Result, Seed};
use serde::{Deserialize, Serialize};

use crate::stored_rows::Numbers;

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

/// What a network reads of an example instead of a text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dense<'a> {
    /// The name of the input.
    pub input: &'static str,
    /// The shape of the numbers, which all examples of a file share.
    pub shape: &'a [i64],
    pub numbers: Numbers<'a>,
}

/// A file and what a line of it looks like, for errors.
#[derive(Debug)]
pub(crate) struct Form {
    path: PathBuf,
    form: String,
}

impl Form {
    fn new(path: &Path, form: impl Into<String>) -> Self {
        Form { path: path.to_owned(), form: form.into() }
    }

    /// The error for a line.
    pub(crate) fn wrong(&self, line: &Line, what: impl std::fmt::Display) -> Error {
        self.wrong_at(line.number, what)
    }

    fn wrong_at(&self, number: usize, what: impl std::fmt::Display) -> Error {
        Error::invalid(
            format!("{}:{number}", self.path.display()),
            format!("{what}; {}", self.form),
        )
    }
}

/// Takes the examples of a file, one after the other, with their numbers where they have no text.
pub(crate) type Take<'a> = dyn FnMut(&Form, Line, Option<Dense>) -> Result<()> + 'a;

/// A sample in the making: the places of `n` of some ids, chosen by seed and id. The first ones of a file
/// would be no fair choice: many files are sorted.
#[derive(Debug)]
struct Sample {
    n: usize,
    seed: Seed,
    seen: usize,
    /// The lowest ranks so far, the highest of them first.
    best: BinaryHeap<(u64, usize)>,
}

impl Sample {
    fn new(n: usize, seed: u64) -> Self {
        Sample { n, seed: Seed(seed), seen: 0, best: BinaryHeap::new() }
    }

    fn see(&mut self, id: &str) {
        self.best.push((self.seed.child(id).0, self.seen));
        self.seen += 1;
        if self.best.len() > self.n {
            self.best.pop();
        }
    }

    fn places(self) -> BTreeSet<usize> {
        self.best.into_iter().map(|(_, place)| place).collect()
    }
}

/// The places of `n` of some ids, chosen by seed and id; all where there are no more.
pub(crate) fn chosen<'a>(
    ids: impl Iterator<Item = &'a str>,
    n: usize,
    seed: u64,
) -> BTreeSet<usize> {
    let mut sample = Sample::new(n, seed);
    ids.for_each(|id| sample.see(id));
    sample.places()
}

/// Hands out the examples of a file, or of the images of a folder that are for training.
///
/// # Errors
/// With file and line where something is missing or does not fit, or what `take` refuses.
pub(crate) fn read(format: DataFormat, path: &Path, wanted: Wanted, take: &mut Take) -> Result<()> {
    match format {
        DataFormat::Tsv => tsv::read(path, wanted, take),
        DataFormat::Csv => delimited::read(path, wanted, take),
        DataFormat::Jsonl => jsonl::read(path, wanted, take),
        DataFormat::Parquet => parquet::read(path, wanted, take),
        DataFormat::Safetensors => tensors::read(path, wanted, take),
        DataFormat::Idx => idx::read(path, take),
    }
}

/// [`read`]s `n` of the examples, chosen by seed and id and left in their order; all where there are no more.
/// The file is read twice.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_sample(
    format: DataFormat,
    path: &Path,
    wanted: Wanted,
    (n, seed): (usize, u64),
    take: &mut Take,
) -> Result<()> {
    let mut sample = Sample::new(n, seed);
    let mut see = |id: &str| sample.see(id);
    match format {
        DataFormat::Idx => {
            idx::labels(path)?.iter().enumerate().for_each(|(i, _)| see(&i.to_string()))
        }
        DataFormat::Safetensors => {
            tensors::Columns::open(path, wanted)?.ids.iter().for_each(|id| see(id))
        }
        _ => read(format, path, wanted, &mut |_, line, _| {
            see(&line.id);
            Ok(())
        })?,
    }
    let mut places = sample.places().into_iter().peekable();
    let mut place = 0;
    read(format, path, wanted, &mut |form, line, dense| {
        place += 1;
        match places.next_if_eq(&(place - 1)) {
            Some(_) => take(form, line, dense),
            None => Ok(()),
        }
    })
}

/// What is right in the examples, each once, without spaces around it.
///
/// # Errors
/// As [`read`].
pub(crate) fn labels(format: DataFormat, path: &Path, wanted: Wanted) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut see = |label: &str| {
        if !label.trim().is_empty() && !found.contains(label.trim()) {
            found.insert(label.trim().to_owned());
        }
    };
    match format {
        DataFormat::Idx => idx::labels(path)?.iter().for_each(|label| see(&label.to_string())),
        DataFormat::Safetensors => {
            tensors::Columns::open(path, wanted)?.labels.iter().for_each(|label| see(label));
        }
        _ => read(format, path, wanted, &mut |_, line, _| {
            see(&line.label);
            Ok(())
        })?,
    }
    Ok(found)
}
