//! Settings of their own for some sites, by PEFT's rule for `rank_pattern` and `alpha_pattern`.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use modl_core::{Error, Result};
use regex::Regex;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// An ordered map from patterns to values: the first key that fits a site's path wins.
///
/// A key is a regular expression for the whole path or for what follows one of its dots:
/// `(.*\.)?(KEY)$`. As text it is a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Patterns<T>(Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Patterns(Vec::new())
    }
}

impl<K: Into<String>, T> FromIterator<(K, T)> for Patterns<T> {
    fn from_iter<I: IntoIterator<Item = (K, T)>>(iter: I) -> Self {
        Patterns(iter.into_iter().map(|(k, v)| (k.into(), v)).collect())
    }
}

impl<T> Patterns<T> {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keys and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The same keys with other values.
    pub(crate) fn map<U>(&self, of: impl Fn(&T) -> U) -> Patterns<U> {
        self.iter().map(|(key, value)| (key, of(value))).collect()
    }

    /// The value of the first key that fits `path`.
    ///
    /// # Errors
    /// Where a key is not a regular expression.
    pub fn find(&self, path: &str) -> Result<Option<&T>> {
        for (key, value) in &self.0 {
            let whole = Regex::new(&format!(r"^(.*\.)?({key})$"))
                .map_err(|e| Error::invalid(format!("pattern `{key}`"), e.to_string()))?;
            if whole.is_match(path) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(self.iter())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(InOrder(PhantomData))
    }
}

struct InOrder<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
    type Value = Patterns<T>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a table from patterns to numbers")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Patterns<T>, M::Error> {
        let mut all = Vec::new();
        let mut seen = HashSet::new();
        while let Some((key, value)) = map.next_entry::<String, T>()? {
            if !seen.insert(key.clone()) {
                return Err(serde::de::Error::custom(format!("pattern `{key}` comes twice")));
            }
            all.push((key, value));
        }
        Ok(Patterns(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(keys: &[(&str, i64)]) -> Patterns<i64> {
        keys.iter().copied().collect()
    }

    #[test]
    fn a_key_fits_the_end_of_a_path_and_starts_at_a_dot() {
        let path = "encoder.layer.0.attention.self.query";
        let find = |key: &str| ranks(&[(key, 3)]).find(path).unwrap().copied();
        assert_eq!(find("query"), Some(3));
        assert_eq!(find(r"layer\.\d+\.attention\.self\.query"), Some(3));
        assert_eq!(find("key|query"), Some(3));
        assert_eq!(find(path), Some(3));
        assert_eq!(find("uery"), None);
        assert_eq!(find("self"), None);
    }

    #[test]
    fn the_first_key_wins_also_after_a_round_trip() {
        let given = ranks(&[("z.query", 1), ("query", 2), (".*", 3)]);
        let text = serde_json::to_string(&given).unwrap();
        let read: Patterns<i64> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, given);
        assert_eq!(read.find("z.query").unwrap(), Some(&1));
        assert_eq!(read.find("a.query").unwrap(), Some(&2));
        assert_eq!(read.find("a.key").unwrap(), Some(&3));
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let e = ranks(&[("(", 1)]).find("a").unwrap_err().to_string();
        assert!(e.contains("pattern `(`"), "{e}");
        assert!(serde_json::from_str::<Patterns<i64>>(r#"{"a": 1, "a": 2}"#).is_err());
    }
}
