//! The one place with `unsafe`: memory maps.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::{Error, Result};

/// Maps a file for reading.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
    // SAFETY: the map is private and read-only. Another process that truncates the file while it
    // is mapped could still raise SIGBUS; modl itself replaces files by rename, never in place.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::file(path, format!("cannot be mapped: {e}")))
}
