//! A library of modules: each by name and version, with where it comes from, and found again by name or
//! by what it was trained on.
//!
//! ```text
//! LIBRARY/NAME/VERSION/card.json    what it is and where it comes from
//! LIBRARY/NAME/VERSION/module/      PEFT's folder, or NAME.safetensors
//! ```
//!
//! A version is there whole or not at all, and is never changed. Modules for a new task are looked for by
//! the nearest prototype, the mean vector of what each was trained on (Jang et al. 2023,
//! arXiv 2302.03202). Survey §6.3: libraries of modules for post-hoc use.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use modl_core::{Error, FolderLock, Result, checkpoint};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What is known of a module.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Card {
    /// Letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// From 1 on; given by the library.
    pub version: u32,
    /// The method: `lora`.
    pub kind: String,
    /// In words.
    pub about: String,
    /// The fingerprint of the backbone that it was trained on.
    pub base: Option<String>,
    /// The fingerprint of what it was trained on.
    pub data: Option<String>,
    /// The recipe that it was trained by, as a text.
    pub recipe: Option<String>,
    /// What was measured on held-out examples.
    pub metrics: BTreeMap<String, f64>,
    /// The mean vector of what it was trained on, by the backbone without modules.
    pub prototype: Option<Vec<f32>>,
    /// The hash of its files; given by the library.
    pub sha256: String,
}

/// A folder with modules.
#[derive(Debug, Clone)]
pub struct Library {
    folder: PathBuf,
}

const CARD: &str = "card.json";
const MODULE: &str = "module";
/// A version under this name is not whole yet.
const UNFINISHED: &str = ".unfinished";

impl Library {
    /// The library in a folder, which need not be there yet.
    pub fn open(folder: impl AsRef<Path>) -> Self {
        Library { folder: folder.as_ref().to_owned() }
    }

