//! T5 (Raffel et al. 2020, arXiv 1910.10683): an encoder and a decoder with relative positions,
//! normalisation by the root of the mean square before each sub-layer, and no biases; and Switch
//! Transformers (Fedus et al. 2021, arXiv 2101.03961), of whose feed-forward networks some are
//! mixtures of experts.
//!
//! | site | kind |
//! |---|---|
//! | `encoder.embed_tokens` | embedding |
//! | `encoder` (what the first block gets) | tokens |
//! | `encoder.block.N` | block |
//! | `….layer.K.layer_norm` | norm |
//! | `….layer.0.SelfAttention.{q,k,v,o}` | linear |
//! | `….layer.0.SelfAttention` | attention |
//! | `….layer.K` (from its attention or norm up to the residual connection) | sub-layer |
//! | `….layer.1.DenseReluDense.{wi,wo}`, or `{wi_0,wi_1,wo}` where it is gated | linear |
//! | `….layer.1.mlp` for it in Switch Transformers, and where it is a mixture: | |
//! | `….layer.1.mlp.router.classifier` | router |
//! | `….layer.1.mlp.experts` | experts |
//! | `….layer.1.mlp.experts.expert_E.{wi,wo}`, of each expert for its tokens | linear |
//! | `encoder.final_layer_norm` | norm |
//! | `lm_head` | linear |
//!
//! The decoder's sites are named likewise, with cross-attention in `layer.1.EncDecAttention` and
//! the feed-forward network in `layer.2`. Its blocks also have the companions
//! `encoder_hidden_states` and `encoder_attention_mask`. Bias and mask together are the companion
//! `mask` of an attention site; self-attention also has `positions` `[batch, seq]` i64, and adds the
//! bias of keys that a module puts before those of the stream, which stand right before the first
//! token. A sub-layer has no stage `norm`: none follows it. Within an expert each of its tokens is a row
//! of its own `[tokens, 1, dim]`, with the labels and features of its row in the batch.
//!
//! Both stacks and the head have one table of words, `shared`, unless the checkpoint stores a table
//! of its own for one of them: who merges into one of these sites changes all that share it.

mod bias;
mod block;
mod config;
mod greedy;
mod names;
mod stack;
mod switch;
mod view;

use std::path::Path;

use modl_core::{
    Backbone, Context, Error, Layers, OwnLoss, ParamStore, Result, ResultExt, Site, SiteKind,
    Tensor, Tensors,
};
use serde_json::Value;

pub use config::T5Config;
pub use greedy::greedy;
use stack::{Stack, States};
pub use switch::SwitchConfig;

use crate::LoadOptions;
use crate::folder::{Weights, files, read_config};
use crate::ids::{check_shape, in_range};
use crate::mask::read_mask;
use crate::moe::{Fused, of_expert};
use crate::place::{Pass, Place, Surveyor, theta, theta_of};
use crate::settings::class;

const SHARED: &str = "shared";
const WORDS: &str = "embed_tokens";
const HEAD: &str = "lm_head";
const TABLE: &str = "layer.0.SelfAttention.relative_attention_bias";
const FEED_FORWARD: &str = "DenseReluDense";

/// A T5 encoder–decoder, or Switch Transformers.
///
/// Inputs: `input_ids` `[batch, seq]` i64; `attention_mask` `[batch, seq]` of ones and zeros (ones
/// where it is not given); `decoder_input_ids` `[batch, target]` i64; `decoder_attention_mask`
/// likewise. In place of `input_ids` an `encoder_last_hidden_state` of an earlier pass may be
/// given; then the encoder does not run.
///
/// Outputs: `logits` `[batch, target, vocab]`, or for a `T5Model`, which has no head,
/// `last_hidden_state` `[batch, target, d_model]`; `encoder_last_hidden_state`
/// `[batch, seq, d_model]`; and, where a module has lengthened a sequence, the `attention_mask` or
/// `decoder_attention_mask` of the longer one. With `output_router_logits` in Switch Transformers'
/// settings also `encoder_router_logits.N` `[batch, seq, experts]` of each layer N with experts, the
/// losses `encoder_z_loss` and `encoder_aux_loss` `[]` of all of them, and those of the decoder. Where
/// every layer has experts transformers has losses of 0; here they are what they are.
///
/// The context's feature `mask` is the mask of the stack that runs, in the kind of the hidden
/// states.
#[derive(Debug)]
pub struct T5 {
    config: Value,
    settings: T5Config,
    params: ParamStore,
    sites: Vec<Site>,
    encoder: Stack,
    decoder: Stack,
    head: Option<Place>,
}

/// A place whose `weight` is the table of words unless the checkpoint has one of its own.
fn table_of_words(
    to: &mut Surveyor,
    path: &str,
    kind: SiteKind,
    [input, output]: [i64; 2],
) -> Place {
    let place = to.place(path, kind, input, output);
    match place.theta.is_empty() {
        true => Place { theta: theta(to.params, SHARED), ..place },
        false => place,
    }
}

