//! `cargo xtask setup`: libtorch into `.libtorch`, out of the pinned Python wheels.
//!
//! The torch wheel is a CUDA build, but without `libtorch_cuda.so` it is libtorch for the CPU
//! with all headers; its `libtorch_cpu.so` needs the CUDA runtime and CUPTI to load even so.

use std::env::consts::{ARCH, OS};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::libtorch::{self, VERSION};
use crate::pip::{Form, Package};
use crate::project::Project;
use crate::scratch::Scratch;
use crate::{disk, gpu, progress, unpack};

const AGAIN: &str = "cargo xtask setup";

/// What the chosen files of the wheels take when unpacked.
const UNPACKED: u64 = 500_000_000;
const STAMP: &str = "modl-setup.txt";

const TORCH: Package = Package {
    name: "torch",
    version: VERSION,
    file: "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl",
    bytes: 526_574_961,
    sha256: "60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7",
    form: Form::Wheel(Some("manylinux_2_28_x86_64")),
};

const CUDA_RUNTIME: Package = Package {
    name: "nvidia-cuda-runtime",
    version: "13.0.96",
    file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    bytes: 2_243_632,
    sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    form: Form::Wheel(Some("manylinux2014_x86_64")),
};

const CUDA_CUPTI: Package = Package {
    name: "nvidia-cuda-cupti",
    version: "13.0.85",
    file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
    bytes: 10_715_597,
    sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    form: Form::Wheel(Some("manylinux_2_25_x86_64")),
};

/// A pinned wheel and where its files go; `None` leaves a file out.
struct Part {
    package: Package,
    place: fn(&str) -> Option<PathBuf>,
}

const PARTS: [Part; 3] = [
    Part { package: CUDA_RUNTIME, place: place_cuda },
    Part { package: CUDA_CUPTI, place: place_cuda },
    Part { package: TORCH, place: place_torch },
];

/// What `setup` can be told.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Make a Python environment with torch and its CUDA parts instead
    #[arg(long, conflicts_with = "use_dir")]
    gpu: bool,
    /// Link .libtorch to a libtorch that is already on this machine
    #[arg(long = "use", value_name = "DIR")]
    use_dir: Option<PathBuf>,
    /// Replace what is there
    #[arg(long)]
    force: bool,
    /// Keep the downloaded wheels
    #[arg(long)]
    keep: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let project = Project::find()?;
    if args.gpu {
        return gpu::run(&project, args.force);
    }
    if let Some(dir) = &args.use_dir {
        return link(&project, dir, args.force);
    }
    install(&project, args.force, args.keep)?;
    if let Some(found) = libtorch::in_force(&project, &libtorch::process_vars)? {
        println!("ready: {}", found.describe());
    }
    Ok(())
}

/// Makes sure that some libtorch is there; says nothing if it is.
pub fn ensure(project: &Project) -> Result<()> {
    install(project, false, false)
}

fn install(project: &Project, force: bool, keep: bool) -> Result<()> {
    if !chosen_elsewhere(project) && (force || is_outdated(&project.libtorch())) {
        return fetch(project, keep);
    }
    match libtorch::in_force(project, &libtorch::process_vars)? {
        Some(_) => Ok(()),
        None => fetch(project, keep),
    }
}

fn chosen_elsewhere(project: &Project) -> bool {
    libtorch::process_vars("LIBTORCH_USE_PYTORCH").is_some()
        || libtorch::process_vars("LIBTORCH")
            .is_some_and(|dir| Path::new(&dir) != project.libtorch())
}

fn fetch(project: &Project, keep: bool) -> Result<()> {
    if (OS, ARCH) != ("linux", "x86_64") {
        bail!(
            "setup knows libtorch for Linux on x86_64 only, and this is {OS} on {ARCH}: install \
             torch {VERSION} (`python3 -m pip install torch=={VERSION}`) and set \
             LIBTORCH_USE_PYTORCH=1, or set LIBTORCH to a libtorch {VERSION}"
        );
    }
    let cache = project.downloads();
    let scratch = Scratch::new(project.root(), ".libtorch")?;
    fs::create_dir_all(&cache).with_context(|| {
        format!("{} cannot be made: check its permissions, or set MODL_CACHE", cache.display())
    })?;
    let missing: u64 = PARTS
        .iter()
        .filter(|part| !part.package.in_cache(&cache).exists())
        .map(|part| part.package.bytes)
        .sum();
    let next = format!("free some, or set MODL_CACHE to another disk, then run `{AGAIN}` again");
    // pip holds each download twice for a moment.
    disk::require(&cache, missing * 2, "downloading libtorch", &next)?;
    disk::require(project.root(), UNPACKED, "unpacking libtorch", &next)?;

    let fresh = scratch.path().join("libtorch");
    for part in &PARTS {
        part.package.fetch(&cache, AGAIN)?;
    }
    let bar = progress::bytes("unpacking libtorch", UNPACKED)?;
    for part in &PARTS {
        unpack::zip(&part.package.in_cache(&cache), &fresh, &bar, part.place)?;
    }
    bar.finish_and_clear();
    finish(&fresh)?;
    scratch.replace(&fresh, &project.libtorch())?;
    if !keep {
        for part in &PARTS {
            let wheel = part.package.in_cache(&cache);
            fs::remove_file(&wheel)
                .with_context(|| format!("{} cannot be removed", wheel.display()))?;
        }
    }
    Ok(())
}

