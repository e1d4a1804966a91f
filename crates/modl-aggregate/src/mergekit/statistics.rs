//! The files of statistics that some methods ask for, one for each model.

use std::path::Path;

use modl_core::{Error, Result};

use super::config::MergeConfig;
use crate::merge::{Source, Statistics};

/// Opens the file of each model: the one that the configuration names, from `folder` on, or the one
/// that stands beside the model.
pub(super) fn open(
    sources: &mut [Source],
    kind: Statistics,
    config: &MergeConfig,
    folder: &Path,
) -> Result<()> {
    let of_parts = config.modules.iter().flatten().filter_map(|(_, m)| m.models.as_ref());
    let entries: Vec<_> = config.models.iter().chain(of_parts).flatten().collect();
    for source in sources {
        let mut named = entries.iter().filter(|m| m.model == source.name);
        let path = match named.find_map(|m| m.statistics.as_deref()) {
            Some(path) => folder.join(path),
            None if source.path.is_dir() => source.path.join(kind.file()),
            None => source.path.with_file_name(kind.file()),
        };
        if !path.is_file() {
            let problem = format!(
                "is not there, and `{}` asks for it; make it, or name the file of model `{}` as its \
                 `statistics`",
                config.merge_method, source.name
            );
            return Err(Error::file(path, problem));
        }
        source.beside = Some(Box::new(Source::open(&source.name, &path)?));
    }
    Ok(())
}