    /// Copies a module, a folder or a file, as the next version of `card.name`, and gives its card.
    ///
    /// # Errors
    /// Where the name does not fit, the same files are there already, or something cannot be copied;
    /// then nothing has been changed.
    pub fn add(&self, source: impl AsRef<Path>, card: Card) -> Result<Card> {
        let source = source.as_ref();
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if card.name.is_empty() || card.name.starts_with('.') || !card.name.chars().all(fits) {
            let problem = "is no name; it is made of letters, digits, `-`, `_` and `.`";
            return Err(Error::invalid(format!("`{}`", card.name), problem));
        }
        let _lock = FolderLock::take(&self.folder, "library.lock", "another change of it")?;
        let sha256 = hash(source)?;
        let others = self.versions(&card.name)?;
        if let Some(same) = others.iter().find(|c| c.sha256 == sha256) {
            let problem = format!("is there already, as {}@{}", same.name, same.version);
            return Err(Error::file(source, problem));
        }
        let version = others.iter().map(|c| c.version).max().unwrap_or(0) + 1;
        let card = Card { version, sha256, ..card };
        let at = self.folder.join(&card.name);
        let unfinished = at.join(UNFINISHED);
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(|e| Error::file(&unfinished, e))?;
        }
        let inside = unfinished.join(MODULE);
        match source.is_dir() {
            true => copy(source, &inside)?,
            false => {
                let name = source.file_name().unwrap_or_default();
                copy(source, &inside.join(name))?;
            }
        }
        let text = serde_json::to_vec_pretty(&card).map_err(|e| Error::file(&unfinished, e))?;
        checkpoint::write_whole(unfinished.join(CARD), &text)?;
        let done = at.join(version.to_string());
        fs::rename(&unfinished, &done).map_err(|e| Error::file(&done, e))?;
        Ok(card)
    }

    /// All versions of all modules, by name and version.
    ///
    /// # Errors
    /// Where a card cannot be read.
    pub fn list(&self) -> Result<Vec<Card>> {
        let mut names: Vec<String> = names_in(&self.folder)?;
        names.sort();
        let versions = names.iter().map(|name| self.versions(name));
        Ok(versions.collect::<Result<Vec<_>>>()?.concat())
    }

    /// A module by `NAME`, its last version, or by `NAME@VERSION`.
    ///
    /// # Errors
    /// [`Error::Unknown`] with what there is.
    pub fn find(&self, name: &str) -> Result<Card> {
        let (own, version) = match name.split_once('@') {
            Some((own, version)) => (own, Some(version)),
            None => (name, None),
        };
        let known = self.list()?;
        let mut fits = known
            .iter()
            .filter(|c| c.name == own && version.is_none_or(|v| c.version.to_string() == v));
        let unknown = || {
            let all: Vec<String> =
                known.iter().map(|c| format!("{}@{}", c.name, c.version)).collect();
            Error::unknown("module of the library", name, &all)
        };
        fits.next_back().cloned().ok_or_else(unknown)
    }

    /// Where the files of a module are: PEFT's folder, or a file.
    ///
    /// # Errors
    /// Where they cannot be looked for.
    pub fn path(&self, card: &Card) -> Result<PathBuf> {
        let inside = self.folder.join(&card.name).join(card.version.to_string()).join(MODULE);
        let files = names_in(&inside)?;
        match files.as_slice() {
            [one] if one.ends_with(".safetensors") => Ok(inside.join(one)),
            _ => Ok(inside),
        }
    }

    /// Removes a module: `NAME@VERSION`, or all versions of `NAME`; what was removed.
    ///
    /// # Errors
    /// Where there is none, or it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<Vec<Card>> {
        let found = self.find(name)?;
        let _lock = FolderLock::take(&self.folder, "library.lock", "another change of it")?;
        let at = self.folder.join(&found.name);
        let removed = match name.contains('@') {
            true => vec![found],
            false => self.versions(&found.name)?,
        };
        for card in &removed {
            let version = at.join(card.version.to_string());
            fs::remove_dir_all(&version).map_err(|e| Error::file(&version, e))?;
        }
        // Fails where other versions are left, as it should.
        let _ = fs::remove_dir(&at);
        Ok(removed)
    }

    /// The last versions of modules for a backbone, the nearest prototypes first, with their cosines.
    ///
    /// # Errors
    /// Where a card cannot be read, or the prototype is of another width than the backbone's.
    pub fn nearest(&self, prototype: &[f32], base: &str) -> Result<Vec<(Card, f64)>> {
        let mut last: BTreeMap<String, Card> = BTreeMap::new();
        for card in self.list()? {
            last.insert(card.name.clone(), card);
        }
        let mut found = Vec::new();
        for card in last.into_values().filter(|c| c.base.as_deref() == Some(base)) {
            let Some(own) = &card.prototype else { continue };
            if own.len() != prototype.len() {
                let problem = format!("has {} numbers, wanted are {}", own.len(), prototype.len());
                return Err(Error::invalid(format!("prototype of `{}`", card.name), problem));
            }
            let cosine = cosine(own, prototype);
            found.push((card, cosine));
        }
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(found)
    }

    /// The versions of a module, the last one last.
    fn versions(&self, name: &str) -> Result<Vec<Card>> {
        let at = self.folder.join(name);
        let mut all = Vec::new();
        for version in names_in(&at)?.iter().filter(|v| v.parse::<u32>().is_ok()) {
            let path = at.join(version).join(CARD);
            let text = fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
            let card: Card = serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?;
            all.push(card);
        }
        all.sort_by_key(|c| c.version);
        Ok(all)
    }
}

/// What is in a folder; nothing where there is none.
fn names_in(folder: &Path) -> Result<Vec<String>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(|e| Error::file(folder, e))?;
    entries
        .map(|e| {
            let e = e.map_err(|e| Error::file(folder, e))?;
            Ok(e.file_name().to_string_lossy().into_owned())
        })
        .collect()
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        return names_in(from)?.iter().try_for_each(|n| copy(&from.join(n), &to.join(n)));
    }
    let bytes = fs::read(from).map_err(|e| Error::file(from, e))?;
    checkpoint::write_whole(to, &bytes)
}

