//! The `modl` command line.
//!
//! [`main_with`] is the whole program over a given set of methods: `modl` runs it with
//! [`builtin`], and a crate that adds a router runs it with its own added. See
//! `docs/write-a-router.md`. [`main_with_methods`] is for a crate that adds a merge method.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod cli;
mod commands;
mod demo;
mod progress;
mod report;
mod reproduce;
mod trials;

use std::process::ExitCode;

use modl_core::{Registry, Result};
use modl_train::Methods;

pub use cli::Cli;

/// All methods that modl ships.
///
/// # Errors
/// Where two crates register the same name.
pub fn builtin() -> Result<Registry> {
    Registry::new()
        .with(modl_compute::register)?
        .with(modl_route::register)?
        .with(modl_aggregate::register)?
        .with(modl_models::register)
}

/// Runs the command line of this process over the methods of `registry`, and says how it ended.
/// Errors go to stderr, each with its causes.
pub fn main_with(registry: Result<Registry>) -> ExitCode {
    main_with_methods(registry.and_then(Methods::new))
}

/// [`main_with`] for a program that adds more than a registry holds, such as a merge method:
///
/// ```no_run
/// # use modl_aggregate::merge::MergeMethod;
/// # fn main_of(median: impl MergeMethod + 'static) -> std::process::ExitCode {
/// let methods = modl_apps::builtin().and_then(modl_train::Methods::new);
/// modl_apps::main_with_methods(methods.and_then(|m| m.with_merge(median)))
/// # }
/// ```
pub fn main_with_methods(methods: Result<Methods>) -> ExitCode {
    modl_core::keep_freed_memory();
    leave_when_nobody_reads();
    let outcome = methods.map_err(anyhow::Error::from).and_then(|m| cli::parse().run(&m));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends the program quietly where what it prints has no reader any more, as after `modl … | head`, which
/// `println!` makes a panic of.
fn leave_when_nobody_reads() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>();
        if said.is_some_and(|s| s.starts_with("failed printing to stdout") && s.contains("pipe")) {
            std::process::exit(0);
        }
        usual(panic);
    }));
}
