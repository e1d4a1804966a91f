//! The state of a run on disk, from which it goes on bit for bit.
//!
//! `state-STEP.safetensors` holds the trained parameters (`params.NAME`) and what the optimiser
//! keeps (`optimizer.PART.NAME`), what is kept for each example (`assignments.NAME`, where it is) and
//! what the strategy keeps (`rule.NAME`, where it does), the average of the parameters
//! (`average.NAME`) and the best ones (`best.NAME`), where they are kept; `state.json`, written last,
//! names that file and holds the rest.
//! Both appear whole or not at all, and older files go only after `state.json` names the new one:
//! a run that is killed at any moment leaves a whole state.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Device, Error, Modular, Result, Seed, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::average::copies;
use crate::early_stop::Record;
use crate::{Cursor, Dataset, TrainConfig};

const FORMAT: u32 = 1;

/// The libtorch that the pinned tch is made for; its build refuses others.
const LIBTORCH: &str = "2.13";

/// All of a run's state but tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunState {
    format: u32,
    /// The file with the tensors.
    pub file: String,
    /// Steps that are done.
    pub step: u64,
    /// Where the data goes on.
    pub cursor: Cursor,
    /// Steps that were left out because their numbers were not finite.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: u64,
    /// What has been measured to stop early, where anything is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watched: Option<Record>,
    seed: Seed,
    /// The [`TrainConfig`] as JSON text: as a text it can be compared exactly.
    config: String,
    /// Fingerprint of the data.
    data: String,
    /// Fingerprint of the backbone before training.
    base: String,
    libtorch: String,
}

/// A state with its tensors.
#[derive(Debug)]
pub(crate) struct Saved {
    pub state: RunState,
    pub tensors: Parts,
}

/// The tensors of a state.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub params: Vec<(String, Tensor)>,
    pub optimizer: Vec<(String, Tensor)>,
    pub assignments: Vec<(String, Tensor)>,
    pub rule: Vec<(String, Tensor)>,
    pub average: Vec<(String, Tensor)>,
    pub best: Vec<(String, Tensor)>,
}

impl Parts {
    /// The same in memory of its own.
    pub(crate) fn copied(&self) -> Result<Self> {
        Ok(Parts {
            params: copies(&self.params)?,
            optimizer: copies(&self.optimizer)?,
            assignments: copies(&self.assignments)?,
            rule: copies(&self.rule)?,
            average: copies(&self.average)?,
            best: copies(&self.best)?,
        })
    }
}

impl RunState {
    /// That of a run before its first step.
    pub(crate) fn new(
        seed: Seed,
        config: &TrainConfig,
        model: &Modular,
        data: &Dataset,
    ) -> Result<Self> {
        let config =
            serde_json::to_string(config).map_err(|e| Error::invalid("config", e.to_string()))?;
        let base_is_trained = model.trainable().iter().any(|(n, _)| n.starts_with("base."));
        Ok(RunState {
            format: FORMAT,
            file: String::new(),
            step: 0,
            cursor: Cursor::default(),
            skipped: 0,
            watched: None,
            seed,
            config,
            data: data.fingerprint()?,
            base: if base_is_trained {
                "trained".into()
            } else {
                model.backbone().fingerprint()?
            },
            libtorch: LIBTORCH.into(),
        })
    }

    /// The same after `step` steps.
    pub(crate) fn at(
        &self,
        step: u64,
        cursor: Cursor,
        skipped: u64,
        watched: Option<Record>,
    ) -> Self {
        let file = format!("state-{step}.safetensors");
        RunState { file, step, cursor, skipped, watched, ..self.clone() }
    }

    /// Refuses to go on with another run than `own`, which is on `data`, and notes what may change single
    /// bits.
    pub(crate) fn check(
        &self,
        own: &RunState,
        data: &Dataset,
        folder: &Path,
    ) -> Result<Option<String>> {
        let refuse = |what: String| {
            let advice = "give it another folder, or what it was started with";
            Err(Error::file(folder, format!("holds a run with {what}; {advice}")))
        };
        if let Some(what) = differences(&self.config, &own.config) {
            return refuse(format!("other settings ({what})"));
        }
        let known = |former: Option<String>| former.as_ref() == Some(&self.data);
        if self.data != own.data && !known(data.former_fingerprint()?) {
            return refuse(format!("another data ({}, now {})", self.data, own.data));
        }
        if self.base != own.base {
            return refuse(format!("another backbone ({}, now {})", self.base, own.base));
        }
        if self.seed != own.seed {
            return refuse(format!("seed {}, now {}", self.seed.0, own.seed.0));
        }
        let other = self.libtorch != own.libtorch;
        let note = || {
            let (old, new) = (&self.libtorch, &own.libtorch);
            format!("saved under libtorch {old}, resumed under {new}: last bits may differ")
        };
        Ok(other.then(note))
    }
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Settings that have no part in what steps without trouble come to: a run may go on with others.
const MAY_DIFFER: [&str; 5] =
    ["log_every", "log_routing_every", "checkpoint_every", "on_nan", "in_memory"];

/// The settings in which two configurations, as JSON, differ: `phases.0.lr 0.1, now 0.2`. `None` where
/// there are none that matter.
pub(crate) fn differences(old: &str, new: &str) -> Option<String> {
    let read = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let mut found = Vec::new();
    compare("", Some(&read(old)), Some(&read(new)), &mut found);
    (!found.is_empty()).then(|| found.join("; "))
}

fn compare(path: &str, old: Option<&Value>, new: Option<&Value>, found: &mut Vec<String>) {
    let at = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (old, new) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            let keys = keys.into_iter().filter(|k| !MAY_DIFFER.contains(&k.as_str()));
            keys.for_each(|k| compare(&at(k), a.get(k), b.get(k), found));
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) if a.len() == b.len() => {
            let pairs = a.iter().zip(b).enumerate();
            pairs.for_each(|(i, (a, b))| compare(&at(&i.to_string()), Some(a), Some(b), found));
        }
        _ if old == new => {}
        _ => {
            let show = |v: Option<&Value>| v.map_or("nothing".to_owned(), Value::to_string);
            found.push(format!("{path} {}, now {}", show(old), show(new)));
        }
    }
}

