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
//! | `classifier`, or RoBERTa's `classifier.{dense,out_proj}`, of a classifier | linear |
//!
//! Where the class in `config.json` has a head, the encoder's paths start with `bert.`, or with
//! `roberta.` in RoBERTa and XLM-R (Conneau et al. 2020, arXiv 1911.02116), whose positions are
//! counted over the tokens that are not padding and start after padding's id.
//!
//! θ of a site is what is directly named after it; a block or a sub-layer has none of its own.

mod config;
pub(crate) mod e5;
mod head;
mod inputs;
mod layer;
mod names;
mod untrained;

use std::path::Path;

use modl_core::{
    Backbone, Context, Error, HostFn, Layers, ParamStore, Result, ResultExt, Segments, Signal,
    Site, SiteKind, Tensor, Tensors,
};
use serde_json::Value;

pub use config::BertConfig;
use head::{Head, HeadKind};
use layer::Layer;
use names::{Names, shapes};

use crate::LoadOptions;
use crate::dropout::dropout;
use crate::folder::{Weights, read_config};
use crate::mask::{additive, read_mask, with_mask};
use crate::place::{Pass, Place, Surveyor, theta_of};

const WORDS: &str = "embeddings.word_embeddings";
const POSITIONS: &str = "embeddings.position_embeddings";
const TYPES: &str = "embeddings.token_type_embeddings";

/// A BERT, RoBERTa or XLM-R encoder, with a classifier where its class in `config.json` has one.
///
/// Inputs: `input_ids` `[batch, seq]` i64; `attention_mask` `[batch, seq]` of ones and zeros (ones
/// where it is not given); `token_type_ids` `[batch, seq]` i64 (zeros where they are not given).
/// Outputs: `last_hidden_state` `[batch, seq, hidden]`; `pooler_output` `[batch, hidden]` where the
/// checkpoint has a pooler; `logits` `[batch, labels]` of a classifier of sentences or
/// `[batch, seq, labels]` of one of tokens; and, where a module has lengthened the sequence, `attention_mask` of
/// the longer one. Positions count from the start of the longer sequence.
///
/// The context's feature `mask` is the attention mask in the kind of the hidden states.
#[derive(Debug)]
pub struct Bert {
    config: Value,
    settings: BertConfig,
    names: Names,
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
    head: Option<Head>,
}

