//! `modl list`: the methods of an axis.

use anyhow::Result;
use clap::{Args, ValueEnum};
use modl_core::Catalog;
use modl_train::Methods;
use serde::Serialize;

use crate::report::Table;

/// Arguments of `modl list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Which axis.
    #[arg(value_enum)]
    axis: Axis,
    /// An array of objects instead of a table.
    #[arg(long)]
    json: bool,
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
}

fn rows<T: ?Sized>(catalog: &Catalog<T>) -> Vec<Row> {
    let row = |e: &modl_core::Entry<T>| Row {
        name: e.name,
        title: e.title,
        citation: e.citation,
        section: e.section,
    };
    catalog.entries().iter().map(row).collect()
}

pub(crate) fn run(args: &ListArgs, methods: &Methods) -> Result<()> {
    let rows = match args.axis {
        Axis::Modules => rows(&methods.registry.modules),
        Axis::Routers => rows(&methods.registry.routers),
        Axis::Aggregators => rows(&methods.registry.aggregators),
        Axis::Strategies => rows(&methods.strategies),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let mut table = Table::new(["name", "title", "citation", "section"]).left();
    for r in rows {
        table.row([r.name, r.title, r.citation, r.section]);
    }
    println!("{}", table.text());
    Ok(())
}
