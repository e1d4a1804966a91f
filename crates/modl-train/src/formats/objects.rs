//! An example as an object: keys for the id, for what is right, and for a text or a list of numbers.

use std::path::Path;

use modl_core::{Error, Result};
use serde_json::{Map, Value};

use super::numbers::{Rows, line};
use super::{Form, Take, Wanted};

/// The key of a list of numbers.
pub(super) const INPUT: &str = "input";

/// The objects of a file.
#[derive(Debug)]
pub(super) struct Objects<'a> {
    wanted: Wanted<'a>,
    form: Form,
    rows: Rows,
    row: Vec<f32>,
}

impl<'a> Objects<'a> {
    pub(super) fn new(path: &Path, wanted: Wanted<'a>) -> Self {
        let (label, words) = (wanted.label(), wanted.text());
        let form =
            format!("a line is {{\"id\": …, \"{label}\": …, \"{words}\" or \"{INPUT}\": …}}");
        Objects { wanted, form: Form::new(path, form), rows: Rows::default(), row: Vec::new() }
    }

    /// The error for a line, from 1.
    pub(super) fn wrong(&self, number: usize, what: impl std::fmt::Display) -> Error {
        self.form.wrong_at(number, what)
    }

    /// Hands out the object of a line, from 1. Other keys are passed over.
    ///
    /// # Errors
    /// Where a key is missing or has something else, or what `take` refuses.
    pub(super) fn push(
        &mut self,
        number: usize,
        object: &Map<String, Value>,
        take: &mut Take,
    ) -> Result<()> {
        let Objects { wanted, form, rows, row } = self;
        let refuse = |what: String| form.wrong_at(number, what);
        let (label, words) = (wanted.label(), wanted.text());
        let need = |key: &str| {
            object
                .get(key)
                .map(plain)
                .ok_or_else(|| refuse(format!("has no `{key}`")))?
                .ok_or_else(|| refuse(format!("`{key}` is neither a string nor a number")))
        };
        let id = match wanted.columns.id.is_some() || object.contains_key(wanted.id()) {
            true => Some(need(wanted.id())?),
            false => None,
        };
        let right = match wanted.may_lack_label() && !object.contains_key(label) {
            true => String::new(),
            false => need(label)?,
        };
        let mut own = line(number, id.as_deref(), &right, "");
        match object.get(INPUT) {
            Some(list) if !object.contains_key(words) => {
                row.clear();
                let list = list.as_array().ok_or_else(|| refuse("`input` is no list".into()))?;
                for value in list {
                    let read = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
                    row.push(read.ok_or_else(|| {
                        refuse(format!("{value} in `{INPUT}` is not a number of 32 bits"))
                    })?);
                }
                rows.numbers(form, own, row, take)
            }
            _ if !rows.is_empty() => Err(refuse(format!("has no `{INPUT}`, others have"))),
            _ => {
                own.text = need(words)?;
                rows.text(form, own, take)
            }
        }
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
