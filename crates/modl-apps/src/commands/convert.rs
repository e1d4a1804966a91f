//! `modl convert`: an adapter in another format or merged into its base, or any change of weights as
//! a LoRA or a sparse difference.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use modl_compute::low_rank::{Extraction, extract, extract_difference};
use modl_compute::sparse::attach_difference;
use modl_compute::{adapterhub, peft};
use modl_core::shards::ShardSize;
use modl_core::{Modular, Seed, Select};
use modl_models::ExpertNames;
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
    /// An adapter, or the folder of a fully fine-tuned model.
    source: PathBuf,
    /// What to write.
    #[arg(long, value_enum, default_value_t = To::Lora)]
    to: To,
    /// The rank to keep at most, for `lora`.
    #[arg(long, default_value_t = 8)]
    rank: i64,
    /// The share of the changed sites' numbers to keep, for `delta`.
    #[arg(long, default_value_t = 0.01)]
    density: f64,
    /// The folder to write, or the file for `delta`.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// How large a file of `model` is at most: `5GB`, `300MB` or a number of bytes. A larger model
    /// is cut into shards.
    #[arg(long, value_name = "SIZE", default_value_t)]
    max_shard_size: ShardSize,
    #[command(flatten)]
    compute: Compute,
}

/// What a conversion writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum To {
    /// A LoRA in PEFT's format, of an adapter that can be merged or a fine-tuned model.
    Lora,
    /// The same adapter as a PEFT folder.
    Peft,
    /// The same adapter as an AdapterHub folder.
    Adapterhub,
    /// The largest changes of a fine-tuned model as a module file of modl's.
    Delta,
    /// The base model with the adapter merged in, as a folder that transformers reads.
    Model,
}

pub(crate) fn run(args: &ConvertArgs, methods: &Methods) -> Result<()> {
    anyhow::ensure!(!args.out.exists(), "{}: is there already; name a new one", args.out.display());
    let options = args.compute.options()?;
    let base = modl_models::open(&args.model, &options)
        .with_context(|| format!("model {}", args.model.display()))?;
    let mut model = Modular::from_box(base, Seed(0))?;
    let tuned = if is_model(&args.source) {
        let tuned = modl_models::open(&args.source, &options);
        Some(tuned.with_context(|| format!("fine-tuned model {}", args.source.display()))?)
    } else {
        None
    };
    let context = || args.source.display().to_string();
    match (args.to, tuned) {
        (To::Lora, Some(tuned)) => {
            let found = extract_difference(model.backbone(), tuned.as_ref(), args.rank)?;
            write_lora(&mut model, &found, args)
        }
        (To::Lora, None) => {
            let name = attach(&mut model, args, methods)?;
            let found = extract(&model, &name, args.rank)?;
            model.detach(&name)?;
            write_lora(&mut model, &found, args)
        }
        (To::Delta, Some(tuned)) => {
            let found = attach_difference(&mut model, tuned.as_ref(), "delta", args.density)?;
            let mut table = Table::new(["site", "kept", "of"]);
            for (site, kept, of) in &found.sites {
                table.row([site.clone(), kept.to_string(), of.to_string()]);
            }
            println!("{}", table.text());
            println!("norm of the change {:.4}, lost {:.2} %", found.norm, 100.0 * found.lost);
            say_left_out(&found.left_out, "a site's difference");
            model.save_module("delta", &args.out).with_context(context)?;
            said(args)
        }
        (To::Delta, None) => anyhow::bail!(
            "{}: is no fine-tuned model; --to delta compares one with the base",
            args.source.display()
        ),
        (To::Peft | To::Adapterhub | To::Model, Some(_)) => anyhow::bail!(
            "{}: is a fine-tuned model and no adapter; --to lora and --to delta make one",
            args.source.display()
        ),
        (To::Model, None) => {
            let name = attach(&mut model, args, methods)?;
            model.merge(&name).with_context(context)?;
            let max = args.max_shard_size;
            modl_models::save(model.backbone(), &args.out, ExpertNames::Each, max)?;
            modl_models::copy_tokenizer(&args.model, &args.out)?;
            said(args)
        }
        (to, None) => {
            let name = attach(&mut model, args, methods)?;
            match to {
                To::Peft => peft::save(&model, &name, &args.out),
                _ => adapterhub::save(&model, &name, &args.out),
            }
            .with_context(context)?;
            let params = model.params();
            let own = Select::new(format!("modules.{name}.*"));
            let numbers: usize = params.select(&own).map(|(_, t)| t.numel()).sum();
            let (config, targets) = model.recipe(&name)?;
            let sites = targets.select(model.backbone().sites())?.len();
            println!("{}: {sites} sites, {numbers} numbers", config.kind());
            said(args)
        }
    }
}

/// Attaches the source, and says under which name.
fn attach(model: &mut Modular, args: &ConvertArgs, methods: &Methods) -> Result<String> {
    let source = AdapterArg { name: Some("source".into()), path: args.source.clone() };
    source.attach(model, &methods.registry)
}

fn write_lora(model: &mut Modular, found: &Extraction, args: &ConvertArgs) -> Result<()> {
    println!("{}", table(found).text());
    say_left_out(&found.left_out, "a LoRA");
    found.attach(model, "lora").with_context(|| args.source.display().to_string())?;
    peft::save(model, "lora", &args.out)?;
    said(args)
}

fn say_left_out(left_out: &[(String, f64)], what: &str) {
    for (name, norm) in left_out {
        println!("left out: {name} has changed by {norm:.4}, and {what} cannot hold it");
    }
}

fn said(args: &ConvertArgs) -> Result<()> {
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
