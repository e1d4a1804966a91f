//! TOML with places: every error names the line of the file, the key, and the key that was meant.
//!
//! A recipe's tables are read by many parties, each with its own strict configuration, none of
//! which knows lines. So a table that is refused is read again without one key after the other: the
//! key without which the complaint goes away is the one to point at.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use modl_core::{Error, Result, nearest};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use toml::de::{DeTable, DeValue};

/// Where something stands: the keys from the top, `phases`, `0`, `lr`.
pub(crate) type Keys = Vec<String>;

/// Where the parts of a recipe come from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    path: PathBuf,
    lines: HashMap<Keys, usize>,
    /// What was set from outside and is to blame for any error.
    set: Option<String>,
}

impl Source {
    /// Reads TOML. Tables keep the order of the file.
    pub fn parse(text: &str, path: &Path) -> Result<(Source, Map<String, Value>)> {
        let mut source = Source { path: path.to_owned(), lines: HashMap::new(), set: None };
        let line = |at: usize| 1 + text.bytes().take(at).filter(|b| *b == b'\n').count();
        let table = DeTable::parse(text).map_err(|e| {
            let at = line(e.span().map_or(0, |s| s.start));
            Error::invalid(format!("{}:{at}", path.display()), e.message())
        })?;
        let mut note = |keys: &Keys, span: Range<usize>| {
            source.lines.entry(keys.clone()).or_insert_with(|| line(span.start));
        };
        let values = convert_table(table.get_ref(), &Vec::new(), &mut note)
            .map_err(|(keys, e)| source.error(&keys, e))?;
        Ok((source, values))
    }

    /// The same places, with an `option` of the command line to blame for any error.
    pub fn blaming(&self, option: &str) -> Source {
        Source { set: Some(option.to_owned()), ..self.clone() }
    }

    /// The folder of the file.
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    /// An error at the place, or at the nearest one around it that has a line.
    pub fn error(&self, keys: &[String], problem: impl Into<String>) -> Error {
        if let Some(set) = &self.set {
            return Error::invalid(set, problem);
        }
        let around = (0..=keys.len()).rev().filter_map(|n| keys.get(..n));
        let line = around.filter_map(|k| self.lines.get(k)).next().copied().unwrap_or(1);
        Error::invalid(format!("{}:{line}", self.path.display()), problem)
    }

    /// Reads the table at a place strictly.
    pub fn read<T: DeserializeOwned>(&self, keys: &[String], table: &Value) -> Result<T> {
        self.read_by(keys, table, |v| serde_json::from_value(v.clone()).map_err(|e| e.to_string()))
    }

    /// Reads the table at a place by `parse`, whose complaint is put into words with its place.
    pub fn read_by<T>(
        &self,
        keys: &[String],
        table: &Value,
        parse: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<T> {
        parse(table).map_err(|complaint| {
            let guilty = blame(table, &complaint, &|v| parse(v).err());
            let place = [keys, guilty.as_slice()].concat();
            self.error(&place, in_words(&place, guilty.is_empty(), &complaint))
        })
    }
}

/// An error with its place, before the source is known whole.
type Misplaced = (Keys, String);

fn convert_table(
    table: &DeTable,
    at: &Keys,
    note: &mut impl FnMut(&Keys, Range<usize>),
) -> Result<Map<String, Value>, Misplaced> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let mut map = Map::new();
    for (key, value) in entries {
        let keys = [at.as_slice(), &[key.get_ref().to_string()]].concat();
        note(&keys, key.span());
        map.insert(key.get_ref().to_string(), convert(value.get_ref(), &keys, note)?);
    }
    Ok(map)
}

fn convert(
    value: &DeValue,
    at: &Keys,
    note: &mut impl FnMut(&Keys, Range<usize>),
) -> Result<Value, Misplaced> {
    let wrong = |what: &str| (at.clone(), format!("`{}` {what}", at.join(".")));
    Ok(match value {
        DeValue::String(s) => Value::from(s.as_ref()),
        DeValue::Boolean(b) => Value::from(*b),
        DeValue::Integer(n) => {
            let parsed = i64::from_str_radix(n.as_str(), n.radix());
            Value::from(parsed.map_err(|_| wrong("is not a number of 64 bits"))?)
        }
        DeValue::Float(x) => {
            let parsed = x.as_str().parse::<f64>().ok().filter(|x| x.is_finite());
            Value::from(parsed.ok_or_else(|| wrong("is not a finite number"))?)
        }
        DeValue::Datetime(_) => return Err(wrong("is a date; put it in quotation marks")),
        DeValue::Array(items) => {
            let mut all = Vec::with_capacity(items.len());
            for (i, item) in items.iter().enumerate() {
                let keys = [at.as_slice(), &[i.to_string()]].concat();
                note(&keys, item.span());
                all.push(convert(item.get_ref(), &keys, note)?);
            }
            Value::Array(all)
        }
        DeValue::Table(table) => Value::Object(convert_table(table, at, note)?),
    })
}

