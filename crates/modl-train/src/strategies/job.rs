//! What a strategy works with.

use std::path::Path;

use modl_aggregate::WeightedSum;
use modl_core::{Modular, Result, Seed};
use modl_route::Fixed;
use serde_json::Value;

use crate::recipe::routing::{learned, put_back};
use crate::{
    Batch, Dataset, Methods, Objective, Phase, Plain, Recipe, Sink, StepRule, TrainConfig, Trainer,
};

/// What a strategy works with.
pub struct Job<'a> {
    /// The model with all modules attached.
    pub model: &'a mut Modular,
    /// What is predicted.
    pub objective: &'a dyn Objective,
    /// The examples for training.
    pub data: &'a Dataset,
    /// Examples that are held out, for strategies that measure on their way.
    pub test: Option<&'a Dataset>,
    /// The settings.
    pub phase: &'a Phase,
    /// Where states are saved.
    pub folder: &'a Path,
    /// Who is told.
    pub sink: &'a mut dyn Sink,
    /// The configuration of the router that the strategy has put in the place of the recipe's.
    pub(crate) router: Option<Value>,
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
    ///
    /// # Errors
    /// As [`Trainer::train`].
    pub fn train(&mut self, part: Option<&str>, config: TrainConfig, data: &Dataset) -> Result<()> {
        self.train_by(&mut Plain, part, config, data)
    }

    /// [`Job::train`], each step by a rule.
    ///
    /// # Errors
    /// As [`Trainer::train_by`].
    pub fn train_by(
        &mut self,
        rule: &mut dyn StepRule,
        part: Option<&str>,
        config: TrainConfig,
        data: &Dataset,
    ) -> Result<()> {
        let (name, folder, seed) = match part {
            None => (self.phase.name.clone(), self.folder.to_owned(), self.seed()),
            Some(part) => (
                format!("{}/{part}", self.phase.name),
                self.folder.join(part),
                self.seed().child(part),
            ),
        };
        let trainer = Trainer::new(&name, self.model, self.objective, config, seed)?;
        trainer.keep_in(folder).train_by(rule, data, &Batch::describe, self.sink)
    }

    /// Puts a router in the place of the recipe's, by its configuration with its `type`. It is kept
    /// with the results.
    ///
    /// # Errors
    /// Where there is no such router, or it does not fit the modules.
    pub fn route(&mut self, config: Value) -> Result<()> {
        self.model.route(self.methods.registry.routers.parse(&config)?, false)?;
        self.router = Some(config);
        Ok(())
    }

    /// Runs `work` while one module alone is active for every input, whatever the router says, and
    /// puts back the router and the aggregator as they were.
    ///
    /// # Errors
    /// Where there is no such module, or `work` fails.
    pub fn with_only(
        &mut self,
        module: &str,
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.with_other_routing(|job| {
            // Modules may stand at different sites.
            let only = Fixed { skip_absent: true, ..Fixed::modules([module]) };
            job.model.route(Box::new(only), false)?;
            job.model.aggregate(Box::new(WeightedSum::default()))?;
            work(job)
        })
    }

    /// Runs `work`, which may give the model another router and aggregator, and puts back the recipe's
    /// as they were.
    pub(super) fn with_other_routing<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let before = learned(self.model);
        let result = work(self);
        self.recipe.route_in(self.phase, self.model, self.methods)?;
        put_back(self.model, &before)?;
        result
    }
}
