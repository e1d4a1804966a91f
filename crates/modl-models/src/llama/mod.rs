//! Llama (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Grattafiori et al. 2024, arXiv
//! 2407.21783): a decoder with rotary positions, groups of heads that share keys and values, gated
//! feed-forward networks, and normalisation by the root mean square before each sub-layer. SmolLM is
//! of this architecture; [Mixtral and OLMoE](crate::MixtureConfig) have mixtures of experts for the
//! feed-forward networks, and OLMoE normalises queries and keys.
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
//! | OLMoE's `model.layers.N.self_attn.{q_norm,k_norm}` | norm |
//! | `lm_head` | linear |
//!
//! Without an output layer (`LlamaModel`) there is no `model.`. A sub-layer is not normalised after
//! its residual connection: there is no stage `norm`.

mod config;
mod gguf;
mod layer;

use std::path::Path;

use modl_core::{Backbone, Context, Layers, Result, ResultExt, Site, SiteKind, Tensor, Tensors};
use serde_json::Value;

pub use config::LlamaConfig;
use layer::Layer;

use crate::LoadOptions;
use crate::decoder::{Architecture, Decoder, HEAD, Naming, Seen, backbone};
use crate::folder::{Shapes, Weights, files, read_config};
use crate::gguf::Gguf;
use crate::moe::{DOWN, Fused, GATE_UP, in_memory};
use crate::place::{Pass, Place, Surveyor};
use crate::rope::{Rotation, table};

/// A Llama decoder, or Mixtral or OLMoE.
///
/// Inputs: `input_ids` `[batch, seq]` i64; `attention_mask` `[batch, seq]` of ones and zeros (ones
/// where it is not given); `position_ids` `[batch, seq]` i64 (from the number of tokens in the
/// context's cache, or 0, where they are not given). With a cache all are of the new tokens alone.
/// Outputs: `last_hidden_state` `[batch, seq, hidden_size]`; `logits` `[batch, seq, vocab_size]`;
/// and, where a module has lengthened the sequence, `attention_mask` of the longer one.
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
        let own = |stored: &str| naming.stored(stored, tied, &[".rotary_emb.inv_freq"]);
        let weights = match &settings.mixture {
            None => Weights::open(dir, own)?,
            Some(_) => {
                let fused = Box::new(Fused::new(dir, files(dir)?)?);
                Weights::of(dir, vec![fused], |stored| own(&in_memory(stored)))?
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
        let naming = Self::naming(&config)?;
        let (width, tied) = (settings.hidden_size, settings.tie_word_embeddings);
        let words = naming.path("embed_tokens");
        let wanted = shapes(&settings, naming);
        let params = weights.load(&wanted, &format!("{words}.weight"), options)?;
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let words = to.place(&words, SiteKind::Embedding, settings.vocab_size, width);
        let tokens = to.place(&naming.path("rotary_emb"), SiteKind::Tokens, width, width);
        let (mut blocks, mut layers) = (Vec::new(), Vec::new());
        for n in 0..settings.num_hidden_layers {
            let path = naming.path(&format!("layers.{n}"));
            blocks.push(to.place(&path, SiteKind::Block, width, width));
            layers.push(Layer::new(&mut to, &path, &settings));
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
        Rotation::new(positions, &self.frequencies, self.decoder.kind()).map(Some)
    }

    fn layer(&self, n: usize, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        self.layers.get(n).map_or_else(|| Ok(x.clone()), |layer| layer.forward(x, seen, pass))
    }

    fn normalise(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        self.norm.rms_norm(x, self.settings.rms_norm_eps, pass)
    }
}

backbone!(Llama);

/// All parameters with their shapes.
fn shapes(settings: &LlamaConfig, naming: Naming) -> Shapes {
    let (width, inner) = (settings.hidden_size, settings.intermediate_size);
    let heads = settings.num_attention_heads * settings.head_width();
    let groups = settings.groups() * settings.head_width();
    let mut all = Shapes::new();
    let mut one = |path: &str, shape: &[i64], bias: bool| {
        all.insert(naming.path(&format!("{path}.weight")), shape.to_vec());
        if bias {
            all.insert(
                naming.path(&format!("{path}.bias")),
                shape.iter().take(1).copied().collect(),
            );
        }
    };
    one("embed_tokens", &[settings.vocab_size, width], false);
    for n in 0..settings.num_hidden_layers {
        let mut of =
            |name: &str, shape: &[i64], bias| one(&format!("layers.{n}.{name}"), shape, bias);
        of("input_layernorm", &[width], false);
        for (name, out) in [("q_proj", heads), ("k_proj", groups), ("v_proj", groups)] {
            of(&format!("self_attn.{name}"), &[out, width], settings.attention_bias);
        }
        of("self_attn.o_proj", &[width, heads], settings.attention_bias);
        of("post_attention_layernorm", &[width], false);
        if settings.query_norm {
            of("self_attn.q_norm", &[heads], false);
            of("self_attn.k_norm", &[groups], false);
        }
        match &settings.mixture {
            None => {
                of("mlp.gate_proj", &[inner, width], settings.mlp_bias);
                of("mlp.up_proj", &[inner, width], settings.mlp_bias);
                of("mlp.down_proj", &[width, inner], settings.mlp_bias);
            }
            Some(mixture) => of("mlp.gate", &[mixture.experts, width], false),
        }
    }
    one("norm", &[width], false);
    for (n, mixture) in (0..settings.num_hidden_layers).zip(settings.mixture.iter().cycle()) {
        let path = naming.path(&format!("layers.{n}.mlp.experts"));
        let experts = mixture.experts;
        all.insert(format!("{path}.{GATE_UP}"), vec![experts, 2 * inner, width]);
        all.insert(format!("{path}.{DOWN}"), vec![experts, width, inner]);
    }
    if naming.head && !settings.tie_word_embeddings {
        all.insert(format!("{HEAD}.weight"), vec![settings.vocab_size, width]);
    }
    all
}
