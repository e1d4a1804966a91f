//! Where the examples of a recipe come from: its `[data]`.
//!
//! ```toml
//! [data]
//! format = "idx"                       # "tsv" where nothing is said, "csv", "jsonl", "parquet", …
//! tasks = { digits = "assets/mnist" }  # a file for each task, in the order in which they are learned
//! # test_tasks = { … }                 # files with what is held out, or
//! # test = 0.2                         # the share of examples that is
//! # limit = 1000                       # so many examples of each file only
//! # max_tokens = 128                   # of each text; the rest of it is not read
//! # in_memory = 64                     # megabytes; what is beyond them stands in a file
//! # columns = { label = "digit" }      # names of columns or keys
//! # normalize = [0.1307, 0.3081]       # of numbers: mean and standard deviation
//! # features = { query = "backbone" }   # of each example, for routers: see [`Feature`]
//!
//! [data.stream]                        # many tasks of the one: see [`Stream`]
//! type = "permuted"
//! tasks = 10
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::reading::Reading;
use super::source::Source;
use super::{Feature, Head, Recipe, Stream, TaskFiles};
use crate::Dataset;
use crate::formats::{Columns, DataFormat, Wanted, held_out_images};

/// Examples by task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    /// How the files are written.
    #[serde(default)]
    pub format: DataFormat,
    /// A file for each task, in the order in which they are learned where that counts.
    pub tasks: TaskFiles,
    /// A file for each task with what is held out, instead of `test`. A folder of images with
    /// `t10k-…` has them already.
    pub test_tasks: Option<TaskFiles>,
    /// The share of examples that is held out; 0.2 where nothing is said and no other files have
    /// them.
    pub test: Option<f64>,
    /// Which examples are held out; it does not follow the recipe's seed, so that all seeds are
    /// tested on the same.
    #[serde(default)]
    pub split_seed: u64,
    /// So many examples of each file only, chosen by `split_seed`.
    pub limit: Option<usize>,
    /// So many of each file of `test_tasks` only.
    pub test_limit: Option<usize>,
    /// The tokens of a text, special ones included, that are read at most; all where nothing is said.
    pub max_tokens: Option<usize>,
    /// So many megabytes of tokens, and of numbers, of each of the two sets stand in memory; 64 where
    /// nothing is said, enough for the images of MNIST. Where there are more, they stand in a file
    /// without a name, in the folder that `TMPDIR` names, else in `/var/tmp`. It has no influence on
    /// what is learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_memory: Option<usize>,
    /// How columns or keys are called.
    #[serde(default)]
    pub columns: Columns,
    /// The mean that is taken off each number, and the standard deviation that it is divided by;
    /// bytes of images are between 0 and 1 before.
    pub normalize: Option<[f64; 2]>,
    /// Many tasks of the one that there is.
    pub stream: Option<Stream>,
    /// Features of each example by name, which routers and modules may look at (`feature:NAME`).
    #[serde(default)]
    pub features: BTreeMap<String, Feature>,
}

impl DataSpec {
    /// Checks the settings.
    pub(super) fn check(&self, source: &Source) -> Result<()> {
        let wrong = |key: &str, problem: &str| {
            Err(source.error(&["data".to_owned(), key.to_owned()], problem))
        };
        if self.test.is_some_and(|share| share <= 0.0 || share >= 1.0) {
            return wrong("test", "`test` is a share between 0 and 1, such as 0.2");
        }
        if self.max_tokens.is_some_and(|n| n < 3) {
            return wrong("max_tokens", "`max_tokens` is to be 3 at least");
        }
        if self.tasks.is_empty() {
            return wrong("tasks", "`tasks` is empty; give it a file for each task");
        }
        if let Some(files) = &self.test_tasks {
            if self.test.is_some() {
                return wrong("test_tasks", "`test` and `test_tasks` contradict; keep one of them");
            }
            if files.keys().any(|t| self.tasks.get(t).is_none()) || files.len() != self.tasks.len()
            {
                return wrong("test_tasks", "`test_tasks` is to have the tasks of `tasks`");
            }
        }
        if self.columns != Columns::default()
            && matches!(self.format, DataFormat::Tsv | DataFormat::Idx)
        {
            return wrong("columns", "`columns` is for formats that name columns, such as `csv`");
        }
        if self.normalize.is_some_and(|[_, deviation]| deviation <= 0.0) {
            return wrong(
                "normalize",
                "`normalize` is [mean, standard deviation]; that is above 0",
            );
        }
        match &self.stream {
            Some(_) if self.tasks.len() > 1 => {
                wrong("stream", "a stream is made of one task; `tasks` has more")
            }
            Some(_) if self.features.values().any(|f| matches!(f, Feature::Table(_))) => {
                wrong("features", "a `table` is of tasks of files; a stream makes others")
            }
            Some(stream) => stream.check().or_else(|problem| wrong("stream", problem.as_str())),
            None => Ok(()),
        }
    }
}

