//! Scalings, prompts and bottlenecks: adapters that are no changes of weights.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use modl_aggregate::adapters::{
    average, joined_prompts, product_of_scalings, scalings_around_one, weighted_sum,
};
use modl_aggregate::merge::Settings;
use modl_compute::peft::{self, Folder, where_they_stand};
use modl_core::{Device, Tensor, checkpoint};
use serde_json::{Value, json};

use super::{Asked, copy, said};

/// Refuses what only changes of weights have.
fn plain(asked: &Asked, what: &str) -> Result<()> {
    asked.without_report()?;
    anyhow::ensure!(asked.rank.is_none(), "--rank: {what} have no rank");
    anyhow::ensure!(
        asked.settings == Settings::default(),
        "{what} are merged without settings but the weights"
    );
    if let Some(c) = asked.convention.filter(|c| *c != "peft") {
        anyhow::bail!("convention {c}: for {what} there is `peft`, or none");
    }
    Ok(())
}

/// (IA)³: 1 + Σ w (l − 1), a product, or PEFT's Σ w l.
pub(super) fn scalings(asked: &Asked, folders: &[Folder], weights: &[f64]) -> Result<()> {
    plain(asked, "scalings")?;
    let method = asked.method.unwrap_or("concat");
    type Merge = fn(&[Option<Tensor>], &[f64]) -> modl_core::Result<Tensor>;
    let merge: Merge = match (method, asked.convention) {
        (_, Some("peft")) if matches!(method, "concat" | "linear") => weighted_sum,
        ("concat" | "linear", _) => scalings_around_one,
        ("product", None) => product_of_scalings,
        _ => anyhow::bail!(
            "{method}: scalings are merged by `concat`, 1 + Σ w (l − 1), by `product`, or by \
             `linear` with the convention `peft`, Σ w l"
        ),
    };
    let each: Vec<BTreeMap<String, Tensor>> =
        folders.iter().map(|f| f.by_site("ia3_l")).collect::<modl_core::Result<_>>()?;
    let sites: BTreeSet<&String> = each.iter().flat_map(BTreeMap::keys).collect();
    let (mut tensors, mut before) = (Vec::new(), Vec::new());
    for site in &sites {
        let all: Vec<Option<Tensor>> = each.iter().map(|m| m.get(*site).cloned()).collect();
        let merged = merge(&all, weights).with_context(|| (*site).clone())?;
        // Behind f an l is a column, before it a row.
        if merged.len_of(0) == 1 {
            before.push(site.as_str());
        }
        tensors.push((format!("base_model.model.{site}.ia3_l"), merged));
    }
    let first = folders.first().context("no adapters")?;
    let paths: Vec<&str> = sites.iter().map(|s| s.as_str()).collect();
    let mut fields = first.fields().clone();
    let stand = where_they_stand(folders, &paths);
    let same = stand.get("target_modules") == first.fields().get("target_modules");
    let known: Vec<(String, Value)> =
        stand.into_iter().filter(|(name, _)| fields.contains_key(name)).collect();
    fields.extend(known);
    let feedforward = |f: &Folder| f.fields().get("feedforward_modules").cloned();
    if !same || folders.iter().any(|f| feedforward(f) != feedforward(first)) {
        fields.insert("target_modules".into(), json!(paths));
        fields.insert("feedforward_modules".into(), json!(before));
    }
    if asked.planned(&format!("{method}: {} scalings", sites.len())) {
        return Ok(());
    }
    peft::write_folder(asked.out, first, fields, &tensors)?;
    asked.say(format_args!("{} scalings of {} adapters by `{method}`", sites.len(), folders.len()));
    said(asked)
}

const PROMPT: &str = "prompt_embeddings";

