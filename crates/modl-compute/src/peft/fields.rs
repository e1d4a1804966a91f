//! Strict reading of `adapter_config.json`: what nobody took and would matter is refused by name.

use std::path::Path;

use modl_core::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The fields of a file that have not been taken yet.
pub(crate) struct Fields<'a> {
    path: &'a Path,
    left: Map<String, Value>,
    refused: Vec<String>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(path: &'a Path, all: Map<String, Value>) -> Self {
        Fields { path, left: all, refused: Vec::new() }
    }

    /// Takes a field; `None` where it is missing or null.
    pub(crate) fn optional<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        match self.left.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => serde_json::from_value(v.clone())
                .map(Some)
                .map_err(|e| Error::file(self.path, format!("`{name}` is {v}: {e}"))),
        }
    }

    /// Takes a field that has to be there.
    pub(crate) fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let found = self.optional(name)?;
        found.ok_or_else(|| Error::file(self.path, format!("says nothing for `{name}`")))
    }

    /// What a field says that has not been taken yet, without taking it.
    pub(crate) fn peek(&self, name: &str) -> Option<&Value> {
        self.left.get(name).filter(|v| !v.is_null())
    }

    /// Takes a list that PEFT also writes as its only element.
    pub(crate) fn one_or_many<T: DeserializeOwned>(
        &mut self,
        name: &str,
    ) -> Result<Option<Vec<T>>> {
        if let Some(v) = self.left.get_mut(name)
            && !v.is_array()
            && !v.is_null()
        {
            *v = Value::Array(vec![v.take()]);
        }
        self.optional(name)
    }

    /// Whether a field that has not been taken says something.
    pub(crate) fn says(&self, name: &str) -> bool {
        self.left.get(name).is_some_and(|v| !v.is_null())
    }

    /// Takes a field that does not matter, whatever it says.
    pub(crate) fn ignore(&mut self, name: &str) {
        self.left.shift_remove(name);
    }

    /// Notes that a value of a field is not supported; [`Fields::finish`] says so.
    pub(crate) fn refuse(&mut self, name: &str, value: &Value) {
        self.refused.push(format!("`{name}` = {value}"));
    }

    /// Takes fields that do not matter but are kept, whatever they say.
    pub(crate) fn rest(&mut self, names: &[&str]) -> Map<String, Value> {
        let all = names.iter().filter_map(|n| Some(((*n).to_owned(), self.left.shift_remove(*n)?)));
        all.collect()
    }

    /// Puts a field back in modl's own words, to be taken again.
    pub(crate) fn give(&mut self, name: &str, value: Value) {
        self.left.insert(name.to_owned(), value);
    }

    /// Takes a field that is to say `wanted`, or nothing.
    pub(crate) fn refuse_unless(&mut self, name: &str, wanted: &str) -> Result<()> {
        if let Some(said) = self.optional::<Value>(name)?
            && said.as_str() != Some(wanted)
        {
            self.refuse(name, &said);
        }
        Ok(())
    }

    /// Refuses every field that is left and says something. PEFT's own reader drops what it does
    /// not know; but what it would have done is then missing from the result.
    pub(crate) fn finish(mut self) -> Result<()> {
        let left = std::mem::take(&mut self.left);
        for (name, value) in left.iter().filter(|(_, v)| !idle(v)) {
            self.refuse(name, value);
        }
        if self.refused.is_empty() {
            return Ok(());
        }
        Err(Error::unsupported(
            format!("{} in {}", self.refused.join(", "), self.path.display()),
            "modl does not do this, and leaving it out would change the result; \
             merge the adapter where it was made, or train it without",
        ))
    }
}

/// Whether a value is what PEFT writes for "not used".
fn idle(v: &Value) -> bool {
    match v {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
    }
}

/// A whole number without a fraction, as Python writes what a user gave so.
pub(crate) fn number(a: f64) -> Value {
    if a.fract() == 0.0 && a.abs() < 1e15 { Value::from(a as i64) } else { Value::from(a) }
}
