//! Where the examples of a recipe come from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{Head, Recipe};
use crate::tsv::read_rows;
use crate::{Dataset, Example, Row, read_tsv, sample};

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
    /// `id<TAB>score<TAB>text`; the second column is a class or a prompt where [`Head`] says so.
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
        let classes = self.classes()?;
        let mut examples = Vec::new();
        for (task, file) in &self.data.tasks {
            let DataFormat::Tsv = self.data.format;
            let path = self.resolve(file);
            let number = |row: Row| Ok((row.id, tokenise(&row.text)?, row.score));
            let rows: Vec<(String, Vec<i64>, f32)> = match &self.head {
                Head::Regression { .. } => self.limited(read_tsv(&path)?, number)?,
                Head::Classification { .. } => {
                    let rows = read_rows(&path, "class", |c| index_of(c.trim(), &classes))?;
                    self.limited(rows, number)?
                }
                Head::NextToken {} => {
                    let rows = read_rows(&path, "prompt", |p| Ok(p.to_owned()))?;
                    self.limited(rows, |row| with_prompt(row, task, tokenise))?
                }
            };
            if rows.is_empty() {
                return Err(Error::file(path, "has no examples"));
            }
            let example = |(id, ids, target)| Example { id, task: task.clone(), ids, target };
            examples.extend(rows.into_iter().map(example));
        }
        Dataset::new(examples)?.with_pad(pad).split(self.data.split_seed, self.data.test)
    }

    /// As many of the rows as are wanted, each read by `read`.
    fn limited<T, U>(
        &self,
        rows: Vec<Row<T>>,
        read: impl Fn(Row<T>) -> Result<U>,
    ) -> Result<Vec<U>> {
        let rows = match self.data.limit {
            Some(n) => sample(rows, n, self.data.split_seed),
            None => rows,
        };
        rows.into_iter().map(read).collect()
    }
}

/// The index of a class.
fn index_of(class: &str, classes: &[String]) -> Result<f32, String> {
    let index = classes.iter().position(|c| c == class).map(|i| i as f32);
    index.ok_or_else(|| Error::unknown("class", class, classes).to_string())
}

/// The tokens of prompt and text in one, and how many of them are the prompt's: those at the start
/// that the prompt alone has, too.
fn with_prompt(
    row: Row<String>,
    task: &str,
    tokenise: &dyn Fn(&str) -> Result<Vec<i64>>,
) -> Result<(String, Vec<i64>, f32)> {
    let Row { id, score: prompt, text } = row;
    let ids = tokenise(&format!("{prompt}{text}"))?;
    let given = match prompt.is_empty() {
        true => 0,
        false => tokenise(&prompt)?.iter().zip(&ids).take_while(|(a, b)| a == b).count(),
    };
    if ids.len() <= given.max(1) {
        let place = format!("example `{id}` of `{task}`");
        return Err(Error::invalid(place, "has no token to predict; give it a longer text"));
    }
    Ok((id, ids, given as f32))
}
