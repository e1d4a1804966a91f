//! Rules about Rust source.

use super::Offence;
use super::lexer::{self, is_word};

const MAX_LINES: usize = 400;

/// Calls that end the process where an error should be returned.
const PANICS: [&str; 7] =
    [".unwrap()", ".expect(", "panic!", "todo!", "unimplemented!", "unreachable!", "dbg!"];

/// The kit of contract tests: like a test, it panics to fail, but says why.
const KIT_PANICS: [&str; 2] = [".expect(", "panic!"];
const TESTING_KIT: &str = "crates/modl-core/src/testing";

/// The one file that talks to C++.
const FFI: &str = "crates/modl-core/src/ffi.rs";

/// Checks one Rust file, its path being relative to the root.
pub fn check(path: &str, source: &str) -> Vec<Offence> {
    let mut offences = Vec::new();
    if !has_head_docs(source) {
        offences.push(Offence::new(path, 1, "starts without `//!` docs"));
    }
    if !path.contains("/src/") {
        return offences;
    }
    let lines = source.lines().count();
    if lines > MAX_LINES {
        let message = format!("has {lines} lines, {MAX_LINES} are allowed: split it");
        offences.push(Offence::new(path, lines, message));
    }
    let is_test = path.ends_with("/tests.rs") || path.contains("/src/tests/");
    let is_library = path.starts_with("crates/") && !is_test;
    let code = lexer::without_tests(&lexer::code_only(source));
    for (index, line) in code.lines().enumerate() {
        if is_library {
            for call in PANICS.iter().filter(|call| has_call(line, call)) {
                if !path.starts_with(TESTING_KIT) || !KIT_PANICS.contains(call) {
                    let message = format!("`{call}` in library code: return an error");
                    offences.push(Offence::new(path, index + 1, message));
                }
            }
        }
        if path != FFI && has_word(line, "unsafe") {
            let message = format!("`unsafe` outside {FFI}");
            offences.push(Offence::new(path, index + 1, message));
        }
    }
    offences
}

fn has_head_docs(source: &str) -> bool {
    let mut lines = source.lines().map(str::trim).filter(|line| !line.is_empty());
    let included = |line: &&str| line.starts_with("#![doc");
    lines
        .find(|line| !line.starts_with("#![") || included(line))
        .is_some_and(|line| line.starts_with("//!") || included(&line))
}

/// Whether a line has this call and not one whose name ends like it.
fn has_call(line: &str, call: &str) -> bool {
    line.match_indices(call).any(|(at, _)| {
        call.starts_with('.') || !line[..at].chars().next_back().is_some_and(is_word)
    })
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(is_word)
            && !line[at + word.len()..].chars().next().is_some_and(is_word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(path: &str, source: &str) -> Vec<String> {
        check(path, source).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn library_code_must_not_panic_but_its_tests_and_docs_may() {
        let source = "//! Docs.\n/// a.unwrap()\nfn f() { a.unwrap_or(1); b.unwrap(); }\n\
                      #[cfg(test)]\nmod tests { fn g() { panic!() } }\nfn h() { debug_panic!() }\n";
        let found = messages("crates/a/src/lib.rs", source);
        assert_eq!(found, ["crates/a/src/lib.rs:3: `.unwrap()` in library code: return an error"]);
        assert!(messages("crates/a/tests/b.rs", source).is_empty());
        assert!(messages("xtask/src/b.rs", source).is_empty());
    }

    #[test]
    fn the_testing_kit_may_panic_with_a_reason_and_no_more() {
        let path = format!("{TESTING_KIT}/module.rs");
        let source = "//! Docs.\nfn f() { panic!(\"no\"); a.expect(\"b\"); c.unwrap() }\n";
        assert_eq!(messages(&path, source).len(), 1);
        assert_eq!(messages("crates/a/src/b.rs", source).len(), 3);
    }

    #[test]
    fn unsafe_is_for_one_file() {
        let source = "//! Docs.\n#![deny(unsafe_code)]\nfn f() { unsafe { g() } }\n";
        assert_eq!(messages(FFI, source), Vec::<String>::new());
        assert_eq!(messages("crates/a/src/b.rs", source).len(), 1);
    }

    #[test]
    fn files_have_docs_and_are_short() {
        assert_eq!(messages("crates/a/src/b.rs", "fn f() {}\n").len(), 1);
        assert!(messages("crates/a/src/b.rs", "\n#![allow(x)]\n//! Docs.\n").is_empty());
        assert!(messages("crates/a/src/lib.rs", "#![doc = include_str!(\"x\")]\n").is_empty());
        let long = format!("//! Docs.\n{}", "\n".repeat(MAX_LINES));
        assert_eq!(messages("crates/a/src/b.rs", &long).len(), 1);
    }
}
