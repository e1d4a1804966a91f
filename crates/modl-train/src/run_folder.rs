//! A run's folder, which one process writes at a time.

use std::path::{Path, PathBuf};

use modl_core::{FolderLock, Result, checkpoint};

/// The folder of a run, held by this process as long as the value lives.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    // Held for what letting it go does.
    _lock: FolderLock,
}

impl RunFolder {
    /// What is run in a folder, as JSON; written before anything is trained.
    pub(crate) const RECIPE: &str = "recipe.json";

    /// Takes a folder, which is made where it is not there, and removes what a run that was killed
    /// left half written. The file `run.lock` in it stays.
    ///
    /// # Errors
    /// [`modl_core::Error::File`] where another run has it at this moment.
    pub fn hold(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let lock = FolderLock::take(&path, "run.lock", "another run")?;
        checkpoint::remove_unfinished(&path);
        Ok(RunFolder { path, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a run has been begun in a folder.
    pub fn has_run(path: impl AsRef<Path>) -> bool {
        path.as_ref().join(Self::RECIPE).is_file()
    }
}
