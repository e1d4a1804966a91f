//! The `modl` command line with one router more: `cargo run --example modl -- list routers`.

use std::process::ExitCode;

fn main() -> ExitCode {
    modl_apps::main_with(modl_apps::builtin().and_then(|r| r.with(modl_router_prototype::register)))
}
