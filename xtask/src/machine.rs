//! What this machine is, for reports.

use std::fs;
use std::process::Command;

/// The processor's name.
pub fn cpu() -> String {
    field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// The bf16 instructions that libtorch can use, fastest last.
pub fn bf16() -> Vec<&'static str> {
    let flags = field("flags").unwrap_or_default();
    let has = |flag: &&&str| flags.split(' ').any(|found| found == **flag);
    ["avx512_bf16", "amx_bf16"].iter().filter(has).copied().collect()
}

/// The first line that a program prints, or `None` when it fails or is not there.
pub fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.lines().next().unwrap_or_default().to_owned())
}

fn field(name: &str) -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