/// Writes a state; the one before stays whole until this one is.
pub(crate) fn save(folder: &Path, state: RunState, tensors: &Parts) -> Result<()> {
    let named = |prefix: &str, all: &[(String, Tensor)]| -> Vec<(String, Tensor)> {
        all.iter().map(|(n, t)| (format!("{prefix}.{n}"), t.clone())).collect()
    };
    let all = [
        named("params", &tensors.params),
        named("optimizer", &tensors.optimizer),
        named("assignments", &tensors.assignments),
        named("rule", &tensors.rule),
        named("average", &tensors.average),
        named("best", &tensors.best),
    ]
    .concat();
    let tensors = all.iter().map(|(n, t)| (n.as_str(), t));
    checkpoint::save(folder.join(&state.file), tensors, HashMap::new())?;
    let text = serde_json::to_vec_pretty(&state).map_err(|e| Error::file(folder, e))?;
    checkpoint::write_whole(folder.join("state.json"), &text)?;
    remove_others(folder, &state.file);
    Ok(())
}

/// Removes the tensors of other states than the one in `file`: earlier ones, of which a stop may have
/// left one.
pub(crate) fn remove_others(folder: &Path, file: &str) {
    let old = fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("state-") && name.ends_with(".safetensors") && name != file
    });
    for entry in old {
        // One that cannot be removed does no harm: state.json does not name it.
        let _ = fs::remove_file(entry.path());
    }
}

/// Reads the state in a folder, if there is one.
///
/// # Errors
/// [`Error::File`] where it is of another format, or its files are not whole.
pub(crate) fn load(folder: &Path, device: Device) -> Result<Option<Saved>> {
    let path = folder.join("state.json");
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
    let state: RunState = serde_json::from_str(&text)
        .map_err(|e| Error::file(&path, format!("is not the state of a run: {e}")))?;
    if state.format != FORMAT {
        let problem = format!("is of format {}, this version reads {FORMAT}", state.format);
        return Err(Error::file(&path, problem));
    }
    let file = Checkpoint::open(folder.join(&state.file))?;
    let mut tensors = Parts::default();
    for (name, tensor) in file.tensors(device)? {
        let own = |rest: &str| (rest.to_owned(), tensor.clone());
        match name.split_once('.') {
            Some(("params", rest)) => tensors.params.push(own(rest)),
            Some(("optimizer", rest)) => tensors.optimizer.push(own(rest)),
            Some(("assignments", rest)) => tensors.assignments.push(own(rest)),
            Some(("rule", rest)) => tensors.rule.push(own(rest)),
            Some(("average", rest)) => tensors.average.push(own(rest)),
            Some(("best", rest)) => tensors.best.push(own(rest)),
            _ => {
                return Err(Error::file(
                    file.path(),
                    format!("holds `{name}`, no part of a state"),
                ));
            }
        }
    }
    Ok(Some(Saved { state, tensors }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_differ_are_named_and_those_that_do_not_matter_are_not() {
        let old = r#"{"seed":1,"phases":[{"lr":0.1,"log_every":1,"train":["a"]}],"limit":5}"#;
        let new = r#"{"phases":[{"lr":0.2,"on_nan":"stop","train":["a","b"]}],"seed":1}"#;
        let found = differences(old, new).unwrap();
        let wanted = r#"limit 5, now nothing; phases.0.lr 0.1, now 0.2; phases.0.train ["a"], now ["a","b"]"#;
        assert_eq!(found, wanted);
        let same = old.replace(r#""log_every":1"#, r#""log_every":50,"checkpoint_every":3"#);
        assert_eq!(differences(old, &same), None);
    }
}
