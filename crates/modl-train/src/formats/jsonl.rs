//! A JSON object in each line.
//!
//! ```text
//! {"id": "1", "score": 0.5, "text": "A cat plays."}
//! {"id": "2", "class": 3, "input": [0, 0.5, 1, 0]}
//! ```
//!
//! Other keys are passed over.

use std::path::Path;

use modl_core::Result;
use serde_json::{Map, Value};

use super::numbers::{Rows, line};
use super::{Line, Table, Wanted, text};

/// The key of a list of numbers.
const INPUT: &str = "input";

pub(super) fn read(path: &Path, wanted: Wanted) -> Result<Table> {
    let whole = text(path)?;
    let (label, words) = (wanted.label(), wanted.text());
    let form = format!("a line is {{\"id\": …, \"{label}\": …, \"{words}\" or \"{INPUT}\": …}}");
    let mut table = Table { path: path.to_owned(), form, lines: Vec::new(), numbers: None };
    let mut rows = Rows::default();
    let mut row = Vec::new();
    for (n, json) in whole.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let nothing = || Line { number: n + 1, ..line(n + 1, None, "", "") };
        let refuse = |what: String| table.wrong(&nothing(), what);
        let object: Map<String, Value> =
            serde_json::from_str(json).map_err(|e| refuse(format!("is no JSON object: {e}")))?;
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
        let mut own = line(n + 1, id.as_deref(), &right, "");
        match object.get(INPUT) {
            Some(list) if !object.contains_key(words) => {
                row.clear();
                let list = list.as_array().ok_or_else(|| refuse("`input` is no list".into()))?;
                for value in list {
                    let number = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
                    row.push(number.ok_or_else(|| {
                        refuse(format!("{value} in `{INPUT}` is not a number of 32 bits"))
                    })?);
                }
                rows.push(&row).map_err(refuse)?;
            }
            _ if !rows.is_empty() => return Err(refuse(format!("has no `{INPUT}`, others have"))),
            _ => own.text = need(words)?,
        }
        table.lines.push(own);
    }
    rows.finish(&mut table)?;
    Ok(table)
}

/// A string, or a number as one writes it.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}
