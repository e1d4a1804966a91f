//! Which libtorch is in force, decided as torch-sys decides it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::project::Project;
use crate::python;

/// The libtorch that this tch binds.
pub const VERSION: &str = "2.13.0";

/// Asks Python for torch's version and the folder of its libraries.
const ASK_TORCH: &str = "import torch, os; \
    print(torch.__version__, os.path.dirname(torch.__file__), sep='|')";

/// Who said where libtorch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// `cargo xtask setup` put it, or a link to it, into `.libtorch`.
    Setup,
    /// The environment variable LIBTORCH.
    Variable,
    /// LIBTORCH_USE_PYTORCH and the torch of the Python on the PATH.
    Python,
}

/// A libtorch that was checked.
#[derive(Debug)]
pub struct Libtorch {
    /// The folder that holds `lib` and `include`.
    pub dir: PathBuf,
    /// The folder of the shared libraries.
    pub lib: PathBuf,
    /// Its version where it says so.
    pub version: Option<String>,
    /// Who said that it is there.
    pub source: Source,
}

impl Libtorch {
    /// One line for people.
    pub fn describe(&self) -> String {
        let version = self.version.as_deref().unwrap_or("of unknown version");
        let by = match self.source {
            Source::Setup => "",
            Source::Variable => " (from LIBTORCH)",
            Source::Python => " (from LIBTORCH_USE_PYTORCH)",
        };
        format!("libtorch {version} in {}{by}", self.dir.display())
    }
}

