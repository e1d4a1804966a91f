//! An example as an object: keys for the id, for what is right, and for a text or a list of numbers.

use std::path::Path;

use modl_core::{Error, Result};
use serde_json::{Map, Value};

use super::numbers::{Rows, line};
use super::{Line, Table, Wanted};

/// The key of a list of numbers.
pub(super) const INPUT: &str = "input";

/// A table in the making.
#[derive(Debug)]
pub(super) struct Objects<'a> {
    wanted: Wanted<'a>,
    table: Table,
    rows: Rows,
    row: Vec<f32>,
}

impl<'a> Objects<'a> {
    pub(super) fn new(path: &Path, wanted: Wanted<'a>) -> Self {
        let (label, words) = (wanted.label(), wanted.text());
        let form =
            format!("a line is {{\"id\": …, \"{label}\": …, \"{words}\" or \"{INPUT}\": …}}");
        let table = Table { path: path.to_owned(), form, lines: Vec::new(), numbers: None };
        Objects { wanted, table, rows: Rows::default(), row: Vec::new() }
    }

    /// The error for a line, from 1.
    pub(super) fn wrong(&self, number: usize, what: impl std::fmt::Display) -> Error {
        self.table.wrong(&Line { number, ..line(number, None, "", "") }, what)
    }

    /// Takes the object of a line, from 1. Other keys are passed over.
    ///
    /// # Errors
    /// Where a key is missing or has something else.
    pub(super) fn push(&mut self, number: usize, object: &Map<String, Value>) -> Result<()> {
        let refuse = |what: String| self.wrong(number, what);
        let (label, words) = (self.wanted.label(), self.wanted.text());
        let need = |key: &str| {
            object
                .get(key)
                .map(plain)
                .ok_or_else(|| refuse(format!("has no `{key}`")))?
                .ok_or_else(|| refuse(format!("`{key}` is neither a string nor a number")))
        };
        let id = match self.wanted.columns.id.is_some() || object.contains_key(self.wanted.id()) {
            true => Some(need(self.wanted.id())?),
            false => None,
        };
        let right = match self.wanted.may_lack_label() && !object.contains_key(label) {
            true => String::new(),
            false => need(label)?,
        };
        let mut own = line(number, id.as_deref(), &right, "");
        match object.get(INPUT) {
            Some(list) if !object.contains_key(words) => {
                let mut row = std::mem::take(&mut self.row);
                row.clear();
                let refuse = |what: String| self.wrong(number, what);
                let list = list.as_array().ok_or_else(|| refuse("`input` is no list".into()))?;
                for value in list {
                    let read = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
                    row.push(read.ok_or_else(|| {
                        refuse(format!("{value} in `{INPUT}` is not a number of 32 bits"))
                    })?);
                }
                let pushed = self.rows.push(&row);
                pushed.map_err(|what| self.wrong(number, what))?;
                self.row = row;
            }
            _ if !self.rows.is_empty() => {
                return Err(refuse(format!("has no `{INPUT}`, others have")));
            }
            _ => own.text = need(words)?,
        }
        self.table.lines.push(own);
        Ok(())
    }

    pub(super) fn finish(self) -> Result<Table> {
        let mut table = self.table;
        self.rows.finish(&mut table)?;
        Ok(table)
    }
}

/// A string, or a number as one writes it.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}
