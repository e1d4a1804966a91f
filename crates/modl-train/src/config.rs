//! The settings of a training, as they stand in a recipe's phase.

use std::collections::BTreeMap;

use modl_core::{Error, Modular, Result, Select, Tensor};
use serde::{Deserialize, Serialize};

use crate::optim::lora_plus::{self, Ratio};
use crate::{LossWeight, OnNan, OptimizerConfig, Passes, Sampling, Schedule, Stop};

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
    /// How often each task is seen: `{ temperature = 5.0 }`, with p ∝ n^(1⁄5) of its n examples, or
    /// `"uniform"`. Default: each example once in an epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling: Option<Sampling>,
    /// The batches of a step, each passed forwards and back by itself, so that only one of them is in
    /// memory: the gradients are those of one batch of `accumulate` · `batch_size` examples, but for
    /// dropout, which each draws for itself, and for routers that look at the whole batch. Strategies
    /// that need the gradients of single tasks, or losses of their own, pass all rows at once. Default: 1.
    #[serde(skip_serializing_if = "is_one")]
    pub accumulate: u64,
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
    /// The largest common norm of the gradients, to which longer ones are shortened; default 1. A large
    /// number, such as 1e9, leaves them as they are.
    pub clip: Option<f64>,
    /// Factors of `lr` for some of the parameters, by pattern; those of all patterns that fit are
    /// multiplied, with that of LoRA+, too. Default: none.
    pub lr_scale: BTreeMap<String, f64>,
    /// LoRA+ (Hayou et al. 2024, arXiv 2402.12354): how many times faster than A the B of a LoRA
    /// learns, by PEFT's name `lora_B` (weight and bias), such as 16. PEFT's
    /// `loraplus_lr_ratio` is also for all other vectors that are trained: name those in
    /// `lr_scale`. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_plus_ratio: Option<f64>,
    /// How many times faster than `lr` the two factors of a LoRA at an embedding learn
    /// (`lora_embedding_A`, `lora_embedding_B`), beside `lora_plus_ratio`: what is
    /// `loraplus_lr_embedding ⁄ lr` in PEFT, whose default is 10⁻⁶ ⁄ `lr`. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_plus_embedding_ratio: Option<f64>,
    /// What the losses of routers and those of the backbone's own count, by name, beside the
    /// objective's, which counts 1. Default: what the recipe says at its top; where it says nothing,
    /// what the router's paper has ([`modl_core::Router::loss_weights`]) and what the backbone's
    /// `config.json` has (`aux_loss = router_aux_loss_coef`). A loss of which nobody knows what it
    /// counts is an error.
    pub loss_weights: BTreeMap<String, f64>,
    /// The decay of an exponential moving average of the trained parameters, such as 0.999: the
    /// average is what is measured and given in the end, where training started has no part in it.
    /// Default: the parameters of the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// Ends training where a metric on watched examples does not become better any more, and gives the
    /// best parameters. Default: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// What is done in a step whose loss or gradients are not finite. Default: training stops.
    #[serde(skip_serializing_if = "OnNan::is_default")]
    pub on_nan: OnNan,
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
            accumulate: 1,
            sampling: None,
            split_by_length: false,
            activation_checkpointing: false,
            passes: Passes::default(),
            lr: 1e-3,
            optimizer: OptimizerConfig::default(),
            schedule: Schedule::default(),
            clip: Some(1.0),
            lr_scale: BTreeMap::new(),
            lora_plus_ratio: None,
            lora_plus_embedding_ratio: None,
            loss_weights: BTreeMap::new(),
            ema: None,
            stop: None,
            on_nan: OnNan::default(),
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
        let own: f64 = self.lr_scale.iter().filter(fits).map(|(_, factor)| factor).product();
        let plus = self.lora_plus();
        own * plus.iter().filter(|r| (r.fits)(name)).map(|r| r.ratio).product::<f64>()
    }

    /// Refuses factors of the learning rate that none of the parameters `trained` has.
    pub(crate) fn check_factors(&self, trained: &[(String, Tensor)]) -> Result<()> {
        let problem = "takes none of the trained parameters; see `train`";
        for pattern in self.lr_scale.keys() {
            let select = Select::new(pattern.as_str());
            if !trained.iter().any(|(name, _)| select.matches(name)) {
                return Err(Error::invalid(format!("lr_scale.\"{pattern}\""), problem));
            }
        }
        for Ratio { key, fits, .. } in self.lora_plus() {
            if !trained.iter().any(|(name, _)| fits(name)) {
                return Err(Error::invalid(key, problem));
            }
        }
        Ok(())
    }

    fn lora_plus(&self) -> Vec<Ratio> {
        lora_plus::ratios(self.lora_plus_ratio, self.lora_plus_embedding_ratio)
    }

    /// With a name for a placeholder in the patterns of `train`.
    pub(crate) fn naming(mut self, placeholder: &str, name: &str) -> Self {
        self.train.iter_mut().for_each(|p| *p = p.replace(placeholder, name));
        self
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
            ("accumulate", self.accumulate > 0),
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
        for Ratio { key, ratio, .. } in self.lora_plus() {
            if !(ratio > 0.0 && ratio.is_finite()) {
                return Err(Error::invalid(key, format!("is {ratio}, wants a factor above 0")));
            }
        }
        for (name, weight) in &self.loss_weights {
            if !(*weight >= 0.0 && weight.is_finite()) {
                let problem = format!("is {weight}, wants a weight of 0 or more");
                return Err(Error::invalid(format!("loss_weights.{name}"), problem));
            }
        }
        self.sampling.map_or(Ok(()), Sampling::check)?;
        if let Some(decay) = self.ema
            && !(0.0..1.0).contains(&decay)
        {
            return Err(Error::invalid(
                "ema",
                format!("is {decay}, wants a decay from 0 to below 1"),
            ));
        }
        self.stop.as_ref().map_or(Ok(()), Stop::check)?;
        self.passes.check()?;
        self.schedule.check()?;
        self.optimizer.build().map(drop)
    }
}

fn is_one(n: &u64) -> bool {
    *n == 1
}
