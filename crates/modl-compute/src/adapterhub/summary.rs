//! What a folder says of itself, without the backbone that it is for.

use std::collections::BTreeMap;
use std::path::Path;

use modl_core::{Result, checkpoint};

use super::folder::{PICKLE_FILE, WEIGHTS_FILE};
use super::header::{CONFIG_FILE, Header};
use super::settings;

/// The methods of an adapter and where its parameters stand.
#[derive(Debug, Clone)]
pub struct Summary {
    /// The adapter's name.
    pub name: String,
    /// The kinds of its modules.
    pub kinds: Vec<&'static str>,
    /// The sites, with how many numbers stand there; `` for what all share.
    pub sites: BTreeMap<String, usize>,
}

/// What a key has behind its site.
const MARKS: [&str; 7] = [
    ".adapters.",
    ".loras.",
    ".reft_layer.",
    ".prefix_tuning.pool.",
    "prefix_tuning.prefix_tunings.",
    "prompt_tuning.prompt_tunings.",
    "invertible_adapters.",
];

/// Reads what an AdapterHub folder holds.
///
/// # Errors
/// As [`load`](super::load), for a backbone that it was made for.
pub fn summary(dir: impl AsRef<Path>) -> Result<Summary> {
    let dir = dir.as_ref();
    let header = Header::read(dir)?;
    let read = settings::read(&dir.join(CONFIG_FILE), &header)?;
    let file = checkpoint::open_first(dir, &[WEIGHTS_FILE, PICKLE_FILE])?;
    let mut sites = BTreeMap::new();
    for key in file.names() {
        let (shape, _) = file.info(&key)?;
        let found = MARKS.iter().find_map(|mark| Some((key.split_once(mark)?.0, *mark)));
        let site = match found {
            Some((site, "invertible_adapters." | "prompt_tuning.prompt_tunings.")) => {
                format!("{site}embeddings")
            }
            Some((site, mark)) if mark.starts_with('.') => site.to_owned(),
            _ => String::new(),
        };
        // A prefix stands in each layer again, as it is.
        let copy = key.contains(".prefix_tuning.pool.");
        let numbers = if copy { 0 } else { shape.iter().product::<i64>().max(0) as usize };
        *sites.entry(site).or_insert(0) += numbers;
    }
    let kinds = read.iter().map(|(config, _)| config.kind()).collect();
    Ok(Summary { name: header.name, kinds, sites })
}
