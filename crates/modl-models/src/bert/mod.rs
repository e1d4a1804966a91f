//! BERT (Devlin et al. 2018, arXiv 1810.04805): a bidirectional encoder with learned positions and
//! layer normalisation after each residual connection. MiniLM and multilingual-e5 are of this
//! architecture.
//!
//! | site | kind |
//! |---|---|
//! | `embeddings.word_embeddings` | embedding |
//! | `embeddings` (positions, segments, normalisation, dropout) | tokens |
//! | `embeddings.LayerNorm` | norm |
//! | `encoder.layer.N` | block |
//! | `encoder.layer.N.attention.self.{query,key,value}` | linear |
//! | `encoder.layer.N.attention.self` | attention |
//! | `encoder.layer.N.attention.output`, `encoder.layer.N.output` | sub-layer |
//! | `….output.dense`, `encoder.layer.N.intermediate.dense` | linear |
//! | `….output.LayerNorm` | norm |
//! | `pooler.dense`, where the checkpoint has a pooler | linear |
//!
//! θ of a site is what is directly named after it; a block or a sub-layer has none of its own.

mod config;
mod inputs;
mod layer;
mod names;
mod untrained;

use std::path::Path;

use modl_core::{
    Backbone, Context, Error, HostFn, Layers, ParamStore, Result, ResultExt, Signal, Site,
    SiteKind, Tensor, Tensors,
};
use serde_json::Value;

pub use config::BertConfig;
use layer::Layer;
use names::{canonical, shapes};

use crate::LoadOptions;
use crate::dropout::dropout;
use crate::folder::{Weights, read_config};
use crate::mask::{additive, read_mask};
use crate::place::{Pass, Place, Surveyor, theta_of};

const WORDS: &str = "embeddings.word_embeddings";
const POSITIONS: &str = "embeddings.position_embeddings";
const TYPES: &str = "embeddings.token_type_embeddings";

/// A BERT encoder.
///
/// Inputs: `input_ids` `[batch, seq]` i64; `attention_mask` `[batch, seq]` of ones and zeros (ones
/// where it is not given); `token_type_ids` `[batch, seq]` i64 (zeros where they are not given).
/// Outputs: `last_hidden_state` `[batch, seq, hidden]`; `pooler_output` `[batch, hidden]` where the
/// checkpoint has a pooler; and, where a module has lengthened the sequence, `attention_mask` of
/// the longer one. Positions count from the start of the longer sequence.
///
/// The context's feature `mask` is the attention mask in the kind of the hidden states.
#[derive(Debug)]
pub struct Bert {
    config: Value,
    settings: BertConfig,
    params: ParamStore,
    sites: Vec<Site>,
    words: Place,
    tokens: Place,
    norm: Place,
    /// `[max_position_embeddings, hidden]`.
    positions: Tensor,
    /// `[type_vocab_size, hidden]`.
    types: Tensor,
    layers: Vec<Layer>,
    pooler: Option<Place>,
}

impl Bert {
    /// Loads a folder with `config.json` and `model.safetensors` (or shards with their index).
    ///
    /// Names may start with `bert.`; then the heads that transformers puts on BERT (`cls.*`,
    /// `classifier.*`, `qa_outputs.*`) are left in the file. The old names `gamma` and `beta` of
    /// normalisations are understood.
    ///
    /// # Errors
    /// Where a file is missing or broken, a setting is not supported, or the tensors are not
    /// exactly those of the configuration: then with all that is missing, unexpected or misshapen.
    pub fn load(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let dir = dir.as_ref();
        Self::from_config(dir, read_config(dir)?, options)
    }

    pub(crate) fn from_config(dir: &Path, config: Value, options: &LoadOptions) -> Result<Self> {
        let mut settings = BertConfig::read(&config).at(dir.to_string_lossy())?;
        if let Some(p) = options.dropout {
            settings = settings.with_dropout(p)?;
        }
        let weights = Weights::open(dir, canonical)?;
        let pooled = weights.has("pooler.dense.weight") || weights.has("pooler.dense.bias");
        let wanted = shapes(&settings, pooled);
        let params = weights.load(&wanted, &format!("{WORDS}.weight"), options)?;
        Self::assemble(config, settings, params, pooled)
    }

