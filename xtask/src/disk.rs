//! Free disk space, asked of `df`, so that no system crate is needed.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress::size;

/// Free bytes on the file system that holds `dir`.
pub fn free(dir: &Path) -> Result<u64> {
    let output = Command::new("df").arg("-Pk").arg(dir).output().context("`df` cannot be run")?;
    let text = String::from_utf8_lossy(&output.stdout);
    available(&text).with_context(|| format!("`df -Pk {}` said nothing usable", dir.display()))
}

/// Fails when `dir` has less than `needed` bytes; passes when that cannot be found out.
pub fn require(dir: &Path, needed: u64, what: &str, next: &str) -> Result<()> {
    match free(dir) {
        Ok(free) if free < needed => bail!(
            "{what} needs {} in {}, where {} is free: {next}",
            size(needed),
            dir.display(),
            size(free)
        ),
        _ => Ok(()),
    }
}

fn available(df: &str) -> Option<u64> {
    let line = df.lines().nth(1)?;
    // A device name may hold blanks; the number before the percentage never does.
    let words: Vec<&str> = line.split_whitespace().collect();
    let percent = words.iter().position(|word| word.ends_with('%'))?;
    Some(words.get(percent.checked_sub(1)?)?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_available_column_is_read() {
        let head = "Filesystem 1024-blocks Used Available Capacity Mounted on\n";
        let plain = format!("{head}/dev/vda 264212084 17553936 77731952 19% /\n");
        assert_eq!(available(&plain), Some(77_731_952 * 1024));
        let blank = format!("{head}//server/my disk 100 40 60 40% /mnt/a b\n");
        assert_eq!(available(&blank), Some(60 * 1024));
        assert_eq!(available(head), None);
    }

    #[test]
    fn too_little_space_is_an_error_with_the_next_step() {
        let dir = tempfile::tempdir().unwrap();
        require(dir.path(), 1, "a test", "free some").unwrap();
        let error = require(dir.path(), u64::MAX, "a test", "free some").unwrap_err().to_string();
        assert!(error.starts_with("a test needs") && error.ends_with("free some"), "{error}");
    }
}
