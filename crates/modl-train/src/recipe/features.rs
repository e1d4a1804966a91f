//! Features of examples, which routers and hypernetworks look at (`feature:NAME`).
//!
//! ```toml
//! [data]
//! features = { query = "backbone", typology = { table = "typology.tsv" } }
//! ```
//!
//! A table has a row for each task, its columns parted by tabs:
//!
//! ```text
//! # A comment.
//! task    verb_final    cases
//! eng     0             0
//! tur     1             1
//! ```
//!
//! Each example has its task's row as a feature of that name, which hypernetworks such as `mad_g`
//! (`languages = { feature = "typology", width = 2 }`) read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use modl_core::{Device, Error, Modular, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::Recipe;
use crate::Dataset;
use crate::formats::finite;

/// What a feature of an example is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// The vector of the backbone without modules: [`crate::base_vectors`]. It is computed once, before
    /// anything is trained.
    Backbone,
    /// What is known of the example's task, as numbers: a row of the table in this file.
    Table(PathBuf),
}

impl Recipe {
    /// The examples with what `model`, as it was before training, says of them, where the recipe names
    /// such a feature.
    ///
    /// # Errors
    /// Where a forward pass fails.
    pub fn add_features(&self, model: &Modular, mut data: Dataset) -> Result<Dataset> {
        for (name, feature) in &self.data.features {
            if *feature == Feature::Backbone {
                let rows = crate::base_vectors(model, &data, 64)?;
                let origin = format!("backbone {}", model.backbone().fingerprint()?);
                data = data.with_computed(name.as_str(), rows, origin)?;
            }
        }
        Ok(data)
    }

    /// The data with the rows of their tasks.
    pub(super) fn with_tables(&self, mut data: Dataset) -> Result<Dataset> {
        for (name, feature) in &self.data.features {
            let Feature::Table(file) = feature else { continue };
            let path = self.resolve(file);
            let table = read(&path)?;
            let (mut rows, mut width) = (Vec::new(), 0);
            for example in data.examples() {
                let own = table.get(&example.task).ok_or_else(|| {
                    let unknown = Error::unknown("task", &example.task, table.keys());
                    Error::file(&path, format!("has no row for a task of the data: {unknown}"))
                })?;
                width = own.len() as i64;
                rows.extend_from_slice(own);
            }
            let size = [data.len() as i64, width];
            data =
                data.with_feature(name.clone(), Tensor::from_slice(&rows, &size, Device::Cpu)?)?;
        }
        Ok(data)
    }
}

/// The numbers of each task.
fn read(path: &Path) -> Result<BTreeMap<String, Vec<f32>>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    let lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
    let mut lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let names: Vec<&str> = match lines.next() {
        Some((_, header)) => header.split('\t').skip(1).map(str::trim).collect(),
        None => Vec::new(),
    };
    if names.is_empty() {
        let problem = "has no columns; its first line is `task<TAB>NAME<TAB>NAME…`";
        return Err(Error::file(path, problem));
    }
    let mut table = BTreeMap::new();
    for (number, line) in lines {
        let wrong =
            |problem: String| Err(Error::invalid(format!("{}:{number}", path.display()), problem));
        let mut cells = line.split('\t').map(str::trim);
        let task = cells.next().unwrap_or_default();
        let cells: Vec<&str> = cells.collect();
        if cells.len() != names.len() {
            return wrong(format!("has {} numbers for {} columns", cells.len(), names.len()));
        }
        let mut row = Vec::with_capacity(names.len());
        for (cell, name) in cells.iter().zip(&names) {
            match finite(cell) {
                Some(number) => row.push(number),
                None => return wrong(format!("`{cell}` in `{name}` is not a number")),
            }
        }
        if table.insert(task.to_owned(), row).is_some() {
            return wrong(format!("has the task `{task}` again"));
        }
    }
    Ok(table)
}
