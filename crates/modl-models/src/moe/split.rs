//! The names on disk of what is in memory: the other way round than [`super::names`].

use modl_core::{Error, Result, Tensor};
use serde_json::Value;

use super::{DOWN, GATE_UP, WI, WO};
use crate::ExpertNames;

/// Where the parts of an expert's matrix go, one above the other.
type Parts = (&'static str, &'static [&'static str]);

const MIXTRAL: [Parts; 2] = [(GATE_UP, &["w1", "w3"]), (DOWN, &["w2"])];
const OTHERS: [Parts; 2] = [(GATE_UP, &["gate_proj", "up_proj"]), (DOWN, &["down_proj"])];
const SWITCH: [Parts; 2] = [(WI, &["wi"]), (WO, &["wo"])];

/// The tensors of a file for the parameter `name` of a backbone with the settings `config`.
///
/// # Errors
/// Where `names` are none of the architecture's.
pub(crate) fn on_disk(
    name: &str,
    t: &Tensor,
    config: &Value,
    names: ExpertNames,
) -> Result<Vec<(String, Tensor)>> {
    let (parts, expert) = match config.get("model_type").and_then(Value::as_str) {
        Some("mixtral") => (MIXTRAL, ""),
        Some("switch_transformers") => (SWITCH, "expert_"),
        _ => (OTHERS, ""),
    };
    let stacked = name.rsplit_once('.').filter(|(path, _)| path.ends_with(".experts"));
    let found = stacked.and_then(|(path, own)| {
        let (_, ends) = parts.into_iter().find(|(matrix, _)| *matrix == own)?;
        Some((path, ends))
    });
    let former = |name: &str| match parts == MIXTRAL && names == ExpertNames::Each {
        true => name.replace(".mlp.", ".block_sparse_moe."),
        false => name.to_owned(),
    };
    let Some((path, ends)) = found else { return Ok(vec![(former(name), t.clone())]) };
    if names == ExpertNames::Fused {
        return match parts == SWITCH {
            true => Err(Error::unsupported(
                format!("one tensor for `{name}` in a file of Switch Transformers"),
                "write each expert by itself: ExpertNames::Each",
            )),
            false => Ok(vec![(name.to_owned(), t.clone())]),
        };
    }
    let path = former(path);
    let mut all = Vec::new();
    for (e, matrix) in t.unbind(0)?.iter().enumerate() {
        let rows = matrix.len_of(0) / ends.len() as i64;
        for (part, end) in matrix.split(&vec![rows; ends.len()], 0)?.into_iter().zip(ends) {
            all.push((format!("{path}.{expert}{e}.{end}.weight"), part.contiguous()?));
        }
    }
    Ok(all)
}
