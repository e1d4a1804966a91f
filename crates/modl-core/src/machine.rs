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

/// Whether the processor multiplies bf16 matrices in hardware; without it, bf16 is slower than f32.
pub fn has_bf16() -> bool {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|f| f == "avx512_bf16" || f == "amx_bf16")
}
