//! What was measured, one JSON object a line: a run that is there is not run again.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use modl_core::{Seed, checkpoint};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One condition with one seed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    /// The condition.
    pub(crate) condition: String,
    /// The seed.
    pub(crate) seed: u64,
    /// [`fingerprint`] of all settings that the numbers follow from.
    pub(crate) config: String,
    /// What was measured, by key.
    pub(crate) metrics: BTreeMap<String, f64>,
    /// Wall time.
    pub(crate) seconds: f64,
    /// The largest resident memory of the process up to the end of this run, in MB.
    pub(crate) peak_rss_mb: Option<f64>,
    /// modl's version.
    pub(crate) modl: String,
    /// The commit of modl's source, with `+` where it had changes; none where it is not known.
    pub(crate) commit: Option<String>,
}

/// The runs of a file.
#[derive(Debug)]
pub(crate) struct Runs {
    path: PathBuf,
    runs: Vec<Run>,
}

impl Runs {
    /// The runs that are in a file, none where it is not there. A last line that a stop has cut off
    /// is taken out.
    pub(crate) fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| path.display().to_string()),
        };
        let whole = text.rfind('\n').map_or("", |end| text.get(..=end).unwrap_or_default());
        if whole.len() < text.len() {
            checkpoint::write_whole(&path, whole.as_bytes())?;
        }
        let read = |(i, line): (usize, &str)| {
            serde_json::from_str(line)
                .with_context(|| format!("{}:{}: is damaged; remove it", path.display(), i + 1))
        };
        let runs = whole.lines().enumerate().map(read).collect::<Result<_>>()?;
        Ok(Runs { path, runs })
    }

    /// The run of a condition with a seed under settings of this fingerprint.
    pub(crate) fn find(&self, condition: &str, seed: u64, config: &str) -> Option<&Run> {
        let same = |r: &&Run| r.condition == condition && r.seed == seed && r.config == config;
        self.runs.iter().find(same)
    }

    /// Adds a run at the end of the file.
    pub(crate) fn add(&mut self, run: Run) -> Result<()> {
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("making {}", folder.display()))?;
        }
        let line = serde_json::to_string(&run)? + "\n";
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path);
        let written = file.as_mut().map(|f| f.write_all(line.as_bytes()));
        match written {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(e).with_context(|| self.path.display().to_string()),
            Err(e) => anyhow::bail!("{}: {e}", self.path.display()),
        }
        self.runs.push(run);
        Ok(())
    }
}

/// Sixteen hex digits that change with any of the settings.
pub(crate) fn fingerprint(settings: &Value) -> String {
    format!("{:016x}", Seed(0).child(&settings.to_string()).0)
}

/// The largest resident memory of this process so far, in MB, where the system tells.
pub(crate) fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some((kib * 1.024).round() / 1000.0)
}

/// The commit that modl's source stands at, with `+` where tracked files differ from it; `None`
/// where this program was not built from a repository that is still there.
pub(crate) fn commit() -> Option<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let git = |args: &[&str]| -> Option<String> {
        let out = Command::new("git").arg("-C").arg(source).args(args).output().ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    // Another repository around an unpacked package is none of ours.
    let top = git(&["rev-parse", "--show-toplevel"])?;
    let own = source.parent()?.parent()?.canonicalize().ok()?;
    if Path::new(&top).canonicalize().ok()? != own {
        return None;
    }
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(git(&["rev-parse", "--short=12", "HEAD"])? + if changed { "+" } else { "" })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(seed: u64) -> Run {
        Run {
            condition: "soft".into(),
            seed,
            config: "c".into(),
            metrics: [("l1".to_owned(), 0.1 + seed as f64 / 3.0)].into(),
            seconds: 1.5,
            peak_rss_mb: None,
            modl: "0".into(),
            commit: None,
        }
    }

    #[test]
    fn runs_are_found_again_and_a_line_that_was_cut_off_is_not_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/runs.jsonl");
        let mut runs = Runs::open(&path).unwrap();
        runs.add(run(0)).unwrap();
        runs.add(run(1)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let mut again = Runs::open(&path).unwrap();
        assert!(again.find("soft", 1, "c").is_none() && again.find("soft", 0, "d").is_none());
        assert_eq!(again.find("soft", 0, "c").unwrap().metrics, run(0).metrics);
        again.add(run(1)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        std::fs::write(&path, "{}\n").unwrap();
        assert!(format!("{:#}", Runs::open(&path).unwrap_err()).contains("runs.jsonl:1"));
    }

    #[test]
    fn any_setting_changes_the_fingerprint() {
        let of = |v: Value| fingerprint(&v);
        assert_eq!(of(json!({"steps": 5})), of(json!({"steps": 5})));
        assert_ne!(of(json!({"steps": 5})), of(json!({"steps": 6})));
    }
}
