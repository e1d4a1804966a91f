//! A safetensors file with the examples of a task.
//!
//! | tensor | shape | what it is |
//! |---|---|---|
//! | `input_values` or `pixel_values` | `[examples, …]` | what the network reads; bytes become 0 … 1 |
//! | `score` or `class` | `[examples]` | what is right |
//! | `id` | `[examples]` | whole numbers; counted from 0 where it is not there |

use std::path::Path;

use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Error, Kind, Result, Tensor};

use super::{Line, Table, Wanted};

const INPUTS: [&str; 2] = ["input_values", "pixel_values"];

pub(super) fn read(path: &Path, wanted: Wanted) -> Result<Table> {
    let file = Checkpoint::open(path)?;
    let names = file.names();
    let there = |name: &str| names.iter().any(|n| n == name);
    let input = INPUTS.into_iter().find(|name| there(name)).ok_or_else(|| {
        let known = names.join(", ");
        Error::file(path, format!("has none of {}, but {known}", INPUTS.join(" and ")))
    })?;
    let rows = file.tensor(input, Device::Cpu)?;
    let examples = rows.size().first().copied().unwrap_or(0);
    let one_each = |name: &str| -> Result<Vec<String>> {
        if !there(name) {
            return Err(Error::unknown(format!("tensor of {}", path.display()), name, &names));
        }
        let own = file.tensor(name, Device::Cpu)?;
        if own.size() != [examples] {
            let problem = format!("`{name}` is {:?}, `{input}` has {examples} rows", own.size());
            return Err(Error::file(path, problem));
        }
        as_written(&own)
    };
    let labels = one_each(wanted.label())?;
    let ids = match wanted.columns.id.is_some() || there(wanted.id()) {
        true => one_each(wanted.id())?,
        false => (0..examples).map(|i| i.to_string()).collect(),
    };
    let lines = labels.into_iter().zip(ids).enumerate();
    let line = |(i, (label, id))| Line { number: i + 1, id, label, text: String::new() };
    let rows = match rows.kind() {
        Kind::Uint8 => rows,
        _ => rows.to_kind(Kind::Float)?,
    };
    Ok(Table {
        path: path.to_owned(),
        form: "the number is that of the row, from 1".into(),
        lines: lines.map(line).collect(),
        numbers: Some((input, rows)),
    })
}

/// Numbers as one writes them.
fn as_written(t: &Tensor) -> Result<Vec<String>> {
    Ok(match t.kind() {
        Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double => {
            t.to_vec::<f64>()?.iter().map(f64::to_string).collect()
        }
        _ => t.to_vec::<i64>()?.iter().map(i64::to_string).collect(),
    })
}
