//! The settings of mixtures, as in the `config.json` of Mixtral, OLMoE, Qwen2-MoE, DeepSeek-MoE and
//! DeepSeek-V3.

use modl_core::{Error, Result};
use serde_json::Value;

use crate::settings::{Fixed, check_fixed, check_positive, check_weight, refuse};

/// What a mixture has more than a feed-forward network.
#[derive(Debug, Clone, PartialEq)]
pub struct MixtureConfig {
    /// The number of experts: `num_local_experts` of Mixtral (8), `num_experts` of OLMoE (64) and
    /// Qwen2-MoE (60), `n_routed_experts` of DeepSeek-V3 (256).
    pub experts: i64,
    /// How many of them each token has, `num_experts_per_tok`: 2, 8, 4 and 8.
    pub top_k: i64,
    /// Width within an expert: `moe_intermediate_size`, and `intermediate_size` of Mixtral and
    /// OLMoE.
    pub width: i64,
    /// How experts are chosen and weighed.
    pub scores: RouterScores,
    /// Whether the gates of a token's experts are divided by their sum: so in Mixtral, and where
    /// `norm_topk_prob` says so; where it is not given it is true in DeepSeek-V3 alone.
    pub normalised: bool,
    /// What gates are multiplied by at last: `routed_scaling_factor` of DeepSeek-V3, else 1.
    pub scale: f64,
    /// The expert that every token has.
    pub shared: Option<SharedExpert>,
    /// Which layers have a mixture.
    pub layers: SparseLayers,
    /// In training x is multiplied by numbers from [1 − jitter, 1 + jitter]: `router_jitter_noise`
    /// of Mixtral, else 0.
    pub jitter: f64,
    /// Whether `router_logits.N` and, but for DeepSeek-V3, `aux_loss` are among the outputs:
    /// `output_router_logits`.
    pub router_logits: bool,
    /// What the auxiliary loss counts in training: `router_aux_loss_coef`, 0.001, and 0.01 in
    /// OLMoE. `None` where there is none, as in DeepSeek-V3.
    pub loss_weight: Option<f64>,
}

/// How experts are chosen and weighed by a router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterScores {
    /// softmax over all experts, for both.
    Softmax,
    /// σ of each logit weighs; with the expert's bias added it chooses, among those of the groups
    /// whose two best sum to most (DeepSeek-AI 2024, arXiv 2412.19437, §2.1.2).
    Sigmoid {
        /// The number of groups into which experts are cut, `n_group`.
        groups: i64,
        /// The number of groups in which a token may choose, `topk_group`.
        kept: i64,
    },
}

/// The expert that every token has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExpert {
    /// Width within it: `shared_expert_intermediate_size`, or `n_shared_experts` times an expert's.
    pub width: i64,
    /// Whether it has a gate of its own, σ(x wᵀ), as in Qwen2-MoE.
    pub gated: bool,
}

impl SharedExpert {
    /// Its name within the mixture.
    pub(crate) fn name(self) -> &'static str {
        if self.gated { "shared_expert" } else { "shared_experts" }
    }
}

/// Which layers have a mixture for their feed-forward network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseLayers {
    /// The layers before it are dense: `first_k_dense_replace`, 0.
    pub first: usize,
    /// Every so-manieth layer: `decoder_sparse_step`, 1.
    pub step: usize,
    /// Layers that are dense nevertheless: `mlp_only_layers`, none.
    pub dense: Vec<usize>,
}

impl SparseLayers {
    const ALL: SparseLayers = SparseLayers { first: 0, step: 1, dense: Vec::new() };

    /// Whether layer `n` has a mixture.
    pub fn has(&self, n: usize) -> bool {
        n >= self.first && (n + 1).is_multiple_of(self.step.max(1)) && !self.dense.contains(&n)
    }
}

/// Settings that would change the result, and their only supported value.
const FIXED: [(&str, &[Fixed]); 5] = [
    ("mixtral", &[]),
    ("olmoe", &[]),
    (
        "qwen2_moe",
        &[
            ("use_sliding_window", |v| v == false, "only attention to all earlier tokens is"),
            ("layer_types", all_full, "only attention to all earlier tokens is"),
        ],
    ),
    (
        "deepseek",
        &[
            ("moe_layer_freq", |v| v == 1, "only a mixture in every layer is"),
            ("scoring_func", |v| v == "softmax", "only `softmax` is"),
        ],
    ),
    (
        "deepseek_v3",
        &[
            ("moe_layer_freq", |v| v == 1, "only a mixture in every layer is"),
            ("scoring_func", |v| v == "sigmoid", "only `sigmoid` is"),
            ("topk_method", |v| v == "noaux_tc", "only `noaux_tc` is"),
        ],
    ),
];

fn all_full(types: &Value) -> bool {
    types.as_array().is_some_and(|all| all.iter().all(|t| t == "full_attention"))
}

