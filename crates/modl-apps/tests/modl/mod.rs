//! The program, run as a user runs it.

use std::process::{Command, Output};

/// The program with these arguments, on one thread.
pub fn modl(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_modl"));
    command.args(["--threads", "1"]).args(args);
    command
}

fn run(args: &[&str]) -> Output {
    modl(args).output().unwrap()
}

/// What it prints where it succeeds.
pub fn succeed(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// It refuses, in words that hold `part`.
pub fn refuse(args: &[&str], part: &str) {
    let out = run(args);
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{args:?}: {error}");
    assert!(error.contains(part) && !error.contains("panicked"), "{args:?}: {error}");
}
