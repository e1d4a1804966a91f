//! `config` in `adapter_config.json`: one method, several in one table, or a union of tables.

use std::path::Path;

use modl_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::{Fields, Header, METHODS, Method, Read, invertible};

/// The name of a union's architecture.
const UNION: &str = "union";

/// What the settings ask for.
///
/// # Errors
/// Where modl does not have the method, or a setting asks for something that it would not do.
pub(super) fn read(path: &Path, header: &Header) -> Result<Vec<Read>> {
    let settings = &header.config;
    if settings.get("architecture").and_then(Value::as_str) != Some(UNION) {
        return read_table(path, settings.clone(), header);
    }
    let wrong = || Error::file(path, "is a union without a list of tables as `configs`");
    let configs = settings.get("configs").and_then(Value::as_array).ok_or_else(wrong)?;
    let mut found = Vec::new();
    for config in configs {
        let table = config.as_object().ok_or_else(wrong)?.clone();
        found.extend(read_table(path, table, header)?);
    }
    if found.is_empty() { Err(wrong()) } else { Ok(found) }
}

fn read_table(path: &Path, mut settings: Map<String, Value>, header: &Header) -> Result<Vec<Read>> {
    let architecture = settings.shift_remove("architecture").unwrap_or_default();
    let own = |m: &&Method| json!(m.architecture) == architecture;
    if !METHODS.iter().any(|m| own(&m)) {
        let mut names: Vec<&str> =
            METHODS.iter().map(|m| m.architecture.unwrap_or("null (bottleneck)")).collect();
        names.sort_unstable();
        names.dedup();
        return Err(Error::unsupported(
            format!("the architecture {architecture} in {}", path.display()),
            format!("of AdapterHub's, modl has {} and union", names.join(", ")),
        ));
    }
    let asked: Vec<&Method> = METHODS.iter().filter(own).filter(|m| (m.asked)(&settings)).collect();
    if asked.is_empty() {
        let problem = "asks for no adapter: `mh_adapter` and `output_adapter` are both false";
        return Err(Error::file(path, problem));
    }
    let mut fields = Fields::new(path, settings);
    let read = asked.into_iter().map(|m| (m.read)(&mut fields, header));
    let read = read.collect::<Result<Vec<_>>>()?;
    fields.finish()?;
    Ok(read)
}

/// The settings of all parts of one adapter.
pub(super) fn write(parts: Vec<Map<String, Value>>) -> Result<Map<String, Value>> {
    let mut parts = invertible::join(parts)?;
    match (parts.pop(), parts.is_empty()) {
        (Some(only), true) => Ok(only),
        (last, _) => {
            parts.extend(last);
            Ok(Map::from_iter([
                ("architecture".to_owned(), json!(UNION)),
                ("configs".to_owned(), json!(parts)),
            ]))
        }
    }
}