/// Reads an environment variable; tests pass their own.
pub type Vars<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The process environment.
pub fn process_vars(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The libtorch that cargo will build against, or `None` when setup has to fetch it.
pub fn in_force(project: &Project, vars: Vars) -> Result<Option<Libtorch>> {
    if vars("LIBTORCH_USE_PYTORCH").is_some() {
        return from_python().map(Some);
    }
    let own = project.libtorch();
    // `cargo xtask` itself gets LIBTORCH=.libtorch from .cargo/config.toml.
    let (dir, source) = match vars("LIBTORCH").map(PathBuf::from) {
        Some(dir) if dir != own => (dir, Source::Variable),
        _ if own.exists() => (own, Source::Setup),
        _ => return Ok(None),
    };
    let said_by = match source {
        Source::Variable => "the environment variable LIBTORCH",
        _ => ".libtorch",
    };
    let next = match source {
        Source::Variable => "correct it, or unset it and run `cargo xtask setup`",
        _ => "run `cargo xtask setup --force`",
    };
    if dir.is_relative() {
        bail!("{said_by} is {}, a relative path: give an absolute one", dir.display());
    }
    let lib = vars("LIBTORCH_LIB").map_or_else(|| dir.clone(), PathBuf::from).join("lib");
    let include = vars("LIBTORCH_INCLUDE").map_or_else(|| dir.clone(), PathBuf::from);
    let version = check(&dir, &lib, &include).with_context(|| {
        format!("{said_by} points to {}, which is no use: {next}", dir.display())
    })?;
    Ok(Some(Libtorch { dir, lib, version, source }))
}

/// Checks a folder that should be a libtorch; its version where it says so.
pub fn check(dir: &Path, lib: &Path, include: &Path) -> Result<Option<String>> {
    if !dir.is_dir() {
        bail!("{} is not a folder", dir.display());
    }
    let wanted = ["libtorch_cpu.so", "libtorch.so", "libtorch_cpu.dylib", "libtorch.dylib"];
    if !wanted.iter().any(|name| lib.join(name).exists()) {
        bail!("{} holds neither libtorch_cpu.so nor libtorch.so", lib.display());
    }
    let header = include.join("include/torch/csrc/api/include/torch/torch.h");
    if !header.exists() {
        bail!("the header {} is missing", header.display());
    }
    let Ok(version) = fs::read_to_string(dir.join("build-version")) else { return Ok(None) };
    let version = version.trim().to_owned();
    check_version(&version)?;
    Ok(Some(version))
}

fn check_version(version: &str) -> Result<()> {
    // A build tag such as +cpu or +cu130 does not matter.
    if version.split('+').next() != Some(VERSION) {
        bail!("it is version {version}, but this tch binds {VERSION}");
    }
    Ok(())
}

fn from_python() -> Result<Libtorch> {
    let python = python::interpreter();
    let next = format!(
        "put a Python with torch {VERSION} first on the PATH (`cargo xtask setup --gpu` makes \
         one), or unset LIBTORCH_USE_PYTORCH and run `cargo xtask setup`"
    );
    let answer = python::ask(Path::new(python), ASK_TORCH)
        .with_context(|| format!("LIBTORCH_USE_PYTORCH is set, but no torch answers: {next}"))?;
    let (version, dir) = answer
        .split_once('|')
        .with_context(|| format!("`{python}` gave {answer:?} for torch's version: {next}"))?;
    check_version(version).with_context(|| format!("torch of `{python}` is no use: {next}"))?;
    let dir = PathBuf::from(dir);
    let lib = dir.join("lib");
    Ok(Libtorch { dir, lib, version: Some(version.to_owned()), source: Source::Python })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(dir: &Path, version: &str) {
        fs::create_dir_all(dir.join("lib")).unwrap();
        let api = dir.join("include/torch/csrc/api/include/torch");
        fs::create_dir_all(&api).unwrap();
        fs::write(api.join("torch.h"), "").unwrap();
        fs::write(dir.join("lib/libtorch_cpu.so"), "").unwrap();
        fs::write(dir.join("build-version"), version).unwrap();
    }

    fn with_variable(project: &Project, value: &str) -> Result<Option<Libtorch>> {
        let value = value.to_owned();
        in_force(project, &move |name: &str| (name == "LIBTORCH").then(|| value.clone()))
    }

    #[test]
    fn nothing_is_in_force_before_setup() {
        let root = tempfile::tempdir().unwrap();
        assert!(in_force(&Project::at(root.path()), &|_| None).unwrap().is_none());
    }

    #[test]
    fn the_variable_that_cargo_sets_means_setup_and_another_wins() {
        let root = tempfile::tempdir().unwrap();
        let project = Project::at(root.path());
        make(&project.libtorch(), "2.13.0\n");
        let other = root.path().join("other");
        make(&other, "2.13.0+cu130");
        let own = with_variable(&project, &project.libtorch().display().to_string());
        assert_eq!(own.unwrap().unwrap().source, Source::Setup);
        let found = with_variable(&project, &other.display().to_string()).unwrap().unwrap();
        assert_eq!((found.source, found.lib), (Source::Variable, other.join("lib")));
        assert_eq!(found.version.as_deref(), Some("2.13.0+cu130"));
    }

    #[test]
    fn a_wrong_variable_is_named_with_its_path_and_the_next_step() {
        let root = tempfile::tempdir().unwrap();
        let project = Project::at(root.path());
        let empty = root.path().join("empty");
        fs::create_dir(&empty).unwrap();
        let error = with_variable(&project, &empty.display().to_string()).unwrap_err();
        let text = format!("{error:#}");
        for part in ["LIBTORCH", "empty", "libtorch_cpu.so", "cargo xtask setup"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let error = with_variable(&project, "some/where").unwrap_err().to_string();
        assert!(error.contains("relative"), "{error}");
    }

    #[test]
    fn another_version_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let project = Project::at(root.path());
        make(&project.libtorch(), "2.12.0+cpu");
        let text = format!("{:#}", in_force(&project, &|_| None).unwrap_err());
        assert!(text.contains("2.12.0+cpu") && text.contains("2.13.0"), "{text}");
        assert!(check_version("2.13.0").is_ok() && check_version("2.13.01").is_err());
    }
}
