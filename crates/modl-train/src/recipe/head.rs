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
//!
//! [head]
//! type = "next_token"         # id<TAB>prompt<TAB>text; the prompt is not counted, and may be empty
//! ```

use std::collections::BTreeSet;

use modl_core::{Error, Modular, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Recipe;
use super::source::Source;
use crate::objective::Metric;
use crate::tsv::read_rows;
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
    },
    /// Each token of a text from those before it: [`NextToken`].
    NextToken {},
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
        let Head::Classification { classes, label_smoothing, .. } = self else { return Ok(()) };
        let wrong =
            |key: &str, problem| source.error(&["head".to_owned(), key.to_owned()], problem);
        if !(0.0..1.0).contains(label_smoothing) {
            return Err(wrong("label_smoothing", "`label_smoothing` is to be in [0, 1)"));
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
            Head::Classification { name, label_smoothing, .. } => Box::new(Classification {
                head: name.clone(),
                dim: dim()?,
                classes: self.classes()?,
                label_smoothing: *label_smoothing,
            }),
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
        for file in self.data.tasks.values() {
            let rows = read_rows(self.resolve(file), "class", |c| Ok(c.trim().to_owned()))?;
            found.extend(rows.into_iter().map(|row| row.score).filter(|c| !c.is_empty()));
        }
        if found.len() < 2 {
            let problem = format!("the data has {} classes; two are needed at least", found.len());
            return Err(self.source.error(&["head".to_owned()], problem));
        }
        Ok(found.into_iter().collect())
    }
}
