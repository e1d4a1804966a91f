//! `modl inspect`: what a model, an adapter, a tensor file or a run is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use modl_compute::adapterhub;
use modl_core::checkpoint::Checkpoint;
use modl_core::{Kind, Modular, Seed};
use modl_train::Methods;

use super::adapter::is_adapter;
use super::{health, inspect_run};
use crate::report::Table;

/// What a phase of a run keeps of its routers and aggregators.
const ROUTING: &str = "routing.safetensors";

/// Arguments of `modl inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A model's folder, an adapter's folder, a .safetensors file, a run's folder, or that of one of
    /// its phases.
    path: PathBuf,
    /// List every site of a model, or every tensor of a file.
    #[arg(long)]
    all: bool,
}

pub(crate) fn run(args: &InspectArgs, methods: &Methods) -> Result<()> {
    let path = &args.path;
    if path.is_file() {
        tensors(path, args.all, methods)
    } else if is_adapter(path) {
        adapter(path, args.all, methods)
    } else if path.join("config.json").is_file() {
        model(path, args.all)
    } else if path.join("recipe.toml").is_file() {
        inspect_run::run(path, methods)
    } else if path.join(ROUTING).is_file() {
        tensors(&path.join(ROUTING), args.all, methods)
    } else if path.exists() {
        anyhow::bail!(
            "{}: is neither a model (config.json), an adapter (adapter_config.json) nor a run (recipe.toml)",
            path.display()
        )
    } else {
        anyhow::bail!("{}: is not there", path.display())
    }
}

fn model(path: &Path, all: bool) -> Result<()> {
    let backbone = modl_models::open(path, &modl_models::LoadOptions::default())?;
    let model = Modular::from_box(backbone, Seed(0))?;
    let backbone = model.backbone();
    let numbers: usize = backbone.params().iter().map(|(_, p)| p.tensor().numel()).sum();
    let kind = backbone.config().get("model_type").and_then(|v| v.as_str()).unwrap_or("?");
    println!("model {kind}, {numbers} parameters, fingerprint {}", backbone.fingerprint()?);
    let mut table = Table::new(["site", "kind", "in", "out"]);
    for s in backbone.sites().iter().filter(|s| all || !repeated(&s.path)) {
        table.row([
            s.path.clone(),
            format!("{:?}", s.kind).to_lowercase(),
            s.input.to_string(),
            s.output.to_string(),
        ]);
    }
    println!("{}", table.text());
    if !all {
        println!(
            "{} sites; layers after the first are left out, --all shows them",
            backbone.sites().len()
        );
    }
    Ok(())
}

/// Whether a site is of a layer, or an expert, after the first.
fn repeated(path: &str) -> bool {
    let number = |part: &str| part.strip_prefix("expert_").unwrap_or(part).parse::<u64>();
    path.split('.').any(|part| number(part).is_ok_and(|n| n > 0))
}

fn adapter(path: &Path, all: bool, methods: &Methods) -> Result<()> {
    let config = std::fs::read_to_string(path.join("adapter_config.json"))?;
    let config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&config)?;
    let set = |v: &serde_json::Value| match v {
        serde_json::Value::Null | serde_json::Value::Bool(false) => false,
        serde_json::Value::Object(o) => !o.is_empty(),
        serde_json::Value::Array(a) => !a.is_empty(),
        _ => true,
    };
    let hub = adapterhub::is_folder(path);
    let mut table = Table::new(["setting", "value"]);
    for (name, value) in config.iter().filter(|(_, v)| set(v)) {
        match value {
            // AdapterHub has the settings of the method in a table of their own.
            serde_json::Value::Object(own) if hub => {
                for (name, value) in own.iter().filter(|(_, v)| set(v)) {
                    table.row([name.clone(), value.to_string()]);
                }
            }
            _ => table.row([name.clone(), value.to_string()]),
        }
    }
    println!("{}", table.text());
    if hub {
        summary(path, all)?;
    }
    let weights = path.join(if hub { "adapter.safetensors" } else { "adapter_model.safetensors" });
    if let Some(ranks) = health::low_rank(&Checkpoint::open(&weights)?)? {
        println!("{}", ranks.text());
    }
    tensors(&weights, all, methods)
}

/// Which methods, at which sites, with how many parameters.
fn summary(path: &Path, all: bool) -> Result<()> {
    let found = adapterhub::summary(path)?;
    let mut table = Table::new(["site", "parameters"]);
    for (site, numbers) in found.sites.iter().filter(|(site, _)| all || !repeated(site)) {
        let site = if site.is_empty() { "(shared)" } else { site };
        table.row([site.to_owned(), numbers.to_string()]);
    }
    println!("{}", table.text());
    let sites = found.sites.keys().filter(|site| !site.is_empty()).count();
    let numbers: usize = found.sites.values().sum();
    let kinds = found.kinds.join(" + ");
    println!("adapter `{}`: {kinds} at {sites} sites, {numbers} parameters", found.name);
    Ok(())
}

fn tensors(path: &Path, all: bool, methods: &Methods) -> Result<()> {
    let file = Checkpoint::open(path)?;
    let names = file.names();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for name in &names {
        let (shape, kind): (Vec<i64>, Kind) = file.info(name)?;
        let n = shape.iter().product::<i64>() as usize;
        let kind = format!("{kind:?}").to_lowercase();
        *kinds.entry(kind).or_default() += n;
    }
    let counts: Vec<String> = kinds.iter().map(|(k, n)| format!("{n} {k}")).collect();
    println!("{}: {} tensors, {}", path.display(), names.len(), counts.join(", "));
    let (table, suspicious) = health::report(&file)?;
    if all {
        println!("{}", table.text());
    }
    for line in suspicious {
        println!("suspicious: {line}");
    }
    let mut metadata: Vec<_> = file.metadata().into_iter().collect();
    metadata.sort();
    for (key, value) in metadata {
        if key == "modl"
            && let Some(routing) = inspect_run::routing_file(path, &value, methods)?
        {
            println!("{routing}");
            continue;
        }
        println!("  {key}: {value}");
    }
    Ok(())
}
