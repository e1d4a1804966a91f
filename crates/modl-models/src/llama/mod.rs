//! Llama (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Grattafiori et al. 2024, arXiv
//! 2407.21783): a decoder with rotary positions, groups of heads that share keys and values, gated
//! feed-forward networks, and normalisation by the root mean square before each sub-layer. SmolLM is
//! of this architecture; [Mixtral, OLMoE, Qwen2-MoE and DeepSeek-V3](crate::MixtureConfig) have
//! mixtures of experts for the feed-forward networks, OLMoE normalises queries and keys, and
//! DeepSeek-V3 makes them [of narrow vectors](crate::LatentConfig).
//!
//! | site | kind |
//! |---|---|
//! | `model.embed_tokens` | embedding |
//! | `model.rotary_emb` (x as it is; its `positions` are those by which queries and keys turn) | tokens |
//! | `model.layers.N` | block |
//! | `model.layers.N.{input_layernorm,post_attention_layernorm}`, `model.norm` | norm |
//! | `model.layers.N.self_attn.{q_proj,k_proj,v_proj,o_proj}` | linear |
//! | `model.layers.N.self_attn` | attention |
//! | `model.layers.N.self_attn.output` (`o_proj`), `model.layers.N.mlp` | sub-layer |
//! | `model.layers.N.mlp.{gate_proj,up_proj,down_proj}` | linear |
//! | with a mixture instead: `model.layers.N.mlp.gate` | router |
//! | `model.layers.N.mlp.experts` | experts |
//! | Qwen2-MoE's `model.layers.N.mlp.shared_expert.{gate_proj,up_proj,down_proj}`, `….shared_expert_gate` | linear |
//! | DeepSeek-V3's `model.layers.N.mlp.shared_experts.{gate_proj,up_proj,down_proj}` | linear |
//! | its `model.layers.N.self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj}` for `q_proj`, `k_proj`, `v_proj` | linear |
//! | its `model.layers.N.self_attn.{q_a_layernorm,kv_a_layernorm}` | norm |
//! | OLMoE's `model.layers.N.self_attn.{q_norm,k_norm}` | norm |
//! | `lm_head` | linear |
//!
//! Without an output layer (`LlamaModel`) there is no `model.`. A sub-layer is not normalised after
//! its residual connection: there is no stage `norm`.

mod config;
mod gguf;
mod latent;
mod layer;
mod names;

use std::path::Path;

use modl_core::{Backbone, Context, Layers, Result, ResultExt, Site, SiteKind, Tensor, Tensors};
use serde_json::Value;

pub use config::LlamaConfig;
pub use latent::LatentConfig;
use layer::Layer;

use crate::LoadOptions;
use crate::decoder::{Architecture, Decoder, Naming, Seen, backbone};
use crate::folder::{Weights, files, read_config};
use crate::gguf::Gguf;
use crate::moe::{CHOICE_BIAS, Fused, MixtureConfig, in_memory};
use crate::place::{Pass, Place, Surveyor};
use crate::rope::{Rotation, table};

/// A Llama decoder, or Mixtral, OLMoE, Qwen2-MoE or DeepSeek-V3.
///
/// Inputs: `input_ids` `[batch, seq]` i64; `attention_mask` `[batch, seq]` of ones and zeros (ones
/// where it is not given); `position_ids` `[batch, seq]` i64 (from the number of tokens in the
/// context's cache, or 0, where they are not given). With a cache all are of the new tokens alone.
/// Outputs: `last_hidden_state` `[batch, seq, hidden_size]`; `logits` `[batch, seq, vocab_size]`;
/// and, where a module has lengthened the sequence, `attention_mask` of the longer one. With
/// `output_router_logits` also `router_logits.N` `[batch · seq, experts]` of each layer N that has a
/// mixture, and the auxiliary loss `aux_loss` `[]` of all of them, which DeepSeek-V3 does not have;
/// neither with a cache, nor of a layer whose rows modules around it have separated. The loss is
/// added in training, by `router_aux_loss_coef` where nothing else is said.
///
/// The context's feature `mask` is the attention mask in the kind of the hidden states.
#[derive(Debug)]
pub struct Llama {
    decoder: Decoder,
    settings: LlamaConfig,
    layers: Vec<Layer>,
    norm: Place,
    /// `[head width ⁄ 2]`.
    frequencies: Tensor,
}

impl Llama {
    /// Loads a folder with `config.json` and `model.safetensors` (or shards with their index).
    ///
    /// `architectures` says whether there is an output layer; names in the file may be with or
    /// without `model.`.
    ///
    /// # Errors
    /// Where a file is missing or broken, a setting is not supported, or the tensors are not
    /// exactly those of the configuration: then with all that is missing, unexpected or misshapen.
    pub fn load(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let dir = dir.as_ref();
        Self::from_config(dir, read_config(dir)?, options)
    }

