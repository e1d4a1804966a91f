//! What a merge of adapters is going to do, and what it leaves out.

use std::collections::BTreeMap;

use anyhow::Result;
use modl_aggregate::adapters::{SiteChanges, Way};
use modl_compute::peft::Folder;
use modl_core::Tensor;

use super::super::plan::{any_layer, size};
use super::Asked;
use super::tables::of_plan;
use crate::report::Table;

/// What does not take part, and why.
pub(super) fn not_merged(sites: &[SiteChanges], names: &[String], weights: &[f64]) -> Vec<String> {
    let mut notes = Vec::new();
    for (name, w) in names.iter().zip(weights) {
        if *w == 0.0 {
            notes.push(format!("`{name}` has the weight 0"));
        }
    }
    let mut absent: BTreeMap<(String, usize), usize> = BTreeMap::new();
    for site in sites {
        for (j, _) in site.changes.iter().enumerate().filter(|(_, change)| change.is_none()) {
            *absent.entry((any_layer(&site.path), j)).or_default() += 1;
        }
    }
    for ((path, j), n) in absent {
        let name = names.get(j).map_or("?", String::as_str);
        notes.push(format!(
            "`{name}` does not stand at `{path}` ({n} sites) and changes nothing there"
        ));
    }
    notes
}

/// What would be done, and what it costs.
pub(super) fn show(
    asked: &Asked,
    folders: &[Folder],
    sites: &[SiteChanges],
    names: &[String],
    way: &Way,
    notes: &[String],
) -> Result<()> {
    let mut adapters = Table::new(["adapter", "kind", "weight", "sites", "size"]);
    let mut read = 0;
    for ((folder, name), (j, w)) in folders.iter().zip(names).zip(asked.weights.iter().enumerate())
    {
        let bytes: u64 = folder.tensors().iter().map(|(_, t)| bytes(t)).sum();
        read += bytes;
        let stands = sites.iter().filter(|s| s.present().any(|(i, _)| i == j)).count();
        let kind = folder.config().module.kind().to_owned();
        adapters.row([name.clone(), kind, w.to_string(), stands.to_string(), size(bytes)]);
    }
    println!("{}", adapters.text());
    println!("{}", of_plan(sites, names, way).text());
    notes.iter().for_each(|note| println!("note: {note}"));
    let written: i64 = sites
        .iter()
        .map(|s| {
            let [out, wide] = s.present().next().map_or([0, 0], |(_, c)| c.weight.shape());
            4 * way.rank_of(s) * (out + wide)
        })
        .sum();
    println!(
        "{} of {} adapters: reads {}, writes at most {} to {}",
        asked.method.unwrap_or("concat"),
        names.len(),
        size(read),
        size(written as u64),
        asked.out.display()
    );
    Ok(())
}

fn bytes(t: &Tensor) -> u64 {
    (t.numel() * t.kind().elt_size_in_bytes()) as u64
}
