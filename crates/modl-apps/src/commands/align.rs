//! `modl align`: Git Re-Basin by weights, on the files of two models.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use modl_aggregate::exchangeable::{Shapes, exchangeable, read};
use modl_aggregate::merge::Source;
use modl_aggregate::rebasin::{Matched, Permutations, match_weights};
use modl_core::checkpoint::write_whole;
use modl_core::shards::ShardSize;
use modl_core::{Device, Seed, Tensors, checkpoint, shards};
use serde_json::{Map, json};

use super::merge::beside;
use crate::report::Table;

/// Arguments of `modl align`.
#[derive(Debug, Args)]
pub(crate) struct AlignArgs {
    /// The model that stays as it is.
    a: PathBuf,
    /// The model whose hidden units are put into the order of A's. What it computes stays the same.
    b: PathBuf,
    /// The folder to write: B in the other order.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Which axes of which tensors go together, as YAML or JSON: `LAYER: {TENSOR: AXIS, …}`. Left out, the
    /// units of feed-forward networks and of plain chains of layers are found by their names.
    #[arg(long, value_name = "FILE")]
    permutations: Option<PathBuf>,
    /// Which of several optima is found.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The size of a file at most: `5GB`, `500MB`, or bytes.
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: ShardSize,
}

pub(crate) fn run(args: &AlignArgs) -> Result<()> {
    anyhow::ensure!(!args.out.exists(), "{}: is there already; name a new one", args.out.display());
    let (a, b) = (open(&args.a)?, open(&args.b)?);
    let layers = match &args.permutations {
        Some(path) => {
            let at = || path.display().to_string();
            read(&fs::read_to_string(path).with_context(at)?).with_context(at)?
        }
        None => {
            let shapes: Shapes = a.iter().map(|(name, t)| (name.to_owned(), t.size())).collect();
            exchangeable(&shapes).with_context(|| args.a.display().to_string())?
        }
    };
    let found = match_weights(&layers, &a, &b, Seed(args.seed))?;
    println!("{}", table(&layers, &found).text());
    if let (Some(first), Some(last)) = (found.objective.first(), found.objective.last()) {
        println!("Σ ⟨A, B⟩ over these tensors: {first:.6} before, {last:.6} now");
    }
    write(args, &layers, &found)?;
    println!("written to {}", args.out.display());
    Ok(())
}

/// All tensors of a model.
fn open(path: &Path) -> Result<Tensors> {
    let source = Source::open(&path.display().to_string(), path)?;
    let mut all = Tensors::new();
    for file in source.files() {
        for (name, t) in checkpoint::open(file)?.tensors(Device::Cpu)? {
            all.set(name, t);
        }
    }
    Ok(all)
}

fn table(layers: &Permutations, found: &Matched) -> Table {
    let mut table = Table::new(["layer", "units", "moved"]);
    for (layer, order) in layers.layers().iter().zip(&found.orders) {
        let moved = order.iter().enumerate().filter(|(i, j)| i != *j).count();
        table.row([layer.name.clone(), order.len().to_string(), moved.to_string()]);
    }
    table
}

/// Writes a folder beside the result, which then gets its name.
fn write(args: &AlignArgs, layers: &Permutations, found: &Matched) -> Result<()> {
    let work = beside(&args.out, ".aligning");
    let at = || work.display().to_string();
    if work.exists() {
        fs::remove_dir_all(&work).with_context(at)?;
    }
    fs::create_dir_all(&work).with_context(at)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    shards::save(&work, "model", found.model.iter(), &metadata, args.max_shard_size)?;
    for entry in fs::read_dir(&args.b).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let text = name.to_string_lossy();
        let weights = [".safetensors", ".bin", ".index.json"].iter().any(|e| text.ends_with(e));
        if path.is_file() && !weights {
            fs::copy(&path, work.join(&name)).with_context(at)?;
        }
    }
    let orders: Map<_, _> = layers
        .layers()
        .iter()
        .zip(&found.orders)
        .map(|(layer, order)| (layer.name.clone(), json!(order)))
        .collect();
    let text = serde_json::to_string_pretty(&orders)?;
    write_whole(work.join("permutations.json"), (text + "\n").as_bytes())?;
    fs::rename(&work, &args.out).with_context(|| args.out.display().to_string())
}
