//! `modl lib`: a library of modules, with where each comes from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use modl_core::{Context, Modular, Tensor, no_grad};
use modl_models::{LoadOptions, Tokenizer, open};
use modl_train::{Card, Dataset, Example, Library, Methods, sentence_vectors};

use super::run_folder::{self, Loaded};
use crate::report::Table;

/// Arguments of `modl lib`.
#[derive(Debug, Args)]
pub(crate) struct LibArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Add a run's modules, or one adapter: each as the next version of its name.
    Add {
        /// The library's folder; made where it is not there.
        library: PathBuf,
        /// The folder of a run of `modl train`, or of an adapter, or a module's file.
        source: PathBuf,
        /// Of a run this module only; of an adapter the name that it gets.
        #[arg(long)]
        name: Option<String>,
        /// What it is, in words.
        #[arg(long, default_value = "")]
        about: String,
    },
    /// Show what there is.
    List {
        /// The library's folder.
        library: PathBuf,
        /// The cards as JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Find the modules that were trained on what is most like a text.
    Search {
        /// The library's folder.
        library: PathBuf,
        /// The text; several make one mean.
        #[arg(long, required = true)]
        text: Vec<String>,
        /// The backbone that the modules are for.
        #[arg(long)]
        model: PathBuf,
    },
    /// Say where a module's files are, for `--adapter` and scripts.
    Path {
        /// The library's folder.
        library: PathBuf,
        /// NAME, its last version, or NAME@VERSION.
        name: String,
    },
    /// Remove NAME@VERSION, or all versions of NAME.
    Remove {
        /// The library's folder.
        library: PathBuf,
        /// Which.
        name: String,
    },
}

pub(crate) fn run(args: &LibArgs, methods: &Methods) -> Result<()> {
    match &args.action {
        Action::Add { library, source, name, about } => {
            let library = Library::open(library);
            let (name, about) = (name.as_deref(), about.as_str());
            match source.join("origin.json").is_file() {
                true => add_run(&library, source, name, about, methods),
                false => add_one(&library, source, name, about),
            }
        }
        Action::List { library, json } => list(&Library::open(library), *json),
        Action::Search { library, text, model } => search(&Library::open(library), text, model),
        Action::Path { library, name } => {
            let library = Library::open(library);
            println!("{}", library.path(&library.find(name)?)?.display());
            Ok(())
        }
        Action::Remove { library, name } => {
            for card in Library::open(library).remove(name)? {
                println!("removed {}@{}", card.name, card.version);
            }
            Ok(())
        }
    }
}

/// So many texts make a prototype.
const TEXTS: usize = 256;

/// The modules of the last finished phase, with recipe, data, metrics and prototype.
fn add_run(
    library: &Library,
    run: &Path,
    only: Option<&str>,
    about: &str,
    methods: &Methods,
) -> Result<()> {
    let recipe = run_folder::recipe_of(run, methods)?;
    let phases = recipe.phases.iter().enumerate().rev();
    let mut folders = phases.map(|(i, p)| run.join("phases").join(format!("{}-{}", i + 1, p.name)));
    let done = folders.find(|f| f.join("params.safetensors").is_file());
    let modules = done.with_context(|| {
        format!("{}: has no finished phase; `modl train --resume` goes on with it", run.display())
    })?;
    let modules = modules.join("modules");
    let text = fs::read_to_string(run.join("recipe.toml"))?;
    let metrics: BTreeMap<String, BTreeMap<String, f64>> = match fs::read(run.join("metrics.json"))
    {
        Ok(text) => serde_json::from_slice(&text).context("metrics.json")?,
        Err(_) => BTreeMap::new(),
    };
    let kinds: BTreeMap<String, String> = recipe
        .modules
        .iter()
        .map(|m| {
            (m.name.clone(), m.config.get("type").and_then(|t| t.as_str()).unwrap_or("").into())
        })
        .collect();
    let loaded = Loaded::new(recipe, methods)?;
    let base = loaded.model.backbone().fingerprint()?;
    let mut added = 0;
    let mut entries: Vec<PathBuf> = fs::read_dir(&modules)?.flatten().map(|e| e.path()).collect();
    entries.sort();
    for source in entries {
        let name = match source.is_dir() {
            true => source.file_name(),
            false => source.file_stem(),
        };
        let name = name.unwrap_or_default().to_string_lossy().into_owned();
        if only.is_some_and(|only| only != name) {
            continue;
        }
        // A module of a task's name was made for the task, any other for all.
        let train = &loaded.part(None).train;
        let of_task = train.tasks().contains_key(name.as_str());
        let data = if of_task { train.of_task(&name)? } else { train.clone() };
        let card = Card {
            kind: kinds.get(&name).or(kinds.values().next()).cloned().unwrap_or_default(),
            about: about.to_owned(),
            base: Some(base.clone()),
            data: Some(data.fingerprint()?),
            recipe: Some(text.clone()),
            metrics: metrics
                .get(if of_task { name.as_str() } else { "all" })
                .cloned()
                .unwrap_or_default(),
            prototype: Some(prototype(&loaded.model, &data)?),
            name,
            ..Card::default()
        };
        told(&library.add(&source, card)?);
        added += 1;
    }
    anyhow::ensure!(
        added > 0,
        "{}: has no module{}",
        run.display(),
        only.map(|o| format!(" `{o}`")).unwrap_or_default()
    );
    Ok(())
}