    fn assemble(
        config: Value,
        settings: BertConfig,
        params: ParamStore,
        pooled: bool,
    ) -> Result<Self> {
        let width = settings.hidden_size;
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let words = to.place(WORDS, SiteKind::Embedding, settings.vocab_size, width);
        let tokens = to.place("embeddings", SiteKind::Tokens, width, width);
        let norm = to.place("embeddings.LayerNorm", SiteKind::Norm, width, width);
        let layers = (0..settings.num_hidden_layers)
            .map(|i| Layer::new(&mut to, &format!("encoder.layer.{i}"), &settings))
            .collect();
        let pooler = pooled.then(|| to.place("pooler.dense", SiteKind::Linear, width, width));
        let sites = to.sites;
        let positions = params.get(&format!("{POSITIONS}.weight"))?.clone();
        let types = params.get(&format!("{TYPES}.weight"))?.clone();
        Ok(Bert {
            config,
            settings,
            sites,
            words,
            tokens,
            norm,
            positions,
            types,
            layers,
            pooler,
            params,
        })
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &BertConfig {
        &self.settings
    }

    /// Positions, segments, normalisation and dropout on token vectors `[batch, seq, hidden]`.
    /// `places` are the tokens' positions `[batch, seq]` where they are not 0, 1, ….
    fn place_tokens(
        &self,
        x: &Tensor,
        types: Option<&Tensor>,
        places: Option<&Tensor>,
        pass: Pass,
    ) -> Result<Tensor> {
        let len = x.len_of(1);
        let end = match places {
            None => len,
            Some(p) => p.largest()?.item()? as i64 + 1,
        };
        if end > self.positions.len_of(0) {
            return Err(Error::invalid(
                "sequence",
                format!(
                    "{end} tokens with what modules put in, but max_position_embeddings is {}",
                    self.positions.len_of(0)
                ),
            ));
        }
        let positions = match places {
            None => self.positions.narrow(0, 0, len)?,
            Some(p) => self.positions.embedding(p)?,
        };
        let x = match types {
            None => x.add(&positions.add(&self.types.select(0, 0)?)?)?,
            Some(types) if types.len_of(1) == len => {
                x.add(&self.types.embedding(types)?)?.add(&positions)?
            }
            Some(types) => {
                return Err(Error::unsupported(
                    format!("{} token_type_ids for {len} tokens", types.len_of(1)),
                    "leave token_type_ids out where a module lengthens the sequence, as PEFT does",
                ));
            }
        };
        let x = self.norm.layer_norm(&x, self.settings.layer_norm_eps, pass)?;
        dropout(x, pass.dropout("embeddings.dropout", self.settings.hidden_dropout_prob))
    }

    /// The first hidden states `[batch, seq, hidden]` and the mask `[batch, seq]`, both longer
    /// where a module puts tokens in.
    fn embed(
        &self,
        ids: &Tensor,
        types: Option<&Tensor>,
        mask: Tensor,
        pass: Pass,
    ) -> Result<(Tensor, Tensor)> {
        let x = self.words.embedding(ids, pass)?;
        if !self.tokens.modular(pass) {
            return Ok((self.place_tokens(&x, types, None, pass).at("embeddings")?, mask));
        }
        let host: &HostFn = &|_, s, cx| {
            let (types, places) = (s.with.get("token_type_ids"), s.with.need("positions")?);
            Ok(s.replace(self.place_tokens(&s.x, types, Some(places), pass.of(cx))?))
        };
        let positions = Tensor::arange(ids.len_of(1), ids.device())?.expand(&ids.size())?;
        let mut with = Tensors::new().with("mask", mask).with("positions", positions);
        if let Some(types) = types {
            with.set("token_type_ids", types.clone());
        }
        let y = self.tokens.run(&Signal { x, with }, pass, host)?;
        let mask = y.with.need("mask").at("embeddings")?.clone();
        let (hidden, covered) = (y.x.size(), mask.size());
        if hidden.len() != 3 || hidden.get(..2) != Some(covered.as_slice()) {
            let problem = format!("modules made hidden states {hidden:?} with a mask {covered:?}");
            return Err(Error::invalid("embeddings", problem));
        }
        Ok((y.x, mask))
    }
}

impl Backbone for Bert {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, site: &Site) -> Result<Tensors> {
        theta_of(&self.sites, &self.params, site)
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let ids = &inputs.need("input_ids")?.to_device(self.positions.device())?;
        self.check_ids(ids)?;
        let types = self.read_types(inputs.get("token_type_ids"), ids)?;
        let mask = read_mask(inputs.get("attention_mask"), ids, self.positions.kind())?;
        let given = cx.clone().with_feature("mask", mask.clone());
        let pass = Pass { layers, cx: &given };
        let (mut x, mask) = self.embed(ids, types.as_ref(), mask, pass)?;
        let lengthened = mask.size() != ids.size();
        let cx = &given.clone().with_feature("mask", mask.clone());
        let pass = Pass { layers, cx };
        let hidden_keys = additive(&mask)?;
        for layer in &self.layers {
            x = layer.forward(&x, &mask, hidden_keys.as_ref(), pass)?;
        }
        let mut outputs = Tensors::new().with("last_hidden_state", x.clone());
        if let Some(pooler) = &self.pooler {
            let pooled = pooler.linear(&x.select(1, 0)?, pass)?.tanh()?;
            outputs.set("pooler_output", pooled);
        }
        if lengthened {
            outputs.set("attention_mask", mask.to_kind(ids.kind())?);
        }
        Ok(outputs)
    }
}
