//! Files that appear whole or not at all, also where the machine stops halfway.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A file that is written and synced under a temporary name beside its own. Where it is dropped
/// before it is [put](Pending::put), it is removed.
#[derive(Debug)]
pub(crate) struct Pending {
    path: PathBuf,
    temporary: PathBuf,
}

impl Pending {
    pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<Self> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let folder = folder(path);
        let temporary = folder.join(format!(".{name}.{}.tmp", std::process::id()));
        let pending = Pending { path: path.to_owned(), temporary };
        let write = || -> io::Result<()> {
            fs::create_dir_all(folder)?;
            let mut file = File::create(&pending.temporary)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|e| cannot(path, &e))?;
        Ok(pending)
    }

    /// Gives the file its name, in place of what has it.
    pub(crate) fn put(self) -> Result<()> {
        let put = fs::rename(&self.temporary, &self.path).and_then(|()| sync(folder(&self.path)));
        put.map_err(|e| cannot(&self.path, &e))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // It is not there any more where it has been put.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Writes a file so that it appears whole or not at all, also where the machine stops halfway.
///
/// # Errors
/// [`Error::File`] where the disk refuses; what was there before is then untouched.
pub fn write_whole(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    Pending::write(path.as_ref(), bytes)?.put()
}

/// Removes what writers that were killed left half done in a folder and the folders in it. For a folder
/// that is this process's alone ([`crate::FolderLock`]): others may be writing elsewhere.
pub fn remove_unfinished(folder: impl AsRef<Path>) {
    // What cannot be removed does no harm: nothing reads it.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_unfinished(entry.path());
        } else if is_temporary(&name) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whether a name is one that [`Pending::write`] gives: `.NAME.PROCESS.tmp`.
fn is_temporary(name: &str) -> bool {
    let inner = name.strip_prefix('.').and_then(|n| n.strip_suffix(".tmp"));
    let process = inner.and_then(|n| n.rsplit_once('.')).map_or("", |(_, process)| process);
    !process.is_empty() && process.bytes().all(|b| b.is_ascii_digit())
}

/// Removes a file, if it is there, for good.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path).and_then(|()| sync(folder(path))) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::file(path, format!("cannot be removed: {e}")))
        }
        _ => Ok(()),
    }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn cannot(path: &Path, e: &io::Error) -> Error {
    Error::file(path, format!("cannot be written: {e}; what was there before is untouched"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    #[test]
    fn what_a_killed_writer_left_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write_whole(at("a/state.json"), b"whole").unwrap();
        std::mem::forget(Pending::write(&at("a/state.json"), b"new").unwrap());
        for name in ["mine.tmp", ".mine.tmp", ".mine.old.tmp"] {
            fs::write(at(name), "").unwrap();
        }
        let count = |name: &str| fs::read_dir(at(name)).unwrap().count();
        assert_eq!((count("a"), count(".")), (2, 4));
        remove_unfinished(dir.path());
        assert_eq!((count("a"), count(".")), (1, 4));
        assert_eq!(fs::read(at("a/state.json")).unwrap(), b"whole");
    }
}
