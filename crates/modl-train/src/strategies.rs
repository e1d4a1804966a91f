//! Training strategies (survey §6): which parameters are trained on which data, in which order.
//!
//! | name | what is trained |
//! |---|---|
//! | `joint` | everything selected, on the data of all tasks at once |
//! | `per_task` | each module alone on the task of its name, after the fact |
//! | `routing` | routers and aggregators over modules that stay as they are |

use std::path::Path;

use modl_aggregate::WeightedSum;
use modl_core::{Catalog, Entry, Error, Modular, Result, ResultExt, Seed, Select, Tensor, no_grad};
use modl_route::Fixed;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{Batch, Dataset, Methods, Objective, Phase, Recipe, Sink, TrainConfig, Trainer};

/// A way to train a modular network.
pub trait Strategy: std::fmt::Debug + Send + Sync {
    /// The name in recipes: `joint`.
    fn kind(&self) -> &'static str;

    /// The patterns of what is trained where a phase has no `train`.
    fn trains(&self) -> Vec<String>;

    /// Trains. Called again after a stop, it goes on from what it has saved under `job.folder`.
    fn run(&self, job: &mut Job) -> Result<()>;
}

/// What a strategy works with.
pub struct Job<'a> {
    /// The model with all modules attached.
    pub model: &'a mut Modular,
    /// What is predicted.
    pub objective: &'a dyn Objective,
    /// The examples for training.
    pub data: &'a Dataset,
    /// The settings.
    pub phase: &'a Phase,
    /// Where states are saved.
    pub folder: &'a Path,
    /// Who is told.
    pub sink: &'a mut dyn Sink,
    pub(crate) recipe: &'a Recipe,
    pub(crate) methods: &'a Methods,
}

impl std::fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("phase", self.phase).field("folder", &self.folder).finish()
    }
}

impl Job<'_> {
    /// Where the random numbers of this phase come from.
    pub fn seed(&self) -> Seed {
        self.recipe.seed().child(&self.phase.name)
    }

    /// Trains what `config.train` takes on `data`; `part` names a part of the phase. What was
    /// trained before a stop is taken up.
    pub fn train(&mut self, part: Option<&str>, config: TrainConfig, data: &Dataset) -> Result<()> {
        let (name, folder, seed) = match part {
            None => (self.phase.name.clone(), self.folder.to_owned(), self.seed()),
            Some(part) => (
                format!("{}/{part}", self.phase.name),
                self.folder.join(part),
                self.seed().child(part),
            ),
        };
        Trainer::new(&name, self.model, self.objective, config, seed)?.keep_in(folder).train(
            data,
            &Batch::describe,
            self.sink,
        )
    }

    /// Runs `work` while one module alone is active for every input, whatever the router says, and
    /// puts back the router and the aggregator as they were.
    pub fn with_only(
        &mut self,
        module: &str,
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let learned = Select::any(["routers.*", "aggregators.*"]);
        let before: Vec<(String, Tensor)> =
            self.model.params().select(&learned).map(|(n, t)| (n.to_owned(), t.clone())).collect();
        // Modules may stand at different sites.
        let only = Fixed { skip_absent: true, ..Fixed::modules([module]) };
        self.model.route(Box::new(only), false)?;
        self.model.aggregate(Box::new(WeightedSum::default()))?;
        let result = work(self);
        self.recipe.route(self.model, self.methods)?;
        for (name, t) in before {
            let now = self.model.params().get(&name)?;
            no_grad(|| now.clone().copy_from(&t)).at(&name)?;
        }
        result
    }
}

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

/// Each module alone on the data of the task that has its name, one after the other (survey §6.3:
/// post-hoc adaptation). In the patterns of `train`, `{module}` stands for each module's name.
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
        for module in &modules {
            let data = job.data.of_task(module).at(format!("modules.{module}"))?;
            let mut config = job.phase.train.clone();
            for pattern in &mut config.train {
                *pattern = pattern.replace("{module}", module);
            }
            job.with_only(module, |job| job.train(Some(module), config, &data))?;
        }
        Ok(())
    }
}

/// Routers and aggregators on all tasks' data, over modules that stay as they are (survey §6.3:
/// AdapterFusion, post-hoc mixtures).
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

/// The strategies of this crate.
pub(crate) fn catalog() -> Result<Catalog<dyn Strategy>> {
    let mut all = Catalog::new("strategy");
    all.add(entry::<Joint>("joint", "All tasks at once", "Caruana 1997", "6.1"))?;
    all.add(entry::<PerTask>(
        "per_task",
        "Each module alone on its task",
        "Pfeiffer et al. 2021, arXiv 2005.00247",
        "6.3",
    ))?;
    all.add(entry::<RoutingOnly>(
        "routing",
        "Routing over frozen modules",
        "Pfeiffer et al. 2021, arXiv 2005.00247",
        "6.3",
    ))?;
    Ok(all)
}

fn entry<S: Strategy + DeserializeOwned + 'static>(
    name: &'static str,
    title: &'static str,
    citation: &'static str,
    section: &'static str,
) -> Entry<dyn Strategy> {
    let parse = |config| Ok(Box::new(modl_core::from_json::<S>("strategy", config)?) as _);
    Entry { name, title, citation, section, parse }
}
