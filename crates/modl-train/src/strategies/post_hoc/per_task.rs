//! Each module alone on the data of the task that has its name, one after the other (survey §6.3:
//! post-hoc adaptation). Pfeiffer et al. 2021, *AdapterFusion*, arXiv 2005.00247, first stage.

use modl_core::{Error, Result, ResultExt};
use serde::Deserialize;

use super::{Job, Strategy};

/// Each module alone on its task; where the phase says `tasks`, the modules of those alone. In the
/// patterns of `train`, `{module}` stands for each module's name.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PerTask {}

impl Strategy for PerTask {
    fn kind(&self) -> &'static str {
        "per_task"
    }

    fn trains(&self) -> Vec<String> {
        vec!["modules.{module}.*".into()]
    }

    fn run(&self, job: &mut Job) -> Result<()> {
        let modules: Vec<String> = job.model.modules().into_iter().map(str::to_owned).collect();
        let wanted = |module: &&String| job.phase.tasks.as_ref().is_none_or(|t| t.contains(module));
        let modules: Vec<&String> = modules.iter().filter(wanted).collect();
        if let Some(task) = job.phase.tasks.iter().flatten().find(|t| !modules.contains(t)) {
            return Err(Error::unknown("module of a task", task, job.model.modules()));
        }
        for module in modules {
            let data = job.data.of_task(module).at(format!("modules.{module}"))?;
            let config = job.phase.train.clone().naming("{module}", module);
            job.with_only(module, |job| job.train(Some(module), config, &data))?;
        }
        Ok(())
    }
}
