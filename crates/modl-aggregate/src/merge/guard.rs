//! What keeps a merge out of another's way and off a full disk: a lock on the folder in which it is
//! made, and a look at the room there is before anything is written.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fs4::{FileExt, TryLockError};
use modl_core::{Error, Result};

use super::{Output, Plan};

/// The file in the folder that is locked. The system lets go of it with the process, however that ends.
const NAME: &str = "merge.lock";

/// A folder that is this process's alone.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    // Held for what closing it does.
    _file: File,
}

impl Lock {
    /// Takes the folder `work`, in which `out` is made.
    pub(super) fn of(work: &Path, out: &Path) -> Result<Self> {
        let path = work.join(NAME);
        let failed = |e: std::io::Error| Error::file(&path, format!("cannot be locked: {e}"));
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(failed)?;
        match FileExt::try_lock(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let problem = "is being written by another merge at this moment; wait until it has \
                               ended, or name another folder";
                return Err(Error::file(work, problem));
            }
            // Some network file systems have no locks; two merges are then the user's affair.
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        if out.exists() {
            // The other merge has ended just now, and our file went with the folder.
            let _ = fs::remove_file(out.join(NAME));
            return Err(Error::file(out, "is there already; name a new folder"));
        }
        Ok(Lock { path, _file: file })
    }

    /// Takes the file away: the folder gets its name next.
    pub(super) fn leave(self) -> std::io::Result<()> {
        fs::remove_file(&self.path)
    }
}

/// Refuses a plan that the disk has no room for. What finished files of an earlier start hold already
/// is not needed again.
pub(super) fn room(plan: &Plan, work: &Path) -> Result<()> {
    let wanted: u64 = plan.outputs.iter().map(Output::bytes).sum();
    let there = |entry: fs::DirEntry| {
        let finished = entry.path().extension().is_some_and(|e| e == "safetensors");
        finished.then(|| entry.metadata().map_or(0, |m| m.len()))
    };
    let kept: u64 = fs::read_dir(work).into_iter().flatten().flatten().filter_map(there).sum();
    let place = work.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    // Where it cannot be found out, the merge itself will say.
    let Ok(free) = fs4::available_space(place) else { return Ok(()) };
    enough(wanted.saturating_sub(kept), free, work)
}

fn enough(wanted: u64, free: u64, work: &Path) -> Result<()> {
    if wanted <= free {
        return Ok(());
    }
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let problem = format!(
        "needs {} and its disk has {} free; make room, or name a folder on another disk",
        gb(wanted),
        gb(free)
    );
    Err(Error::file(work, problem))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_folder_is_one_merges_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (work, out) = (dir.path().join("m.merging"), dir.path().join("m"));
        fs::create_dir(&work).unwrap();
        let first = Lock::of(&work, &out).unwrap();
        let error = Lock::of(&work, &out).unwrap_err().to_string();
        assert!(error.contains("m.merging") && error.contains("another merge"), "{error}");
        // One that was killed lets go, and its file stays.
        drop(first);
        assert!(work.join(NAME).exists());
        Lock::of(&work, &out).unwrap().leave().unwrap();
        assert!(!work.join(NAME).exists());
        // The result has got its name in the meantime.
        fs::create_dir(&out).unwrap();
        let error = Lock::of(&work, &out).unwrap_err().to_string();
        assert!(error.contains("already"), "{error}");
    }

    #[test]
    fn too_little_room_is_told_in_numbers() {
        let work = Path::new("m.merging");
        enough(5, 5, work).unwrap();
        let error = enough(3_000_000_000, 1_500_000_000, work).unwrap_err().to_string();
        assert!(error.contains("needs 3.00 GB") && error.contains("1.50 GB free"), "{error}");
    }
}
