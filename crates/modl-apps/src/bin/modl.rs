//! `modl`: modular deep learning from the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    modl_apps::main_with(modl_apps::builtin())
}
