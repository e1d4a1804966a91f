//! Where the examples of a recipe come from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::Recipe;
use crate::{Dataset, Example, read_tsv, sample};

/// Examples by task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    /// How the files are written.
    #[serde(default)]
    pub format: DataFormat,
    /// A file for each task.
    pub tasks: BTreeMap<String, PathBuf>,
    /// The share of examples that is held out; 0.2 where nothing is said.
    #[serde(default = "one_fifth")]
    pub test: f64,
    /// Which examples are held out; it does not follow the recipe's seed, so that all seeds are
    /// tested on the same.
    #[serde(default)]
    pub split_seed: u64,
    /// So many examples of each file only, chosen by `split_seed`.
    pub limit: Option<usize>,
}

fn one_fifth() -> f64 {
    0.2
}

/// How a file of examples is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// `id<TAB>score<TAB>text`.
    #[default]
    Tsv,
}

impl Recipe {
    /// The examples for training and those held out, from the recipe's files; `tokenise` makes the
    /// token ids of a text.
    ///
    /// # Errors
    /// Where a file cannot be read or has a line that does not fit, or one of the two is empty.
    pub fn load_data(
        &self,
        tokenise: &dyn Fn(&str) -> Result<Vec<i64>>,
        pad: i64,
    ) -> Result<(Dataset, Dataset)> {
        let mut examples = Vec::new();
        for (task, file) in &self.data.tasks {
            let rows = match self.data.format {
                DataFormat::Tsv => read_tsv(self.resolve(file))?,
            };
            let rows = match self.data.limit {
                Some(n) => sample(rows, n, self.data.split_seed),
                None => rows,
            };
            if rows.is_empty() {
                return Err(Error::file(self.resolve(file), "has no examples"));
            }
            for row in rows {
                let ids = tokenise(&row.text)?;
                examples.push(Example { id: row.id, task: task.clone(), ids, target: row.score });
            }
        }
        Dataset::new(examples)?.with_pad(pad).split(self.data.split_seed, self.data.test)
    }
}
