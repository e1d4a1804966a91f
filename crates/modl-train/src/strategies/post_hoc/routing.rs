//! Routers and aggregators on all tasks' data, over modules that stay as they are (survey §6.3:
//! AdapterFusion, post-hoc mixtures). Pfeiffer et al. 2021, arXiv 2005.00247, second stage.

use modl_core::{Error, Result, Select};
use serde::Deserialize;

use super::{Job, Strategy};

/// Routing over frozen modules.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RoutingOnly {}

impl Strategy for RoutingOnly {
    fn kind(&self) -> &'static str {
        "routing"
    }

    fn trains(&self) -> Vec<String> {
        vec!["routers.*".into(), "aggregators.*".into()]
    }

    fn run(&self, job: &mut Job) -> Result<()> {
        let select = Select::any(job.phase.train.train.clone());
        let taken = job.model.params().select(&select).find(|(n, _)| n.starts_with("modules."));
        if let Some((name, _)) = taken {
            let problem = format!("takes `{name}`, but this strategy leaves modules as they are");
            return Err(Error::invalid("train", format!("{problem}; use `joint` to train both")));
        }
        job.train(None, job.phase.train.clone(), job.data)
    }
}
