//! `modl list`: the methods of an axis.

use anyhow::Result;
use clap::{Args, ValueEnum};
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
    Strategies,
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
    let mut model = minilm()?;
    let mut rows = rows(catalog);
    for (row, entry) in rows.iter_mut().zip(catalog.entries()) {
        let facts = facts(&mut model, entry)?;
        let composition = composition(entry.section);
        let (parameters, mergeable) = facts.unzip();
        row.module = Some(ModuleFacts { composition, parameters, mergeable });
    }
    Ok(rows)
}

/// The number of parameters, and whether the method can be merged.
fn facts(
    model: &mut Modular,
    entry: &modl_core::Entry<dyn ModuleConfig>,
) -> Result<Option<(usize, bool)>> {
    let Ok(config) = (entry.parse)(json!({})) else { return Ok(None) };
    let targets = config.usual_targets();
    if model.attach("one", config, &targets).is_err() {
        return Ok(None);
    }
    let own = model.params().iter().filter(|(_, p)| !p.is_buffer());
    let parameters = own.map(|(_, p)| p.tensor().numel()).sum();
    let mergeable = model.merge("one").is_ok();
    model.unmerge()?;
    model.detach("one")?;
    Ok(Some((parameters, mergeable)))
}

/// The shape of all-MiniLM-L6-v2, without what it has learned.
fn minilm() -> Result<Modular> {
    let config = json!({
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
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
        Axis::Strategies => rows(&methods.strategies),
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
