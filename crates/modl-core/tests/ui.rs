//! What the compiler says where a crate misuses the seams: `tests/ui/*.rs`, each with its message
//! in `.stderr`. `TRYBUILD=overwrite cargo test -p modl-core --test ui` writes them anew.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;
use std::process::Command;

/// The compiler's own words differ from version to version; those in the files are of this one.
const WORDS_OF: &str = "1.95";

fn rustc(args: &[&str]) -> String {
    let program = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    String::from_utf8(Command::new(program).args(args).output().unwrap().stdout).unwrap()
}

/// The cases are only checked and never linked, so torch-sys' C++ is not compiled for them once
/// more: what its build script would say stands in a setting.
fn spare_libtorch() {
    let about = rustc(&["-vV"]);
    let host = about.lines().find_map(|l| l.strip_prefix("host: ")).unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let folder = target.join("tests/trybuild/.cargo");
    std::fs::create_dir_all(&folder).unwrap();
    let setting = format!("[target.{host}.tch]\nrustc-link-lib = []\n");
    std::fs::write(folder.join("config.toml"), setting).unwrap();
}

#[test]
fn misuse_is_told_in_words() {
    let version = rustc(&["--version"]);
    if !version.starts_with(&format!("rustc {WORDS_OF}.")) {
        // Not `eprintln!`, which nobody sees where a test passes.
        let note = format!("not compared: tests/ui has the words of rustc {WORDS_OF}; {version}");
        std::io::stderr().write_all(note.as_bytes()).unwrap();
        return;
    }
    spare_libtorch();
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
