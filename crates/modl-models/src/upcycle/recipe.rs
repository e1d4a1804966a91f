//! What a mixture is made of, under the names of `mergekit-moe`.

use std::path::PathBuf;

use modl_core::{Error, Kind, Result};
use serde::Deserialize;

use super::target::Target;

/// The settings of an upcycling: a `mergekit-moe` file.
///
/// Fields that are not known here are errors, and so are those that are known and not supported.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upcycling {
    /// The folder of the model from which all but the experts comes.
    pub base_model: PathBuf,
    /// The models whose feed-forward networks become the experts, in their order.
    pub experts: Vec<ExpertSource>,
    /// How gates are made; `hidden` where it is not given.
    #[serde(default)]
    pub gate_mode: GateMode,
    /// The kind of the mixture's tensors; that of the base model where it is not given.
    #[serde(default)]
    pub dtype: Option<Dtype>,
    /// How many experts a token has, 2.
    #[serde(default = "two")]
    pub experts_per_token: usize,
    /// The expert that every token has; one at most, and none in a Mixtral.
    #[serde(default)]
    pub shared_experts: Option<Vec<ExpertSource>>,
    /// What is to be written: `mixtral`, `deepseek` or `qwen`, or how one of them begins. Where it is
    /// not given it is the first of them that can have the shared expert that there is.
    #[serde(default)]
    pub architecture: Option<String>,
}

fn two() -> usize {
    2
}

/// One expert.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertSource {
    /// The folder of the model.
    pub source_model: PathBuf,
    /// Texts that are to be sent to it.
    #[serde(default)]
    pub positive_prompts: Option<Vec<String>>,
    /// Texts that are not.
    #[serde(default)]
    pub negative_prompts: Option<Vec<String>>,
    /// The standard deviation of noise on its matrices, drawn from the seed; none where not given.
    #[serde(default)]
    pub noise_scale: Option<f64>,
    /// What its last matrix is multiplied by; 1 where not given.
    #[serde(default)]
    pub residual_scale: Option<f64>,
}

impl ExpertSource {
    pub(super) fn has_prompts(&self) -> bool {
        self.positive_prompts.as_ref().is_some_and(|all| !all.is_empty())
    }
}

/// How the gates `[experts, hidden]` of each layer are made.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateMode {
    /// What goes into the layer at the last token of the expert's positive prompts, averaged over
    /// them, less the same of its negative ones, of length 1.
    #[default]
    #[serde(alias = "hidden_last")]
    Hidden,
    /// The sum of the vectors of all words of the positive prompts, of length 1, less the same of
    /// the negative ones, again of length 1; the same in all layers.
    CheapEmbed,
    /// Normal with standard deviation 1.
    Random,
    /// Uniform in ±1⁄√hidden, as linear layers start.
    UniformRandom,
    /// Normal with this standard deviation; `mergekit-moe` does not have it.
    #[serde(skip)]
    Normal(f64),
}

/// The kinds that a file may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits.
    #[serde(alias = "fp32")]
    Float32,
    /// 16 bits with the range of 32.
    #[serde(alias = "bf16")]
    Bfloat16,
    /// 16 bits.
    #[serde(alias = "fp16")]
    Float16,
}

impl Dtype {
    pub(super) fn kind(self) -> Kind {
        match self {
            Dtype::Float32 => Kind::Float,
            Dtype::Bfloat16 => Kind::BFloat16,
            Dtype::Float16 => Kind::Half,
        }
    }
}

impl Upcycling {
    /// Copies of one model as `experts` experts, with small gates that training is to change:
    /// normal with standard deviation 0.02.
    pub fn copies(model: impl Into<PathBuf>, experts: usize, experts_per_token: usize) -> Self {
        let base_model = model.into();
        let one = ExpertSource { source_model: base_model.clone(), ..ExpertSource::default() };
        Upcycling {
            base_model,
            experts: vec![one; experts],
            gate_mode: GateMode::Normal(0.02),
            dtype: None,
            experts_per_token,
            shared_experts: None,
            architecture: None,
        }
    }

    /// Whether gates are made of prompts.
    pub(super) fn prompted(&self) -> bool {
        matches!(self.gate_mode, GateMode::Hidden | GateMode::CheapEmbed)
    }

    /// The experts that every token has.
    pub(super) fn shared(&self) -> &[ExpertSource] {
        self.shared_experts.as_deref().unwrap_or_default()
    }

    /// What is to be written.
    ///
    /// # Errors
    /// Where a setting is out of range, or nothing can have what is asked for.
    pub(super) fn check(&self) -> Result<Target> {
        let target = Target::of(self)?;
        let (experts, k) = (self.experts.len(), self.experts_per_token);
        if k < 1 || k > experts {
            let problem = format!("{k} is to be from 1 to the number of experts, {experts}");
            return Err(Error::invalid("experts_per_token", problem));
        }
        let lora = |p: &PathBuf| p.to_string_lossy().contains('+') && !p.exists();
        let paths = self.experts.iter().chain(self.shared()).map(|e| &e.source_model);
        if let Some(path) = std::iter::once(&self.base_model).chain(paths).find(|p| lora(p)) {
            return Err(Error::unsupported(
                format!("the model `{}` with an adapter", path.display()),
                "merge it into its base first (`modl convert --to model`)",
            ));
        }
        let finite = |x: Option<f64>| x.is_none_or(f64::is_finite);
        let routed = self.experts.iter().enumerate().map(|(e, own)| ("experts", e, own));
        let shared = self.shared().iter().enumerate().map(|(e, own)| ("shared_experts", e, own));
        for (list, e, expert) in routed.chain(shared) {
            let place = |name: &str| format!("{list}.{e}.{name}");
            if expert.noise_scale.is_some_and(|s| s < 0.0) || !finite(expert.noise_scale) {
                return Err(Error::invalid(place("noise_scale"), "is to be 0 or more"));
            }
            if !finite(expert.residual_scale) {
                return Err(Error::invalid(place("residual_scale"), "is to be a number"));
            }
            if list == "experts" && self.prompted() && !expert.has_prompts() {
                let problem = "are none; gates are made of them unless `gate_mode` is `random`";
                return Err(Error::invalid(place("positive_prompts"), problem));
            }
        }
        let prompts = |e: &ExpertSource| {
            (e.positive_prompts.clone(), e.negative_prompts.clone().unwrap_or_default())
        };
        let mut all = self.experts.iter().map(prompts);
        let first = all.next();
        if self.prompted() && experts > 1 && all.all(|p| Some(p) == first) {
            let problem = "are the same for all experts, which would get the same gates";
            return Err(Error::invalid("positive_prompts", problem));
        }
        Ok(target)
    }
}