impl T5 {
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
        let mut settings = T5Config::read(&config).at(dir.to_string_lossy())?;
        if let Some(p) = options.dropout {
            settings = settings.with_dropout(p)?;
        }
        if let (Some(wanted), Some(switch)) = (options.router_losses, &mut settings.switch) {
            switch.router_logits = wanted;
        }
        let headed = match class(&config, "T5ForConditionalGeneration") {
            "T5ForConditionalGeneration" | "T5WithLMHeadModel" => true,
            "SwitchTransformersForConditionalGeneration" => true,
            "T5Model" | "SwitchTransformersModel" => false,
            other => {
                return Err(Error::unsupported(
                    format!("the architecture `{other}`"),
                    "save the model as T5ForConditionalGeneration or T5Model",
                ));
            }
        };
        let weights = match &settings.switch {
            None => Weights::open(dir, names::canonical)?,
            Some(_) => {
                let fused = Box::new(Fused::new(dir, files(dir)?)?);
                Weights::of(dir, vec![fused], names::canonical)?
            }
        };
        let (_, gated) = settings.feed_forward()?;
        let stored =
            |path: &str| (headed || path != HEAD) && weights.has(&format!("{path}.weight"));
        let wanted = names::shapes(&settings, gated, stored);
        let params = weights.load(&wanted, &format!("{SHARED}.weight"), options)?;
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let encoder = Stack::new(&mut to, false, &settings)?;
        let decoder = Stack::new(&mut to, true, &settings)?;
        let shape = [settings.d_model, settings.vocab_size];
        let head = headed.then(|| table_of_words(&mut to, HEAD, SiteKind::Linear, shape));
        let sites = to.sites;
        Ok(T5 { config, settings, sites, encoder, decoder, head, params })
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &T5Config {
        &self.settings
    }

    /// The table of words that all share.
    fn shared(&self) -> Result<&Tensor> {
        self.params.get(&format!("{SHARED}.weight"))
    }

    /// Checked ids and their mask, both where the model is.
    fn read(&self, inputs: &Tensors, ids: &str, mask: &str) -> Result<(Tensor, Tensor)> {
        let table = self.shared()?;
        let tokens = inputs.need(ids)?.to_device(table.device())?;
        check_shape(ids, &tokens)?;
        in_range(ids, &tokens, self.settings.vocab_size)?;
        let mask = read_mask(inputs.get(mask), &tokens, table.kind()).at(ids)?;
        Ok((tokens, mask))
    }

    /// The encoder's states, and whether modules have lengthened them.
    fn encode(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<(States, bool)> {
        let Some(hidden) = inputs.get("encoder_last_hidden_state") else {
            let (ids, mask) = self.read(inputs, "input_ids", "attention_mask")?;
            let states = self.encoder.forward(&ids, mask, None, layers, cx)?;
            let longer = states.mask.size() != ids.size();
            return Ok((states, longer));
        };
        if hidden.dim() != 3 || hidden.len_of(2) != self.settings.d_model {
            let problem = format!("{hidden:?}; wanted is [batch, seq, {}]", self.settings.d_model);
            return Err(Error::invalid("encoder_last_hidden_state", problem));
        }
        let mask = inputs.get("attention_mask");
        let mask = read_mask(mask, &hidden.select(2, 0)?, self.shared()?.kind())?;
        Ok((States { hidden: hidden.clone(), mask, routed: Tensors::new() }, false))
    }
}

impl Backbone for T5 {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, site: &Site) -> Result<Tensors> {
        let own = theta_of(&self.sites, &self.params, site)?;
        if !own.is_empty() {
            return Ok(own);
        }
        let shares = site.path == HEAD || site.kind == SiteKind::Embedding;
        let part = of_expert(&self.params, &site.path).at(&site.path)?;
        Ok(part.unwrap_or_else(|| if shares { theta(&self.params, SHARED) } else { own }))
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn own_losses(&self) -> Vec<OwnLoss> {
        self.settings.switch.as_ref().map(SwitchConfig::own_losses).unwrap_or_default()
    }

    fn causal(&self, site: &Site) -> bool {
        site.path.starts_with("decoder.") || site.path == HEAD
    }

    fn canonical(&self, path: &str) -> String {
        names::path(path).to_owned()
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let (ids, mask) = self.read(inputs, "decoder_input_ids", "decoder_attention_mask")?;
        let (encoded, longer) = self.encode(inputs, layers, cx)?;
        if encoded.hidden.len_of(0) != ids.len_of(0) {
            let problem =
                format!("{} rows, but the encoder has {}", ids.len_of(0), encoded.hidden.len_of(0));
            return Err(Error::invalid("decoder_input_ids", problem));
        }
        // Routers of the decoder that read ids read its own.
        let cx = &cx.clone().with_feature("input_ids", ids.clone());
        let decoded = self.decoder.forward(&ids, mask, Some(&encoded), layers, cx)?;
        let given = cx.clone().with_feature("mask", decoded.mask.clone());
        let mut outputs = Tensors::new();
        match &self.head {
            Some(head) => {
                let x = decoded.hidden.mul_scalar(self.settings.output_scale())?;
                outputs.set("logits", head.linear(&x, Pass { layers, cx: &given })?);
            }
            None => outputs.set("last_hidden_state", decoded.hidden),
        }
        outputs.set("encoder_last_hidden_state", encoded.hidden);
        for (name, t) in encoded.routed.iter().chain(decoded.routed.iter()) {
            outputs.set(name.to_owned(), t.clone());
        }
        if longer {
            outputs.set("attention_mask", encoded.mask.to_kind(ids.kind())?);
        }
        if decoded.mask.size() != ids.size() {
            outputs.set("decoder_attention_mask", decoded.mask.to_kind(ids.kind())?);
        }
        Ok(outputs)
    }
}
