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

use super::{Dense, Form, Line, Take, Wanted};
use crate::stored_rows::Numbers;

const INPUTS: [&str; 2] = ["input_values", "pixel_values"];

/// The numbers that are read at once.
const BLOCK: usize = 1 << 18;

/// A file with what is said of each example.
pub(super) struct Columns {
    file: Checkpoint,
    input: &'static str,
    pub(super) labels: Vec<String>,
    pub(super) ids: Vec<String>,
}

impl Columns {
    pub(super) fn open(path: &Path, wanted: Wanted) -> Result<Self> {
        let file = Checkpoint::open(path)?;
        let names = file.names();
        let there = |name: &str| names.iter().any(|n| n == name);
        let input = INPUTS.into_iter().find(|name| there(name)).ok_or_else(|| {
            let known = names.join(", ");
            Error::file(path, format!("has none of {}, but {known}", INPUTS.join(" and ")))
        })?;
        let examples = file.info(input)?.0.first().copied().unwrap_or(0);
        let one_each = |name: &str| -> Result<Vec<String>> {
            if !there(name) {
                return Err(Error::unknown(format!("tensor of {}", path.display()), name, &names));
            }
            let size = file.info(name)?.0;
            if size != [examples] {
                let problem = format!("`{name}` is {size:?}, `{input}` has {examples} rows");
                return Err(Error::file(path, problem));
            }
            as_written(&file.tensor(name, Device::Cpu)?)
        };
        let labels = one_each(wanted.label())?;
        let ids = match wanted.columns.id.is_some() || there(wanted.id()) {
            true => one_each(wanted.id())?,
            false => (0..examples).map(|i| i.to_string()).collect(),
        };
        Ok(Columns { file, input, labels, ids })
    }
}

pub(super) fn read(path: &Path, wanted: Wanted, take: &mut Take) -> Result<()> {
    let Columns { file, input, labels, ids } = Columns::open(path, wanted)?;
    let (size, kind) = file.info(input)?;
    let shape = size.get(1..).unwrap_or_default();
    let width = shape.iter().product::<i64>() as usize;
    if shape.is_empty() || width == 0 {
        return Err(Error::file(
            path,
            format!("`{input}` is {size:?}; a row of numbers for each example is wanted"),
        ));
    }
    let form = Form::new(path, "the number is that of the row, from 1");
    let mut lines = labels.into_iter().zip(ids).enumerate();
    let rows: Vec<i64> = (0..size.first().copied().unwrap_or(0)).collect();
    for block in rows.chunks((BLOCK / width).max(1)) {
        let numbers = file.rows(input, block, Device::Cpu)?;
        let (bytes, floats) = match kind {
            Kind::Uint8 => (numbers.to_vec::<u8>()?, Vec::new()),
            _ => (Vec::new(), numbers.to_vec::<f32>()?),
        };
        let all = bytes
            .chunks(width)
            .map(Numbers::Bytes)
            .chain(floats.chunks(width).map(Numbers::Floats));
        for (numbers, (i, (label, id))) in all.zip(&mut lines) {
            let line = Line { number: i + 1, id, label, text: String::new() };
            take(&form, line, Some(Dense { input, shape, numbers }))?;
        }
    }
    Ok(())
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
