//! SHA-256 of files against pins.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// The SHA-256 of a file in lower-case hex.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file =
        File::open(path).with_context(|| format!("{} cannot be opened", path.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read =
            file.read(&mut buffer).with_context(|| format!("{} cannot be read", path.display()))?;
        if read == 0 {
            return Ok(format!("{:x}", hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

/// Fails unless the file has the pinned SHA-256.
pub fn verify(path: &Path, pin: &str) -> Result<()> {
    let found = sha256(path)?;
    if found != pin {
        bail!("{} has sha256 {found}, but {pin} is pinned in xtask", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn the_right_pin_passes_and_a_wrong_one_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "abc").unwrap();
        verify(&path, ABC).unwrap();
        let error = verify(&path, "00").unwrap_err().to_string();
        assert!(error.contains(ABC) && error.contains("but 00 is pinned"), "{error}");
    }
}