impl MixtureConfig {
    /// Reads and checks the settings, where the architecture has a mixture.
    ///
    /// # Errors
    /// By name where a setting has the wrong type, is out of range or is not supported.
    pub(crate) fn read(config: &Value) -> Result<Option<Self>> {
        let name = config.get("model_type").and_then(Value::as_str);
        let Some((name, fixed)) = FIXED.into_iter().find(|(n, _)| Some(*n) == name) else {
            return Ok(None);
        };
        check_fixed(config, name, fixed)?;
        let from = Reader(config);
        let router_logits = from.flag("output_router_logits", false)?;
        let usual_weight = if name == "olmoe" { 0.01 } else { 0.001 };
        let base = |experts: (&str, i64), top_k, width: (&str, i64)| -> Result<Self> {
            Ok(MixtureConfig {
                experts: from.number(experts.0, experts.1)?,
                top_k: from.number("num_experts_per_tok", top_k)?,
                width: from.number(width.0, width.1)?,
                scores: RouterScores::Softmax,
                normalised: true,
                scale: 1.0,
                shared: None,
                layers: SparseLayers::ALL,
                jitter: 0.0,
                router_logits,
                loss_weight: Some(from.real("router_aux_loss_coef", usual_weight)?),
            })
        };
        let (count, settings) = match name {
            "mixtral" => {
                let count = "num_local_experts";
                let base = base((count, 8), 2, ("intermediate_size", 14336))?;
                let jitter = from.real("router_jitter_noise", 0.0)?;
                (count, MixtureConfig { jitter, ..base })
            }
            "olmoe" => {
                let base = base(("num_experts", 64), 8, ("intermediate_size", 2048))?;
                let normalised = from.flag("norm_topk_prob", false)?;
                ("num_experts", MixtureConfig { normalised, ..base })
            }
            "qwen2_moe" => {
                let base = base(("num_experts", 60), 4, ("moe_intermediate_size", 1408))?;
                let width = from.number("shared_expert_intermediate_size", 5632)?;
                let settings = MixtureConfig {
                    normalised: from.flag("norm_topk_prob", false)?,
                    shared: Some(SharedExpert { width, gated: true }),
                    layers: SparseLayers {
                        first: 0,
                        step: from.count("decoder_sparse_step", 1)?.max(1),
                        dense: from.list("mlp_only_layers")?,
                    },
                    ..base
                };
                ("num_experts", settings)
            }
            "deepseek" => {
                let base = base(("n_routed_experts", 64), 6, ("moe_intermediate_size", 1407))?;
                let shared = from.number("n_shared_experts", 0)?;
                let width = shared.saturating_mul(base.width);
                let settings = MixtureConfig {
                    normalised: from.flag("norm_topk_prob", false)? && base.top_k > 1,
                    shared: (shared != 0).then_some(SharedExpert { width, gated: false }),
                    layers: SparseLayers {
                        first: from.count("first_k_dense_replace", 0)?,
                        ..SparseLayers::ALL
                    },
                    ..base
                };
                ("n_routed_experts", settings)
            }
            _ => {
                let base = base(("n_routed_experts", 256), 8, ("moe_intermediate_size", 2048))?;
                let width = from.number("n_shared_experts", 1)? * base.width;
                let settings = MixtureConfig {
                    normalised: from.flag("norm_topk_prob", true)?,
                    scale: from.real("routed_scaling_factor", 2.5)?,
                    scores: RouterScores::Sigmoid {
                        groups: from.number("n_group", 8)?,
                        kept: from.number("topk_group", 4)?,
                    },
                    shared: Some(SharedExpert { width, gated: false }),
                    layers: SparseLayers {
                        first: from.count("first_k_dense_replace", 3)?,
                        ..SparseLayers::ALL
                    },
                    loss_weight: None,
                    ..base
                };
                ("n_routed_experts", settings)
            }
        };
        settings.check(count)?;
        Ok(Some(settings))
    }

    fn check(&self, count: &str) -> Result<()> {
        let shared = self.shared.map_or(1, |s| s.width);
        check_positive(&[
            (count, self.experts),
            ("num_experts_per_tok", self.top_k),
            ("moe_intermediate_size", self.width),
            ("shared_expert_intermediate_size", shared),
        ])?;
        if !(0.0..1.0).contains(&self.jitter) {
            refuse("router_jitter_noise", self.jitter, "is to be in [0, 1)")?;
        }
        check_weight("router_aux_loss_coef", self.loss_weight.unwrap_or(0.0))?;
        let mut open = self.experts;
        if let RouterScores::Sigmoid { groups, kept } = self.scores {
            check_positive(&[("n_group", groups), ("topk_group", kept)])?;
            if self.experts % groups != 0 || self.experts / groups < 2 {
                refuse("n_group", groups, "is to cut the experts into groups of at least two")?;
            }
            if kept > groups {
                refuse("topk_group", kept, "are more than there are groups")?;
            }
            open = kept * (self.experts / groups);
        }
        if self.top_k > open {
            refuse("num_experts_per_tok", self.top_k, "are more than there are experts")?;
        }
        Ok(())
    }
}

/// Settings with what they are where they are not given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(pub(crate) &'a Value);

impl Reader<'_> {
    fn given<T>(
        self,
        name: &str,
        usual: T,
        what: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        match self.0.get(name).filter(|v| !v.is_null()) {
            None => Ok(usual),
            Some(v) => read(v).ok_or_else(|| Error::invalid(name, format!("{v} is no {what}"))),
        }
    }

    pub(crate) fn number(self, name: &str, usual: i64) -> Result<i64> {
        self.given(name, usual, "number", Value::as_i64)
    }

    pub(crate) fn real(self, name: &str, usual: f64) -> Result<f64> {
        self.given(name, usual, "number", Value::as_f64)
    }

    pub(crate) fn flag(self, name: &str, usual: bool) -> Result<bool> {
        self.given(name, usual, "true or false", Value::as_bool)
    }

    fn count(self, name: &str, usual: usize) -> Result<usize> {
        self.given(name, usual, "number of layers", |v| usize::try_from(v.as_u64()?).ok())
    }

    fn list(self, name: &str) -> Result<Vec<usize>> {
        let layer = |v: &Value| usize::try_from(v.as_u64()?).ok();
        self.given(name, Vec::new(), "list of layers", |v| {
            v.as_array()?.iter().map(layer).collect()
        })
    }
}
