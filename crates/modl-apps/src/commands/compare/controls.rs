//! What routers are measured against: no choice, a choice by lot, by the ids of tokens and by the task,
//! and no choice at all but one dense module.
//!
//! A dense module is of the method of the recipe's modules, which are to be alike, and wider:
//!
//! - `dense-parameters` has as many parameters as all of them together, as nearly as a whole width can
//!   have: for LoRAs of rank r the rank m·r;
//! - `dense-flops` takes as many operations for a token as those that the first router runs for it: the
//!   width times the mean number of modules with αⱼ ≠ 0, of examples that were held out, in evaluation,
//!   before training.
//!
//! What takes a module of each task one by one trains the dense one on all tasks at once, on as many
//! examples.

use anyhow::Result;
use modl_core::{Context, ModuleConfig, Weights, no_grad};
use modl_models::Tokenizer;
use modl_route::stats::Units;
use modl_train::{Methods, Recipe};
use serde_json::{Value, json};

use super::contestants::{Contestant, as_toml};
use crate::commands::run_folder::Loaded;

/// The name of the dense module.
const DENSE: &str = "dense";

/// Examples by which it is counted how many modules run for a token.
const COUNTED: usize = 64;

/// The controls of a recipe with the first router. Those that it has no place for are told.
pub(super) fn of(mut loaded: Loaded, methods: &Methods) -> Result<Vec<Contestant>> {
    let recipe = loaded.recipe.clone();
    let has = |kind: &str| methods.registry.routers.entries().iter().any(|e| e.name == kind);
    let plain = ["uniform", "random"].into_iter().filter(|kind| has(kind));
    let mut all: Vec<Contestant> =
        plain.map(|kind| Contestant::new(kind, json!({ "type": kind }))).collect();
    if has("hash") && recipe.backbone.fresh.is_none() {
        // A tokenizer may leave out ids, and a table of embeddings have more than are used.
        let known = Tokenizer::open(recipe.backbone_folder()?)?.vocabulary() as i64;
        let rows = loaded.model.backbone().config().get("vocab_size").and_then(Value::as_i64);
        let vocabulary = rows.unwrap_or(0).max(known);
        all.push(Contestant::new("hash", json!({ "type": "hash", "vocab": vocabulary })));
    }
    let named = |task: &str| recipe.modules.iter().any(|m| m.name == task);
    match recipe.data.tasks.keys().find(|t| !named(t)) {
        None => all.push(Contestant::new("oracle", json!({ "type": "fixed" }))),
        Some(task) => println!("no control `oracle`: task `{task}` has no module of its name"),
    }
    match dense(&mut loaded, methods)? {
        Ok(dense) => all.extend(dense),
        Err(reason) => println!("no dense controls: {reason}"),
    }
    Ok(all)
}

/// The dense modules, or why there are none.
fn dense(loaded: &mut Loaded, methods: &Methods) -> Result<Result<Vec<Contestant>, String>> {
    let recipe = loaded.recipe.clone();
    let Some((first, others)) = recipe.modules.split_first() else {
        return Ok(Err("the recipe has no modules".into()));
    };
    let unlike = others.iter().find(|m| m.config != first.config || m.targets != first.targets);
    if let Some(other) = unlike {
        return Ok(Err(format!("modules `{}` and `{}` are not alike", first.name, other.name)));
    }
    let config = methods.registry.modules.parse(&first.config)?;
    if config.widened(1.0).is_none() {
        return Ok(Err(format!("`{}` has no width that can be set", config.kind())));
    }
    loaded.prepare(methods)?;
    let (m, runs) = (recipe.modules.len(), running(loaded)?);
    let count = |config: &dyn ModuleConfig| -> Result<usize> {
        let own = loaded.model.parameters_of(config, &first.targets)?;
        Ok(own.iter().filter(|(_, p)| !p.is_buffer()).map(|(_, p)| p.tensor().numel()).sum())
    };
    let all_have = m * count(config.as_ref())?;
    let mut all = Vec::new();
    let mut add = |label: &str, dense: Box<dyn ModuleConfig>, like: String| -> Result<()> {
        let (kind, has) = (dense.kind(), count(dense.as_ref())?);
        println!("control `{label}`: one `{kind}` with {has} parameters; {like}");
        let router = json!({ "type": "fixed", "modules": [DENSE] });
        let set = instead(&recipe, &first.name, dense.as_ref())?;
        all.push(Contestant { set, ..Contestant::new(label, router) });
        Ok(())
    };
    if let Some(dense) = of_size(config.as_ref(), all_have, 4.0 * m as f64, &count)? {
        add("dense-parameters", dense, format!("{m} modules have {all_have}"))?;
    }
    match config.widened(runs) {
        _ if runs > m as f64 - 0.01 => {
            println!("no control `dense-flops`: the first router runs all modules for each token");
        }
        _ if runs < 0.01 => println!("no control `dense-flops`: no module runs before training"),
        None => {}
        Some(dense) => add("dense-flops", dense, format!("{runs:.2} modules run for a token"))?,
    }
    Ok(Ok(all))
}

