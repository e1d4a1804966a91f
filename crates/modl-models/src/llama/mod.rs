//! Llama (Touvron et al. 2023, arXiv 2302.13971): a causal decoder with rotary positions, RMS
//! normalisation before each sub-layer, a gated feed-forward network, and fewer heads of keys and
//! values than of queries where the settings say so. SmolLM2 is of this architecture.
//!
//! | site | kind |
//! |---|---|
//! | `model.embed_tokens` | embedding |
//! | `model` (nothing but positions) | tokens |
//! | `model.layers.N` | block |
//! | `….input_layernorm`, `….post_attention_layernorm`, `model.norm` | norm |
//! | `….self_attn.{q,k,v,o}_proj`, `….mlp.{gate,up,down}_proj` | linear |
//! | `….self_attn`, with rotated queries and keys | attention |
//! | `….self_attn.output`, `….mlp` | sub-layer |
//! | `lm_head`, the table of words where the checkpoint has none of its own | linear |
//!
//! A `LlamaModel` without a head has the same names without `model.`, and `tokens` for `model`.
//! Normalisations come before the sub-layers, which so have no stage `norm`.

mod config;
mod layer;
mod names;
mod rope;

use std::path::Path;

use modl_core::{
    Backbone, Context, Error, Layers, ParamStore, Result, ResultExt, Site, SiteKind, Tensor,
    Tensors,
};
use serde_json::Value;

pub use config::{LlamaConfig, Rope};
use layer::Layer;
use rope::{Rotation, frequencies};

use crate::LoadOptions;
use crate::folder::{Weights, read_config};
use crate::ids::{check_shape, in_range};
use crate::mask::read_mask;
use crate::place::{Pass, Place, Surveyor, theta, theta_of};
use crate::settings::class;

const HEAD: &str = "lm_head";
const WORDS: &str = "embed_tokens";

/// A Llama decoder.
///
/// Inputs: `input_ids` `[batch, seq]` i64; `attention_mask` `[batch, seq]` of ones and zeros (ones
/// where it is not given). Outputs: `last_hidden_state` `[batch, seq, hidden]`; `logits`
/// `[batch, seq, vocab]` where the class has a head; and, where a module has lengthened the
/// sequence, `attention_mask` of the longer one. Positions count from the start of the sequence.
///
/// The context's feature `mask` is the attention mask in the kind of the hidden states.
#[derive(Debug)]
pub struct Llama {
    config: Value,
    settings: LlamaConfig,
    params: ParamStore,
    sites: Vec<Site>,
    headed: bool,
    words: Place,
    tokens: Place,
    layers: Vec<Layer>,
    norm: Place,
    head: Option<Place>,
    /// `[head_dim ⁄ 2]`.
    frequencies: Tensor,
}

impl Llama {
    /// Loads a folder with `config.json` and `model.safetensors` (or shards with their index).
    ///
    /// # Errors
    /// Where a file is missing or broken, a setting is not supported, or the tensors are not
    /// exactly those of the configuration: then with all that is missing, unexpected or misshapen.
    pub fn load(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let dir = dir.as_ref();
        Self::from_config(dir, read_config(dir)?, options)
    }

    pub(crate) fn from_config(dir: &Path, config: Value, options: &LoadOptions) -> Result<Self> {
        let mut settings = LlamaConfig::read(&config).at(dir.to_string_lossy())?;
        if let Some(p) = options.dropout {
            settings = settings.with_dropout(p)?;
        }
        let headed = match class(&config, "LlamaForCausalLM") {
            "LlamaForCausalLM" => true,
            "LlamaModel" => false,
            other => {
                return Err(Error::unsupported(
                    format!("the architecture `{other}`"),
                    "save the model as LlamaForCausalLM or LlamaModel",
                ));
            }
        };
        let weights = Weights::open(dir, |stored| names::canonical(stored, headed))?;
        let own_head = weights.has("lm_head.weight") || !settings.tie_word_embeddings;
        let wanted = names::shapes(&settings, headed, own_head);
        let leading = names::path("embed_tokens.weight", headed);
        let params = weights.load(&wanted, &leading, options)?;
        Self::assemble(config, settings, params, headed)
    }

    fn assemble(
        config: Value,
        settings: LlamaConfig,
        params: ParamStore,
        headed: bool,
    ) -> Result<Self> {
        let width = settings.hidden_size;
        let own = |path: &str| names::path(path, headed);
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let words = to.place(&own(WORDS), SiteKind::Embedding, settings.vocab_size, width);
        let tokens = if headed { "model" } else { "tokens" };
        let tokens = to.place(tokens, SiteKind::Tokens, width, width);
        let layers = (0..settings.num_hidden_layers)
            .map(|i| Layer::new(&mut to, &own(&format!("layers.{i}")), &settings))
            .collect();
        let norm = to.place(&own("norm"), SiteKind::Norm, width, width);
        let head = headed.then(|| {
            let place = to.place(HEAD, SiteKind::Linear, width, settings.vocab_size);
            match place.theta.is_empty() {
                true => Place { theta: theta(&params, &own(WORDS)), ..place },
                false => place,
            }
        });
        let sites = to.sites;
        let device = words.theta.need("weight")?.device();
        let frequencies = frequencies(settings.rope_base(), settings.head_width(), device)?;
        Ok(Llama {
            config,
            settings,
            sites,
            headed,
            words,
            tokens,
            layers,
            norm,
            head,
            frequencies,
            params,
        })
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &LlamaConfig {
        &self.settings
    }
}

impl Backbone for Llama {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, site: &Site) -> Result<Tensors> {
        let own = theta_of(&self.sites, &self.params, site)?;
        let tied = own.is_empty() && site.path == HEAD;
        Ok(if tied { theta(&self.params, &names::path(WORDS, self.headed)) } else { own })
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn canonical(&self, path: &str) -> String {
        names::path(path, self.headed)
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let table = self.words.theta.need("weight")?;
        let ids = &inputs.need("input_ids")?.to_device(table.device())?;
        check_shape("input_ids", ids)?;
        in_range("input_ids", ids, self.settings.vocab_size)?;
        let mask = read_mask(inputs.get("attention_mask"), ids, table.kind())?;
        let given = cx.clone().with_feature("mask", mask.clone());
        let pass = Pass { layers, cx: &given };
        let x = self.words.embedding(ids, pass)?;
        let mut stream = self.tokens.first(x, mask, pass, |x, _, _| Ok(x.clone()))?;
        let given = cx.clone().with_feature("mask", stream.mask.clone());
        let pass = Pass { layers, cx: &given };
        let hidden = stream.causal()?;
        let turn = Rotation::new(&self.frequencies, &stream.positions, stream.x.kind())?;
        for layer in &self.layers {
            stream.x = layer.forward(&stream, &hidden, &turn, &self.frequencies, pass)?;
        }
        let x = self.norm.rms_norm(&stream.x, self.settings.rms_norm_eps, pass)?;
        let mut outputs = Tensors::new();
        if let Some(head) = &self.head {
            outputs.set("logits", head.linear(&x, pass)?);
        }
        outputs.set("last_hidden_state", x);
        if stream.mask.size() != ids.size() {
            outputs.set("attention_mask", stream.mask.to_kind(ids.kind())?);
        }
        Ok(outputs)
    }
}
