//! Rows of numbers that a file of text has.

use modl_core::{Error, Result};

use super::{Dense, Form, Line, Take};
use crate::stored_rows::Numbers;

/// The input that a network reads them from.
const INPUT: &str = "input_values";

/// The examples of a file so far: their rows are as long as the first.
#[derive(Debug, Default)]
pub(super) struct Rows {
    texts: bool,
    width: Option<usize>,
}

impl Rows {
    /// Hands out an example with numbers.
    ///
    /// # Errors
    /// Where the row has another length than the first, or none, or other examples have texts.
    pub(super) fn numbers(
        &mut self,
        form: &Form,
        line: Line,
        row: &[f32],
        take: &mut Take,
    ) -> Result<()> {
        let width = *self.width.get_or_insert(row.len());
        if row.is_empty() {
            return Err(form.wrong(&line, "has no numbers"));
        }
        if row.len() != width {
            let what = format!("has {} numbers, the first example {width}", row.len());
            return Err(form.wrong(&line, what));
        }
        if self.texts {
            let problem = "has examples with texts and others with numbers";
            return Err(Error::file(&form.path, problem));
        }
        let dense = Dense { input: INPUT, shape: &[width as i64], numbers: Numbers::Floats(row) };
        take(form, line, Some(dense))
    }

    /// Hands out an example with a text.
    pub(super) fn text(&mut self, form: &Form, line: Line, take: &mut Take) -> Result<()> {
        self.texts = true;
        take(form, line, None)
    }

    /// Whether none has numbers.
    pub(super) fn is_empty(&self) -> bool {
        self.width.is_none()
    }
}

/// A number that is finite.
pub(crate) fn finite(text: &str) -> Option<f32> {
    text.trim().parse::<f32>().ok().filter(|x| x.is_finite())
}

/// A line whose id is what stands there, or its number.
pub(super) fn line(number: usize, id: Option<&str>, label: &str, text: &str) -> Line {
    let id = id.map_or_else(|| number.to_string(), |id| id.trim().to_owned());
    Line { number, id, label: label.to_owned(), text: text.to_owned() }
}
