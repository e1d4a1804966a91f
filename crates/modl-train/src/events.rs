//! What a run reports while it goes on, and who listens.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// What a loss counts beside the objective's, which counts 1, and who says so.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossWeight {
    /// Its weight.
    pub weight: f64,
    /// Whether it is what the router's paper or the backbone's `config.json` has, since nobody gave
    /// another.
    pub default: bool,
}

/// Something that happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A training begins, or goes on after `step` steps.
    Started {
        /// What is trained: a phase, or a module within it.
        name: String,
        /// Steps that are done.
        step: u64,
        /// Steps that there will be.
        steps: u64,
        /// Trained parameters, counted as numbers.
        trained: usize,
        /// Examples for training.
        examples: usize,
        /// What the resumed state may differ in, if anything.
        note: Option<String>,
        /// What the losses of routers and those of the backbone's own count, by name.
        #[serde(default)]
        losses: BTreeMap<String, LossWeight>,
    },
    /// Something that one may not expect, said once.
    Notice {
        /// The number of the step at which it showed, from 1.
        step: u64,
        /// In words.
        text: String,
    },
    /// A step is done.
    Step {
        /// Its number, from 1.
        step: u64,
        /// The objective's loss on its batch.
        loss: f64,
        /// The losses of routers and those of the backbone's own by name, before they are weighed.
        aux: BTreeMap<String, f64>,
        /// The learning rate.
        lr: f64,
        /// The common norm of all gradients before clipping.
        grad_norm: f64,
        /// How long it took.
        seconds: f64,
    },
    /// What the routers chose for the batch of a step, in training.
    Routed {
        /// The number of the step, from 1.
        step: u64,
        /// The mean over sites of `load_cv2`, `importance_cv2`, `max_violation`, `entropy_of_mean`,
        /// `mean_entropy`, `active_modules`, `overflow` and `unrouted`, as `modl_route::RoutingStats`
        /// has them.
        metrics: BTreeMap<String, f64>,
    },
    /// A model was evaluated.
    Evaluated {
        /// On what.
        name: String,
        /// The number of steps that were done, where it was on the way.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        step: Option<u64>,
        /// Metrics by name.
        metrics: BTreeMap<String, f64>,
    },
    /// The state of a training was saved.
    Saved {
        /// The folder.
        path: PathBuf,
        /// Steps that are done.
        step: u64,
    },
    /// A training is done.
    Finished {
        /// What was trained.
        name: String,
        /// Steps that are done.
        step: u64,
        /// Trained parameters that never had a gradient in this process: what was never routed.
        unused: Vec<String>,
    },
    /// A phase of a recipe is done and its results are saved.
    PhaseFinished {
        /// The phase.
        name: String,
        /// The folder of its results.
        path: PathBuf,
    },
}

/// Someone who is told.
pub trait Sink {
    /// Takes an event.
    ///
    /// # Errors
    /// Where it cannot be kept; the run then stops.
    fn event(&mut self, event: &Event) -> Result<()>;
}

/// Nobody is told.
impl Sink for () {
    fn event(&mut self, _: &Event) -> Result<()> {
        Ok(())
    }
}

/// Events are kept in order.
impl Sink for Vec<Event> {
    fn event(&mut self, event: &Event) -> Result<()> {
        self.push(event.clone());
        Ok(())
    }
}

/// A file with one JSON object for each event, appended line by line. After a resumed run, steps
/// between the last saved state and the stop are there twice; the later ones count.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens or makes the file. A last line that a stop has cut off is taken out.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be written.
    pub fn append(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let open = || -> std::io::Result<File> {
            let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path)?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            if whole < bytes.len() {
                file.set_len(whole as u64)?;
            }
            Ok(file)
        };
        let file = open().map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
        Ok(JsonLines { path, file })
    }
}

impl Sink for JsonLines {
    fn event(&mut self, event: &Event) -> Result<()> {
        let failed =
            |e: &dyn std::fmt::Display| Error::file(&self.path, format!("cannot be written: {e}"));
        let line = serde_json::to_string(event).map_err(|e| failed(&e))? + "\n";
        // In one piece, so that a stop leaves a whole line or the start of one.
        self.file.write_all(line.as_bytes()).map_err(|e| failed(&e))
    }
}

/// Several sinks as one, told in order.
#[derive(Default)]
pub struct Fanout<'a>(pub Vec<&'a mut dyn Sink>);

impl std::fmt::Debug for Fanout<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fanout({})", self.0.len())
    }
}

impl Sink for Fanout<'_> {
    fn event(&mut self, event: &Event) -> Result<()> {
        self.0.iter_mut().try_for_each(|sink| sink.event(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_appended_one_a_line_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let saved = |step| Event::Saved { path: "a/b".into(), step };
        let mut kept = Vec::new();
        JsonLines::append(&path).unwrap().event(&saved(1)).unwrap();
        let mut file = JsonLines::append(&path).unwrap();
        Fanout(vec![&mut file, &mut kept]).event(&saved(2)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let read: Vec<Event> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(read, [saved(1), saved(2)]);
        assert_eq!(kept, [saved(2)]);
        assert!(text.starts_with(r#"{"event":"saved","#), "{text}");
        // What a stop has cut off goes before more comes.
        std::fs::write(&path, &text[..text.len() - 3]).unwrap();
        JsonLines::append(&path).unwrap().event(&saved(2)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}
