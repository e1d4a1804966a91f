//! What a recipe predicts: its `[head]`.
//!
//! ```toml
//! [head]
//! type = "regression"         # a line of data is id<TAB>score<TAB>text
//!
//! [head]
//! type = "classification"     # id<TAB>class<TAB>text
//! classes = ["no", "yes"]     # in the order of their indices; all of the data, sorted, if left out
//! label_smoothing = 0.1
//! heads = "per_task"          # one for each task over its own classes; all share one if left out
//! # heads = "backbone"        # none: the backbone's own output layer
//! outputs = 100               # of a head: more than it has classes, if wanted
//!
//! [head]
//! type = "next_token"         # id<TAB>prompt<TAB>text; the prompt is not counted, and may be empty
//! ```

use std::collections::BTreeSet;
use std::path::Path;

use modl_core::{Error, Modular, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Recipe;
use super::source::Source;
use crate::formats::labels;
use crate::objective::Metric;
use crate::{Classification, NextToken, Objective, Regression};

/// What is predicted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Head {
    /// One number for each text: [`Regression`].
    Regression {
        /// The name of its parameters; `score` where nothing is said.
        #[serde(default = "score")]
        name: String,
    },
    /// One of several classes for each text: [`Classification`].
    Classification {
        /// The name of its parameters; `class` where nothing is said.
        #[serde(default = "class")]
        name: String,
        /// The classes in the order of their indices; all of the data, sorted, where nothing is said.
        classes: Option<Vec<String>>,
        /// ε in [0, 1), 0 where nothing is said.
        #[serde(default)]
        label_smoothing: f64,
        /// Whether all tasks share one head.
        #[serde(default)]
        heads: Heads,
        /// The outputs of a head; as many as it has classes where nothing is said.
        outputs: Option<usize>,
    },
    /// Each token of a text from those before it: [`NextToken`].
    NextToken {},
}

/// How many output layers there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Heads {
    /// One for all tasks, over all classes.
    #[default]
    Shared,
    /// One for each task, over the classes of the task.
    PerTask,
    /// None: the `logits` of the backbone's own output layer.
    Backbone,
}

fn score() -> String {
    "score".into()
}

fn class() -> String {
    "class".into()
}

impl Head {
    /// What predictions are measured by.
    pub fn metrics(&self) -> &'static [Metric] {
        match self {
            Head::Regression { .. } => Regression::METRICS,
            Head::Classification { .. } => Classification::METRICS,
            Head::NextToken {} => NextToken::METRICS,
        }
    }

    /// Checks the settings.
    pub(super) fn check(&self, source: &Source) -> Result<()> {
        let Head::Classification { classes, label_smoothing, heads, outputs, .. } = self else {
            return Ok(());
        };
        let wrong =
            |key: &str, problem| source.error(&["head".to_owned(), key.to_owned()], problem);
        if !(0.0..1.0).contains(label_smoothing) {
            return Err(wrong("label_smoothing", "`label_smoothing` is to be in [0, 1)"));
        }
        if outputs.is_some() && *heads == Heads::Backbone {
            let problem = "`outputs` are of a head; those of the backbone are its own setting";
            return Err(wrong("outputs", problem));
        }
        let Some(classes) = classes else { return Ok(()) };
        let distinct: BTreeSet<&str> = classes.iter().map(String::as_str).collect();
        let plain = distinct.iter().all(|c| !c.is_empty() && c.trim() == *c);
        if distinct.len() < 2 || distinct.len() < classes.len() || !plain {
            let problem = "`classes` are to be two or more different names, without spaces around";
            return Err(wrong("classes", problem));
        }
        Ok(())
    }
}

impl Recipe {
    /// The objective on a model, whose width is taken from its configuration.
    ///
    /// # Errors
    /// Where the configuration has no `hidden_size` for the head, or classes are to be found in files
    /// that cannot be read or have fewer than two.
    pub fn objective(&self, model: &Modular) -> Result<Box<dyn Objective>> {
        let dim = || {
            let dim = model.backbone().config().get("hidden_size").and_then(Value::as_i64);
            dim.ok_or_else(|| Error::invalid("backbone", "its config has no `hidden_size`"))
        };
        Ok(match &self.head {
            Head::Regression { name } => Box::new(Regression { head: name.clone(), dim: dim()? }),
            Head::Classification { name, label_smoothing, heads, outputs, .. } => {
                let classes = self.classes()?;
                let tasks = match heads {
                    Heads::Shared | Heads::Backbone => Vec::new(),
                    Heads::PerTask => self.classes_of_tasks(&classes)?,
                };
                let most = match heads {
                    Heads::Shared | Heads::Backbone => classes.len(),
                    Heads::PerTask => tasks.iter().map(|(_, own)| own.len()).max().unwrap_or(0),
                };
                if let Some(n) = outputs.filter(|n| *n < most) {
                    let problem = format!("`outputs` are {n} for {most} classes of a head");
                    let at = ["head".to_owned(), "outputs".to_owned()];
                    return Err(self.source.error(&at, problem));
                }
                Box::new(Classification {
                    head: name.clone(),
                    dim: dim()?,
                    classes,
                    label_smoothing: *label_smoothing,
                    outputs: *outputs,
                    tasks,
                    of_backbone: *heads == Heads::Backbone,
                })
            }
            Head::NextToken {} => Box::new(NextToken),
        })
    }

    /// The classes in the order of their indices: those of the recipe, or all of its files, sorted;
    /// none where no class is predicted.
    ///
    /// # Errors
    /// Where a file cannot be read, or there are fewer than two.
    pub fn classes(&self) -> Result<Vec<String>> {
        let Head::Classification { classes, .. } = &self.head else { return Ok(Vec::new()) };
        if let Some(classes) = classes {
            return Ok(classes.clone());
        }
        let mut found = BTreeSet::new();
        for (_, file) in self.data.tasks.iter() {
            found.extend(self.labels_of(file)?);
        }
        if found.len() < 2 {
            let problem = format!("the data has {} classes; two are needed at least", found.len());
            return Err(self.source.error(&["head".to_owned()], problem));
        }
        let mut found: Vec<String> = found.into_iter().collect();
        // As numbers where all of them are: 10 comes after 9.
        if found.iter().all(|c| c.parse::<i64>().is_ok()) {
            found.sort_by_key(|c| c.parse::<i64>().unwrap_or_default());
        }
        Ok(found)
    }

    fn labels_of(&self, file: &Path) -> Result<BTreeSet<String>> {
        let all = labels(self.data.format, &self.resolve(file), self.wanted())?;
        Ok(all.iter().map(|c| c.trim()).filter(|c| !c.is_empty()).map(str::to_owned).collect())
    }

    /// Each task with the indices of its classes: what a stream says, or its file has.
    fn classes_of_tasks(&self, classes: &[String]) -> Result<Vec<(String, Vec<usize>)>> {
        if let Some(stream) = &self.data.stream {
            return stream.classes(classes);
        }
        let of = |(task, file): (&str, &Path)| {
            let own = self.labels_of(file)?;
            let index = classes.iter().enumerate().filter(|(_, c)| own.contains(*c));
            Ok((task.to_owned(), index.map(|(i, _)| i).collect()))
        };
        self.data.tasks.iter().map(of).collect()
    }
}
