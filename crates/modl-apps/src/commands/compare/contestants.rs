//! The routers that take part, as they are named on the command line.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::super::study::folder;

/// A router that takes part.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Contestant {
    /// What it is called in tables: `top_k{"k":2}`.
    pub(super) label: String,
    /// Its configuration with its `type`.
    pub(super) config: Value,
    /// What else is set in the recipe for it.
    pub(super) set: Vec<String>,
}

impl Contestant {
    pub(super) fn new(label: impl Into<String>, config: Value) -> Self {
        Contestant { label: label.into(), config, set: Vec::new() }
    }
}

/// `top_k{"k":2},soft`: names with settings in JSON.
pub(super) fn contestants(list: &str) -> Result<Vec<Contestant>> {
    let mut all: Vec<Contestant> = Vec::new();
    let mut rest = list.trim();
    while !rest.is_empty() {
        let end = rest.find([',', '{']).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let name = name.trim();
        let mut config = json!({ "type": name });
        let mut label = name.to_owned();
        rest = after;
        if rest.starts_with('{') {
            let mut settings = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let own = settings.next().transpose();
            let own = own.with_context(|| format!("--routers: settings of `{name}`"))?;
            let read = settings.byte_offset();
            if let (Some(Value::Object(own)), Some(all)) = (own, config.as_object_mut()) {
                all.extend(own);
            }
            label += rest.get(..read).unwrap_or_default();
            rest = rest.get(read..).unwrap_or_default();
        }
        anyhow::ensure!(!name.is_empty(), "--routers: `{list}` has a router without a name");
        rest = rest.trim_start();
        let next = rest.strip_prefix(',');
        anyhow::ensure!(
            next.is_some() || rest.is_empty(),
            "--routers: `{rest}` after `{label}`; routers are separated by commas"
        );
        rest = next.unwrap_or_default().trim_start();
        if let Some(same) = all.iter().find(|c| folder(&c.label) == folder(&label)) {
            anyhow::bail!("--routers: `{}` and `{label}` are the same", same.label);
        }
        all.push(Contestant::new(label, config));
    }
    anyhow::ensure!(!all.is_empty(), "--routers: names none");
    Ok(all)
}

/// A value as TOML writes it in one line.
pub(super) fn as_toml(value: &Value) -> Result<String> {
    let parts =
        |all: Vec<String>, open: &str, close: &str| open.to_owned() + &all.join(", ") + close;
    Ok(match value {
        Value::Null => anyhow::bail!("null is no value of a recipe"),
        Value::Array(all) => parts(all.iter().map(as_toml).collect::<Result<_>>()?, "[", "]"),
        Value::Object(all) => {
            let pair = |(k, v): (&String, &Value)| Ok(format!("{} = {}", json!(k), as_toml(v)?));
            parts(all.iter().map(pair).collect::<Result<_>>()?, "{ ", " }")
        }
        // JSON's strings, numbers and truth values are TOML's.
        other => other.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routers_come_with_settings_in_json() {
        let all = contestants(r#"top_k{"k": 2, "noise":[1,{"a":","}]} , soft,top_k"#).unwrap();
        let configs: Vec<&Value> = all.iter().map(|c| &c.config).collect();
        let first = json!({"type": "top_k", "k": 2, "noise": [1, {"a": ","}]});
        assert_eq!(configs, [&first, &json!({"type": "soft"}), &json!({"type": "top_k"})]);
        assert_eq!(folder(&all[0].label), "top_k-k-2-noise-1-a");
        for bad in ["", ",", "soft,soft", "soft{\"k\":}", "soft{} top_k", "{}"] {
            assert!(contestants(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn values_are_the_same_in_toml() {
        let value = json!({"type": "fixed", "table": {"a \"b\"": ["x", "y\n"]}, "k": 2, "t": 0.5,
                           "on": true, "none": []});
        let text = format!("router = {}", as_toml(&value).unwrap());
        let read: Value = toml::from_str(&text).unwrap();
        assert_eq!(read["router"], value);
        assert!(as_toml(&json!({"a": null})).is_err());
    }
}
