//! Rows of numbers that a file of text has.

use modl_core::{Device, Error, Result, Tensor};

use super::{Line, Table};

/// The input that a network reads them from.
const INPUT: &str = "input_values";

/// Rows as they are read, each as long as the first.
#[derive(Debug, Default)]
pub(super) struct Rows {
    values: Vec<f32>,
    width: Option<usize>,
}

impl Rows {
    /// Takes a row.
    ///
    /// # Errors
    /// In words where it has another length than the first, or none.
    pub(super) fn push(&mut self, row: &[f32]) -> Result<(), String> {
        let width = *self.width.get_or_insert(row.len());
        if row.is_empty() {
            return Err("has no numbers".into());
        }
        if row.len() != width {
            return Err(format!("has {} numbers, the first example {width}", row.len()));
        }
        self.values.extend(row);
        Ok(())
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.width.is_none()
    }

    /// The rows of `lines` examples, `[lines, width]`; none where no example has numbers.
    ///
    /// # Errors
    /// Where some have texts, others numbers.
    pub(super) fn finish(self, table: &mut Table) -> Result<()> {
        let (Some(width), lines) = (self.width, table.lines.len()) else { return Ok(()) };
        if self.values.len() != width * lines {
            return Err(Error::file(
                &table.path,
                "has examples with texts and others with numbers",
            ));
        }
        let shape = [lines as i64, width as i64];
        table.numbers = Some((INPUT, Tensor::from_slice(&self.values, &shape, Device::Cpu)?));
        Ok(())
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
