//! `modl upcycle`: a mixture of experts out of dense models.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use modl_core::Seed;
use modl_core::shards::ShardSize;
use modl_models::{Upcycling, upcycle};

/// From which condition number on `mergekit-moe` warns.
const ALIKE: f64 = 5.0;

/// Arguments of `modl upcycle`.
#[derive(Debug, Args)]
pub(crate) struct UpcycleArgs {
    /// Folder of a dense model whose copies become the experts, or a file as `mergekit-moe` reads it.
    source: PathBuf,
    /// The number of experts, for a folder; 8 where it is left out.
    #[arg(long)]
    experts: Option<usize>,
    /// How many of them a token has, for a folder; 2 where it is left out.
    #[arg(long)]
    top_k: Option<usize>,
    /// Where gates that are drawn come from.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How large a file is at most: `5GB`, `300MB` or a number of bytes. A larger mixture is cut
    /// into shards.
    #[arg(long, value_name = "SIZE", default_value_t)]
    max_shard_size: ShardSize,
}

pub(crate) fn run(args: &UpcycleArgs) -> Result<()> {
    anyhow::ensure!(!args.out.exists(), "{}: is there already; name a new one", args.out.display());
    let recipe = if args.source.is_file() {
        anyhow::ensure!(
            args.experts.is_none() && args.top_k.is_none(),
            "--experts and --top-k: the file says them, as `experts` and `experts_per_token`"
        );
        read(&args.source)?
    } else {
        Upcycling::copies(&args.source, args.experts.unwrap_or(8), args.top_k.unwrap_or(2))
    };
    let made = upcycle(&recipe, &args.out, Seed(args.seed), args.max_shard_size)
        .with_context(|| args.source.display().to_string())?;
    println!(
        "{} layers with {} experts each, {} of them for a token: {} parameters",
        made.layers, made.experts, recipe.experts_per_token, made.parameters
    );
    let alike = made.condition.iter().enumerate().filter(|(_, c)| **c > ALIKE);
    let alike: Vec<String> = alike.map(|(n, c)| format!("{n} ({c:.1})")).collect();
    if !alike.is_empty() {
        println!(
            "gates are much alike (condition number) in layers {}: some experts will hardly be \
             chosen until they are trained",
            alike.join(", ")
        );
    }
    let first = recipe.experts.first().map(|e| &e.source_model);
    if recipe.experts.iter().all(|e| Some(&e.source_model) == first) {
        println!(
            "all experts are copies: until it is trained it computes what the dense model does"
        );
    }
    println!("written to {}", args.out.display());
    Ok(())
}

/// Reads a file of `mergekit-moe`.
fn read(path: &Path) -> Result<Upcycling> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_norway::from_str(&text).with_context(|| path.display().to_string())
}
