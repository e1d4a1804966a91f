//! Pinned packages, downloaded by pip from whatever index it is configured for; some by npm or apt,
//! each as it is configured.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::scratch::Scratch;
use crate::{apt, checksum, npm, progress, python};

/// A package file as the index serves it.
#[derive(Debug)]
pub struct Package {
    /// Its name there.
    pub name: &'static str,
    /// Its exact version.
    pub version: &'static str,
    /// The file that pip saves.
    pub file: &'static str,
    /// The file's size.
    pub bytes: u64,
    /// The file's SHA-256.
    pub sha256: &'static str,
    /// Which of its files is meant.
    pub form: Form,
}

/// Which file of a package is meant.
#[derive(Debug)]
pub enum Form {
    /// A wheel for a platform, or for any.
    Wheel(Option<&'static str>),
    /// The source archive.
    Source,
    /// A package of npm.
    Npm,
    /// A package of Debian.
    Deb,
}

impl Form {
    /// What downloads it, and how its settings are shown.
    fn tool(&self) -> (&'static str, String) {
        match self {
            Form::Npm => ("npm", "npm config list".into()),
            Form::Deb => ("apt-get", "apt-cache policy".into()),
            _ => ("pip", format!("{} -m pip config list", python::interpreter())),
        }
    }
}

impl Package {
    /// Where `fetch` leaves the file.
    pub fn in_cache(&self, cache: &Path) -> PathBuf {
        cache.join(self.file)
    }

    /// Downloads the file into `cache` unless it is there, checked against its pin either way.
    ///
    /// `again` is the command to name in errors.
    pub fn fetch(&self, cache: &Path, again: &str) -> Result<PathBuf> {
        let path = self.in_cache(cache);
        if path.exists() && checksum::verify(&path, self.sha256).is_err() {
            eprintln!("{} is damaged, downloading it again", path.display());
            fs::remove_file(&path)
                .with_context(|| format!("{} cannot be removed", path.display()))?;
        }
        if !path.exists() {
            self.download(cache, again)?;
        }
        Ok(path)
    }

    fn download(&self, cache: &Path, again: &str) -> Result<()> {
        let scratch = Scratch::new(cache, "partial")?;
        let log = scratch.path().join("log");
        let saved = scratch.path().join("saved");
        let mut command = match self.form {
            Form::Npm => npm::pack(cache, again)?,
            Form::Deb => apt::download()?,
            _ => {
                python::pip_version()?;
                self.command(scratch.path(), &saved)
            }
        };
        if matches!(self.form, Form::Npm | Form::Deb) {
            fs::create_dir_all(&saved)
                .with_context(|| format!("{} cannot be made", saved.display()))?;
            let at = if matches!(self.form, Form::Npm) { "@" } else { "=" };
            command.arg(format!("{}{at}{}", self.name, self.version)).current_dir(&saved);
        }
        let log_file =
            File::create(&log).with_context(|| format!("{} cannot be made", log.display()))?;
        let mut child = command
            .stdout(log_file.try_clone()?)
            .stderr(log_file)
            .spawn()
            .with_context(|| format!("{command:?} cannot be run"))?;

        let message = format!("downloading {} {}", self.name, self.version);
        let bar = progress::bytes(&message, self.bytes)?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            bar.set_position(folder_size(scratch.path()).min(self.bytes));
            thread::sleep(Duration::from_millis(150));
        };
        bar.finish_and_clear();

        if !status.success() {
            let log = fs::read_to_string(&log).unwrap_or_default();
            let (tool, settings) = self.form.tool();
            bail!(
                "{tool} could not download {} {} ({status}):\n{}\ncheck the network, the disk and \
                 {tool}'s settings (`{settings}`), then run `{again}` again",
                self.name,
                self.version,
                reason(&log),
            );
        }
        self.accept(&saved, cache, again)
    }