impl Recipe {
    /// The examples for training and those held out, from the recipe's files and with the targets of its
    /// own head; `tokenise` makes the token ids of a text.
    ///
    /// # Errors
    /// As [`Recipe::load_data_of`].
    pub fn load_data(
        &self,
        tokenise: &dyn Fn(&str) -> Result<Vec<i64>>,
        pad: i64,
    ) -> Result<(Dataset, Dataset)> {
        self.load_data_of(&self.head, tokenise, pad)
    }

    /// [`Recipe::load_data`] with the targets of a head.
    ///
    /// # Errors
    /// Where a file cannot be read or has a line that does not fit, or one of the two is empty.
    pub fn load_data_of(
        &self,
        head: &Head,
        tokenise: &dyn Fn(&str) -> Result<Vec<i64>>,
        pad: i64,
    ) -> Result<(Dataset, Dataset)> {
        let classes = self.classes_of(head)?;
        let load = |files: Vec<(&str, PathBuf)>, limit| {
            let reading = Reading::new(self, head, &classes, tokenise, limit);
            self.with_tables(reading.data_set(files)?.with_pad(pad))
        };
        let files = self.data.tasks.iter().map(|(t, file)| (t, self.resolve(file))).collect();
        let train = load(files, self.data.limit)?;
        let (train, test) = match self.held_out_files()? {
            Some(files) => (train, load(files, self.data.test_limit)?),
            None => train.split(self.data.split_seed, self.data.test.unwrap_or(0.2))?,
        };
        match &self.data.stream {
            None => Ok((train, test)),
            Some(stream) => Ok((stream.of(&train, &classes)?, stream.of(&test, &classes)?)),
        }
    }

    /// The files of what is held out, where files say it.
    fn held_out_files(&self) -> Result<Option<Vec<(&str, PathBuf)>>> {
        let spec = &self.data;
        if let Some(files) = &spec.test_tasks {
            let all = files.iter().map(|(t, file)| (t, self.resolve(file)));
            return Ok(Some(all.collect()));
        }
        if spec.test.is_some() || spec.format != DataFormat::Idx {
            return Ok(None);
        }
        let images = |(t, file): (_, &Path)| (t, held_out_images(&self.resolve(file)));
        let all: Vec<(&str, Option<PathBuf>)> = spec.tasks.iter().map(images).collect();
        let there = all.iter().filter(|(_, file)| file.is_some()).count();
        if there > 0 && there < all.len() {
            let without = all.iter().find(|(_, file)| file.is_none()).map_or("", |(t, _)| *t);
            let file = spec.tasks.get(without).unwrap_or(Path::new(""));
            let problem = "has no t10k-images, as other tasks do; give a share `test`";
            return Err(Error::file(self.resolve(file), problem));
        }
        Ok((there > 0).then(|| all.into_iter().filter_map(|(t, f)| Some((t, f?))).collect()))
    }

    /// What is looked for in a file.
    pub(super) fn wanted(&self, head: &Head) -> Wanted<'_> {
        let label = match head {
            Head::Regression { .. } => "score",
            Head::Classification { .. } => "class",
            Head::NextToken {} => "prompt",
            Head::MaskedTokens { .. } => "label",
        };
        let optional = matches!(head, Head::NextToken {} | Head::MaskedTokens { .. });
        Wanted { columns: &self.data.columns, label, optional }
    }
}