/// The width with which `config` has as nearly as it can so many parameters: its own times `most` at
/// most.
fn of_size(
    config: &dyn ModuleConfig,
    wanted: usize,
    most: f64,
    count: &dyn Fn(&dyn ModuleConfig) -> Result<usize>,
) -> Result<Option<Box<dyn ModuleConfig>>> {
    let (mut below, mut above) = (0.0, most);
    // Halved until all widths of any module are told apart.
    for _ in 0..40 {
        let middle = (below + above) / 2.0;
        let Some(tried) = config.widened(middle) else { return Ok(None) };
        match count(tried.as_ref())? < wanted {
            true => below = middle,
            false => above = middle,
        }
    }
    let mut best: Option<(usize, Box<dyn ModuleConfig>)> = None;
    for tried in [below, above].into_iter().filter_map(|factor| config.widened(factor)) {
        let off = count(tried.as_ref())?.abs_diff(wanted);
        if best.as_ref().is_none_or(|(least, _)| off < *least) {
            best = Some((off, tried));
        }
    }
    Ok(best.map(|(_, config)| config))
}

/// How many modules run for a row or token, in the mean over sites.
fn running(loaded: &Loaded) -> Result<f64> {
    let part = loaded.part(None);
    let rows: Vec<usize> = (0..part.test.len().min(COUNTED)).collect();
    let batch = part.test.batch(&rows, loaded.model.device())?;
    let cx = batch.describe(Context::eval())?;
    no_grad(|| part.objective.predict(&loaded.model, &batch, &cx))?;
    let (mut chosen, mut units) = (0.0, 0.0);
    for (_, routing) in cx.take_trace().routings {
        if let Weights::Slots { dispatch, .. } = &routing.weights {
            // Each module computes its slots, whatever the number of tokens.
            let [_, tokens, modules, slots] = dispatch.size()[..] else { continue };
            chosen += (modules * slots) as f64 / tokens.max(1) as f64;
            units += 1.0;
            continue;
        }
        let own = Units::of(&routing, rows.len(), cx.find("mask"))?;
        let n = own.iter().count().max(1) as f64;
        chosen += own.iter().map(|u| u.chosen.len()).sum::<usize>() as f64 / n;
        units += 1.0;
    }
    Ok(if units > 0.0 { chosen / units } else { 0.0 })
}

/// What is set in the recipe for one dense module where `first` and the others are.
fn instead(recipe: &Recipe, first: &str, dense: &dyn ModuleConfig) -> Result<Vec<String>> {
    let values = recipe.values();
    let table = values.get("modules").and_then(|all| all.get(first)).and_then(Value::as_object);
    let mut module = serde_json::Map::new();
    module.insert("type".into(), dense.kind().into());
    let place = ["targets", "exclude", "layers", "layers_pattern"];
    let own = table.into_iter().flatten().filter(|(key, _)| place.contains(&key.as_str()));
    module.extend(own.map(|(key, value)| (key.clone(), value.clone())));
    let settings = dense.to_json()?;
    // What is not set has no value in TOML.
    let set = settings.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    module.extend(set.map(|(key, value)| (key.clone(), value.clone())));
    let mut phases = values.get("phases").cloned().unwrap_or_else(|| json!([]));
    for phase in phases.as_array_mut().into_iter().flatten() {
        on_all_tasks(phase, recipe);
    }
    let modules = as_toml(&json!({ DENSE: module }))?;
    Ok(vec![format!("modules={modules}"), format!("phases={}", as_toml(&phases)?)])
}

/// Makes of a phase that takes module by module one that trains the dense module on everything.
fn on_all_tasks(phase: &mut Value, recipe: &Recipe) {
    let strategy = phase.get("strategy").cloned().unwrap_or_default();
    let kind = strategy.get("type").unwrap_or(&strategy);
    if kind == "per_task" {
        phase["strategy"] = json!("joint");
        if phase.get("train").is_none() {
            phase["train"] = json!(["modules.{module}.*"]);
        }
        if let Some(steps) = phase.get("steps").and_then(Value::as_u64) {
            phase["steps"] = (steps * recipe.modules.len() as u64).into();
        }
    }
    let mut patterns = Vec::new();
    for pattern in phase.get("train").and_then(Value::as_array).into_iter().flatten() {
        let mut pattern = pattern.as_str().unwrap_or_default().replace("{module}", DENSE);
        for module in &recipe.modules {
            let own = format!("modules.{}.", module.name);
            pattern = pattern.replace(&own, &format!("modules.{DENSE}."));
        }
        if !patterns.contains(&pattern) {
            patterns.push(pattern);
        }
    }
    if !patterns.is_empty() {
        phase["train"] = patterns.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Wide(i64);

    impl ModuleConfig for Wide {
        fn kind(&self) -> &'static str {
            "wide"
        }

        fn to_json(&self) -> modl_core::Result<Value> {
            Ok(json!({}))
        }

        fn build(
            &self,
            _: &modl_core::Attachment,
            _: &mut modl_core::Scope,
        ) -> modl_core::Result<Box<dyn modl_core::Module>> {
            Err(modl_core::Error::invalid("wide", "is not built"))
        }

        fn widened(&self, factor: f64) -> Option<Box<dyn ModuleConfig>> {
            Some(Box::new(Wide(((self.0 as f64 * factor).round() as i64).max(1))))
        }
    }

    #[test]
    fn the_width_with_the_nearest_number_of_parameters_is_found() {
        // 20 numbers for each unit of width, and 50 that no width changes.
        let width = |c: &dyn ModuleConfig| -> i64 {
            format!("{c:?}").trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
        };
        let count = |c: &dyn ModuleConfig| Ok((20 * width(c) + 50) as usize);
        for (wanted, best) in [(210, 8), (219, 8), (221, 9), (849, 40), (831, 39)] {
            let found = of_size(&Wide(8), wanted, 40.0, &count).unwrap().unwrap();
            assert_eq!(width(found.as_ref()), best, "{wanted}");
        }
    }
}