/// The keys, from `value` down, without which `complaint` goes away; none where it is about what is
/// missing.
fn blame(value: &Value, complaint: &str, check: &dyn Fn(&Value) -> Option<String>) -> Keys {
    let Some(table) = value.as_object() else { return Keys::new() };
    let (mut gone, mut changed, mut missed) = (None, None, None);
    for key in table.keys() {
        let mut without = table.clone();
        without.shift_remove(key);
        // Without its `type` a table has another complaint, whatever was wrong in it.
        let telling = key != "type" || complaint.contains("unknown ");
        match check(&Value::Object(without)) {
            None => gone = gone.or(Some(key)),
            Some(other) if other == complaint => {}
            // It is what is missing that is to blame, and no key that is there.
            Some(_) if complaint.contains("missing field") => {}
            // What is missed has been read with a complaint.
            Some(other) if other.contains(&format!("missing field `{key}`")) => {
                missed = missed.or(Some(key));
            }
            // Another complaint: this one's cause is gone.
            Some(other) if telling && !other.contains("missing field") => {
                changed = changed.or(Some(key));
            }
            Some(_) => {}
        }
    }
    // What cannot be left out, or is missed under another name, is told by what the complaint quotes.
    let quoted = |what: &str, name: &str| complaint.contains(&format!("unknown {what} `{name}`"));
    let field = table.keys().find(|key| quoted("field", key));
    let refused = |v: &Value| v.as_str().is_some_and(|v| quoted("variant", v));
    let variant = table.iter().find(|(_, v)| refused(v)).map(|(key, _)| key);
    let Some(key) = gone.or(field).or(changed).or(variant).or(missed) else { return Keys::new() };
    let inner = |v: &Value| {
        let mut table = table.clone();
        table.insert(key.clone(), v.clone());
        check(&Value::Object(table))
    };
    let below = table.get(key).map(|v| blame(v, complaint, &inner)).unwrap_or_default();
    [vec![key.clone()], below].concat()
}

/// serde's complaint in a user's words.
fn in_words(place: &[String], missing: bool, complaint: &str) -> String {
    // serde quotes names: the first is the culprit, those after `expected` are allowed.
    let quoted = |text: &str| -> Vec<String> {
        text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    };
    let part = |marker: &str| complaint.split_once(marker).map(|(_, rest)| rest);
    let (key, table) = match place.split_last() {
        Some((key, table)) if !missing => (key.as_str(), section(table)),
        _ => ("", section(place)),
    };
    if let Some(rest) = part("missing field ") {
        return format!("{} needs `{}`", section(place), quoted(rest).join("`, `"));
    }
    let unknown = part("unknown field ").or(part("unknown variant "));
    let Some((name, allowed)) = unknown.and_then(|rest| rest.split_once(',')) else {
        return if missing {
            format!("{table}: {complaint}")
        } else {
            format!("`{key}` in {table}: {complaint}")
        };
    };
    let (name, allowed) = (quoted(name).concat(), quoted(allowed));
    let hint = nearest(&name, allowed.iter().map(String::as_str));
    let hint = hint.map(|n| format!("; did you mean `{n}`?")).unwrap_or_else(|| ";".into());
    let allowed = if allowed.is_empty() { "nothing".into() } else { allowed.join(", ") };
    match part("unknown field ") {
        Some(_) => format!("unknown key `{name}` in {table}{hint} allowed: {allowed}"),
        None => format!("unknown value `{name}` of `{key}` in {table}{hint} allowed: {allowed}"),
    }
}

/// `[modules.en]`, `[[phases]]`, `[phases.optimizer]`: how the table is written in a file.
fn section(keys: &[String]) -> String {
    let is_number = |k: &&String| k.parse::<usize>().is_ok();
    let name: Vec<&str> = keys.iter().filter(|k| !is_number(k)).map(String::as_str).collect();
    match keys.last() {
        None => "the recipe".into(),
        Some(last) if is_number(&last) => format!("[[{}]]", name.join(".")),
        Some(_) => format!("[{}]", name.join(".")),
    }
}
