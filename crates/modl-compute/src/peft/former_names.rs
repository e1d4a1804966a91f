//! Folders that were made where the backbone's sites had other names: ViT's until transformers 5.
//!
//! [`Backbone::canonical`] translates the tensors' keys. What `adapter_config.json` says of names,
//! ends of names and patterns holds for the former ones; it is worked out on them and written down
//! for today's, site by site.

use modl_core::{Backbone, Error, Names, Result, Site, Targets};
use serde_json::{Map, Value, json};

use super::PREFIX;
use crate::patterns::Patterns;

/// Whether some of a file's keys have former names, in more than what stands before them.
pub(super) fn used(keys: &[String], backbone: &dyn Backbone) -> bool {
    keys.iter().filter_map(|key| key.strip_prefix(PREFIX)).any(|path| {
        let today = backbone.canonical(path);
        !today.ends_with(path) && !path.ends_with(&today)
    })
}

/// The fields by today's names; `targets` are those that they speak of by former ones.
///
/// # Errors
/// Where no site fits, or a pattern is none.
pub(super) fn translate(
    fields: &mut Map<String, Value>,
    targets: &Targets,
    backbone: &dyn Backbone,
) -> Result<()> {
    let all = backbone.sites();
    let former = all.iter().map(|s| Site { path: backbone.former(&s.path), ..s.clone() });
    let former: Vec<Site> = former.collect();
    let chosen = targets.select(&former)?;
    let today = |sites: &[&Site]| -> Vec<&str> {
        sites.iter().filter_map(|s| Some(all.get(s.index)?.path.as_str())).collect()
    };
    fields.insert("target_modules".to_owned(), json!(today(&chosen)));
    for said in ["exclude_modules", "layers_to_transform", "layers_pattern"] {
        fields.shift_remove(said);
    }
    if let Some(names) = fields.get_mut("feedforward_modules").filter(|v| !idle(v)) {
        let own = Targets::new(read::<Names>("feedforward_modules", names)?);
        let taken: Result<Vec<bool>> = chosen.iter().map(|s| own.take(s)).collect();
        let taken = chosen.iter().zip(taken?).filter_map(|(s, yes)| yes.then_some(*s));
        *names = json!(today(&taken.collect::<Vec<_>>()));
    }
    for (name, table) in fields.iter_mut().filter(|(name, _)| name.ends_with("_pattern")) {
        let Value::Object(own) = &*table else { continue };
        let mut each = Map::new();
        if own.values().any(Value::is_array) {
            // AdaLoRA's are named by parameters.
            each.extend(own.iter().map(|(key, v)| (backbone.canonical(key), v.clone())));
        } else {
            let patterns: Patterns<Value> = read(name, table)?;
            for (site, path) in chosen.iter().zip(today(&chosen)) {
                if let Some(value) = patterns.find(&site.path)? {
                    each.insert(regex::escape(path), value.clone());
                }
            }
        }
        *table = Value::Object(each);
    }
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(name: &str, value: &Value) -> Result<T> {
    serde_json::from_value(value.clone()).map_err(|e| Error::invalid(name, e.to_string()))
}

/// Whether a list says nothing.
fn idle(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}
