//! `cargo xtask demo`: from a bare checkout to modl's demo.

use anyhow::Result;

use crate::project::Project;
use crate::{assets, cargo, setup};

/// What `demo` passes on.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Arguments for `modl demo`, such as --quick, --full or --seeds
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let project = Project::find()?;
    setup::ensure(&project)?;
    assets::ensure(&project)?;
    let mut demo = cargo::with_libtorch(&project)?;
    demo.args(["run", "--release", "--package", "modl-apps", "--bin", "modl", "--", "demo"]);
    cargo::run(demo.args(&args.args), "the demo", "see above, or ask `cargo xtask doctor`")
}
