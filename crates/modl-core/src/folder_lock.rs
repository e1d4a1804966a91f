//! Folders that one process writes at a time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use fs4::{FileExt, TryLockError};

use crate::{Error, Result};

/// A folder that is this process's alone, as long as the value lives. The system lets go of it with the
/// process, however that ends; the file that is locked then stays and does no harm.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    // Held for what closing it does.
    _file: File,
}

impl FolderLock {
    /// Takes a folder, which is made where it is not there, by a lock on the file `name` in it. `other`
    /// is what has it where it is refused: `another merge`.
    ///
    /// # Errors
    /// [`Error::File`] where another process (or another lock of this one) has the folder, or the file
    /// cannot be made.
    pub fn take(folder: impl AsRef<Path>, name: &str, other: &str) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(name);
        let failed = |e: io::Error| Error::file(&path, format!("cannot be locked: {e}"));
        fs::create_dir_all(folder)
            .map_err(|e| Error::file(folder, format!("cannot be made: {e}")))?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(failed)?;
        match FileExt::try_lock(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let problem = format!(
                    "is being written by {other} at this moment; wait until it has ended, or name \
                     another folder"
                );
                return Err(Error::file(folder, problem));
            }
            // Some network file systems have no locks; two writers are then the user's affair.
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        Ok(FolderLock { path, _file: file })
    }

    /// Takes the file away, for a folder that gets another name next. A folder that keeps its name
    /// keeps the file, too: another process may be waiting for it.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn leave(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_folder_is_one_writers_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a/b");
        let take = || FolderLock::take(&folder, "run.lock", "another run");
        let first = take().unwrap();
        let error = take().unwrap_err().to_string();
        assert!(error.contains("b: is being written by another run"), "{error}");
        // One that was killed lets go, and its file stays.
        drop(first);
        assert!(folder.join("run.lock").exists());
        take().unwrap().leave().unwrap();
        assert!(!folder.join("run.lock").exists());
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(FolderLock::take(dir.path().join("file"), "run.lock", "another run").is_err());
    }
}
