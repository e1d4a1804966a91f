//! `modl demo`: what modularity is for, on a real model and real data.
//!
//! A frozen MiniLM and sentences of four domains with their sentiment. One LoRA is trained for each
//! domain, after the fact; then held-out data says what is gained by knowing the domain, by routing
//! without knowing it, and by merging, against one LoRA for everything and no module at all.

mod data;
mod measures;
mod merging;
mod methods;
mod report;
mod results;
mod setting;
mod study;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Args;
use modl_train::Methods;

use crate::cli::Precision;
use results::Results;
use setting::{Setting, Size};

/// Arguments of `modl demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// One seed and few texts: about two minutes on two cores.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// All texts.
    #[arg(long)]
    full: bool,
    /// How many seeds, from 0; 3 where it is left out, 1 with --quick.
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// Where modules, results and the report go.
    #[arg(long, default_value = "runs/demo", value_name = "DIR")]
    out: PathBuf,
    /// Where `cargo xtask assets` put model and data.
    #[arg(long, default_value = "assets", value_name = "DIR")]
    assets: PathBuf,
    /// Precision of the backbone.
    #[arg(long, value_enum, default_value_t = Precision::Auto)]
    dtype: Precision,
    /// `cpu`, or `cuda:N` where libtorch has CUDA.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Forget what an earlier run has finished.
    #[arg(long)]
    fresh: bool,
}

pub(crate) fn run(args: &DemoArgs, methods: &Methods) -> Result<()> {
    let clock = Instant::now();
    let size = match (args.quick, args.full) {
        (true, _) => Size::Quick,
        (_, true) => Size::Full,
        _ => Size::Standard,
    };
    let setting = Setting::new(size, args.dtype, &args.device);
    let device = crate::cli::device(&args.device)?;
    let seeds = args.seeds.unwrap_or(setting.size.seeds());
    anyhow::ensure!(seeds > 0, "--seeds is to be at least 1");
    let folder = args.out.join(setting.size.name());
    if args.fresh && folder.exists() {
        std::fs::remove_dir_all(&folder)
            .with_context(|| format!("removing {}", folder.display()))?;
    }
    setting.claim(&folder)?;
    let corpus = data::Corpus::open(&args.assets)?;
    println!("{}", setting.summary(&corpus, seeds));
    let mut results = Results::default();
    for seed in 0..seeds {
        let study = study::Study::new(
            seed,
            &setting,
            device,
            &corpus,
            &args.assets,
            &folder,
            &methods.registry,
        )?;
        results.add(study.run().with_context(|| format!("seed {seed}"))?);
    }
    let report = report::write(&args.out, &setting, &corpus, &results)?;
    println!("\n{}", report.text);
    println!("{:.0} s this time; report: {}", clock.elapsed().as_secs_f64(), report.path.display());
    Ok(())
}
