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
use super::packed::Unpacked;
use super::{Take, Wanted};

pub(super) fn read(path: &Path, wanted: Wanted, take: &mut Take) -> Result<()> {
    let mut objects = Objects::new(path, wanted);
    Unpacked::open(path)?.lines(|number, json| {
        let object: Map<String, Value> = serde_json::from_str(json)
            .map_err(|e| objects.wrong(number, format!("is no JSON object: {e}")))?;
        objects.push(number, &object, take)
    })
}
