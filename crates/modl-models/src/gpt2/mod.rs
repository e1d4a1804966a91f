//! GPT-2 (Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*): a causal
//! decoder with learned positions and layer normalisation before each sub-layer.
//!
//! | site | kind |
//! |---|---|
//! | `transformer.wte` | embedding |
//! | `transformer` (positions, dropout) | tokens |
//! | `transformer.h.N` | block |
//! | `….ln_1`, `….ln_2`, `transformer.ln_f` | norm |
//! | `….attn.c_attn` (queries, keys and values at once), `….attn.c_proj`, `….mlp.{c_fc,c_proj}` | linear |
//! | `….attn` | attention |
//! | `….attn.output`, `….mlp` | sub-layer |
//! | `lm_head`, the table of words where the checkpoint has none of its own | linear |
//!
//! Weights of linear layers are stored `[in, out]`; θ of a site is their transposed view, so that
//! modules see `[out, in]` as everywhere. A `GPT2Model` without a head has the same names without
//! `transformer.`, and `tokens` for `transformer`. Normalisations come before the sub-layers, which
//! so have no stage `norm`.

mod config;
mod layer;
mod names;

use std::path::Path;

use modl_core::{
    Backbone, Context, Error, Layers, ParamStore, Result, ResultExt, Site, SiteKind, Tensor,
    Tensors,
};
use serde_json::Value;

pub use config::Gpt2Config;
use layer::Layer;

use crate::LoadOptions;
use crate::dropout::dropout;
use crate::folder::{Weights, read_config};
use crate::ids::{check_shape, in_range};
use crate::mask::read_mask;
use crate::place::{Pass, Place, Surveyor, theta, theta_of};
use crate::settings::class;

const HEAD: &str = "lm_head";
const WORDS: &str = "wte";

/// A place whose weight is stored `[in, out]`.
fn out_in(place: Place) -> Result<Place> {
    let theta = turned(&place.site, place.theta)?;
    Ok(Place { theta, ..place })
}

/// θ with `weight` as `[out, in]`, where it is the weight of a linear layer of a block.
fn turned(site: &Site, theta: Tensors) -> Result<Tensors> {
    match theta.get("weight") {
        Some(w) if site.kind == SiteKind::Linear && site.path != HEAD => {
            let w = w.t().at(&site.path)?;
            Ok(theta.with("weight", w))
        }
        _ => Ok(theta),
    }
}

/// A GPT-2 decoder.
///
/// Inputs: `input_ids` `[batch, seq]` i64; `attention_mask` `[batch, seq]` of ones and zeros (ones
/// where it is not given). Outputs: `last_hidden_state` `[batch, seq, n_embd]`; `logits`
/// `[batch, seq, vocab]` where the class has a head; and, where a module has lengthened the
/// sequence, `attention_mask` of the longer one. Positions count from the start of the sequence.
///
/// The context's feature `mask` is the attention mask in the kind of the hidden states.
#[derive(Debug)]
pub struct Gpt2 {
    config: Value,
    settings: Gpt2Config,
    params: ParamStore,
    sites: Vec<Site>,
    headed: bool,
    words: Place,
    tokens: Place,
    /// `[n_positions, n_embd]`.
    positions: Tensor,
    layers: Vec<Layer>,
    norm: Place,
    head: Option<Place>,
}

impl Gpt2 {
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
        let mut settings = Gpt2Config::read(&config).at(dir.to_string_lossy())?;
        if let Some(p) = options.dropout {
            settings = settings.with_dropout(p)?;
        }
        let headed = match class(&config, "GPT2LMHeadModel") {
            "GPT2LMHeadModel" => true,
            "GPT2Model" => false,
            other => {
                return Err(Error::unsupported(
                    format!("the architecture `{other}`"),
                    "save the model as GPT2LMHeadModel or GPT2Model",
                ));
            }
        };
        let weights = Weights::open(dir, |stored| names::canonical(stored, headed))?;
        let own_head = weights.has("lm_head.weight") || !settings.tie_word_embeddings;
        let wanted = names::shapes(&settings, headed, own_head);
        let params = weights.load(&wanted, &names::path("wte.weight", headed), options)?;
        Self::assemble(config, settings, params, headed)
    }

    fn assemble(
        config: Value,
        settings: Gpt2Config,
        params: ParamStore,
        headed: bool,
    ) -> Result<Self> {
        let width = settings.n_embd;
        let own = |path: &str| names::path(path, headed);
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let words = to.place(&own(WORDS), SiteKind::Embedding, settings.vocab_size, width);
        let tokens = if headed { "transformer" } else { "tokens" };
        let tokens = to.place(tokens, SiteKind::Tokens, width, width);
        let layers = (0..settings.n_layer)
            .map(|i| Layer::new(&mut to, &own(&format!("h.{i}")), &settings))
            .collect::<Result<_>>()?;
        let norm = to.place(&own("ln_f"), SiteKind::Norm, width, width);
        let head = headed.then(|| {
            let place = to.place(HEAD, SiteKind::Linear, width, settings.vocab_size);
            match place.theta.is_empty() {
                true => Place { theta: theta(&params, &own(WORDS)), ..place },
                false => place,
            }
        });
        let sites = to.sites;
        let positions = params.get(&own("wpe.weight"))?.clone();
        Ok(Gpt2 {
            config,
            settings,
            sites,
            headed,
            words,
            tokens,
            positions,
            layers,
            norm,
            head,
            params,
        })
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &Gpt2Config {
        &self.settings
    }

    /// Positions and dropout on token vectors `[batch, seq, n_embd]`.
    fn place_tokens(&self, x: &Tensor, positions: &Tensor, pass: Pass) -> Result<Tensor> {
        let last = positions.largest()?.item()? as i64;
        if last >= self.settings.n_positions {
            let problem = format!(
                "{} tokens with what modules put in, but n_positions is {}",
                last + 1,
                self.settings.n_positions
            );
            return Err(Error::invalid("sequence", problem));
        }
        let x = x.add(&self.positions.embedding(positions)?)?;
        let draw = format!("{}.dropout", self.tokens.site.path);
        dropout(x, pass.dropout(&draw, self.settings.embd_pdrop))
    }
}

impl Backbone for Gpt2 {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, site: &Site) -> Result<Tensors> {
        let own = theta_of(&self.sites, &self.params, site)?;
        if own.is_empty() && site.path == HEAD {
            return Ok(theta(&self.params, &names::path(WORDS, self.headed)));
        }
        turned(site, own)
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
        let mut stream = self
            .tokens
            .first(x, mask, pass, |x, places, pass| self.place_tokens(x, places, pass))?;
        let given = cx.clone().with_feature("mask", stream.mask.clone());
        let pass = Pass { layers, cx: &given };
        let hidden = stream.causal()?;
        for layer in &self.layers {
            stream.x = layer.forward(&stream, &hidden, pass)?;
        }
        let x = self.norm.layer_norm(&stream.x, self.settings.layer_norm_epsilon, pass)?;
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
