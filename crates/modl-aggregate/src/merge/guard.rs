//! What keeps a merge out of another's way and off a full disk: a lock on the folder in which it is
//! made, and a look at the room there is before anything is written.

use std::fs;
use std::path::Path;

use modl_core::{Error, FolderLock, Result};

use super::{Output, Plan};

/// The file in the folder that is locked.
const NAME: &str = "merge.lock";

/// Takes the folder `work`, in which `out` is made.
pub(super) fn lock(work: &Path, out: &Path) -> Result<FolderLock> {
    let lock = FolderLock::take(work, NAME, "another merge")?;
    if out.exists() {
        // The other merge has ended just now, and our file went with the folder.
        let _ = fs::remove_file(out.join(NAME));
        return Err(Error::file(out, "is there already; name a new folder"));
    }
    Ok(lock)
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
    let size = |bytes: u64| match bytes as f64 {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.2} MB", b / 1e6),
        b => format!("{:.0} kB", (b / 1e3).ceil()),
    };
    let problem = format!(
        "needs {} and its disk has {} free; make room, or name a folder on another disk",
        size(wanted),
        size(free)
    );
    Err(Error::file(work, problem))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_result_that_has_got_its_name_in_the_meantime_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (work, out) = (dir.path().join("m.merging"), dir.path().join("m"));
        let first = lock(&work, &out).unwrap();
        let error = lock(&work, &out).unwrap_err().to_string();
        assert!(error.contains("m.merging") && error.contains("another merge"), "{error}");
        drop(first);
        fs::create_dir(&out).unwrap();
        let error = lock(&work, &out).unwrap_err().to_string();
        assert!(error.contains("already"), "{error}");
    }

    #[test]
    fn too_little_room_is_told_in_numbers() {
        let work = Path::new("m.merging");
        enough(5, 5, work).unwrap();
        let error = enough(3_000_000_000, 1_500_000_000, work).unwrap_err().to_string();
        assert!(error.contains("needs 3.00 GB") && error.contains("1.50 GB free"), "{error}");
        let error = enough(78_001, 32_000, work).unwrap_err().to_string();
        assert!(error.contains("needs 79 kB") && error.contains("32 kB free"), "{error}");
    }
}
