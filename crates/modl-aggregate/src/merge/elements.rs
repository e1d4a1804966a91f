//! Tensors as sequences of numbers that are read piece by piece, wherever they are.

use std::fmt::Debug;
use std::fs::File;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use modl_core::{Error, Result};
use safetensors::Dtype;

/// The numbers of one tensor, in the order of its elements.
pub trait Elements: Debug + Send + Sync {
    /// Reads the numbers from `at` on into `out`, as f32.
    ///
    /// # Errors
    /// Where the file cannot be read, or ends before.
    fn read(&self, at: usize, out: &mut [f32]) -> Result<()>;
}

/// What becomes of a tensor's numbers as they are read: an adapter is merged into it.
pub trait Adapted: Debug + Send + Sync {
    /// Changes the numbers from `at` on.
    ///
    /// # Errors
    /// Where it has fewer numbers.
    fn apply(&self, at: usize, values: &mut [f32]) -> Result<()>;

    /// Bytes of memory that it holds.
    fn bytes(&self) -> u64;
}

/// Numbers in memory.
impl Elements for [f32] {
    fn read(&self, at: usize, out: &mut [f32]) -> Result<()> {
        let from = self.get(at..at + out.len());
        let from = from.ok_or_else(|| Error::invalid("tensor", "has fewer numbers than asked"))?;
        out.copy_from_slice(from);
        Ok(())
    }
}

/// Numbers in memory.
impl Elements for Vec<f32> {
    fn read(&self, at: usize, out: &mut [f32]) -> Result<()> {
        self.as_slice().read(at, out)
    }
}

/// The numbers of a tensor in a file.
///
/// They are read by position and not through a map: pages of a map count as resident memory, which
/// is to stay within the bound that a plan states, and a file that is cut off while it is mapped ends
/// the process instead of giving an error.
#[derive(Debug)]
pub struct Stored<'a> {
    pub(crate) file: &'a File,
    pub(crate) path: &'a Path,
    /// Where its bytes start.
    pub(crate) offset: u64,
    pub(crate) dtype: Dtype,
    /// What the numbers are rounded to before anything is done with them.
    pub(crate) rounded: Option<Dtype>,
    /// What is done to the numbers before they are rounded.
    pub(crate) adapted: Option<&'a dyn Adapted>,
}

impl Elements for Stored<'_> {
    fn read(&self, at: usize, out: &mut [f32]) -> Result<()> {
        let size = width(self.dtype)
            .ok_or_else(|| Error::file(self.path, format!("{:?} are no floats", self.dtype)))?;
        let offset = self.offset + (at * size) as u64;
        match self.dtype {
            Dtype::F32 => read_at(self.file, self.path, bytemuck::cast_slice_mut(out), offset)?,
            Dtype::F64 => {
                let mut raw = vec![0f64; out.len()];
                read_at(self.file, self.path, bytemuck::cast_slice_mut(&mut raw), offset)?;
                out.iter_mut().zip(&raw).for_each(|(x, r)| *x = *r as f32);
            }
            _ => {
                let mut raw = vec![0u16; out.len()];
                read_at(self.file, self.path, bytemuck::cast_slice_mut(&mut raw), offset)?;
                if self.dtype == Dtype::BF16 {
                    bytemuck::cast_slice::<u16, bf16>(&raw).convert_to_f32_slice(out);
                } else {
                    bytemuck::cast_slice::<u16, f16>(&raw).convert_to_f32_slice(out);
                }
            }
        }
        if let Some(adapted) = self.adapted {
            adapted.apply(at, out)?;
        }
        let already = |dtype| self.dtype == dtype && self.adapted.is_none();
        match self.rounded {
            Some(Dtype::BF16) if !already(Dtype::BF16) => {
                out.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
            }
            Some(Dtype::F16) if !already(Dtype::F16) => {
                out.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
            }
            _ => {}
        }
        Ok(())
    }
}

/// Bytes of a float of this type; `None` for anything else.
pub(crate) fn width(dtype: Dtype) -> Option<usize> {
    Some(match dtype {
        Dtype::F64 => 8,
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        _ => return None,
    })
}

/// Calls `work` with the numbers as bytes of this type.
pub(crate) fn with_bytes<T>(values: &[f32], dtype: Dtype, work: impl FnOnce(&[u8]) -> T) -> T {
    match dtype {
        Dtype::BF16 => {
            let mut narrow = vec![bf16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            work(bytemuck::cast_slice(&narrow))
        }
        Dtype::F16 => {
            let mut narrow = vec![f16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            work(bytemuck::cast_slice(&narrow))
        }
        Dtype::F64 => {
            let wide: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
            work(bytemuck::cast_slice(&wide))
        }
        _ => work(bytemuck::cast_slice(values)),
    }
}

/// Reads exactly so many bytes from a position.
pub(crate) fn read_at(file: &File, path: &Path, out: &mut [u8], offset: u64) -> Result<()> {
    positional::read_exact_at(file, out, offset)
        .map_err(|e| Error::file(path, format!("cannot be read: {e}")))
}

/// Writes all bytes from a position on.
pub(crate) fn write_at(file: &File, path: &Path, bytes: &[u8], offset: u64) -> Result<()> {
    positional::write_all_at(file, bytes, offset).map_err(|e| {
        Error::file(path, format!("cannot be written: {e}; make room and start again to go on"))
    })
}

#[cfg(unix)]
mod positional {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    pub(super) fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> std::io::Result<()> {
        file.read_exact_at(out, at)
    }

    pub(super) fn write_all_at(file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
        file.write_all_at(bytes, at)
    }
}

#[cfg(windows)]
mod positional {
    use std::fs::File;
    use std::os::windows::fs::FileExt;

    pub(super) fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> std::io::Result<()> {
        let mut done = 0;
        while let Some(rest) = out.get_mut(done..).filter(|r| !r.is_empty()) {
            match file.seek_read(rest, at + done as u64)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    pub(super) fn write_all_at(file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|r| !r.is_empty()) {
            done += file.seek_write(rest, at + done as u64)?;
        }
        Ok(())
    }
}
