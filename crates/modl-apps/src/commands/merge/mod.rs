//! `modl merge`: one model of several, by a file as mergekit reads it, or by a method and folders; one
//! adapter of several.

mod adapters;
pub(crate) mod barrier;
mod evaluate;
mod hurry;
mod lora;
mod plan;
mod report;
mod search;
mod trials;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use modl_aggregate::merge::{MergeMethods, Plan, Step, run as merge};
use modl_aggregate::mergekit::{self, MergeConfig, Options};

use super::adapter::is_adapter;
use modl_core::shards::ShardSize;

use crate::progress::bar;

/// Arguments of `modl merge`.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct MergeArgs {
    /// A YAML file as mergekit reads it; or, with --method, folders of models: first the base, where
    /// the method has one, then the others. Or folders of adapters, which need no method: their exact
    /// sum is what is made of them.
    #[arg(required = true, value_name = "CONFIG | MODEL")]
    inputs: Vec<PathBuf>,
    /// The folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The method, where there is no file: `modl list merges` shows them.
    #[arg(long)]
    method: Option<String>,
    /// A setting of each model, separated by commas, or one for all; 1 where it is left out.
    #[arg(long, value_name = "W,…", allow_hyphen_values = true)]
    weight: Option<String>,
    /// The share of each task vector that is kept, as for --weight.
    #[arg(long, value_name = "D,…", requires = "method")]
    density: Option<String>,
    /// Another setting of the method: `--set lambda=0.7 --set normalize=false`.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "method")]
    settings: Vec<String>,
    /// What inputs are rounded to and the result is stored in; as stored where it is left out.
    #[arg(long, requires = "method")]
    dtype: Option<String>,
    /// Of adapters: the rank to keep at most; what is lost is told.
    #[arg(long)]
    rank: Option<i64>,
    /// Of adapters: whose reading of a method it is, where they differ: `peft` or `mergekit`.
    #[arg(long)]
    convention: Option<String>,
    /// Of adapters: their base model, which DoRA and other changes that depend on it need.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Only show what would be done: inputs, settings of each tensor, bytes, memory.
    #[arg(long)]
    plan: bool,
    /// Compare the models and the result: a table, and a page with heat maps in this folder.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// A command that evaluates the model in `$MODEL`; the last line that it prints is shown for each
    /// model and for the result. For --soup and --search that line is a number, more is better.
    #[arg(long, value_name = "COMMAND")]
    eval: Option<String>,
    /// The average of models that were fine-tuned from one start: of all, or of those with which the
    /// evaluation does not fall, the best first.
    #[arg(long, value_enum, conflicts_with_all = ["method", "weight", "search", "plan", "rank"])]
    soup: Option<Soup>,
    /// Look for the weights of --method, or of adapters, under which the evaluation is best. Started
    /// again, it goes on where it was.
    #[arg(long, value_enum, requires = "eval", conflicts_with = "plan")]
    search: Option<SearchKind>,
    /// Evaluations that a search has, without that of its start.
    #[arg(long, value_name = "N", requires = "search", default_value_t = 60)]
    budget: usize,
    /// What the weights of a search stay in.
    #[arg(long, value_name = "LO,HI", requires = "search", allow_hyphen_values = true)]
    bounds: Option<String>,
    /// The evaluation is a loss: less is better.
    #[arg(long, requires = "eval")]
    minimize: bool,
    /// Says nothing of itself: a candidate among many.
    #[arg(skip)]
    quiet: bool,
    /// Where random drops and a search's points come from.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The size of a file at most: `5GB`, `500MB`, or bytes.
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: ShardSize,
    /// Let numbers through that are not finite.
    #[arg(long)]
    allow_nan: bool,
    /// What is done with a tensor that some models lack or have in another shape.
    #[arg(long, value_enum, default_value_t = Uneven::Refuse)]
    uneven: Uneven,
}

/// Which models are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Soup {
    /// Those with which the evaluation does not fall.
    Greedy,
    /// All.
    Uniform,
}

/// How weights are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SearchKind {
    /// CMA-ES, from --weight or equal shares on.
    CmaEs,
    /// As LoraHub does: from 0 on within ±1.5, with 0.05 times the mean of |w| taken off.
    LoraHub,
}

/// What is done with a tensor that some models lack or have in another shape.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Uneven {
    /// Nothing is written, and all of them are named.
    #[default]
    Refuse,
    /// It is taken from the base, or the first model that has it.
    Keep,
}

pub(crate) fn run(args: &MergeArgs, methods: &MergeMethods) -> Result<()> {
    match (args.soup, args.search) {
        (Some(kind), _) => search::soup(args, methods, kind),
        (_, Some(kind)) => search::weights(args, methods, kind),
        _ => merge_inputs(args, methods),
    }
}

