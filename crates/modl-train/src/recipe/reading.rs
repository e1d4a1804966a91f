//! The files of a recipe, read into a data set: each example becomes token ids, or a row of numbers, as it
//! comes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use modl_core::{Error, Result};

use super::{Head, Recipe};
use crate::dense::DenseRows;
use crate::formats::{Dense, Form, Line, finite, read, read_sample};
use crate::spill::Spill;
use crate::stored_rows::RowsWriter;
use crate::{Dataset, Example, TokenIds};

/// The megabytes of tokens or of numbers that stand in memory where the recipe says nothing.
const IN_MEMORY: usize = 64;

/// What files become.
pub(super) struct Reading<'a> {
    recipe: &'a Recipe,
    head: &'a Head,
    classes: &'a [String],
    tokenise: &'a dyn Fn(&str) -> Result<Vec<i64>>,
    limit: Option<usize>,
    /// The bytes of tokens or numbers that stand in memory.
    most: usize,
    examples: Vec<Example>,
    tokens: Arc<Spill>,
    numbers: Option<Numbers>,
    /// The last file with texts.
    texts: Option<PathBuf>,
}

/// The rows of numbers so far.
struct Numbers {
    input: &'static str,
    rows: RowsWriter,
    /// The first file that has some.
    of: PathBuf,
}

impl<'a> Reading<'a> {
    pub(super) fn new(
        recipe: &'a Recipe,
        head: &'a Head,
        classes: &'a [String],
        tokenise: &'a dyn Fn(&str) -> Result<Vec<i64>>,
        limit: Option<usize>,
    ) -> Self {
        let most = recipe.data.in_memory.unwrap_or(IN_MEMORY).saturating_mul(1 << 20);
        Reading {
            recipe,
            head,
            classes,
            tokenise,
            limit,
            most,
            examples: Vec::new(),
            tokens: Arc::new(Spill::new(most)),
            numbers: None,
            texts: None,
        }
    }

    /// The examples of a file for each task.
    ///
    /// # Errors
    /// Where a file cannot be read or has none, a line does not fit, or files differ in what they have.
    pub(super) fn data_set(mut self, files: Vec<(&str, PathBuf)>) -> Result<Dataset> {
        let spec = &self.recipe.data;
        for (task, path) in files {
            let (before, wanted) = (self.examples.len(), self.recipe.wanted(self.head));
            let limit = self.limit;
            let mut take = |form: &Form, line: Line, dense: Option<Dense>| {
                self.take(task, &path, form, line, dense)
            };
            match limit {
                Some(n) => {
                    read_sample(spec.format, &path, wanted, (n, spec.split_seed), &mut take)?;
                }
                None => read(spec.format, &path, wanted, &mut take)?,
            }
            if self.examples.len() == before {
                return Err(Error::file(path, "has no examples"));
            }
        }
        let examples = self.examples;
        let Some(Numbers { input, rows, .. }) = self.numbers else {
            return match spec.normalize {
                Some(_) => Err(Error::invalid("data", "has texts; `normalize` is for numbers")),
                None => Dataset::new(examples),
            };
        };
        let rows = DenseRows::of(input, rows.finish()?, examples.len())?;
        let inputs = [(input.to_owned(), rows)].into();
        let data = Dataset { examples, inputs, ..Dataset::default() }.checked()?;
        Ok(match spec.normalize {
            Some([mean, deviation]) => data.normalized(mean, deviation),
            None => data,
        })
    }

    fn take(
        &mut self,
        task: &str,
        path: &Path,
        form: &Form,
        line: Line,
        dense: Option<Dense>,
    ) -> Result<()> {
        let (ids, target) = match self.head {
            Head::Regression { .. } => {
                let wrong = || form.wrong(&line, "its score is not a number");
                let score = finite(&line.label).ok_or_else(wrong)?;
                (self.text(&line, dense.is_some())?, score)
            }
            Head::Classification { .. } => {
                let class = line.label.trim();
                let index = self.classes.iter().position(|c| c == class);
                let unknown = || form.wrong(&line, Error::unknown("class", class, self.classes));
                let index = index.ok_or_else(unknown)?;
                (self.text(&line, dense.is_some())?, index as f32)
            }
            Head::NextToken {} | Head::MaskedTokens { .. } if dense.is_some() => {
                return Err(form.wrong(&line, "has numbers; the head predicts texts"));
            }
            Head::MaskedTokens { .. } => (self.text(&line, false)?, 0.0),
            Head::NextToken {} => self.with_prompt(task, &line)?,
        };
        match dense {
            Some(dense) => self.row(path, dense)?,
            None if self.texts.as_deref() != Some(path) => self.texts = Some(path.to_owned()),
            None => {}
        }
        if let (Some(texts), Some(Numbers { of, .. })) = (&self.texts, &self.numbers) {
            let problem = format!("has texts, but {} numbers", of.display());
            return Err(Error::file(texts, problem));
        }
        let ids = match ids.is_empty() {
            true => TokenIds::default(),
            false => TokenIds::stored(&ids, &self.tokens)?,
        };
        self.examples.push(Example { id: line.id, task: task.to_owned(), ids, target });
        Ok(())
    }

    /// Takes a row of numbers, which has to be as long as those of other files.
    fn row(&mut self, path: &Path, dense: Dense) -> Result<()> {
        let Dense { input, shape, numbers } = dense;
        let own = self.numbers.get_or_insert_with(|| {
            let rows = RowsWriter::new(shape, numbers, self.most);
            Numbers { input, rows, of: path.to_owned() }
        });
        if own.rows.shape() != shape {
            let (other, of) = (own.rows.shape(), own.of.display());
            let problem = format!("has rows of {shape:?} numbers, {of} of {other:?}");
            return Err(Error::file(path, problem));
        }
        own.rows.push(numbers)
    }

    fn text(&self, line: &Line, numbers: bool) -> Result<Vec<i64>> {
        match numbers {
            true => Ok(Vec::new()),
            false => (self.tokenise)(&line.text),
        }
    }

    /// The tokens of prompt and text in one, and how many of them are the prompt's: those at the
    /// start that the prompt alone has, too.
    fn with_prompt(&self, task: &str, line: &Line) -> Result<(Vec<i64>, f32)> {
        let prompt = &line.label;
        let ids = (self.tokenise)(&format!("{prompt}{}", line.text))?;
        let given = match prompt.is_empty() {
            true => 0,
            false => (self.tokenise)(prompt)?.iter().zip(&ids).take_while(|(a, b)| a == b).count(),
        };
        if ids.len() <= given.max(1) {
            let place = format!("example `{}` of `{task}`", line.id);
            return Err(Error::invalid(place, "has no token to predict; give it a longer text"));
        }
        Ok((ids, given as f32))
    }
}
