//! `cargo xtask docs`: the API documentation, where every warning is an error.

use anyhow::Result;

use crate::project::Project;
use crate::{cargo, setup};

/// What `docs` can be told.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Open them in a browser
    #[arg(long)]
    open: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let project = Project::find()?;
    setup::ensure(&project)?;
    let mut doc = cargo::with_libtorch(&project)?;
    doc.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    if args.open {
        doc.arg("--open");
    }
    cargo::run(&mut doc, "rustdoc", "mend the warnings above, then run `cargo xtask docs` again")
}
