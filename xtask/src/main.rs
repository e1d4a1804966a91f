//! `cargo xtask`: everything around the code. It runs before libtorch is there.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod apt;
mod assets;
mod bench;
mod cargo;
mod catalog;
mod checksum;
mod ci;
mod convert;
mod datasets;
mod demo;
mod disk;
mod docs;
mod doctor;
mod failure;
mod gpu;
mod libtorch;
mod machine;
mod measurements;
mod npm;
mod peers;
mod pip;
mod progress;
mod project;
mod python;
mod router_crate;
mod scratch;
mod setup;
mod table;
mod test;
mod tidy;
mod totals;
mod unpack;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "modl's own commands", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch libtorch into .libtorch
    Setup(setup::Args),
    /// Look for what building and running needs, and say how to mend what is missing
    Doctor(doctor::Args),
    /// Fetch pretrained models and data into assets/
    Assets(assets::Args),
    /// Fetch what is missing and run modl's demo
    Demo(demo::Args),
    /// Run all tests
    Test(test::Args),
    /// Run the benchmarks
    Bench(bench::Args),
    /// Make the API documentation
    Docs(docs::Args),
    /// Check the house rules that compilers do not
    Tidy,
    /// Run all checks
    Ci,
}

fn main() -> ExitCode {
    // Not returned from main: that would add a stack trace under RUST_BACKTRACE=1.
    run().unwrap_or_else(|error| {
        eprintln!("{}", failure::text(&error));
        ExitCode::FAILURE
    })
}

fn run() -> anyhow::Result<ExitCode> {
    match Cli::parse().command {
        Command::Setup(args) => setup::run(&args)?,
        Command::Doctor(args) => doctor::run(&args)?,
        Command::Assets(args) => assets::run(&args)?,
        Command::Demo(args) => demo::run(&args)?,
        Command::Test(args) => return test::run(&args),
        Command::Bench(args) => bench::run(&args)?,
        Command::Docs(args) => docs::run(&args)?,
        Command::Tidy => tidy::run()?,
        Command::Ci => return ci::run(),
    }
    Ok(ExitCode::SUCCESS)
}
