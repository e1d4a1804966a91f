//! Prints how far modl's outputs are from PEFT's, by method and backbone: the table in
//! `docs/modules.md`.
//!
//! For each adapter that PEFT made on a tiny model, the largest difference between recorded outputs
//! (adapted and merged) and modl's own; in the table the largest over all adapters of a method.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};

use modl_compute::peft;
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum};
use modl_core::{Context, Device, Modular, Seed, Tensors};
use modl_models::{LoadOptions, open};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The folders of backbones, and what they are called in the table.
const BASES: [(&str, &str); 7] = [
    ("bert", "BERT"),
    ("gpt2", "GPT-2"),
    ("llama", "Llama"),
    ("mixtral", "Mixtral"),
    ("olmoe", "OLMoE"),
    ("t5", "T5"),
    ("vit", "ViT"),
];

fn tensors(path: &Path) -> Result<Tensors> {
    Ok(Checkpoint::open(path)?.tensors(Device::Cpu)?.into_iter().collect())
}

/// Adapters as (backbone in the table, the backbone's folder, the adapter's folder, its outputs).
fn adapters(fixtures: &Path) -> Result<Vec<(&'static str, PathBuf, PathBuf, PathBuf)>> {
    let mut found = Vec::new();
    for (folder, base) in BASES {
        for entry in std::fs::read_dir(fixtures)? {
            let dir = entry?.path();
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(&format!("{folder}_")) && dir.join("adapter").is_dir() {
                let of = fixtures.join(format!("base_{folder}"));
                found.push((base, of, dir.join("adapter"), dir.join("outputs.safetensors")));
            }
        }
        let of = fixtures.join(format!("deterministic_{folder}"));
        for entry in std::fs::read_dir(&of).into_iter().flatten() {
            let dir = entry?.path();
            let outputs = dir.join("outputs.safetensors");
            if dir.join("adapter_config.json").exists() && outputs.exists() {
                found.push((base, of.clone(), dir, outputs));
            }
        }
    }
    Ok(found)
}

/// The largest difference among the outputs whose names `own` finds in `golden`.
fn apart(found: &Tensors, golden: &Tensors, own: impl Fn(&str) -> Option<String>) -> Result<f64> {
    let mut largest = 0.0f64;
    for (key, expected) in golden.iter() {
        if let Some(ours) = own(key).and_then(|name| found.get(&name)) {
            largest = largest.max(ours.max_abs_diff(expected)?);
        }
    }
    Ok(largest)
}

fn main() -> Result<()> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut table: BTreeMap<String, BTreeMap<&str, f64>> = BTreeMap::new();
    let mut bases = BTreeSet::new();
    for (base, of, adapter, outputs) in adapters(&fixtures)? {
        let golden = tensors(&outputs)?;
        let inputs = tensors(&of.join("inputs.safetensors"))?;
        let mut model = Modular::from_box(open(&of, &LoadOptions::default())?, Seed(1))?;
        peft::load(&mut model, &adapter, Some("a"))?;
        model.aggregate(Box::new(Sum::default()))?;
        model.route(Given::only(0), false)?;
        let named = |state: &'static str| {
            move |key: &str| match (key, state) {
                ("logits", "adapted") | ("merged_logits", "merged") => Some("logits".to_owned()),
                _ => key.strip_prefix(state)?.strip_prefix('.').map(str::to_owned),
            }
        };
        let mut largest =
            apart(&model.forward(&inputs, &Context::eval())?, &golden, named("adapted"))?;
        if model.merge("a").is_ok() {
            let merged = model.forward_base(&inputs, &Context::eval())?;
            largest = largest.max(apart(&merged, &golden, named("merged"))?);
        }
        let config = peft::read_config(&adapter)?;
        let kind = match config.peft_type() {
            "LORA" if config.module.kind() == "dora" => "LORA with `use_dora`".to_owned(),
            other => other.to_owned(),
        };
        let cell = table.entry(kind).or_default().entry(base).or_default();
        *cell = cell.max(largest);
        bases.insert(base);
    }
    let bases: Vec<&str> = BASES.iter().map(|(_, b)| *b).filter(|b| bases.contains(b)).collect();
    println!("| type | {} |\n|---|{}", bases.join(" | "), "---|".repeat(bases.len()));
    for (kind, row) in table {
        let cell = |b: &&str| row.get(b).map_or("–".to_owned(), |d| format!("{d:.0e}"));
        println!("| {kind} | {} |", bases.iter().map(cell).collect::<Vec<_>>().join(" | "));
    }
    Ok(())
}
