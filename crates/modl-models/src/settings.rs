//! Reading and checking what `config.json` says, with the name of what does not fit.

use std::fmt;

use modl_core::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// No model is near it; a broken file must not make us build names without end.
const MOST_LAYERS: usize = 1000;

/// A setting that would change the result, whether a value of it is supported, and what is.
pub(crate) type Fixed = (&'static str, fn(&Value) -> bool, &'static str);

/// The settings of `model`, of which `fixed` have to have the values that are supported.
///
/// # Errors
/// By name where a setting has the wrong type or is not supported.
pub(crate) fn parse<T: DeserializeOwned>(
    model: &str,
    config: &Value,
    fixed: &[Fixed],
) -> Result<T> {
    for (name, fits, advice) in fixed {
        if let Some(value) = config.get(name).filter(|v| !v.is_null() && !fits(v)) {
            return Err(Error::unsupported(format!("{model} with `{name}` = {value}"), *advice));
        }
    }
    for (name, value) in config.as_object().into_iter().flatten() {
        // Each by itself, because serde's errors do not say which key they are about.
        T::deserialize(&json!({ name: value })).map_err(|e| Error::invalid(name, e.to_string()))?;
    }
    T::deserialize(config).map_err(|e| Error::invalid("config", e.to_string()))
}

/// Checks that sizes are positive.
pub(crate) fn positive(sizes: &[(&str, i64)]) -> Result<()> {
    match sizes.iter().find(|(_, n)| *n < 1) {
        Some((name, value)) => refuse(name, value, "is to be positive"),
        None => Ok(()),
    }
}

/// Checks that probabilities of dropout are in [0, 1).
pub(crate) fn probabilities(all: &[(&str, f64)]) -> Result<()> {
    match all.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
        Some((name, p)) => refuse(name, p, "is to be in [0, 1)"),
        None => Ok(()),
    }
}

/// Checks a number of layers.
pub(crate) fn layers(name: &str, n: usize) -> Result<()> {
    if n > MOST_LAYERS { refuse(name, n, "are too many") } else { Ok(()) }
}

/// The error for a value that does not fit.
pub(crate) fn refuse(name: &str, value: impl fmt::Display, problem: &str) -> Result<()> {
    Err(Error::invalid(name, format!("{value} {problem}")))
}
