//! The one place with `unsafe`: memory maps, tensors filled in place, and a setting of malloc's.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::tensor::op_error;
use crate::{Device, Error, Kind, Result, Tensor};

/// Maps a file for reading.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
    // SAFETY: the map is private and read-only. Another process that truncates the file while it
    // is mapped could still raise SIGBUS; modl itself replaces files by rename, never in place.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::file(path, format!("cannot be mapped: {e}")))
}

/// A new tensor on the CPU that `fill` writes, in row-major order. `T` is the element type of
/// `kind`.
///
/// # Errors
/// Where the sizes of `T` and `kind` differ, or there is no memory.
pub(crate) fn filled<T: tch::kind::Element>(
    shape: &[i64],
    kind: Kind,
    fill: impl FnOnce(&mut [T]),
) -> Result<Tensor> {
    // By size, since tch's `Element` takes `half::bf16` for f16.
    if size_of::<T>() != kind.elt_size_in_bytes() {
        let problem = format!("{} bytes for an element of {kind:?}", size_of::<T>());
        return Err(Error::invalid("filled", problem));
    }
    let t = tch::Tensor::f_zeros(0, (kind, Device::Cpu))
        .and_then(|empty| empty.f_new_empty(shape, (kind, Device::Cpu)));
    let t = t.map_err(|e| op_error("filled", &[], e))?;
    let n = t.numel();
    if n > 0 {
        // SAFETY: the tensor is new, contiguous and on the CPU, nobody else has it, and its `n`
        // elements are `T`s; every bit pattern is a valid number.
        fill(unsafe { std::slice::from_raw_parts_mut(t.data_ptr().cast::<T>(), n) });
    }
    Ok(Tensor(t))
}

/// Sets glibc's thresholds for giving memory back; whether it took both.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn keep_freed(mapped_from: i32, trimmed_from: i32) -> bool {
    // SAFETY: mallopt takes two integers and locks malloc's state itself.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, mapped_from) == 1
            && libc::mallopt(libc::M_TRIM_THRESHOLD, trimmed_from) == 1
    }
}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn keep_freed(_mapped_from: i32, _trimmed_from: i32) -> bool {
    false
}
