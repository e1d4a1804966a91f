//! A JSON object in each line.
//!
//! ```text
//! {"id": "1", "score": 0.5, "text": "A cat plays."}
//! {"id": "2", "class": 3, "input": [0, 0.5, 1, 0]}
//! ```
//!
//! Other keys are passed over.

use std::path::Path;

use modl_core::Result;
use serde_json::{Map, Value};

use super::objects::Objects;
use super::{Table, Wanted, text};

pub(super) fn read(path: &Path, wanted: Wanted) -> Result<Table> {
    let whole = text(path)?;
    let mut objects = Objects::new(path, wanted);
    for (n, json) in whole.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let object: Map<String, Value> = serde_json::from_str(json)
            .map_err(|e| objects.wrong(n + 1, format!("is no JSON object: {e}")))?;
        objects.push(n + 1, &object)?;
    }
    objects.finish()
}
