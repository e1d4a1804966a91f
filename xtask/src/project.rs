//! Where things lie in the checkout.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The checkout that xtask works on.
#[derive(Debug, Clone)]
pub struct Project {
    root: PathBuf,
}

impl Project {
    /// Finds the checkout from where `cargo run` says xtask is, or from the current folder.
    ///
    /// A path compiled in would be wrong in a checkout that was moved.
    pub fn find() -> Result<Self> {
        let start = match env::var_os("CARGO_MANIFEST_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => env::current_dir().context("the current folder cannot be read")?,
        };
        let root = start
            .ancestors()
            .find(|dir| dir.join("xtask/Cargo.toml").is_file() && dir.join("crates").is_dir())
            .with_context(|| {
                format!(
                    "{} is not in a modl checkout: run `cargo xtask` inside one",
                    start.display()
                )
            })?;
        Ok(Self { root: root.to_path_buf() })
    }

    /// A project at a given root, for tests.
    #[cfg(test)]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    /// The root of the checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below the root.
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.root.join(below)
    }

    /// Where `cargo xtask setup` puts libtorch.
    pub fn libtorch(&self) -> PathBuf {
        self.path(".libtorch")
    }

    /// Where models and data go.
    pub fn assets(&self) -> PathBuf {
        self.path("assets")
    }

    /// Where downloads wait until they are unpacked.
    pub fn downloads(&self) -> PathBuf {
        match env::var_os("MODL_CACHE") {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("downloads"),
            _ => self.path(".cache/downloads"),
        }
    }

    /// Where cargo puts what it builds.
    pub fn target(&self) -> PathBuf {
        match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) if !dir.is_empty() => self.root.join(dir),
            _ => self.path("target"),
        }
    }

    /// A path as a reader wants it: from the root where it is below it.
    pub fn show(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }
}
