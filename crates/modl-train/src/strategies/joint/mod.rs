//! Joint training: the data of all tasks at once (survey §6.1).

use modl_core::{Catalog, Result};
use serde::Deserialize;

use super::{Job, Strategy, entry};
use crate::TrainConfig;

/// All tasks' data at once (survey §6.1).
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Joint {}

impl Strategy for Joint {
    fn kind(&self) -> &'static str {
        "joint"
    }

    fn trains(&self) -> Vec<String> {
        TrainConfig::default().train
    }

    fn run(&self, job: &mut Job) -> Result<()> {
        job.train(None, job.phase.train.clone(), job.data)
    }
}

pub(super) fn register(all: &mut Catalog<dyn Strategy>) -> Result<()> {
    all.add(entry::<Joint>("joint", "All tasks at once", "Caruana 1997", "6.1"))
}
