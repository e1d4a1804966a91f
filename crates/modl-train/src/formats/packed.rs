//! Files that may be packed by gzip, and their lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use modl_core::{Error, Result};

/// What is read at once.
const BUFFER: usize = 1 << 16;

/// A file as it is when it is unpacked.
pub(super) struct Unpacked {
    path: PathBuf,
    packed: bool,
    from: Box<dyn BufRead>,
}

impl Unpacked {
    /// Opens a file; its first bytes say whether it is packed.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::file(path, e))?;
        let mut from = BufReader::with_capacity(BUFFER, file);
        let packed = from.fill_buf().map_err(|e| Error::file(path, e))?.starts_with(&[0x1f, 0x8b]);
        let from: Box<dyn BufRead> = match packed {
            true => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(from))),
            false => Box::new(from),
        };
        Ok(Unpacked { path: path.to_owned(), packed, from })
    }

    /// The error for what reading it has come to.
    pub(super) fn broken(&self, e: &io::Error) -> Error {
        broken(&self.path, self.packed, e)
    }

    /// Up to `n` bytes in place of those in `bytes`: fewer where the file ends.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(super) fn next(&mut self, n: u64, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.clear();
        let read = (&mut self.from).take(n).read_to_end(bytes);
        read.map(drop).map_err(|e| self.broken(&e))
    }

    /// The bytes that are left, which are passed over.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(super) fn rest(&mut self) -> Result<u64> {
        io::copy(&mut self.from, &mut io::sink()).map_err(|e| self.broken(&e))
    }

    /// Hands out the lines that are not empty with their numbers, from 1.
    ///
    /// # Errors
    /// Where the file cannot be read or is not UTF-8, or what `each` refuses.
    pub(super) fn lines(mut self, mut each: impl FnMut(usize, &str) -> Result<()>) -> Result<()> {
        let (mut line, mut start, mut number) = (Vec::new(), 0, 0);
        while self.from.read_until(b'\n', &mut line).map_err(|e| self.broken(&e))? > 0 {
            number += 1;
            let text = std::str::from_utf8(&line).map_err(|e| {
                let at = start + e.valid_up_to();
                let problem = format!("is not UTF-8 from its byte {at} on; write it as UTF-8");
                Error::file(&self.path, problem)
            })?;
            let text = text.strip_suffix('\n').map_or(text, |t| t.strip_suffix('\r').unwrap_or(t));
            if !text.trim().is_empty() {
                each(number, text)?;
            }
            start += line.len();
            line.clear();
        }
        Ok(())
    }

    /// What the bytes are read from, and the error for what reading them comes to.
    pub(super) fn into_parts(self) -> (Box<dyn BufRead>, impl Fn(&io::Error) -> Error) {
        (self.from, move |e| broken(&self.path, self.packed, e))
    }
}

fn broken(path: &Path, packed: bool, e: &io::Error) -> Error {
    match packed {
        true => Error::file(path, format!("cannot be unpacked: {e}")),
        false => Error::file(path, e),
    }
}
