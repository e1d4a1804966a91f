//! Types whose settings modl calls as PEFT does: they are copied, name by name.

use modl_core::{ModuleConfig, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{Fields, PeftType, Provenance, Read, Written, number, object, read_targets};

/// A configuration whose fields are called as in PEFT's file.
pub(super) trait SameNames: ModuleConfig + Serialize + DeserializeOwned + 'static {
    /// As in `peft_type`: `BOFT`.
    const TYPE: &'static str;
    /// As in the registry: `boft`.
    const KIND: &'static str;
    /// What both sides call the same.
    const NAMES: &'static [&'static str];

    /// What PEFT writes besides, where nothing was said.
    fn others() -> Value;

    /// What came with the file.
    fn peft(&self) -> &Provenance;

    /// Puts into modl's words what PEFT says otherwise under the same name.
    fn from_peft(_fields: &mut Fields) -> Result<()> {
        Ok(())
    }

    /// The way back.
    fn to_peft(&self, _fields: &mut Map<String, Value>) {}
}

/// The type of a configuration.
pub(super) const fn of<C: SameNames>() -> PeftType {
    PeftType::in_model(C::TYPE, C::KIND, read::<C>, write::<C>)
}

fn read<C: SameNames>(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    fields.refuse_unless("bias", "none")?;
    C::from_peft(fields)?;
    let mut own = object(json!({ "peft": peft }));
    for name in C::NAMES {
        if let Some(value) = fields.optional::<Value>(name)? {
            own.insert((*name).to_owned(), value);
        }
    }
    let module: C = modl_core::from_json(C::KIND, Value::Object(own))?;
    Ok((Box::new(module), targets))
}

fn write<C: SameNames>(config: Value) -> Result<Written> {
    let config: C = modl_core::from_json(C::KIND, config)?;
    let mut fields = object(json!({
        "exclude_modules": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "modules_to_save": null,
        "target_modules": null,
    }));
    fields.extend(object(C::others()));
    let own = object(modl_core::to_json(C::KIND, &config)?);
    fields.extend(own.into_iter().filter(|(name, _)| name != "peft"));
    config.to_peft(&mut fields);
    Ok((fields, config.peft().clone()))
}

/// Writes a number, or each in a table, as Python writes one that was given without a fraction.
pub(super) fn whole(fields: &mut Map<String, Value>, name: &str) {
    let mend = |value: &mut Value| {
        if let Some(a) = value.as_f64() {
            *value = number(a);
        }
    };
    match fields.get_mut(name) {
        Some(Value::Object(table)) => table.values_mut().for_each(mend),
        Some(value) => mend(value),
        None => {}
    }
}
