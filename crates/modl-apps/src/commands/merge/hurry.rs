//! A configuration from a method's name, folders and a few settings.

use anyhow::{Context as _, Result};
use modl_aggregate::merge::{Base, MergeMethods, Of, Spec};
use modl_aggregate::mergekit::{InputModel, MergeConfig};
use serde_json::{Map, Value};

use super::{MergeArgs, one_each};

/// What --method and the folders say.
pub(super) fn config(args: &MergeArgs, methods: &MergeMethods) -> Result<MergeConfig> {
    let method = args.method.clone().unwrap_or_default();
    let spec = methods.find(&method)?.spec();
    let mut folders = args.inputs.iter().map(|p| p.display().to_string());
    let base_model = match spec.base {
        Base::Required => Some(folders.next().with_context(|| format!("`{method}` needs a base"))?),
        _ => None,
    };
    let folders: Vec<String> = folders.collect();
    let mut models: Vec<InputModel> = folders
        .into_iter()
        .map(|model| InputModel { model, parameters: None, statistics: None })
        .collect();
    let mut parameters = Map::new();
    // Equal shares, unless something else is said; settings that have a default keep it.
    let weight = args.weight.as_deref().or(Some("1")).filter(|_| spec.has("weight"));
    for (name, values) in [("weight", weight), ("density", args.density.as_deref())] {
        if let Some(values) = values {
            each(&spec, name, values, &mut models)?;
        }
    }
    for setting in &args.settings {
        let (key, value) = setting
            .split_once('=')
            .with_context(|| format!("--set {setting}: is to be KEY=VALUE"))?;
        let value: Value =
            serde_norway::from_str(value).with_context(|| format!("--set {setting}"))?;
        match spec.settings.iter().find(|s| s.name == key) {
            Some(s) if s.of == Of::Each => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                each(&spec, key, &text, &mut models)?;
            }
            _ => {
                parameters.insert(key.to_owned(), value);
            }
        }
    }
    Ok(MergeConfig {
        merge_method: method,
        base_model,
        models: Some(models),
        parameters: (!parameters.is_empty()).then_some(parameters),
        dtype: args.dtype.clone(),
        ..MergeConfig::default()
    })
}

/// Gives each model its value of a setting: `0.5,0.3`, or one for all.
fn each(spec: &Spec, name: &str, values: &str, models: &mut [InputModel]) -> Result<()> {
    anyhow::ensure!(spec.has(name), "--{name}: `{}` has no such setting", spec.name);
    let things = match spec.base {
        Base::Required => "models (the first folder is the base)",
        _ => "models",
    };
    let numbers = one_each(name, values, models.len(), things)?;
    for (model, number) in models.iter_mut().zip(numbers) {
        let own = model.parameters.get_or_insert_with(Map::new);
        own.insert(name.to_owned(), number.into());
    }
    Ok(())
}
