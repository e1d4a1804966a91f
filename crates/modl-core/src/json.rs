//! JSON from files that others wrote: no key may come twice in a table. Readers differ in which one
//! counts, so that a file with both means two things.

use std::cell::RefCell;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Reads the JSON `text` of a file.
///
/// # Errors
/// [`Error::File`] where it is not JSON, is nested more than 128 deep, has a number beyond those of
/// a 64-bit float, or has keys more than once: all of them are named.
pub fn parse_json(path: &Path, text: &str) -> Result<Value> {
    let twice = RefCell::new(Vec::new());
    let mut reader = serde_json::Deserializer::from_str(text);
    let parsed = Strict { at: String::new(), twice: &twice }.deserialize(&mut reader);
    let parsed = parsed.and_then(|value| reader.end().map(|()| value));
    let value = parsed.map_err(|e| Error::file(path, format!("is not JSON: {e}")))?;
    let twice = twice.into_inner();
    match twice.is_empty() {
        true => Ok(value),
        false => Err(Error::file(path, format!("has more than once: {}", twice.join(", ")))),
    }
}

/// A value at a place in the file.
struct Strict<'a> {
    /// The keys that lead to it.
    at: String,
    twice: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        Value::deserialize(d)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        let item = || Strict { at: format!("{}[]", self.at), twice: self.twice };
        while let Some(v) = items.next_element_seed(item())? {
            all.push(v);
        }
        Ok(all.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let at = if self.at.is_empty() { key.clone() } else { format!("{}.{key}", self.at) };
            let value = entries.next_value_seed(Strict { at: at.clone(), twice: self.twice })?;
            if all.insert(key, value).is_some() {
                self.twice.borrow_mut().push(format!("`{at}`"));
            }
        }
        Ok(all.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(text: &str) -> Result<Value> {
        parse_json(Path::new("x.json"), text)
    }

    #[test]
    fn it_is_json() {
        let text = r#" {"a": [1, -2, 0.5, 1e300, null, true, "é\n"], "b": {"c": {}}} "#;
        assert_eq!(parse(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        for broken in ["", "{", "[1,]", "{} x", "NaN", "1e999", "{'a': 1}"] {
            let e = parse(broken).unwrap_err().to_string();
            assert!(e.contains("x.json") && e.contains("is not JSON"), "{broken}: {e}");
        }
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(&deep).unwrap_err().to_string().contains("recursion limit"));
    }

    #[test]
    fn every_key_that_comes_twice_is_named() {
        let e =
            parse(r#"{"a": 1, "b": {"a": 2, "c": 3, "c": 3}, "d": [{"e": 1, "e": 2}], "a": 4}"#);
        let e = e.unwrap_err().to_string();
        assert!(e.contains("more than once: `b.c`, `d[].e`, `a`"), "{e}");
        assert_eq!(parse(r#"{"a": {"b": 1}, "b": 2}"#).unwrap(), json!({"a": {"b": 1}, "b": 2}));
    }
}
