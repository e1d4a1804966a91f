//! `cargo xtask bench`: criterion's benchmarks under a fixed number of torch threads.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::measurements::{self, Measurement};
use crate::project::Project;
use crate::{cargo, libtorch, machine, peers, setup, table};

/// What `bench` can be told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Compare with the Python libraries instead
    #[arg(long, conflicts_with = "filter")]
    peers: bool,
    /// Only benchmarks whose name holds this
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
    /// Fewer samples: a look, not a measurement
    #[arg(long)]
    quick: bool,
    /// Threads for libtorch; all cores if not given
    #[arg(long)]
    threads: Option<usize>,
    /// Arguments for the comparison
    #[arg(last = true, requires = "peers")]
    args: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let project = Project::find()?;
    setup::ensure(&project)?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores);
    println!("{} with {threads} of {cores} threads", machine::cpu());
    if args.peers { compare(&project, args, threads) } else { measure(&project, args, threads) }
}

fn measure(project: &Project, args: &Args, threads: usize) -> Result<()> {
    let home = project.target().join("criterion");
    let start = SystemTime::now();
    for (package, bench) in targets(project)? {
        let mut command = cargo::with_libtorch(project)?;
        command.args(["bench", "--package", &package, "--bench", &bench, "--"]);
        command.args(args.quick.then_some("--quick")).args(&args.filter);
        command.env("OMP_NUM_THREADS", threads.to_string()).env("CRITERION_HOME", &home);
        cargo::run(&mut command, &format!("bench {bench} of {package}"), "see the errors above")?;
    }
    let found = measurements::since(&home, start)?;
    if found.is_empty() {
        bail!("no benchmark ran: look at the names in crates/*/benches, or leave --filter out");
    }
    let rows = found.iter().map(Measurement::row);
    print!("{}", table::render(&["benchmark", "median", "spread"], rows));
    // Part of the results must not take the place of all of them.
    if args.filter.is_none() { save(project, &found, threads, args.quick) } else { Ok(()) }
}

/// The bench targets of the workspace as (package, target).
fn targets(project: &Project) -> Result<Vec<(String, String)>> {
    let metadata = cargo::metadata(project)?;
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        for target in package["targets"].as_array().into_iter().flatten() {
            let is_bench = |kinds: &Vec<Value>| kinds.iter().any(|kind| kind == "bench");
            if target["kind"].as_array().is_some_and(is_bench) {
                let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
                found.push((name(package), name(target)));
            }
        }
    }
    if found.is_empty() {
        bail!("no crate has benchmarks: add a [[bench]] to one");
    }
    Ok(found)
}

fn save(project: &Project, found: &[Measurement], threads: usize, quick: bool) -> Result<()> {
    let torch = libtorch::in_force(project, &libtorch::process_vars)?.and_then(|it| it.version);
    let revision = revision(project.root());
    let report = json!({
        "revision": revision,
        "cpu": machine::cpu(),
        "libtorch": torch,
        "threads": threads,
        "quick": quick,
        "unit": "ns",
        "benchmarks": found,
    });
    let path = project.target().join("bench").join(format!("{revision}.json"));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        fs::write(&path, format!("{report:#}\n"))
    };
    write().with_context(|| format!("{} cannot be written", path.display()))?;
    println!("saved: {}", project.show(&path));
    Ok(())
}

/// The commit that was measured, marked where the checkout differs from it.
fn revision(root: &Path) -> String {
    let root = root.display().to_string();
    let git = |args: &[&str]| machine::first_line("git", &[&["-C", root.as_str()], args].concat());
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(commit) if git(&["status", "--porcelain"]).is_some_and(|line| line.is_empty()) => {
            commit
        }
        Some(commit) => format!("{commit}-changed"),
        None => "unversioned".to_owned(),
    }
}

fn compare(project: &Project, args: &Args, threads: usize) -> Result<()> {
    crate::assets::ensure(project)?;
    let modl = peers::build_fast_modl(project)?;
    let sides = [
        ("compare.py", "MODL_PEER_STEP", peers::build_peer_step(project)?),
        ("merging.py", "MODL", modl.clone()),
        ("training.py", "MODL", modl),
    ];
    let python = peers::ensure(project)?;
    for (script, variable, program) in sides {
        let script = project.path("benches/peers").join(script);
        if !script.exists() {
            bail!("{} is missing: restore it with git", project.show(&script));
        }
        let mut command = peers::script(project, &python, variable, &program)?;
        command.arg(&script).args(args.quick.then_some("--quick")).args(&args.args);
        command.args(["--threads", &threads.to_string()]);
        command.env("OMP_NUM_THREADS", threads.to_string());
        cargo::run(&mut command, "the comparison", "see the errors above")?;
    }
    Ok(())
}
