//! Values of settings: a scalar, a gradient over the layers, or the first of several whose filter is
//! part of the tensor's name; looked up from the source outwards (source, slice, module, file).

use modl_core::{Error, Result};
use serde_json::{Map, Value};

use super::config::Parameters;
use crate::merge::{Base, Of, Scalar, Setting, Settings, Spec};

/// Where values are looked up for one tensor, from the nearest outwards, but for the model's own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scopes<'a> {
    pub(super) slice: Option<&'a Parameters>,
    pub(super) module: Option<&'a Parameters>,
    pub(super) file: Option<&'a Parameters>,
    /// How deep the layer lies: 0 for the first, 1 for the last.
    pub(super) depth: f64,
}

impl Scopes<'_> {
    /// The settings of a method for one tensor whose inputs have these names and values of their own.
    pub(super) fn settings(
        &self,
        spec: &Spec,
        name: &str,
        inputs: &[(&str, Option<&Parameters>)],
        base: Option<usize>,
    ) -> Result<Settings> {
        let mut settings = Settings::default();
        for s in spec.settings {
            match s.of {
                Of::All => {
                    if let Some(value) = self.value(s, name, None)? {
                        settings = settings.set(s.name, value);
                    }
                }
                Of::Each => {
                    let mut values = Vec::new();
                    for (i, (input, own)) in inputs.iter().enumerate() {
                        if spec.base != Base::Input && Some(i) == base {
                            continue;
                        }
                        let default = s.default.map(Value::from);
                        let found = self.value(s, input, *own)?.or(default);
                        values.push(found.ok_or_else(|| missing(spec, s, i, input))?);
                    }
                    settings = settings.set_each(s.name, values);
                }
            }
        }
        Ok(settings)
    }

    fn value(&self, s: &Setting, name: &str, own: Option<&Parameters>) -> Result<Option<Value>> {
        for scope in [own, self.slice, self.module, self.file].into_iter().flatten() {
            if let Some(value) = scope.get(s.name)
                && let Some(found) = evaluate(s, value, name, self.depth)?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// Refuses settings that the method does not have.
pub(super) fn known(spec: &Spec, parameters: Option<&Parameters>) -> Result<()> {
    for name in parameters.into_iter().flat_map(Map::keys) {
        if !spec.has(name) {
            let names = spec.settings.iter().map(|s| s.name);
            return Err(Error::unknown(format!("parameter of `{}`", spec.name), name, names));
        }
    }
    Ok(())
}

/// The value for a tensor; `None` where no filter fits.
fn evaluate(s: &Setting, value: &Value, name: &str, depth: f64) -> Result<Option<Value>> {
    match value {
        Value::Object(condition) => conditional(s, condition, name, depth),
        Value::Array(all) if all.iter().any(Value::is_object) => {
            for one in all {
                if let Some(found) = evaluate(s, one, name, depth)? {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        }
        Value::Array(all) => gradient(s, all, depth).map(Some),
        Value::Null => Ok(None),
        scalar => Ok(Some(scalar.clone())),
    }
}

fn conditional(
    s: &Setting,
    condition: &Map<String, Value>,
    name: &str,
    depth: f64,
) -> Result<Option<Value>> {
    if let Some(key) = condition.keys().find(|k| *k != "filter" && *k != "value") {
        let kind = format!("key of a conditional `{}`", s.name);
        return Err(Error::unknown(kind, key, ["filter", "value"]));
    }
    let value = condition.get("value").ok_or_else(|| {
        Error::invalid(format!("parameter `{}`", s.name), "has a filter without a `value`")
    })?;
    let fits = match condition.get("filter") {
        None | Some(Value::Null) => true,
        Some(Value::String(filter)) => filter == "*" || name.contains(filter.as_str()),
        Some(other) => {
            let problem = format!("its `filter` is to be a part of names, not {other}");
            return Err(Error::invalid(format!("parameter `{}`", s.name), problem));
        }
    };
    if fits { evaluate(s, value, name, depth) } else { Ok(None) }
}

/// Numbers are interpolated over the layers; flags and words hold for a part of them each.
fn gradient(s: &Setting, all: &[Value], depth: f64) -> Result<Value> {
    let last = all
        .len()
        .checked_sub(1)
        .ok_or_else(|| Error::invalid(format!("parameter `{}`", s.name), "is an empty list"))?;
    let place = depth * last as f64;
    let at = |i: usize| all.get(i.min(last)).cloned().unwrap_or_default();
    let low = place as usize;
    if !matches!(s.default, None | Some(Scalar::Number(_))) {
        return Ok(at(low));
    }
    let number = |v: Value| {
        let text = v.as_str().and_then(|t| t.parse().ok());
        v.as_f64().or(text).ok_or_else(|| {
            let problem = format!("is a list over the layers, and {v} in it is no number");
            Error::invalid(format!("parameter `{}`", s.name), problem)
        })
    };
    let share = place - low as f64;
    Ok(((1.0 - share) * number(at(low))? + share * number(at(low + 1))?).into())
}

fn missing(spec: &Spec, s: &Setting, input: usize, tensor: &str) -> Error {
    let problem = format!(
        "`{}` needs it for each model ({}), and model {} has none for `{tensor}`",
        spec.name,
        s.about,
        input + 1
    );
    Error::invalid(format!("parameter `{}`", s.name), problem)
}
