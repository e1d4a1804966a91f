//! Bytes that stand in memory while they are few, and beyond that in a file: what a data set reads again and
//! again but need not have at hand.
//!
//! The file stands in the folder that `TMPDIR` names, else in `/var/tmp`, since `/tmp` is memory on many
//! systems. It has no name, so that nothing is left of it, however the program ends.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use modl_core::{Error, Result};

/// What is held back and written at once.
const BUFFER: usize = 1 << 20;

/// Bytes that are written once, at the end, and read anywhere.
#[derive(Debug)]
pub(crate) struct Spill {
    /// So many bytes stand in memory at most.
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The last bytes; all of them where there is no file.
    held: Vec<u8>,
    file: Option<File>,
    /// The bytes of the file.
    written: u64,
}

impl Spill {
    /// An empty one, of which `most` bytes stand in memory.
    pub(crate) fn new(most: usize) -> Self {
        Spill { most, state: Mutex::default() }
    }

    /// So many bytes stand in memory at most.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Adds bytes at the end: where they begin.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub(crate) fn append(&self, bytes: &[u8]) -> Result<u64> {
        let mut state = self.state();
        let start = state.written + state.held.len() as u64;
        if state.file.is_none() && state.held.len() + bytes.len() > self.most {
            state.file = Some(tempfile::tempfile_in(folder()).map_err(|e| broken(&e))?);
            state.write().map_err(|e| broken(&e))?;
        }
        state.held.extend_from_slice(bytes);
        if state.file.is_some() && state.held.len() >= BUFFER {
            state.write().map_err(|e| broken(&e))?;
        }
        Ok(start)
    }

    /// Fills `bytes` with those from `start` on.
    ///
    /// # Errors
    /// Where the file cannot be read, or there are not so many.
    pub(crate) fn read(&self, start: u64, bytes: &mut [u8]) -> Result<()> {
        self.state().read(start, bytes).map_err(|e| broken(&e))
    }

    /// All bytes, in pieces of at most a megabyte.
    ///
    /// # Errors
    /// As [`Spill::read`].
    pub(crate) fn pieces(&self, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (mut start, len) = (0, self.len());
        let mut piece = vec![0; BUFFER];
        while start < len {
            piece.truncate((len - start).min(BUFFER as u64) as usize);
            self.read(start, &mut piece)?;
            each(&piece)?;
            start += piece.len() as u64;
        }
        Ok(())
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u64 {
        let state = self.state();
        state.written + state.held.len() as u64
    }

    /// All bytes, where they stand in memory.
    pub(crate) fn in_memory<T>(&self, of: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let state = self.state();
        state.file.is_none().then(|| of(&state.held))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked left bytes that are whole: they are counted when they are there.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Writes what is held.
    fn write(&mut self) -> std::io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        file.seek(SeekFrom::Start(self.written))?;
        file.write_all(&self.held)?;
        self.written += self.held.len() as u64;
        self.held = Vec::with_capacity(2 * BUFFER);
        Ok(())
    }

    fn read(&mut self, start: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        if start < self.written && start + bytes.len() as u64 > self.written {
            self.write()?;
        }
        if start < self.written {
            let Some(file) = &mut self.file else { return Ok(()) };
            file.seek(SeekFrom::Start(start))?;
            return file.read_exact(bytes);
        }
        let start = (start - self.written) as usize;
        let held = self.held.get(start..start + bytes.len());
        let held = held.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(held);
        Ok(())
    }
}

/// Where the files stand.
fn folder() -> PathBuf {
    let large = Path::new("/var/tmp");
    match std::env::var_os("TMPDIR").is_none() && large.is_dir() {
        true => large.to_owned(),
        false => std::env::temp_dir(),
    }
}

fn broken(e: &std::io::Error) -> Error {
    let advice = "make room there, or name another folder by TMPDIR";
    Error::file(folder(), format!("cannot hold what data has beyond the memory: {e}; {advice}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_was_written_in_memory_in_the_file_and_across() {
        let pieces: Vec<Vec<u8>> =
            (0..400u32).map(|i| (0..i * 37 % 20_000).map(|k| (i + k) as u8).collect()).collect();
        let whole = pieces.concat();
        for most in [usize::MAX, 3_000_000, 100, 0] {
            let spill = Spill::new(most);
            let mut starts = Vec::new();
            for (i, piece) in pieces.iter().enumerate() {
                starts.push(spill.append(piece).unwrap());
                // Between writing, too: the last ones, and some of long ago.
                for j in [i, i / 2] {
                    let mut found = vec![0; pieces[j].len()];
                    spill.read(starts[j], &mut found).unwrap();
                    assert!(found == pieces[j], "{most} {i} {j}");
                }
            }
            assert_eq!(spill.in_memory(|_| ()).is_none(), most < whole.len());
            assert_eq!(spill.len(), whole.len() as u64);
            let mut all = Vec::new();
            let mut add = |piece: &[u8]| {
                all.extend_from_slice(piece);
                Ok(())
            };
            spill.pieces(&mut add).unwrap();
            assert!(all == whole, "{most}");
            // From the file into what is held.
            let mut last = vec![0; 1_500_000];
            spill.append(b"end").unwrap();
            spill.read(whole.len() as u64 + 3 - last.len() as u64, &mut last).unwrap();
            assert!(
                last.ends_with(b"end")
                    && last[..100] == whole[whole.len() + 3 - last.len()..][..100]
            );
            let e = spill.read(spill.len() - 1, &mut [0, 0]).unwrap_err().to_string();
            assert!(e.contains("TMPDIR"), "{e}");
        }
    }
}
