//! What an upcycling writes: the architectures of `mergekit-moe`, their names and their settings.

use modl_core::{Error, Result};
use serde_json::{Value, json};

use super::{GateMode, Upcycling};
use crate::llama::LlamaConfig;
use crate::rope::RopeScaling;

/// The architecture of a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Without an expert that every token has.
    Mixtral,
    /// With or without one, which has no gate.
    Deepseek,
    /// With one that has a gate of its own, and with biases at queries, keys and values.
    Qwen,
}

/// In the order in which they are tried.
const ALL: [(&str, Target); 3] =
    [("mixtral", Target::Mixtral), ("deepseek", Target::Deepseek), ("qwen", Target::Qwen)];

impl Target {
    /// That of a recipe.
    ///
    /// # Errors
    /// Where none is so called, or none can have the shared experts.
    pub(super) fn of(recipe: &Upcycling) -> Result<Self> {
        let wanted = recipe.architecture.as_deref().map(str::to_lowercase).unwrap_or_default();
        let named: Vec<_> = ALL.into_iter().filter(|(n, _)| n.starts_with(&wanted)).collect();
        if named.is_empty() {
            return Err(Error::unsupported(
                format!("`architecture` = {wanted} in an upcycling"),
                "`mixtral`, `deepseek` and `qwen` are written",
            ));
        }
        let mut problems = Vec::new();
        for (name, target) in named {
            match target.problem(recipe) {
                None => return Ok(target),
                Some(problem) => problems.push(format!("{name} {problem}")),
            }
        }
        Err(Error::invalid("shared_experts", problems.join("; ")))
    }

    /// Why it cannot be what the recipe asks for, by the rules of `mergekit-moe`.
    fn problem(self, recipe: &Upcycling) -> Option<&'static str> {
        let drawn = matches!(recipe.gate_mode, GateMode::Random | GateMode::Normal(_));
        match (self, recipe.shared()) {
            (Target::Mixtral | Target::Deepseek, []) => None,
            (Target::Mixtral, _) => Some("has none"),
            (Target::Deepseek, [one]) => {
                let none = |prompts: &Option<Vec<_>>| prompts.as_ref().is_none_or(Vec::is_empty);
                let free = none(&one.positive_prompts) && none(&one.negative_prompts);
                (!free).then_some("has one without a gate, so that it is to have no prompts")
            }
            (Target::Qwen, [one]) if drawn || one.has_prompts() => None,
            (Target::Qwen, [_]) => Some("has one with a gate, which is to have positive prompts"),
            (Target::Deepseek, _) => Some("has one at most"),
            (Target::Qwen, _) => Some("has exactly one"),
        }
    }

    /// Refuses settings of the dense model that it cannot have.
    pub(super) fn fits(self, dense: &LlamaConfig) -> Result<()> {
        let usual = dense.hidden_size / dense.num_attention_heads.max(1);
        if self == Target::Deepseek && dense.head_width() != usual {
            let what = format!("`head_dim` = {} in a DeepSeek-MoE", dense.head_width());
            return Err(Error::unsupported(what, "its heads are hidden_size ⁄ heads wide"));
        }
        if self == Target::Deepseek && dense.rope.scaling != RopeScaling::Default {
            let what = "scaled rotary positions in a DeepSeek-MoE";
            return Err(Error::unsupported(what, "leave `shared_experts` out for a Mixtral"));
        }
        Ok(())
    }

    /// Whether the shared expert has a gate.
    pub(super) fn shared_gate(self) -> bool {
        self == Target::Qwen
    }

    /// The mixture of a layer.
    pub(super) fn mixture(self, layer: &str) -> String {
        match self {
            Target::Mixtral => format!("{layer}.block_sparse_moe"),
            Target::Deepseek | Target::Qwen => format!("{layer}.mlp"),
        }
    }

    /// The expert in a mixture that every token has.
    pub(super) fn shared(self) -> &'static str {
        if self == Target::Qwen { "shared_expert" } else { "shared_experts" }
    }

    /// A matrix of an expert by its name in Llama.
    pub(super) fn matrix(self, own: &'static str) -> &'static str {
        match (self, own) {
            (Target::Mixtral, "gate_proj") => "w1",
            (Target::Mixtral, "up_proj") => "w3",
            (Target::Mixtral, "down_proj") => "w2",
            _ => own,
        }
    }

    /// What its `config.json` has besides the settings that it shares with Llama. All that it has
    /// other defaults for than Llama are among them.
    pub(super) fn settings(self, dense: &LlamaConfig, recipe: &Upcycling, bare: bool) -> Value {
        let (experts, width) = (recipe.experts.len(), dense.intermediate_size);
        let class =
            |of: &str| json!([format!("{of}{}", if bare { "Model" } else { "ForCausalLM" })]);
        match self {
            Target::Mixtral => json!({
                "architectures": class("Mixtral"),
                "model_type": "mixtral",
                "num_local_experts": experts,
                "output_router_logits": false,
                "router_aux_loss_coef": 0.001,
                "router_jitter_noise": 0.0,
                "sliding_window": null,
            }),
            // transformers has no class of its own for it.
            Target::Deepseek => json!({
                "architectures": class("Deepseek"),
                "attention_bias": false,
                "auto_map": {
                    "AutoConfig":
                        "deepseek-ai/deepseek-moe-16b-base--configuration_deepseek.DeepseekConfig",
                    "AutoModel":
                        "deepseek-ai/deepseek-moe-16b-base--modeling_deepseek.DeepseekModel",
                    "AutoModelForCausalLM":
                        "deepseek-ai/deepseek-moe-16b-base--modeling_deepseek.DeepseekForCausalLM",
                },
                "first_k_dense_replace": 0,
                "model_type": "deepseek",
                "moe_intermediate_size": width,
                "moe_layer_freq": 1,
                "n_routed_experts": experts,
                "n_shared_experts": if recipe.shared().is_empty() { Value::Null } else { json!(1) },
                "norm_topk_prob": true,
                "rope_theta": dense.rope.theta,
                "scoring_func": "softmax",
            }),
            Target::Qwen => json!({
                "architectures": class("Qwen2Moe"),
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "model_type": "qwen2_moe",
                "moe_intermediate_size": width,
                "norm_topk_prob": true,
                "num_experts": experts,
                "output_router_logits": false,
                "qkv_bias": true,
                "router_aux_loss_coef": 0.001,
                "shared_expert_intermediate_size": width,
                "sliding_window": null,
                "use_sliding_window": false,
            }),
        }
    }
}