    fn command(&self, temporary: &Path, saved: &Path) -> Command {
        let mut command = Command::new(python::interpreter());
        command.args(["-m", "pip", "download", "--no-deps", "--no-input", "--no-cache-dir"]);
        command.args(["--disable-pip-version-check", "--progress-bar", "off"]);
        match self.form {
            Form::Wheel(platform) => {
                // For Python 3.11 whatever runs pip: only the file's own pin matters.
                command.args(["--only-binary=:all:", "--python-version", "3.11"]);
                command.args(["--implementation", "cp"]);
                if let Some(platform) = platform {
                    command.args(["--platform", platform]);
                }
            }
            _ => {
                command.args(["--no-binary", self.name]);
            }
        }
        command.arg("--dest").arg(saved);
        command.arg(format!("{}=={}", self.name, self.version));
        // pip unpacks in TMPDIR, which is often a small file system in memory.
        command.env("TMPDIR", temporary);
        command
    }

    /// Moves a download into the cache if it is what is pinned.
    fn accept(&self, saved: &Path, cache: &Path, again: &str) -> Result<()> {
        let from = saved.join(self.file);
        if !from.exists() {
            bail!(
                "{} saved {} for {}=={}, not {}: its index serves other files than xtask pins",
                self.form.tool().0,
                names(saved),
                self.name,
                self.version,
                self.file
            );
        }
        checksum::verify(&from, self.sha256).with_context(|| {
            format!(
                "{}=={} is not the file that was checked; it was thrown away: run `{again}` \
                 again, and if that fails too, compare {}'s index with another",
                self.name,
                self.version,
                self.form.tool().0
            )
        })?;
        let to = self.in_cache(cache);
        fs::rename(&from, &to).with_context(|| format!("{} cannot be written", to.display()))
    }
}

/// The lines of a pip log that say why it failed.
fn reason(log: &str) -> String {
    let errors: Vec<&str> = log.lines().filter(|line| is_error(line.trim_start())).collect();
    if errors.is_empty() {
        log.lines().last().unwrap_or_default().to_owned()
    } else {
        errors.join("\n")
    }
}

fn is_error(line: &str) -> bool {
    ["ERROR", "npm error", "E: "].iter().any(|start| line.starts_with(start))
}

fn folder_size(dir: &Path) -> u64 {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => folder_size(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

fn names(dir: &Path) -> String {
    let names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGE: Package = Package {
        name: "thing",
        version: "1.0",
        file: "thing-1.0.whl",
        bytes: 3,
        sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        form: Form::Wheel(None),
    };

    #[test]
    fn a_cached_file_with_the_right_pin_needs_no_download() {
        let cache = tempfile::tempdir().unwrap();
        fs::write(PACKAGE.in_cache(cache.path()), "abc").unwrap();
        let path = PACKAGE.fetch(cache.path(), "cargo xtask setup").unwrap();
        assert_eq!(path, cache.path().join("thing-1.0.whl"));
    }

    #[test]
    fn a_wrong_download_is_refused_with_the_next_step() {
        let cache = tempfile::tempdir().unwrap();
        let saved = cache.path().join("saved");
        fs::create_dir(&saved).unwrap();
        fs::write(saved.join(PACKAGE.file), "abd").unwrap();
        let error = PACKAGE.accept(&saved, cache.path(), "cargo xtask setup").unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("thing==1.0") && text.contains("`cargo xtask setup` again"),
            "{text}"
        );
        assert!(text.contains(PACKAGE.sha256), "{text}");
        assert!(!PACKAGE.in_cache(cache.path()).exists());
    }

    #[test]
    fn another_file_than_the_pinned_one_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let saved = cache.path().join("saved");
        fs::create_dir(&saved).unwrap();
        fs::write(saved.join("thing-1.0.tar.gz"), "abc").unwrap();
        let error = PACKAGE.accept(&saved, cache.path(), "x").unwrap_err().to_string();
        assert!(error.contains("thing-1.0.tar.gz") && error.contains("thing-1.0.whl"), "{error}");
    }

    #[test]
    fn pip_errors_are_picked_out() {
        let log = "Collecting thing\nERROR: No matching distribution found\nnotice";
        assert_eq!(reason(log), "ERROR: No matching distribution found");
        assert_eq!(reason("one\ntwo"), "two");
    }
}
