//! What `modl inspect` says of runs and of files of routers: modules, router, aggregator, phases.

use std::path::Path;

use anyhow::{Context as _, Result};
use modl_core::{Names, Targets};
use modl_train::Methods;
use serde_json::Value;

use super::run_folder;
use crate::report::Table;

/// What a run is and how far it is.
pub(super) fn run(folder: &Path, methods: &Methods) -> Result<()> {
    let recipe = run_folder::recipe_of(folder, methods)?;
    let backbone = match &recipe.backbone.fresh {
        Some(fresh) => {
            let (kind, settings) = described(fresh);
            format!("fresh {kind}, {settings}")
        }
        None => recipe.backbone_folder()?.display().to_string(),
    };
    println!("run of a recipe: backbone {backbone}");
    let mut table = Table::new(["module", "method", "settings", "stands at"]).left();
    for m in &recipe.modules {
        let (kind, settings) = described(&m.config);
        table.row([m.name.clone(), kind, settings, places(&m.targets)]);
    }
    println!("{}", table.text());
    let router = recipe.router.as_ref().map(|r| (&r.config, r.global));
    println!("{}", routing(router, recipe.aggregator.as_ref(), methods)?);
    let mut table = Table::new(["phase", "done"]).left();
    for (i, phase) in recipe.phases.iter().enumerate() {
        let own = folder.join("phases").join(format!("{}-{}", i + 1, phase.name));
        let state = if own.join("params.safetensors").is_file() {
            "yes"
        } else if own.is_dir() {
            "partly; `modl train --resume` goes on"
        } else {
            "no"
        };
        table.row([phase.name.as_str(), state]);
    }
    println!("{}", table.text());
    Ok(())
}

/// What the header of a file of routers says; nothing where it is of another file.
pub(super) fn routing_file(path: &Path, header: &str, methods: &Methods) -> Result<Option<String>> {
    let context = || format!("{}: its `modl` metadata", path.display());
    let header: Value = serde_json::from_str(header).with_context(context)?;
    let Some(modules) = header.get("modules").and_then(Value::as_array) else { return Ok(None) };
    let names: Vec<&str> = modules.iter().filter_map(Value::as_str).collect();
    let global = header.get("global").and_then(Value::as_bool).unwrap_or_default();
    let given = |key: &str| header.get(key).filter(|v| !v.is_null());
    let router = given("router").map(|config| (config, global));
    let routing = routing(router, given("aggregator"), methods).with_context(context)?;
    Ok(Some(format!("modules: {}\n{routing}", names.join(", "))))
}

/// A table of the router and the aggregator.
fn routing(
    router: Option<(&Value, bool)>,
    aggregator: Option<&Value>,
    methods: &Methods,
) -> Result<String> {
    let mut table = Table::new(["part", "method", "settings", "how many", "decides for"]).left();
    match router {
        Some((config, global)) => {
            let (kind, settings) = described(config);
            let many = if global { "one for all sites" } else { "one for each site" };
            let level = level(&methods.registry.routers.parse(config)?.to_json()?);
            table.row(["router".into(), kind, settings, many.into(), level.into()]);
        }
        None => table.row(["router", "none", "", "", ""]),
    }
    match aggregator {
        Some(config) => {
            let (kind, settings) = described(config);
            table.row(["aggregator".into(), kind, settings, "one for each site".into(), "".into()]);
        }
        None => table.row(["aggregator", "none", "", "", ""]),
    }
    Ok(table.text())
}

/// For what a router with these settings decides, as far as they say it.
fn level(settings: &Value) -> &'static str {
    let said = |key: &str| settings.get(key).and_then(Value::as_str);
    match (said("level"), said("input")) {
        (Some("static"), _) => "the whole batch",
        (Some("token"), _) | (None, Some("tokens")) => "each token",
        (Some("example"), _) | (None, Some(_)) => "each example",
        _ => "what its method says",
    }
}

/// A method and its settings: `k = 2, input = "tokens"`.
fn described(config: &Value) -> (String, String) {
    let kind = config.get("type").and_then(Value::as_str).unwrap_or("?");
    let own = config.as_object().into_iter().flatten().filter(|(key, _)| *key != "type");
    let all: Vec<String> = own.map(|(key, value)| format!("{key} = {value}")).collect();
    (kind.to_owned(), all.join(", "))
}

fn places(targets: &Targets) -> String {
    let names = |names: &Names| match names {
        Names::List(list) => list.join(", "),
        Names::Pattern(pattern) => pattern.clone(),
        Names::Any(parts) => parts.iter().map(places).collect::<Vec<_>>().join(" and "),
    };
    let mut text = names(&targets.names);
    if let Some(layers) = &targets.layers {
        let layers: Vec<String> = layers.iter().map(i64::to_string).collect();
        text = format!("{text} of layers {}", layers.join(", "));
    }
    if let Some(exclude) = &targets.exclude {
        text = format!("{text} without {}", names(exclude));
    }
    text
}
