//! The Python that fetches packages, and virtual environments made with it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The interpreter: as torch-sys picks it, so that both mean the same one.
pub fn interpreter() -> &'static str {
    if env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" }
}

/// The first line that a Python one-liner prints.
pub fn ask(python: &Path, code: &str) -> Result<String> {
    let output = Command::new(python).arg("-c").arg(code).output().with_context(|| {
        format!("`{}` cannot be run: install Python 3.9 or newer", python.display())
    })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}", python.display(), stderr.lines().last().unwrap_or("no message"));
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    Ok(stdout.lines().next().unwrap_or_default().to_owned())
}

/// The version of pip, or what to install.
pub fn pip_version() -> Result<String> {
    let python = interpreter();
    let version = ask(Path::new(python), "import platform; print(platform.python_version())")?;
    ask(Path::new(python), "import pip; print(pip.__version__)").with_context(|| {
        format!(
            "{python} {version} has no pip: run `{python} -m ensurepip`, or install your \
             system's python3-pip"
        )
    })
}

/// A virtual environment with some packages, made again when the list changes.
#[derive(Debug)]
pub struct Venv<'a> {
    /// The folder.
    pub dir: PathBuf,
    /// What pip is to install.
    pub packages: &'a [&'a str],
    /// The command that makes it, for error texts.
    pub made_by: &'a str,
}

impl Venv<'_> {
    /// Its interpreter.
    pub fn python(&self) -> PathBuf {
        self.dir.join("bin/python3")
    }

    /// Whether it is there with these very packages.
    pub fn ready(&self) -> bool {
        let stamp = fs::read_to_string(self.stamp()).unwrap_or_default();
        stamp == self.packages.join("\n") && self.python().exists()
    }

    /// Makes it unless it is ready.
    pub fn ensure(&self) -> Result<()> {
        if self.ready() {
            return Ok(());
        }
        pip_version()?;
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir)
                .with_context(|| format!("{} cannot be removed", self.dir.display()))?;
        }
        eprintln!("making {} with {}", self.dir.display(), self.packages.join(", "));
        let mut make = Command::new(interpreter());
        self.step(make.args(["-m", "venv"]).arg(&self.dir), "install your system's python3-venv")?;
        let mut install = Command::new(self.python());
        // pip unpacks gigabytes there, and the usual place is often small.
        install.env("TMPDIR", &self.dir);
        install.args(["-m", "pip", "install", "--no-input", "--disable-pip-version-check"]);
        self.step(install.args(self.packages), "check the network and the free disk space")?;
        // Last, so that an interrupted install is made anew.
        fs::write(self.stamp(), self.packages.join("\n"))
            .with_context(|| format!("{} cannot be written", self.stamp().display()))
    }

    fn step(&self, command: &mut Command, hint: &str) -> Result<()> {
        let status = command.status().with_context(|| format!("{command:?} cannot be run"))?;
        if !status.success() {
            bail!("{command:?} failed ({status}): {hint}, then run `{}` again", self.made_by);
        }
        Ok(())
    }

    fn stamp(&self) -> PathBuf {
        self.dir.join("modl-packages.txt")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_venv_is_ready_only_with_its_own_packages() {
        let dir = tempfile::tempdir().unwrap();
        let venv = Venv { dir: dir.path().into(), packages: &["a==1"], made_by: "test" };
        assert!(!venv.ready());
        fs::create_dir(dir.path().join("bin")).unwrap();
        fs::write(venv.python(), "").unwrap();
        fs::write(venv.stamp(), "a==1").unwrap();
        assert!(venv.ready());
        assert!(!Venv { packages: &["a==2"], ..venv }.ready());
    }

    #[test]
    fn a_missing_interpreter_says_what_to_install() {
        let error = ask(Path::new("no-such-python"), "").unwrap_err().to_string();
        assert!(error.contains("install Python"), "{error}");
    }
}