    pub(crate) fn from_config(dir: &Path, config: Value, options: &LoadOptions) -> Result<Self> {
        let settings = LlamaConfig::read(&config).at(dir.to_string_lossy())?;
        let naming = Self::naming(&config)?;
        let tied = settings.tie_word_embeddings;
        let ahead = names::ahead(&config, settings.num_hidden_layers);
        let own = |stored: &str| {
            let name = naming.stored(stored, tied, &[".rotary_emb.inv_freq"])?;
            (!ahead(&name)).then_some(name)
        };
        let weights = match &settings.mixture {
            None => Weights::open(dir, own)?,
            Some(_) => {
                let fused = Box::new(Fused::new(dir, files(dir)?)?);
                Weights::of(dir, vec![fused], |stored| own(&in_memory(stored)))?
                    .wide(&[CHOICE_BIAS])
            }
        };
        Self::assemble(config, settings, &weights, options)
    }

    /// The model of a GGUF file. Quantised tensors become f32.
    pub(crate) fn from_gguf(file: Gguf, options: &LoadOptions) -> Result<Self> {
        let source = file.path().to_string_lossy().into_owned();
        let config = gguf::config(&file)?;
        let settings = LlamaConfig::read(&config).at(source)?;
        let weights = gguf::weights(file, settings.num_attention_heads, settings.groups())?;
        Self::assemble(config, settings, &weights, options)
    }

    fn naming(config: &Value) -> Result<Naming> {
        let (bare, headed) = match config.get("model_type").and_then(Value::as_str) {
            Some("mixtral") => ("MixtralModel", "MixtralForCausalLM"),
            Some("olmoe") => ("OlmoeModel", "OlmoeForCausalLM"),
            Some("qwen2_moe") => ("Qwen2MoeModel", "Qwen2MoeForCausalLM"),
            Some("deepseek") => ("DeepseekModel", "DeepseekForCausalLM"),
            Some("deepseek_v3") => ("DeepseekV3Model", "DeepseekV3ForCausalLM"),
            _ => ("LlamaModel", "LlamaForCausalLM"),
        };
        Naming::read(config, "model.", bare, headed)
    }

    fn assemble(
        config: Value,
        mut settings: LlamaConfig,
        weights: &Weights,
        options: &LoadOptions,
    ) -> Result<Self> {
        if let Some(p) = options.dropout {
            settings = settings.with_dropout(p)?;
        }
        if let (Some(wanted), Some(mixture)) = (options.router_losses, &mut settings.mixture) {
            mixture.router_logits = wanted;
        }
        let naming = Self::naming(&config)?;
        let (width, tied) = (settings.hidden_size, settings.tie_word_embeddings);
        let words = naming.path("embed_tokens");
        let wanted = names::shapes(&settings, naming);
        let params = weights.load(&wanted, &format!("{words}.weight"), options)?;
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let words = to.place(&words, SiteKind::Embedding, settings.vocab_size, width);
        let tokens = to.place(&naming.path("rotary_emb"), SiteKind::Tokens, width, width);
        let (mut blocks, mut layers) = (Vec::new(), Vec::new());
        for n in 0..settings.num_hidden_layers {
            let path = naming.path(&format!("layers.{n}"));
            blocks.push(to.place(&path, SiteKind::Block, width, width));
            layers.push(Layer::new(&mut to, &path, n, &settings));
        }
        let norm = to.place(&naming.path("norm"), SiteKind::Norm, width, width);
        let head = naming.head_place(&mut to, &words, tied);
        let sites = to.sites;
        let weight = words.theta.need("weight")?;
        let frequencies =
            table(&settings.rope, settings.head_width(), weight.kind(), weight.device())?;
        let decoder = Decoder { config, params, sites, naming, words, tokens, blocks, head, tied };
        Ok(Llama { decoder, settings, layers, norm, frequencies })
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &LlamaConfig {
        &self.settings
    }
}

impl Architecture for Llama {
    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn place_tokens(&self, _: &Tensors, x: &Tensor, _: &Tensor, _: Pass) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn rotation(&self, positions: &Tensor) -> Result<Option<Rotation>> {
        let stretch = self.settings.rope.stretch();
        Rotation::new(positions, &self.frequencies, stretch, self.decoder.kind()).map(Some)
    }

    fn mixture(&self) -> Option<&MixtureConfig> {
        self.settings.mixture.as_ref()
    }

    fn layer(&self, n: usize, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        self.layers.get(n).map_or_else(|| Ok(x.clone()), |layer| layer.forward(x, seen, pass))
    }

    fn normalise(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        self.norm.rms_norm(x, self.settings.rms_norm_eps, pass)
    }
}

backbone!(Llama);
