//! All tasks' data at once (Caruana 1997, *Multitask learning*; survey §6.1): the mean over all rows.

use modl_core::Result;
use serde::Deserialize;

use super::{Job, Strategy};
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
