//! Folders for work in progress, so that what is interrupted never looks finished.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result};

const SUFFIX: &str = ".tmp";

/// A folder that is deleted when it goes out of scope.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes `parent/stem-PID.tmp` and clears what killed runs left beside it.
    pub fn new(parent: &Path, stem: &str) -> Result<Self> {
        fs::create_dir_all(parent).with_context(|| {
            format!("{} cannot be made: check its permissions", parent.display())
        })?;
        clear_leftovers(parent, stem);
        let path = parent.join(format!("{stem}-{}{SUFFIX}", process::id()));
        if path.exists() {
            fs::remove_dir_all(&path)
                .with_context(|| format!("{} cannot be removed", path.display()))?;
        }
        fs::create_dir(&path)
            .with_context(|| format!("{} cannot be made: check its permissions", path.display()))?;
        Ok(Self { path })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a finished folder in the place of `target`, which is complete before and after.
    pub fn replace(&self, finished: &Path, target: &Path) -> Result<()> {
        let aside = self.path.join("replaced");
        if target.symlink_metadata().is_ok() {
            fs::rename(target, &aside)
                .with_context(|| format!("{} cannot be moved aside", target.display()))?;
        }
        fs::rename(finished, target)
            .with_context(|| format!("{} cannot be put in place", target.display()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be deleted now is cleared by the next run.
        fs::remove_dir_all(&self.path).ok();
    }
}

fn clear_leftovers(parent: &Path, stem: &str) {
    // Without /proc there is no cheap way to tell a dead run's folder from a live one's.
    if !Path::new("/proc/self").exists() {
        return;
    }
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = owner(&name.to_string_lossy(), stem);
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

fn owner(name: &str, stem: &str) -> Option<u32> {
    name.strip_prefix(stem)?.strip_prefix('-')?.strip_suffix(SUFFIX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_goes_with_its_value_and_leftovers_with_the_next_run() {
        let parent = tempfile::tempdir().unwrap();
        // Above the largest pid that Linux gives out.
        let dead = parent.path().join("work-4194305.tmp");
        fs::create_dir(&dead).unwrap();
        let scratch = Scratch::new(parent.path(), "work").unwrap();
        let path = scratch.path().to_path_buf();
        assert!(path.is_dir());
        assert_eq!(dead.exists(), !Path::new("/proc/self").exists());
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn replace_swaps_a_folder_for_another() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("target");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), "").unwrap();
        let scratch = Scratch::new(parent.path(), "work").unwrap();
        let finished = scratch.path().join("finished");
        fs::create_dir(&finished).unwrap();
        fs::write(finished.join("new"), "").unwrap();
        scratch.replace(&finished, &target).unwrap();
        assert!(target.join("new").exists() && !target.join("old").exists());
    }

    #[test]
    fn only_names_of_this_stem_have_an_owner() {
        assert_eq!(owner("work-12.tmp", "work"), Some(12));
        assert_eq!(owner("work-x.tmp", "work"), None);
        assert_eq!(owner("other-12.tmp", "work"), None);
    }
}