/// Adds what the wheels lack, checks the result and stamps it.
fn finish(dir: &Path) -> Result<()> {
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))
    };
    // The wheel's own libtorch.so would pull in CUDA.
    put("lib/libtorch.so", "INPUT(libtorch_cpu.so libc10.so)\n")?;
    put("build-version", &format!("{VERSION}\n"))?;
    libtorch::check(dir, dir.join("lib").as_path(), dir)
        .context("the wheels did not give a whole libtorch: run `cargo xtask setup` again")?;
    check_loads(&dir.join("lib/libtorch_cpu.so"))?;
    put(STAMP, &stamp())
}

/// Fails when the loader misses a library; passes where there is no `ldd`.
fn check_loads(library: &Path) -> Result<()> {
    let Ok(output) = Command::new("ldd").arg(library).output() else { return Ok(()) };
    let text = String::from_utf8_lossy(&output.stdout);
    let missing = unresolved(&text);
    if !missing.is_empty() {
        bail!(
            "libtorch_cpu.so needs {}, which this system lacks: install a C++ compiler (g++) with \
             its run-time libraries, then run `{AGAIN}` again",
            missing.join(", ")
        );
    }
    Ok(())
}

fn unresolved(ldd: &str) -> Vec<&str> {
    ldd.lines()
        .filter(|line| line.contains("=> not found"))
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}

fn place_torch(name: &str) -> Option<PathBuf> {
    if let Some(header) = name.strip_prefix("torch/include/") {
        return Some(Path::new("include").join(header));
    }
    let below = name.strip_prefix("torch/lib/");
    match below {
        Some("libtorch_cpu.so" | "libc10.so" | "libgomp.so.1") => {
            Some(Path::new("lib").join(below?))
        }
        _ => name.ends_with("dist-info/licenses/LICENSE").then(|| "licenses/torch".into()),
    }
}

fn place_cuda(name: &str) -> Option<PathBuf> {
    let file = Path::new(name).file_name()?.to_str()?;
    match file {
        "libcudart.so.13" | "libcupti.so.13" => Some(Path::new("lib").join(file)),
        "License.txt" => Some("licenses/nvidia-cuda".into()),
        _ => None,
    }
}

fn stamp() -> String {
    PARTS
        .iter()
        .map(|part| {
            let Package { name, version, sha256, .. } = part.package;
            format!("{name} {version} {sha256}\n")
        })
        .collect()
}

/// Whether setup made this folder with other pins; a link or someone's own folder never is.
fn is_outdated(dir: &Path) -> bool {
    !dir.is_symlink() && fs::read_to_string(dir.join(STAMP)).is_ok_and(|found| found != stamp())
}

fn link(project: &Project, dir: &Path, force: bool) -> Result<()> {
    let dir = dir
        .canonicalize()
        .with_context(|| format!("--use {}: there is no such folder", dir.display()))?;
    libtorch::check(&dir, &dir.join("lib"), &dir)
        .with_context(|| format!("--use {}: this is no libtorch {VERSION}", dir.display()))?;
    let target = project.libtorch();
    if target.exists() && !target.is_symlink() && !force {
        bail!("{} is a folder already: add --force to replace it by a link", target.display());
    }
    let scratch = Scratch::new(project.root(), ".libtorch")?;
    let fresh = scratch.path().join("link");
    symlink(&dir, &fresh).with_context(|| format!("{} cannot be linked", dir.display()))?;
    scratch.replace(&fresh, &target)?;
    println!("ready: .libtorch is a link to {}", dir.display());
    Ok(())
}

#[cfg(unix)]
fn symlink(to: &Path, at: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(to, at)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::Error::other("links need a Unix system: set LIBTORCH instead"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cpu_part_of_the_wheel_is_taken() {
        let place = |name: &str| place_torch(name).map(|path| path.display().to_string());
        assert_eq!(place("torch/include/ATen/ATen.h").as_deref(), Some("include/ATen/ATen.h"));
        assert_eq!(place("torch/lib/libc10.so").as_deref(), Some("lib/libc10.so"));
        assert_eq!(place("torch/lib/libtorch_cuda.so"), None);
        assert_eq!(place("torch/lib/libtorch.so"), None);
        assert_eq!(place("torch/nn/modules/linear.py"), None);
        let cuda = place_cuda("nvidia/cu13/lib/libcudart.so.13");
        assert_eq!(cuda, Some(PathBuf::from("lib/libcudart.so.13")));
        assert_eq!(place_cuda("nvidia/cu13/lib/libcudart_static.a"), None);
    }

    #[test]
    fn only_a_folder_stamped_with_other_pins_is_outdated() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_outdated(dir.path()));
        fs::write(dir.path().join(STAMP), "torch 2.12.0 00\n").unwrap();
        assert!(is_outdated(dir.path()));
        fs::write(dir.path().join(STAMP), stamp()).unwrap();
        assert!(!is_outdated(dir.path()));
    }

    #[test]
    fn missing_libraries_are_read_from_ldd() {
        let ldd = "\tlibc10.so => /a/libc10.so (0x1)\n\tlibstdc++.so.6 => not found\n";
        assert_eq!(unresolved(ldd), ["libstdc++.so.6"]);
    }

    #[test]
    fn use_refuses_a_folder_that_is_no_libtorch() {
        let root = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let error = link(&Project::at(root.path()), other.path(), false).unwrap_err();
        assert!(format!("{error:#}").contains("libtorch_cpu.so"), "{error:#}");
        assert!(!root.path().join(".libtorch").exists());
    }
}
