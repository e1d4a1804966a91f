//! Rules about all text files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::Offence;
use super::lexer::is_word;

/// Folders of somebody's machine, in two parts so that this file does not break its own rule.
const MACHINE: [&str; 4] =
    [concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/Us", "ers/"), concat!("/wo", "rk/")];

/// Hosts of package indexes; which one is used is up to each machine's settings.
const HOSTS: [&str; 8] = [
    concat!("py", "pi.org"),
    concat!("pythonho", "sted.org"),
    concat!("download.pyt", "orch.org"),
    concat!("registry.np", "mjs.org"),
    concat!("://cra", "tes.io"),
    concat!("static.cra", "tes.io"),
    concat!("index.cra", "tes.io"),
    concat!("--index", "-url"),
];

/// Notes to oneself.
const NOTES: [&str; 2] = [concat!("TO", "DO"), concat!("FIX", "ME")];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 7] =
    ["utils.rs", "util.rs", "helpers.rs", "helper.rs", "common.rs", "misc.rs", "shared.rs"];

/// Checks one text file, its path being relative to the root.
pub fn check(path: &str, text: &str) -> Vec<Offence> {
    let mut offences = Vec::new();
    let name = path.rsplit('/').next().unwrap_or(path);
    if path.contains("/src/") && EMPTY_NAMES.contains(&name) {
        let message = "this name says nothing: name the file by what is in it";
        offences.push(Offence::new(path, 1, message));
    }
    // Written by cargo, registry and all.
    if name == "Cargo.lock" {
        return offences;
    }
    for (index, line) in text.lines().enumerate() {
        let mut offend = |message: String| offences.push(Offence::new(path, index + 1, message));
        for folder in MACHINE.iter().filter(|folder| has_absolute(line, folder)) {
            offend(format!("`{folder}` is a folder of one machine"));
        }
        for host in HOSTS.iter().filter(|host| line.contains(*host)) {
            offend(format!("`{host}` names a package index"));
        }
        for note in NOTES.iter().filter(|note| has_note(line, note)) {
            offend(format!("`{note}`: do it, or open an issue"));
        }
    }
    offences
}

/// Checks that each crate has a README.
pub fn readmes(paths: &[PathBuf]) -> Vec<Offence> {
    let crates: BTreeSet<&Path> = paths
        .iter()
        .filter(|path| path.starts_with("crates") && path.ends_with("Cargo.toml"))
        .filter_map(|path| path.parent())
        .collect();
    crates
        .into_iter()
        .map(|dir| dir.join("README.md"))
        .filter(|readme| !paths.contains(readme))
        .map(|readme| Offence::new(&readme.to_string_lossy(), 1, "is missing"))
        .collect()
}

/// Whether the folder stands at the start of a path, not in the middle of one.
fn has_absolute(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(|c| is_word(c) || "./-}>)~*$".contains(c))
    })
}

fn has_note(line: &str, note: &str) -> bool {
    line.match_indices(note).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(is_word)
            && !line[at + note.len()..].chars().next().is_some_and(is_word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(path: &str, text: &str) -> usize {
        check(path, text).len()
    }

    #[test]
    fn machine_paths_are_found_only_where_a_path_starts() {
        let root = MACHINE[0];
        assert_eq!(count("a.md", &format!("see {root}x")), 1);
        assert_eq!(count("a.md", &format!("\"{root}x\" and ({root}y)")), 1);
        assert_eq!(count("a.md", &format!("target{root}x and ${{A}}{root}x")), 0);
    }

    #[test]
    fn package_indexes_and_notes_are_found() {
        assert_eq!(count("a.toml", HOSTS[0]), 1);
        assert_eq!(count("Cargo.lock", HOSTS[4]), 0);
        assert_eq!(count("a.rs", &format!("// {}: later", NOTES[0])), 1);
        assert_eq!(count("a.rs", &format!("MAS{}N", NOTES[0])), 0);
    }

    #[test]
    fn empty_names_are_for_no_source_file() {
        assert_eq!(count("crates/a/src/utils.rs", ""), 1);
        assert_eq!(count("crates/a/tests/common.rs", ""), 0);
    }

    #[test]
    fn each_crate_has_a_readme() {
        let paths = ["crates/a/Cargo.toml", "crates/a/README.md", "crates/b/Cargo.toml"];
        let found = readmes(&paths.map(PathBuf::from));
        assert_eq!(found, [Offence::new("crates/b/README.md", 1, "is missing")]);
    }
}
