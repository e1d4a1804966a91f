//! Reading an architecture's settings from `config.json`, with errors that say which one is wrong.

use std::fmt;

use modl_core::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// No model is near it; a broken file must not make us build names without end.
pub(crate) const MOST_LAYERS: usize = 1000;

/// A setting that would change the result: its name, whether a value is supported, and what to do
/// where it is not.
pub(crate) type Fixed = (&'static str, fn(&Value) -> bool, &'static str);

/// Reads the settings of `architecture`, which the caller still has to check.
///
/// # Errors
/// By name where a setting has the wrong type, or one of `fixed` a value that is not supported.
pub(crate) fn read<T: DeserializeOwned>(
    config: &Value,
    architecture: &str,
    fixed: &[Fixed],
) -> Result<T> {
    check_fixed(config, architecture, fixed)?;
    for (name, value) in config.as_object().into_iter().flatten() {
        // Each by itself, because serde's errors do not say which key they are about.
        T::deserialize(json!({ name: value })).map_err(|e| Error::invalid(name, e.to_string()))?;
    }
    T::deserialize(config).map_err(|e| Error::invalid("config", e.to_string()))
}

/// Checks that settings which would change the result have a value that is supported.
///
/// # Errors
/// By name where one has not.
pub(crate) fn check_fixed(config: &Value, architecture: &str, fixed: &[Fixed]) -> Result<()> {
    for (name, fits, advice) in fixed {
        if let Some(value) = config.get(name).filter(|v| !v.is_null() && !fits(v)) {
            let what = format!("{architecture} with `{name}` = {value}");
            return Err(Error::unsupported(what, *advice));
        }
    }
    Ok(())
}

/// The classes of a classifier: those that `id2label` names, else `num_labels`, else 2.
pub(crate) fn labels(config: &Value) -> i64 {
    let named = config.get("id2label").and_then(Value::as_object).map(|l| l.len() as i64);
    named.or_else(|| config.get("num_labels")?.as_i64()).unwrap_or(2)
}

/// The class in transformers that the model was saved from; `usual` where it is not said.
pub(crate) fn class<'a>(config: &'a Value, usual: &'a str) -> &'a str {
    config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).unwrap_or(usual)
}

/// Checks that sizes are at least 1.
pub(crate) fn check_positive(sizes: &[(&str, i64)]) -> Result<()> {
    match sizes.iter().find(|(_, n)| *n < 1) {
        Some((name, value)) => refuse(name, value, "is to be positive"),
        None => Ok(()),
    }
}

/// Checks that layers are not more than [`MOST_LAYERS`].
pub(crate) fn check_layers(name: &str, n: usize) -> Result<()> {
    if n > MOST_LAYERS { refuse(name, n, "are too many") } else { Ok(()) }
}

/// Checks that a width, by its name, can be cut into so many heads.
pub(crate) fn check_heads(name: &str, heads: i64, (width, n): (&str, i64)) -> Result<()> {
    if n % heads == 0 { Ok(()) } else { refuse(name, heads, &format!("has to divide {width}")) }
}

/// Checks that probabilities of dropout are in [0, 1).
pub(crate) fn check_dropout(all: &[(&str, f64)]) -> Result<()> {
    match all.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
        Some((name, p)) => refuse(name, p, "is to be in [0, 1)"),
        None => Ok(()),
    }
}

/// The error for a setting that is out of range.
pub(crate) fn refuse(name: &str, value: impl fmt::Display, problem: &str) -> Result<()> {
    Err(Error::invalid(name, format!("{value} {problem}")))
}

/// Checks that what a loss counts is 0 or above.
pub(crate) fn check_weight(name: &str, weight: f64) -> Result<()> {
    match weight >= 0.0 && weight.is_finite() {
        true => Ok(()),
        false => refuse(name, weight, "is to be 0 or above"),
    }
}
