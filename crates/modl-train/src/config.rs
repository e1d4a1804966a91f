//! The settings of a training, as they stand in a recipe's phase.

use std::collections::BTreeMap;

use modl_core::{Error, Modular, Result, Select};
use serde::{Deserialize, Serialize};

use crate::{LossWeight, OptimizerConfig, Passes, Schedule};

/// How a model is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Patterns of the parameters that are trained: `modules.*`. Everything else is frozen.
    pub train: Vec<String>,
    /// How often each example is seen; 1 where neither `epochs` nor `steps` is given.
    pub epochs: Option<u64>,
    /// The number of steps, instead of `epochs`.
    pub steps: Option<u64>,
    /// Examples in a step.
    pub batch_size: usize,
    /// Computes a batch in groups of rows of similar length, so that less padding is computed; the
    /// gradients are those of the whole batch. Not for routers that look at the whole batch.
    /// Default: false.
    pub split_by_length: bool,
    /// Keeps only the hidden states between the backbone's layers for the backward pass, and
    /// computes the rest again: less memory, about a third more computation, the same gradients.
    /// Default: false.
    pub activation_checkpointing: bool,
    /// How often each batch is passed, for routers that draw their choices. Default: once.
    pub passes: Passes,
    /// The highest learning rate.
    pub lr: f64,
    /// How gradients change parameters.
    pub optimizer: OptimizerConfig,
    /// How the learning rate changes.
    pub schedule: Schedule,
    /// The largest common norm of the gradients; not limited where nothing is said.
    pub clip: Option<f64>,
    /// Factors of `lr` for some of the parameters, by pattern; those of all patterns that fit are
    /// multiplied. LoRA+ (Hayou et al. 2024, arXiv 2402.12354) is `"*.lora_B.*" = 16`. Default:
    /// none.
    pub lr_scale: BTreeMap<String, f64>,
    /// What the losses of routers and those of the backbone's own count, by name, beside the
    /// objective's, which counts 1. Default: what the recipe says at its top; where it says nothing,
    /// what the router's paper has ([`modl_core::Router::loss_weights`]) and what the backbone's
    /// `config.json` has (`aux_loss = router_aux_loss_coef`). A loss of which nobody knows what it
    /// counts is an error.
    pub loss_weights: BTreeMap<String, f64>,
    /// An event each so many steps; none where it is 0.
    pub log_every: u64,
    /// What routers choose is measured on the batch of each so many steps, as an event; never where it
    /// is 0. Default: 10.
    pub log_routing_every: u64,
    /// A saved state each so many steps; at the end only where it is 0.
    pub checkpoint_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            train: ["modules.*", "routers.*", "aggregators.*", "heads.*"].map(Into::into).to_vec(),
            epochs: None,
            steps: None,
            batch_size: 16,
            split_by_length: false,
            activation_checkpointing: false,
            passes: Passes::default(),
            lr: 1e-3,
            optimizer: OptimizerConfig::default(),
            schedule: Schedule::default(),
            clip: Some(1.0),
            lr_scale: BTreeMap::new(),
            loss_weights: BTreeMap::new(),
            log_every: 1,
            log_routing_every: 10,
            checkpoint_every: 0,
        }
    }
}

impl TrainConfig {
    /// The factor of `lr` for the parameter `name`.
    pub fn lr_factor(&self, name: &str) -> f64 {
        let fits = |(p, _): &(&String, &f64)| Select::new(p.as_str()).matches(name);
        self.lr_scale.iter().filter(fits).map(|(_, factor)| factor).product()
    }

    /// What each loss counts that `model` may give, or that is given here.
    pub(crate) fn weights_of_losses(&self, model: &Modular) -> BTreeMap<String, LossWeight> {
        let usual = model.loss_weights().into_iter().map(|(name, w)| (name, w, true));
        let given = self.loss_weights.iter().map(|(name, w)| (name.clone(), *w, false));
        // The later one counts.
        usual
            .chain(given)
            .map(|(name, weight, default)| (name, LossWeight { weight, default }))
            .collect()
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key.
    pub fn check(&self) -> Result<()> {
        if self.epochs.is_some() && self.steps.is_some() {
            return Err(Error::invalid("steps and epochs", "say the same; keep one of them"));
        }
        for (key, fits) in [
            ("batch_size", self.batch_size > 0),
            ("lr", self.lr >= 0.0 && self.lr.is_finite()),
            ("clip", self.clip.is_none_or(|c| c > 0.0)),
        ] {
            if !fits {
                return Err(Error::invalid(key, "is to be a positive number"));
            }
        }
        for (pattern, factor) in &self.lr_scale {
            if !(*factor >= 0.0 && factor.is_finite()) {
                let problem = format!("is {factor}, wants a factor of 0 or more");
                return Err(Error::invalid(format!("lr_scale.\"{pattern}\""), problem));
            }
        }
        for (name, weight) in &self.loss_weights {
            if !(*weight >= 0.0 && weight.is_finite()) {
                let problem = format!("is {weight}, wants a weight of 0 or more");
                return Err(Error::invalid(format!("loss_weights.{name}"), problem));
            }
        }
        self.passes.check()?;
        self.schedule.check()?;
        self.optimizer.build().map(drop)
    }
}
