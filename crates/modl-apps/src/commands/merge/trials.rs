//! Evaluations of what could be merged, each kept in a file as soon as it is known: a search that was
//! stopped goes on where it was.
//!
//! While the work lasts, `OUT.trials` holds `evaluations.jsonl` and the candidate that is being looked
//! at. At the end the file moves into the result.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use fs4::{FileExt, TryLockError};
use indicatif::ProgressBar;
use modl_aggregate::merge::identity;
use modl_core::checkpoint::write_whole;
use serde_json::{Value, json};

use super::MergeArgs;
use super::evaluate::number;
use crate::progress::bar;

const FILE: &str = "evaluations.jsonl";
const POINT: &str = "{\"point\":";
const SCORE: &str = ",\"evaluation\":";

/// Evaluations by a command.
pub(super) struct Trials<'a> {
    command: &'a str,
    minimize: bool,
    folder: PathBuf,
    file: File,
    /// By the text of the point, as it stands in the file.
    known: HashMap<String, f64>,
    best: f64,
    bar: ProgressBar,
}

impl<'a> Trials<'a> {
    /// Those of an earlier start for the same `what`, or none yet. About `steps` are to come.
    pub(super) fn open(args: &'a MergeArgs, what: &Value, steps: u64) -> Result<Self> {
        anyhow::ensure!(
            !args.out.exists(),
            "{}: is there already; name a new one",
            args.out.display()
        );
        let command = args.eval.as_deref().with_context(
            || "say with --eval how a model is evaluated: a command that prints a number last",
        )?;
        let folder = super::beside(&args.out, ".trials");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let path = folder.join(FILE);
        let at = || path.display().to_string();
        let mut file =
            OpenOptions::new().create(true).read(true).append(true).open(&path).with_context(at)?;
        if let Err(TryLockError::WouldBlock) = FileExt::try_lock(&file) {
            anyhow::bail!(
                "{}: is being used at this moment; wait until that has ended, or name another --out",
                folder.display()
            );
        }
        let text = fs::read_to_string(&path).with_context(at)?;
        // What a kill has cut off is measured again.
        let whole = text.rfind('\n').map_or(0, |n| n + 1);
        file.set_len(whole as u64).with_context(at)?;
        let inputs: Vec<String> = args.inputs.iter().flat_map(|folder| identity(folder)).collect();
        let head = json!({ "of": what, "command": command, "inputs": inputs });
        let head = head.to_string();
        let mut lines = text.get(..whole).unwrap_or_default().lines();
        match lines.next() {
            None => writeln!(file, "{head}").with_context(at)?,
            Some(first) => anyhow::ensure!(
                first == head,
                "{}: has evaluations of something else (other models, settings or command, or a \
                 changed file); remove it to start anew, or name another --out",
                folder.display()
            ),
        }
        let known: HashMap<String, f64> = lines.filter_map(read).collect();
        let bar = bar(steps, "evaluations");
        let best = if args.minimize { f64::INFINITY } else { f64::NEG_INFINITY };
        Ok(Trials { command, minimize: args.minimize, folder, file, known, best, bar })
    }

    /// The command's number for a folder that is there.
    pub(super) fn of(&mut self, point: &Value, model: &Path) -> Result<f64> {
        let text = point.to_string();
        let found = match self.known.get(&text) {
            Some(found) => *found,
            None => {
                let found = number(self.command, model)?;
                let shown = if found.is_finite() { json!(found) } else { json!(found.to_string()) };
                let at = || self.folder.display().to_string();
                writeln!(self.file, "{POINT}{text}{SCORE}{shown}}}").with_context(at)?;
                self.file.sync_data().with_context(at)?;
                self.known.insert(text, found);
                found
            }
        };
        self.best = if self.minimize { self.best.min(found) } else { self.best.max(found) };
        self.bar.inc(1);
        self.bar.set_message(format!("best {:.6}", self.best));
        Ok(found)
    }

    /// The same for one that `make` makes first, if the number is not known already.
    pub(super) fn of_candidate(
        &mut self,
        point: &Value,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<f64> {
        let candidate = self.folder.join("candidate");
        let known = self.known.contains_key(&point.to_string());
        if !known {
            remove(&candidate)?;
            make(&candidate)?;
        }
        let found = self.of(point, &candidate)?;
        if !known {
            remove(&candidate)?;
        }
        Ok(found)
    }

    /// A number of which more is better, of what the command has printed.
    pub(super) fn worth(&self, printed: f64) -> f64 {
        if self.minimize { -printed } else { printed }
    }

    /// Keeps the evaluations beside the result.
    pub(super) fn finish(self, out: &Path) -> Result<()> {
        self.bar.finish_and_clear();
        let path = self.folder.join(FILE);
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        write_whole(out.join(FILE), &text)?;
        drop(self.file);
        remove(&self.folder)
    }
}

fn remove(folder: &Path) -> Result<()> {
    match folder.exists() {
        true => fs::remove_dir_all(folder).with_context(|| folder.display().to_string()),
        false => Ok(()),
    }
}

/// A line, read as it was written: numbers keep their last bit.
fn read(line: &str) -> Option<(String, f64)> {
    let (point, found) = line.strip_prefix(POINT)?.strip_suffix('}')?.rsplit_once(SCORE)?;
    Some((point.to_owned(), found.trim_matches('"').parse().ok()?))
}

/// Carries an error of the command line through a function of a library that asks for one of its own.
#[derive(Default)]
pub(super) struct Failure(Option<anyhow::Error>);

impl Failure {
    /// The value, or an error that stands for the one that is kept here.
    pub(super) fn keep(&mut self, found: Result<f64>) -> modl_core::Result<f64> {
        found.map_err(|e| {
            self.0 = Some(e);
            modl_core::Error::invalid("evaluation", "has failed")
        })
    }

    /// The library's result, with the error that was kept in place of the other.
    pub(super) fn told<T>(self, result: modl_core::Result<T>) -> Result<T> {
        match self.0 {
            Some(own) => Err(own),
            None => Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    #[test]
    fn lines_are_read_to_the_last_bit() {
        for found in [0.1 + 0.2, -1e-300, f64::NEG_INFINITY, 3.0] {
            let shown = if found.is_finite() { json!(found) } else { json!(found.to_string()) };
            let point = json!([0.1 + 0.2, 1.0 / 3.0]);
            let line = format!("{POINT}{point}{SCORE}{shown}}}");
            assert_eq!(read(&line), Some((point.to_string(), found)));
        }
        assert_eq!(read("{\"point\":[1],\"evalu"), None);
    }
}