/// An adapter, or a module's file, of which only the kind is known.
fn add_one(library: &Library, source: &Path, name: Option<&str>, about: &str) -> Result<()> {
    let config = source.join("adapter_config.json");
    let is_file = source.is_file() && source.extension().is_some_and(|e| e == "safetensors");
    anyhow::ensure!(
        config.is_file() || is_file,
        "{}: is no run, no folder of an adapter, and no .safetensors file",
        source.display()
    );
    let kind = match fs::read(&config) {
        Ok(text) => {
            let config: serde_json::Value =
                serde_json::from_slice(&text).with_context(|| config.display().to_string())?;
            config.get("peft_type").and_then(|t| t.as_str()).unwrap_or("").to_lowercase()
        }
        Err(_) => String::new(),
    };
    let own = source.file_stem().unwrap_or_default().to_string_lossy();
    let card = Card {
        name: name.unwrap_or(&own).to_owned(),
        kind,
        about: about.to_owned(),
        ..Card::default()
    };
    told(&library.add(source, card)?);
    Ok(())
}

fn told(card: &Card) {
    println!("added {}@{}", card.name, card.version);
}

fn list(library: &Library, json: bool) -> Result<()> {
    let all = library.list()?;
    if json {
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let mut table =
        Table::new(["module", "method", "backbone", "data", "held out", "about"]).left();
    for card in all {
        let metrics: Vec<String> =
            card.metrics.iter().map(|(key, value)| format!("{key} {value:.4}")).collect();
        table.row([
            format!("{}@{}", card.name, card.version),
            card.kind,
            card.base.unwrap_or_default(),
            card.data.unwrap_or_default(),
            metrics.join(", "),
            card.about,
        ]);
    }
    println!("{}", table.text());
    Ok(())
}

fn search(library: &Library, texts: &[String], model: &Path) -> Result<()> {
    let backbone =
        open(model, &LoadOptions::default()).with_context(|| model.display().to_string())?;
    let model_of = Modular::from_box(backbone, modl_core::Seed(0))?;
    let tokenizer = Tokenizer::open(model)?;
    let example = |(i, text): (usize, &String)| -> Result<Example> {
        let ids = tokenizer.encode_one(text)?.into();
        Ok(Example { id: i.to_string(), task: "search".to_owned(), ids, target: 0.0 })
    };
    let examples = texts.iter().enumerate().map(example).collect::<Result<_>>()?;
    let wanted = prototype(&model_of, &Dataset::new(examples)?)?;
    let found = library.nearest(&wanted, &model_of.backbone().fingerprint()?)?;
    anyhow::ensure!(
        !found.is_empty(),
        "no module of the library has a prototype for this backbone; `modl lib add LIBRARY RUN` makes them"
    );
    let mut table = Table::new(["module", "cosine", "method", "about"]).left();
    for (card, cosine) in found {
        let name = format!("{}@{}", card.name, card.version);
        table.row([name, format!("{cosine:.4}"), card.kind, card.about]);
    }
    println!("{}", table.text());
    Ok(())
}

/// The mean over some examples of the mean of their last hidden states, by the backbone alone.
fn prototype(model: &Modular, data: &Dataset) -> Result<Vec<f32>> {
    let step = data.len().div_ceil(TEXTS).max(1);
    let rows: Vec<usize> = (0..data.len()).step_by(step).collect();
    let mut sum: Option<Tensor> = None;
    for rows in rows.chunks(32) {
        let batch = data.batch(rows, model.device())?;
        let cx = batch.describe(Context::eval())?;
        let own = no_grad(|| {
            let outputs = model.forward_base(&batch.inputs, &cx)?;
            sentence_vectors(&outputs, &batch)?.sum_dims(&[0], false)
        })?;
        sum = Some(match sum {
            Some(sum) => sum.add(&own)?,
            None => own,
        });
    }
    let sum = sum.context("there is nothing to make a prototype of")?;
    Ok(sum.mul_scalar(1.0 / rows.len() as f64)?.to_vec()?)
}
