//! `modl list`: the methods of an axis, and the experiments.

use anyhow::Result;
use clap::{Args, ValueEnum};
use modl_aggregate::merge::Spec;
use modl_core::{Catalog, Device, Kind, Modular, ModuleConfig, Seed};
use modl_train::Methods;
use serde::Serialize;
use serde_json::json;

use crate::report::Table;

/// Arguments of `modl list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Which axis.
    #[arg(value_enum)]
    axis: Axis,
    /// An array of objects instead of a table.
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// A table in Markdown, as the docs have it.
    #[arg(long)]
    markdown: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Axis {
    Modules,
    Routers,
    Aggregators,
    Merges,
    Strategies,
    Experiments,
}

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    title: &'static str,
    citation: &'static str,
    section: &'static str,
    #[serde(flatten)]
    module: Option<ModuleFacts>,
}

impl From<crate::reproduce::Listed> for Row {
    fn from(e: crate::reproduce::Listed) -> Self {
        let (name, title) = (e.name, e.title);
        Row { name, title, citation: e.citation, section: e.section, module: None }
    }
}

impl From<Spec> for Row {
    fn from(spec: Spec) -> Self {
        let Spec { name, title, citation, .. } = spec;
        Row { name, title, citation, section: "5.1", module: None }
    }
}

/// What is known of a kind of module with its defaults, at its usual sites.
#[derive(Debug, Serialize)]
struct ModuleFacts {
    composition: &'static str,
    /// Trainable parameters on MiniLM-L6; none where the method is not for such a backbone.
    parameters: Option<usize>,
    mergeable: Option<bool>,
}

fn rows<T: ?Sized>(catalog: &Catalog<T>) -> Vec<Row> {
    let row = |e: &modl_core::Entry<T>| Row {
        name: e.name,
        title: e.title,
        citation: e.citation,
        section: e.section,
        module: None,
    };
    catalog.entries().iter().map(row).collect()
}

fn modules(catalog: &Catalog<dyn ModuleConfig>) -> Result<Vec<Row>> {
    let (minilm, mut small) = (bert(384, 6, 30522)?, bert(128, 6, 128)?);
    let mut rows = rows(catalog);
    for (row, entry) in rows.iter_mut().zip(catalog.entries()) {
        let parameters = parameters(&minilm, entry);
        let mergeable = parameters.map(|_| mergeable(&mut small, entry)).transpose()?;
        let composition = composition(entry.section);
        row.module = Some(ModuleFacts { composition, parameters, mergeable });
    }
    Ok(rows)
}

/// The number of trainable parameters, of which only the shapes are made.
fn parameters(model: &Modular, entry: &modl_core::Entry<dyn ModuleConfig>) -> Option<usize> {
    let config = (entry.parse)(json!({})).ok()?;
    let store = model.parameters_of(config.as_ref(), &config.usual_targets()).ok()?;
    let own = store.iter().filter(|(_, p)| !p.is_buffer());
    Some(own.map(|(_, p)| p.tensor().numel()).sum())
}

/// Whether the method can be merged, tried where it costs little.
fn mergeable(model: &mut Modular, entry: &modl_core::Entry<dyn ModuleConfig>) -> Result<bool> {
    let config = (entry.parse)(json!({}))?;
    let targets = config.usual_targets();
    model.attach("one", config, &targets)?;
    let mergeable = model.merge("one").is_ok();
    model.unmerge()?;
    model.detach("one")?;
    Ok(mergeable)
}

/// A BERT without anything learned; the shape of all-MiniLM-L6-v2 is 384, 6, 30522.
fn bert(width: i64, layers: i64, words: i64) -> Result<Modular> {
    let config = json!({
        "model_type": "bert",
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width / 32,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0
    });
    let bert = modl_models::Bert::untrained(config, Seed(0), Kind::Float, Device::Cpu)?;
    Ok(Modular::new(bert, Seed(0))?)
}

/// The survey's word for a section of its chapter on computation.
fn composition(section: &str) -> &'static str {
    match section {
        "3.1" => "parameter",
        "3.2" => "input",
        "3.3" => "function",
        "3.4" => "hypernetwork",
        _ => "several",
    }
}

pub(crate) fn run(args: &ListArgs, methods: &Methods) -> Result<()> {
    let rows = match args.axis {
        Axis::Modules => modules(&methods.registry.modules)?,
        Axis::Routers => rows(&methods.registry.routers),
        Axis::Aggregators => rows(&methods.registry.aggregators),
        Axis::Merges => methods.merges.iter().map(|m| m.spec().into()).collect(),
        Axis::Strategies => rows(&methods.strategies),
        Axis::Experiments => crate::reproduce::list().into_iter().map(Row::from).collect(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let of_modules = matches!(args.axis, Axis::Modules);
    let head: &[&str] = if of_modules {
        &["name", "title", "composition", "citation", "parameters on MiniLM", "mergeable"]
    } else {
        &["name", "title", "citation", "section"]
    };
    let mut table = Table::new(head.iter().copied()).left();
    for r in rows {
        match r.module {
            None => table.row([r.name, r.title, r.citation, r.section]),
            Some(m) => {
                let parameters = m.parameters.map_or_else(|| "–".into(), |n| n.to_string());
                let mergeable = m.mergeable.map_or("–", |yes| if yes { "yes" } else { "no" });
                let (name, title, citation) = (r.name, r.title, r.citation);
                table.row([name, title, m.composition, citation, &parameters, mergeable]);
            }
        }
    }
    println!("{}", if args.markdown { table.markdown() } else { table.text() });
    Ok(())
}
