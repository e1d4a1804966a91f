//! What the machine and this libtorch can do.

/// Threads for one tensor operation. Call it before the first operation.
pub fn set_threads(n: i32) {
    tch::set_num_threads(n);
}

/// Threads for one tensor operation.
pub fn threads() -> i32 {
    tch::get_num_threads()
}

/// The CUDA devices that this libtorch sees.
pub fn cuda_devices() -> usize {
    usize::try_from(tch::Cuda::device_count()).unwrap_or(0)
}

/// What Linux says about the processors; empty elsewhere.
pub(crate) fn cpu_info() -> String {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

/// Whether the processor multiplies bf16 matrices in hardware; without it, bf16 is slower than f32.
pub fn has_bf16() -> bool {
    let cpu = cpu_info();
    let flags = cpu.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|f| f == "avx512_bf16" || f == "amx_bf16")
}

/// Tells malloc to keep the memory of freed tensors for the next ones, and says whether it can.
///
/// glibc gives large blocks back to the system at once and gets them anew, page fault by page fault,
/// for the next operation: up to a third of the time of a forward pass in bf16. It concerns the
/// whole process, which then holds on to its peak memory; a program calls it at its start, as `modl`
/// does, and a library should not.
pub fn keep_freed_memory() -> bool {
    const LARGEST: i32 = 1 << 30;
    // Older versions of glibc refuse more than 32 MiB for the first.
    crate::ffi::keep_freed(LARGEST, i32::MAX) || crate::ffi::keep_freed(32 << 20, i32::MAX)
}