/// Prompts and prefixes: one behind the other, or their average.
pub(super) fn prompts(asked: &Asked, folders: &[Folder], weights: &[f64]) -> Result<()> {
    plain(asked, "prompts")?;
    let prompt = |f: &Folder| match f.tensors() {
        [(key, t)] if key == PROMPT => Ok(t.clone()),
        _ => anyhow::bail!("{}: is to hold `{PROMPT}` alone", f.path().display()),
    };
    let all: Vec<Tensor> = folders.iter().map(prompt).collect::<Result<_>>()?;
    let first = folders.first().context("no adapters")?;
    let number = |f: &Folder, name: &str| f.fields().get(name).and_then(Value::as_i64);
    let tokens = |f: &Folder| number(f, "num_virtual_tokens").unwrap_or(0);
    let stacks = all.first().map_or(1, |t| t.len_of(0) / tokens(first).max(1)).max(1);
    for (f, t) in folders.iter().zip(&all) {
        anyhow::ensure!(
            t.len_of(0) == stacks * tokens(f),
            "{}: holds {} tokens, and `num_virtual_tokens` is {}",
            f.path().display(),
            t.len_of(0),
            tokens(f)
        );
    }
    let some: Vec<Option<Tensor>> = all.iter().cloned().map(Some).collect();
    let mut fields = first.fields().clone();
    let method = asked.method.unwrap_or("concat");
    let merged = match method {
        "concat" | "cat" => {
            fields.insert(
                "num_virtual_tokens".into(),
                json!(folders.iter().map(tokens).sum::<i64>()),
            );
            joined_prompts(&all, weights, stacks)?
        }
        "average" => average(&some, weights)?,
        "linear" => weighted_sum(&some, weights)?,
        _ => anyhow::bail!(
            "{method}: prompts are merged by `concat`, one behind the other, by `average`, \
             Σ w p ⁄ Σ w, or by `linear`, Σ w p"
        ),
    };
    if asked.planned(&format!("{method}: the prompts {:?}", merged.size())) {
        return Ok(());
    }
    asked.say(format_args!("{method} of {} prompts: {:?}", all.len(), merged.size()));
    peft::write_folder(asked.out, first, fields, &[(PROMPT.to_owned(), merged)])?;
    said(asked)
}

const HUB_CONFIG: &str = "adapter_config.json";
const HUB_WEIGHTS: &str = "adapter.safetensors";

/// AdapterHub's folders of one configuration: the average of their parameters.
pub(super) fn bottlenecks(asked: &Asked, weights: &[f64]) -> Result<()> {
    plain(asked, "bottlenecks")?;
    anyhow::ensure!(
        asked.convention.is_none(),
        "PEFT has no bottlenecks; leave out the convention"
    );
    let method = asked.method.unwrap_or("average");
    let merge = match method {
        "average" => average,
        "linear" => weighted_sum,
        _ => anyhow::bail!(
            "{method}: bottlenecks are merged by `average`, Σ w φ ⁄ Σ w, or by `linear`, Σ w φ"
        ),
    };
    let read = |path: &Path| -> Result<(Value, String)> {
        let file = path.join(HUB_CONFIG);
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let config: Value =
            serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        let name = config.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok((config, name))
    };
    let first = asked.folders.first().context("no adapters")?;
    let (config, name) = read(first)?;
    // The average of A and B is not that of the changes.
    if let Some(other) = config.pointer("/config/architecture").and_then(Value::as_str) {
        anyhow::bail!(
            "{}: is AdapterHub's `{other}` and no bottleneck; `modl convert --to peft` makes a folder \
             that can be merged",
            first.display()
        );
    }
    let mut each: Vec<BTreeMap<String, Tensor>> = Vec::new();
    for folder in asked.folders {
        let (own, own_name) = read(folder)?;
        for field in ["config", "hidden_size", "model_type"] {
            anyhow::ensure!(
                own.get(field) == config.get(field),
                "{} and {} differ in `{field}`; only adapters of one form have an average",
                first.display(),
                folder.display()
            );
        }
        let file = checkpoint::open_first(folder, &[HUB_WEIGHTS, "pytorch_adapter.bin"])?;
        // The adapter's name is one part of the keys.
        let renamed = |key: String| -> String {
            let parts = key.split('.').map(|p| if p == own_name { name.as_str() } else { p });
            parts.collect::<Vec<_>>().join(".")
        };
        let tensors = file.tensors(Device::Cpu)?.into_iter();
        each.push(tensors.map(|(key, t)| (renamed(key), t)).collect());
    }
    let keys: BTreeSet<&String> = each.iter().flat_map(BTreeMap::keys).collect();
    let mut merged = Vec::new();
    for key in keys {
        let all: Vec<Option<Tensor>> = each.iter().map(|m| m.get(key).cloned()).collect();
        merged.push((key.as_str(), merge(&all, weights).with_context(|| key.clone())?));
    }
    if asked.planned(&format!("{method}: {} tensors", merged.len())) {
        return Ok(());
    }
    let tensors = merged.iter().map(|(key, t)| (*key, t));
    checkpoint::save(asked.out.join(HUB_WEIGHTS), tensors, HashMap::new())?;
    copy(first, asked.out, &["README.md", HUB_CONFIG])?;
    asked.say(format_args!(
        "{method} of {} adapters: {} tensors, called `{name}`",
        each.len(),
        merged.len()
    ));
    said(asked)
}
