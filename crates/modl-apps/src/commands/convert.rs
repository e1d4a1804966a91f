//! `modl convert`: any change of weights as a LoRA in PEFT's format.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use modl_compute::low_rank::{Extraction, extract, extract_difference};
use modl_compute::peft;
use modl_core::{Modular, Seed};
use modl_train::Methods;

use super::adapter::{AdapterArg, is_adapter};
use crate::cli::Compute;
use crate::report::Table;

/// Arguments of `modl convert`.
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Folder of the base model.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// An adapter of any method that can be merged, or the folder of a fully fine-tuned model.
    source: PathBuf,
    /// The rank to keep at most.
    #[arg(long, default_value_t = 8)]
    rank: i64,
    /// The PEFT folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    compute: Compute,
}

pub(crate) fn run(args: &ConvertArgs, methods: &Methods) -> Result<()> {
    anyhow::ensure!(
        !args.out.exists(),
        "{}: is there already; name a new folder",
        args.out.display()
    );
    let options = args.compute.options()?;
    let base = modl_models::open(&args.model, &options)
        .with_context(|| format!("model {}", args.model.display()))?;
    let mut model = Modular::from_box(base, Seed(0))?;
    let found = if is_model(&args.source) {
        let tuned = modl_models::open(&args.source, &options)
            .with_context(|| format!("fine-tuned model {}", args.source.display()))?;
        extract_difference(model.backbone(), tuned.as_ref(), args.rank)?
    } else {
        let source = AdapterArg { name: Some("source".into()), path: args.source.clone() };
        let name = source.attach(&mut model, &methods.registry)?;
        let found = extract(&model, &name, args.rank)?;
        model.detach(&name)?;
        found
    };
    println!("{}", table(&found).text());
    for (name, norm) in &found.left_out {
        println!("left out: {name} has changed by {norm:.4}, and a LoRA cannot hold it");
    }
    found.attach(&mut model, "lora").with_context(|| args.source.display().to_string())?;
    peft::save(&model, "lora", &args.out)?;
    println!("written to {}", args.out.display());
    Ok(())
}

fn is_model(path: &Path) -> bool {
    path.is_dir() && !is_adapter(path) && path.join("config.json").is_file()
}

fn table(found: &Extraction) -> Table {
    let mut table = Table::new(["site", "rank", "norm of the change", "lost"]);
    for e in &found.sites {
        table.row([
            e.path.clone(),
            e.factors.down.len_of(0).to_string(),
            format!("{:.4}", e.norm),
            format!("{:.2} %", 100.0 * e.lost),
        ]);
    }
    let square = |f: &dyn Fn(&modl_compute::low_rank::Extracted) -> f64| {
        found.sites.iter().map(|e| f(e).powi(2)).sum::<f64>().sqrt()
    };
    let norm = square(&|e| e.norm);
    let lost = if norm > 0.0 { square(&|e| e.norm * e.lost) / norm } else { 0.0 };
    table.row([
        "all".into(),
        String::new(),
        format!("{norm:.4}"),
        format!("{:.2} %", 100.0 * lost),
    ]);
    table
}