/// SHA-256 over the names and bytes of all files, in order.
fn hash(source: &Path) -> Result<String> {
    fn add(hash: &mut Sha256, at: &Path, name: &str) -> Result<()> {
        if at.is_dir() {
            let mut inside = names_in(at)?;
            inside.sort();
            return inside.iter().try_for_each(|n| add(hash, &at.join(n), &format!("{name}/{n}")));
        }
        let bytes = fs::read(at).map_err(|e| Error::file(at, e))?;
        hash.update(format!("{name}\0{}\0", bytes.len()));
        hash.update(bytes);
        Ok(())
    }
    let mut all = Sha256::new();
    add(&mut all, source, "")?;
    Ok(all.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(name: &str, prototype: [f32; 2]) -> Card {
        Card {
            name: name.to_owned(),
            base: Some("base".to_owned()),
            prototype: Some(prototype.to_vec()),
            ..Card::default()
        }
    }

    #[test]
    fn modules_are_kept_by_version_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("adapter");
        let write = |text: &str| {
            fs::create_dir_all(source.join("inside")).unwrap();
            fs::write(source.join("inside/a.json"), text).unwrap();
        };
        let library = Library::open(dir.path().join("library"));
        assert!(library.list().unwrap().is_empty());
        write("one");
        assert_eq!(library.add(&source, card("a", [1.0, 0.0])).unwrap().version, 1);
        let e = library.add(&source, card("a", [1.0, 0.0])).unwrap_err().to_string();
        assert!(e.contains("a@1"), "{e}");
        write("two");
        assert_eq!(library.add(&source, card("a", [0.0, 1.0])).unwrap().version, 2);
        library.add(&source, card("b", [1.0, 1.0])).unwrap();
        let named: Vec<(String, u32)> =
            library.list().unwrap().into_iter().map(|c| (c.name, c.version)).collect();
        assert_eq!(named, [("a".into(), 1), ("a".into(), 2), ("b".into(), 1)]);
        let read = |name: &str| {
            let path = library.path(&library.find(name).unwrap()).unwrap();
            fs::read_to_string(path.join("inside/a.json")).unwrap()
        };
        assert_eq!(
            (read("a@1"), read("a"), read("a@2")),
            ("one".into(), "two".into(), "two".into())
        );
        assert!(library.find("c").unwrap_err().to_string().contains("a@1"));
        assert_eq!(library.remove("a@2").unwrap().len(), 1);
        assert_eq!(read("a"), "one");
        library.remove("a").unwrap();
        assert_eq!(library.list().unwrap().len(), 1);
    }

    #[test]
    fn the_nearest_come_first_of_the_last_versions_for_the_same_backbone() {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::open(dir.path().join("library"));
        let add = |text: &str, card: Card| {
            let source = dir.path().join("m.safetensors");
            fs::write(&source, text).unwrap();
            library.add(&source, card).unwrap();
        };
        add("1", card("x", [0.0, 1.0]));
        add("2", card("x", [3.0, 0.3]));
        add("3", card("y", [1.0, 1.0]));
        add("4", Card { base: Some("other".into()), ..card("z", [1.0, 0.0]) });
        let found = library.nearest(&[2.0, 0.0], "base").unwrap();
        let names: Vec<&str> = found.iter().map(|(c, _)| c.name.as_str()).collect();
        assert_eq!(names, ["x", "y"]);
        assert!((found[1].1 - 0.5f64.sqrt()).abs() < 1e-6);
        assert!(library.nearest(&[1.0], "base").is_err());
        assert!(library.path(&library.find("y").unwrap()).unwrap().ends_with("m.safetensors"));
    }

    #[test]
    fn a_bad_name_and_an_absent_source_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::open(dir.path().join("library"));
        for name in ["", "a/b", "..", "a b"] {
            assert!(library.add(dir.path(), card(name, [0.0; 2])).is_err(), "{name}");
        }
        assert!(library.add(dir.path().join("absent"), card("a", [0.0; 2])).is_err());
        assert!(library.list().unwrap().is_empty());
    }
}
