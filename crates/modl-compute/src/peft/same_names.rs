//! Types whose settings modl calls as PEFT does: they are copied, name by name.

use modl_core::{ModuleConfig, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{Fields, Provenance, object};

/// Makes the configuration of `kind` from the fields called `names`, of which each may be missing.
pub(super) fn read<C: DeserializeOwned + ModuleConfig + 'static>(
    fields: &mut Fields,
    kind: &str,
    names: &[&str],
    peft: &Provenance,
) -> Result<Box<dyn ModuleConfig>> {
    let mut own = object(json!({ "peft": peft }));
    for name in names {
        if let Some(value) = fields.optional::<Value>(name)? {
            own.insert((*name).to_owned(), value);
        }
    }
    Ok(Box::new(modl_core::from_json::<C>(kind, Value::Object(own))?))
}

/// The settings of a configuration as fields, with `others`, which PEFT writes too.
pub(super) fn write<C: Serialize>(
    kind: &str,
    config: &C,
    others: Value,
) -> Result<Map<String, Value>> {
    let mut fields = object(others);
    let own = object(modl_core::to_json(kind, config)?);
    fields.extend(own.into_iter().filter(|(name, _)| name != "peft"));
    Ok(fields)
}
