//! The commands and their options.

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use modl_core::{Device, Kind};
use modl_train::Methods;
use modl_train::recipe::Place;

use crate::{commands, demo, reproduce};

/// Modular deep learning: train, route, aggregate and inspect modules on pretrained models.
#[derive(Debug, Parser)]
#[command(name = "modl", version, about)]
pub struct Cli {
    /// Threads for tensor work; all cores where it is left out.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<i32>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Four domains of sentiment on a frozen MiniLM: modules, routers and merges compared.
    Demo(demo::DemoArgs),
    /// Train what a recipe says; with --resume it goes on where it was.
    Train(commands::train::TrainArgs),
    /// Say what a recipe will train, for how long and with how much memory; nothing is written.
    Plan(commands::plan::PlanArgs),
    /// Train a recipe with all combinations of some settings and several seeds, into one table.
    Sweep(commands::sweep::SweepArgs),
    /// Look at a run while it trains: loss, rate, time left, what routers choose.
    Watch(commands::watch::WatchArgs),
    /// Evaluate a trained run on its held-out data.
    Eval(commands::eval::EvalArgs),
    /// Run tensors through a model with or without adapters.
    Forward(commands::forward::ForwardArgs),
    /// Make a LoRA of any change of weights: another method's adapter, or a fine-tuned model.
    Convert(commands::convert::ConvertArgs),
    /// Merge models: by a file as mergekit reads it, or by a method and folders.
    Merge(commands::merge::MergeArgs),
    /// Put the hidden units of a model into the order of another's, so that their average makes sense.
    Align(commands::align::AlignArgs),
    /// Measure what lies on the straight line between two models: is there a barrier?
    Barrier(commands::merge::barrier::BarrierArgs),
    /// Make a mixture of experts of dense models: copies of one, or what a mergekit-moe file says.
    Upcycle(commands::upcycle::UpcycleArgs),
    /// Say where two models, adapters or tensor files differ.
    Diff(commands::diff::DiffArgs),
    /// Say what a model, an adapter, a tensor file or a run is.
    Inspect(commands::inspect::InspectArgs),
    /// Say how a run's routers use its modules: statistics, signs of collapse, heat maps.
    RouteReport(commands::route_report::RouteReportArgs),
    /// Put published claims to the test on small data, with seeds, controls and intervals.
    Reproduce(reproduce::ReproduceArgs),
    /// Run several routers on a recipe, with seeds, controls and paired differences.
    Compare(commands::compare::CompareArgs),
    /// Keep trained modules in a library: add, list, search, remove.
    Lib(commands::lib::LibArgs),
    /// List the methods of an axis, or the experiments.
    List(commands::list::ListArgs),
}

/// Reads the arguments of this process; wrong ones end it with clap's own message.
pub(crate) fn parse() -> Cli {
    Cli::parse()
}

impl Cli {
    /// Runs the command over `methods`.
    ///
    /// # Errors
    /// Whatever went wrong, with the next step.
    pub fn run(self, methods: &Methods) -> Result<()> {
        if let Some(n) = self.threads {
            anyhow::ensure!(n > 0, "--threads is to be at least 1, not {n}");
            modl_core::set_threads(n);
        }
        match self.command {
            Command::Demo(args) => demo::run(&args, methods),
            Command::Train(args) => commands::train::run(&args, methods),
            Command::Plan(args) => commands::plan::run(&args, methods),
            Command::Sweep(args) => commands::sweep::run(&args, methods),
            Command::Watch(args) => commands::watch::run(&args),
            Command::Eval(args) => commands::eval::run(&args, methods),
            Command::Forward(args) => commands::forward::run(&args, methods),
            Command::Convert(args) => commands::convert::run(&args, methods),
            Command::Merge(args) => commands::merge::run(&args, &methods.merges),
            Command::Align(args) => commands::align::run(&args),
            Command::Barrier(args) => commands::merge::barrier::run(&args, &methods.merges),
            Command::Upcycle(args) => commands::upcycle::run(&args),
            Command::Diff(args) => commands::diff::run(&args),
            Command::Inspect(args) => commands::inspect::run(&args, methods),
            Command::RouteReport(args) => commands::route_report::run(&args, methods),
            Command::Reproduce(args) => reproduce::run(&args, methods, self.threads),
            Command::Compare(args) => commands::compare::run(&args, methods),
            Command::Lib(args) => commands::lib::run(&args, methods),
            Command::List(args) => commands::list::run(&args, methods),
        }
    }
}

/// Where and in which precision a backbone computes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Compute {
    /// Precision of the backbone; modules are always trained in f32.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub(crate) dtype: Precision,
    /// `cpu`, or `cuda:N` where libtorch has CUDA.
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
}

/// Precision of a backbone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats with the range of 32-bit ones.
    Bf16,
    /// bf16 where the processor multiplies it in hardware, else f32.
    Auto,
}

impl Precision {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Precision::F32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
            Precision::Auto if modl_core::has_bf16() => Kind::BFloat16,
            Precision::Auto => Kind::Float,
        }
    }
}

impl Compute {
    pub(crate) fn options(&self) -> Result<modl_models::LoadOptions> {
        Ok(modl_models::LoadOptions {
            kind: Some(self.dtype.kind()),
            device: device(&self.device)?,
            ..Default::default()
        })
    }
}

/// `cpu`, `cuda`, `cuda:1`.
pub(crate) fn device(text: &str) -> Result<Device> {
    let Place(wanted) =
        Place::try_from(text.to_owned()).map_err(|e| anyhow::anyhow!("--device: {e}"))?;
    available(wanted)
}

/// The device, if this libtorch sees it.
pub(crate) fn available(device: Device) -> Result<Device> {
    if let Device::Cuda(n) = device {
        let there = modl_core::cuda_devices();
        anyhow::ensure!(
            n < there,
            "cuda:{n}: this libtorch sees {there} CUDA devices; `cargo xtask setup --gpu` installs one that has CUDA"
        );
    }
    Ok(device)
}