/// What the arguments say, but for searches.
fn merge_inputs(args: &MergeArgs, methods: &MergeMethods) -> Result<()> {
    if args.inputs.iter().all(|path| is_adapter(path)) {
        return adapters::run(args, methods);
    }
    of_models(args)?;
    let (configs, folder) = configs(args, methods)?;
    let mut options = Options {
        seed: args.seed,
        shard: args.max_shard_size,
        allow_nan: args.allow_nan,
        uneven: match args.uneven {
            Uneven::Refuse => mergekit::Uneven::Refuse,
            Uneven::Keep => mergekit::Uneven::Keep,
        },
        named: BTreeMap::new(),
        folder,
        adapt: Some(lora::adapt),
    };
    anyhow::ensure!(
        args.plan || !args.out.exists(),
        "{}: is there already; name a new one",
        args.out.display()
    );
    let Some((last, first)) = configs.split_last() else { return Ok(()) };
    // Where the results of earlier documents are kept until the last is done.
    let parts = beside(&args.out, ".parts");
    for config in first {
        let name = config.name.as_deref().with_context(|| {
            "each document but the last is to have a `name`, under which later ones find its result"
        })?;
        let made = parts.join(name);
        if !made.exists() {
            anyhow::ensure!(
                !args.plan,
                "--plan of several documents needs the results of the earlier ones; \
                 plan the document `{name}` by itself"
            );
            println!("document `{name}`:");
            one(config, methods, &options, &made, None)?;
        }
        options.named.insert(name.to_owned(), made);
    }
    one(last, methods, &options, &args.out, Some(args))?;
    if !args.plan && parts.exists() {
        fs::remove_dir_all(&parts).with_context(|| parts.display().to_string())?;
    }
    Ok(())
}

/// Refuses what only adapters have.
fn of_models(args: &MergeArgs) -> Result<()> {
    let adapters: Vec<_> = args.inputs.iter().filter(|p| is_adapter(p)).collect();
    anyhow::ensure!(
        adapters.is_empty(),
        "{adapters:?} are adapters and the others are not; `modl convert --to model` merges an adapter \
         into its base"
    );
    for (name, given) in [
        ("rank", args.rank.is_some()),
        ("convention", args.convention.is_some()),
        ("model", args.model.is_some()),
    ] {
        anyhow::ensure!(!given, "--{name}: only adapters have it; methods have theirs by --set");
    }
    anyhow::ensure!(args.weight.is_none() || args.method.is_some(), "--weight: is of a --method");
    Ok(())
}

/// `0.5,0.3`: the values of an option.
fn numbers(name: &str, text: &str) -> Result<Vec<f64>> {
    let one =
        |v: &str| v.trim().parse().with_context(|| format!("--{name} {text}: {v} is no number"));
    text.split(',').map(one).collect()
}

/// The same, one for each of `n` things, or one for all of them.
fn one_each(name: &str, text: &str, n: usize, things: &str) -> Result<Vec<f64>> {
    let all = numbers(name, text)?;
    match all.as_slice() {
        [one] => Ok(vec![*one; n]),
        _ if all.len() == n => Ok(all),
        _ => anyhow::bail!("--{name} {text}: there are {} values for {n} {things}", all.len()),
    }
}

/// A folder beside the result that is there until the result is.
pub(crate) fn beside(out: &Path, ending: &str) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(ending);
    out.with_file_name(name)
}

/// What is to be merged, and where its paths start.
fn configs(args: &MergeArgs, methods: &MergeMethods) -> Result<(Vec<MergeConfig>, PathBuf)> {
    if args.method.is_some() {
        return Ok((vec![hurry::config(args, methods)?], PathBuf::new()));
    }
    let [file] = args.inputs.as_slice() else {
        anyhow::bail!(
            "several models need a --method; `modl list merges` shows them. A YAML file stands alone"
        )
    };
    anyhow::ensure!(
        !file.is_dir(),
        "{}: is a folder; give a YAML file, or --method and the models",
        file.display()
    );
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let configs = mergekit::read_documents(&text).with_context(|| file.display().to_string())?;
    // Paths start where the command is given, as mergekit has it, and beside the file where that
    // finds a model and the former does not.
    let beside = file.parent().unwrap_or(Path::new("")).to_owned();
    let there = |folder: &Path| {
        let exists = |m: &str| folder.join(m).exists();
        let alone = |m: &str| m.split_once('+').is_some_and(|(model, _)| exists(model));
        configs.iter().flat_map(MergeConfig::models).any(|m| exists(m) || alone(m))
    };
    let folder = if !there(Path::new("")) && there(&beside) { beside } else { PathBuf::new() };
    Ok((configs, folder))
}

/// One document: its plan and the merge; with `args`, the last one, which is looked at afterwards.
fn one(
    config: &MergeConfig,
    methods: &MergeMethods,
    options: &Options,
    out: &Path,
    args: Option<&MergeArgs>,
) -> Result<()> {
    let planned = mergekit::plan(config, methods, options)?;
    if args.is_some_and(|a| a.quiet) {
        return Ok(merge(&planned, methods, out, |_| {})?);
    }
    let only_plan = args.is_some_and(|a| a.plan);
    plan::show(&planned, methods, out, only_plan)?;
    if only_plan {
        return Ok(());
    }
    do_it(&planned, methods, out)?;
    println!("written to {}", out.display());
    if let Some(folder) = args.and_then(|a| a.report.as_deref()) {
        report::write(&planned, out, folder)?;
    }
    if let Some(command) = args.and_then(|a| a.eval.as_deref()) {
        // There is no folder with the adapter merged in.
        let models = planned.sources.iter();
        let models =
            models.map(|s| (s.name.as_str(), (!s.is_adapted()).then_some(s.path.as_path())));
        evaluate::run(command, models, out)?;
    }
    Ok(())
}

fn do_it(plan: &Plan, methods: &MergeMethods, out: &Path) -> Result<()> {
    let total: u64 = plan.outputs.iter().map(|o| o.bytes()).sum();
    let bar = bar(total >> 10, &plan.method);
    merge(plan, methods, out, |step| match step {
        Step::Tensor(output) => {
            bar.inc(output.bytes() >> 10);
            bar.set_message(output.name.clone());
        }
        Step::Kept(file) => bar.set_message(format!("{file} is there and whole")),
        _ => {}
    })?;
    bar.finish_and_clear();
    Ok(())
}