impl Bert {
    /// Loads a folder with `config.json` and `model.safetensors` (or shards with their index).
    ///
    /// Names may start with `bert.` or not, whatever the class. Heads other than the classifier of a
    /// class that has one are left in the file. The old names `gamma` and `beta` of normalisations
    /// are understood.
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
        let names = Names::new(&config, &settings);
        let weights = Weights::open(dir, |stored| names.canonical(stored))?;
        let has = |end: &str| weights.has(&format!("{}pooler.dense.{end}", names.prefix));
        let pooled = has("weight") || has("bias") || names.head == Some(HeadKind::Pooled);
        let wanted = shapes(&settings, &names, pooled);
        let leading = format!("{}{WORDS}.weight", names.prefix);
        let params = weights.load(&wanted, &leading, options)?;
        Self::assemble(config, settings, names, params, pooled)
    }

    /// multilingual-e5 in one file of 4-bit weights, which become f32.
    pub(crate) fn from_e5(path: &Path, options: &LoadOptions) -> Result<Self> {
        let file = e5::E5File::open(path)?;
        let config = file.config();
        let mut settings = BertConfig::read(&config).at(path.to_string_lossy())?;
        if let Some(p) = options.dropout {
            settings = settings.with_dropout(p)?;
        }
        let names = Names::new(&config, &settings);
        let own = |stored: &str| Some(stored.to_owned());
        let weights = Weights::of(path, vec![Box::new(file)], own)?;
        let wanted = shapes(&settings, &names, false);
        let params = weights.load(&wanted, &format!("{WORDS}.weight"), options)?;
        Self::assemble(config, settings, names, params, false)
    }

    fn assemble(
        config: Value,
        settings: BertConfig,
        names: Names,
        params: ParamStore,
        pooled: bool,
    ) -> Result<Self> {
        let width = settings.hidden_size;
        let own = |path: &str| format!("{}{path}", names.prefix);
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let words = to.place(&own(WORDS), SiteKind::Embedding, settings.vocab_size, width);
        let tokens = to.place(&own("embeddings"), SiteKind::Tokens, width, width);
        let norm = to.place(&own("embeddings.LayerNorm"), SiteKind::Norm, width, width);
        let layers = (0..settings.num_hidden_layers)
            .map(|i| Layer::new(&mut to, &own(&format!("encoder.layer.{i}")), &settings))
            .collect();
        let pooler = pooled.then(|| to.place(&own("pooler.dense"), SiteKind::Linear, width, width));
        let drop = settings.classifier_dropout.unwrap_or(settings.hidden_dropout_prob);
        let head = names.head.map(|kind| Head::new(&mut to, kind, [width, names.labels], drop));
        let sites = to.sites;
        let positions = params.get(&own(&format!("{POSITIONS}.weight")))?.clone();
        let types = params.get(&own(&format!("{TYPES}.weight")))?.clone();
        Ok(Bert {
            config,
            settings,
            names,
            sites,
            words,
            tokens,
            norm,
            positions,
            types,
            layers,
            pooler,
            head,
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
        let counted = self.count_positions(ids)?;
        if !self.tokens.modular(pass) {
            let x = self.place_tokens(&x, types, counted.as_ref(), pass).at("embeddings")?;
            return Ok((x, mask));
        }
        let host: &HostFn = &|_, s, cx| {
            let (types, places) = (s.with.get("token_type_ids"), s.with.need("positions")?);
            Ok(s.replace(self.place_tokens(&s.x, types, Some(places), pass.of(cx))?))
        };
        let positions = match counted {
            Some(positions) => positions,
            None => Tensor::arange(ids.len_of(1), ids.device())?.expand(&ids.size())?,
        };
        let mut with = Tensors::new().with("mask", mask).with("positions", positions);
        if let Some(types) = types {
            with.set("token_type_ids", types.clone());
        }
        self.tokens.masked_tokens("embeddings", &Signal { x, with }, pass, host)
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

    fn canonical(&self, path: &str) -> String {
        self.names.path(path)
    }

    fn segments(&self) -> Option<Box<dyn Segments + '_>> {
        Some(Box::new(self))
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let mut x = self.enter(inputs, layers, cx)?;
        let cx = &with_mask(&x, cx)?;
        let (mask, pass) = (x.with.need("mask")?.clone(), Pass { layers, cx });
        let hidden_keys = additive(&mask)?;
        for layer in &self.layers {
            x.x = layer.forward(&x.x, &mask, hidden_keys.as_ref(), pass)?;
        }
        self.leave(&x, inputs, layers, cx)
    }
}

impl Segments for &Bert {
    fn segments(&self) -> usize {
        self.layers.len()
    }

    fn enter(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Signal> {
        let ids = &inputs.need("input_ids")?.to_device(self.positions.device())?;
        self.check_ids(ids)?;
        let types = self.read_types(inputs.get("token_type_ids"), ids)?;
        let mask = read_mask(inputs.get("attention_mask"), ids, self.positions.kind())?;
        let given = cx.clone().with_feature("mask", mask.clone());
        let pass = Pass { layers, cx: &given };
        let (x, mask) = self.embed(ids, types.as_ref(), mask, pass)?;
        Ok(Signal { x, with: Tensors::new().with("mask", mask) })
    }

    fn segment(&self, n: usize, x: &Signal, layers: &Layers, cx: &Context) -> Result<Signal> {
        let cx = &with_mask(x, cx)?;
        let mask = x.with.need("mask")?;
        let hidden_keys = additive(mask)?;
        let layer = self.layers.get(n).ok_or_else(|| Error::invalid("segment", "is not there"))?;
        let y = layer.forward(&x.x, mask, hidden_keys.as_ref(), Pass { layers, cx })?;
        Ok(x.replace(y))
    }

    fn leave(
        &self,
        x: &Signal,
        inputs: &Tensors,
        layers: &Layers,
        cx: &Context,
    ) -> Result<Tensors> {
        let cx = &with_mask(x, cx)?;
        let pass = Pass { layers, cx };
        let (ids, mask, x) = (inputs.need("input_ids")?, x.with.need("mask")?, &x.x);
        let mut outputs = Tensors::new().with("last_hidden_state", x.clone());
        if let Some(pooler) = &self.pooler {
            let pooled = pooler.linear(&x.select(1, 0)?, pass)?.tanh()?;
            outputs.set("pooler_output", pooled);
        }
        if let Some(head) = &self.head {
            let logits = head.forward(x, outputs.get("pooler_output"), pass)?;
            outputs.set("logits", logits);
        }
        if mask.size() != ids.size() {
            outputs.set("attention_mask", mask.to_kind(ids.kind())?);
        }
        Ok(outputs)
    }
}
