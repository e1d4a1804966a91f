//! A folder of its own for a test.

use std::path::PathBuf;

pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The same as an argument of a command.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}
