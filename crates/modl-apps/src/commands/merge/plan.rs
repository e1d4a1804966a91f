//! What a merge is going to do, in tables.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use modl_aggregate::merge::{MergeMethods, Output, Plan};

use crate::report::Table;

/// Lines of notes that are shown where not all are asked for.
const NOTES: usize = 8;

/// Shows the models, what becomes of which tensors, and what it costs.
pub(super) fn show(plan: &Plan, methods: &MergeMethods, out: &Path, all: bool) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let cost = plan.cost(methods, threads)?;
    if all {
        let mut models = Table::new(["model", "tensors", "size"]);
        for source in &plan.sources {
            let bytes: u64 = source.tensors().values().map(|p| p.bytes).sum();
            models.row([source.name.clone(), source.tensors().len().to_string(), size(bytes)]);
        }
        println!("{}", models.text());
        println!("{}", tensors(plan).text());
    }
    for note in plan.notes.iter().take(if all { usize::MAX } else { NOTES }) {
        println!("kept as it is: {note}");
    }
    if !all && plan.notes.len() > NOTES {
        println!("… and {} more; --plan shows all", plan.notes.len() - NOTES);
    }
    let shards = plan.shards();
    let files =
        if shards.len() == 1 { "one file".into() } else { format!("{} files", shards.len()) };
    println!(
        "{} of {} models: reads {}, writes {} in {files} to {}; at most {} of memory beside the program",
        plan.method,
        plan.sources.len(),
        size(cost.read),
        size(cost.written),
        out.display(),
        size(cost.memory)
    );
    Ok(())
}

/// Tensors that are alike but for the layer and are merged with the same settings, in one row. What is
/// the same for all tensors is said once, in front.
fn tensors(plan: &Plan) -> Table {
    let mut settings: Vec<BTreeMap<String, String>> =
        plan.outputs.iter().filter_map(|o| Some(o.settings.as_ref()?.shown())).collect();
    let mut common = settings.pop().unwrap_or_default();
    common.retain(|name, value| settings.iter().all(|s| s.get(name) == Some(value)));
    let line = |all: &BTreeMap<String, String>| {
        all.iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
    };
    if !common.is_empty() {
        println!("for all tensors: {}", line(&common));
    }
    let mut rows: BTreeMap<(String, String), Vec<&Output>> = BTreeMap::new();
    for output in &plan.outputs {
        let how = match &output.settings {
            None => "copied".to_owned(),
            Some(settings) => {
                let mut own = settings.shown();
                own.retain(|name, _| !common.contains_key(name));
                line(&own)
            }
        };
        rows.entry((any_layer(&output.name), how)).or_default().push(output);
    }
    let mut table = Table::new(["tensor", "count", "shape", "stored as", "settings"]).left();
    for ((pattern, how), outputs) in rows {
        let Some(first) = outputs.first() else { continue };
        table.row([
            pattern,
            outputs.len().to_string(),
            format!("{:?}", first.shape),
            format!("{:?}", first.dtype),
            how,
        ]);
    }
    table
}

/// A name with `*` for the numbers in it.
pub(super) fn any_layer(name: &str) -> String {
    let parts = name.split('.').map(|part| {
        let number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if number { "*" } else { part }
    });
    parts.collect::<Vec<_>>().join(".")
}

/// Bytes for a person.
pub(super) fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.0} kB", b / 1e3),
    }
}
