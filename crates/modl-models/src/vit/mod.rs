//! ViT, the Vision Transformer (Dosovitskiy et al. 2020, *An Image is Worth 16×16 Words*, arXiv
//! 2010.11929): patches of an image as tokens behind a class token, with learned positions and
//! layer normalisation before each sub-layer.
//!
//! | site | kind |
//! |---|---|
//! | `embeddings.patch_embeddings.projection` | convolution |
//! | `embeddings` (adds positions; dropout) | tokens |
//! | `layers.N` | block |
//! | `layers.N.{layernorm_before,layernorm_after}`, `layernorm` | norm |
//! | `layers.N.attention.{q_proj,k_proj,v_proj,o_proj}`, `layers.N.mlp.{fc1,fc2}` | linear |
//! | `layers.N.attention` | attention |
//! | `layers.N.attention.output` (`o_proj` and dropout), `layers.N.mlp` | sub-layer |
//! | `pooler.dense`, where the checkpoint has a pooler | linear |
//! | `classifier` of a classifier | linear |
//!
//! These are the names of transformers 5. Those of its earlier versions, which checkpoints keep, as
//! `encoder.layer.N.attention.attention.query`, are understood everywhere. With a classifier the
//! paths of all but it start with `vit.`. A sub-layer is not normalised after its residual
//! connection: there is no stage `norm`.
//!
//! Tokens that a module puts before the class token get no positions, so that prompt tuning at
//! `embeddings` is the shallow form of visual prompt tuning (Jia et al. 2022, arXiv 2203.12119).

mod config;
mod layer;
mod names;

use std::path::Path;

use modl_core::{
    Backbone, Context, Error, HostFn, Kind, Layers, ParamStore, Result, ResultExt, Segments,
    Signal, Site, SiteKind, Tensor, Tensors, is_float,
};
use serde_json::Value;

pub use config::VitConfig;
use layer::Layer;
use names::{Names, shapes};

use crate::LoadOptions;
use crate::dropout::dropout;
use crate::folder::{Weights, read_config};
use crate::mask::{additive, with_mask};
use crate::place::{Pass, Place, Surveyor, theta_of};

const PATCHES: &str = "embeddings.patch_embeddings.projection";
const CLASS: &str = "embeddings.cls_token";
const POSITIONS: &str = "embeddings.position_embeddings";
const NORM: &str = "layernorm";
const POOLER: &str = "pooler.dense";
const CLASSIFIER: &str = "classifier";

/// A ViT encoder of images, with a classifier where its class in `config.json` has one.
///
/// Input: `pixel_values` `[batch, num_channels, image_size, image_size]`, floats of any kind, which
/// [`Pixels`](crate::Pixels) makes of bytes. Outputs: `last_hidden_state` `[batch, seq, hidden]`,
/// where seq is 1 for the class token, which is the first, and (image_size ⁄ patch_size)² for the
/// patches; `pooler_output` `[batch, pooler_output_size]` where the checkpoint has a pooler;
/// `logits` `[batch, labels]` of a classifier; and, where a module has lengthened the sequence,
/// `attention_mask` of the longer one. There a row's class token and patches are the last of its
/// real tokens.
///
/// The context's feature `mask` is ones, `[batch, seq]`, in the kind of the hidden states.
#[derive(Debug)]
pub struct Vit {
    config: Value,
    settings: VitConfig,
    names: Names,
    params: ParamStore,
    sites: Vec<Site>,
    patches: Place,
    tokens: Place,
    /// `[1, 1, hidden]`.
    class: Tensor,
    /// `[1, tokens, hidden]`.
    positions: Tensor,
    layers: Vec<Layer>,
    norm: Place,
    pooler: Option<Place>,
    classifier: Option<Place>,
}

impl Vit {
    /// Loads a folder with `config.json` and `model.safetensors` (or shards with their index).
    ///
    /// Names in the file may be those of any version of transformers, and start with `vit.` or not.
    /// A classifier is left in the file where the class in `config.json` has none.
    ///
    /// # Errors
    /// Where a file is missing or broken, a setting is not supported, or the tensors are not
    /// exactly those of the configuration: then with all that is missing, unexpected or misshapen.
    pub fn load(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let dir = dir.as_ref();
        Self::from_config(dir, read_config(dir)?, options)
    }

    pub(crate) fn from_config(dir: &Path, config: Value, options: &LoadOptions) -> Result<Self> {
        let mut settings = VitConfig::read(&config).at(dir.to_string_lossy())?;
        if let Some(p) = options.dropout {
            settings = settings.with_dropout(p)?;
        }
        let names = Names::read(&config)?;
        let weights = Weights::open(dir, |stored| names.stored(stored))?;
        let has = |end: &str| weights.has(&names.own(&format!("{POOLER}.{end}")));
        let pooled = has("weight") || has("bias");
        let wanted = shapes(&settings, &names, pooled);
        let params = weights.load(&wanted, &names.own(&format!("{PATCHES}.weight")), options)?;
        let width = settings.hidden_size;
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let mut place = |path: &str, kind, input, output| to.place(path, kind, input, output);
        let channels = settings.num_channels;
        let patches = place(&names.own(PATCHES), SiteKind::Conv, channels, width);
        let tokens = place(&names.own("embeddings"), SiteKind::Tokens, width, width);
        let layers = (0..settings.num_hidden_layers)
            .map(|i| Layer::new(&mut to, &names.own(&format!("layers.{i}")), &settings))
            .collect();
        let mut place = |path: &str, kind, output| to.place(path, kind, width, output);
        let norm = place(&names.own(NORM), SiteKind::Norm, width);
        let pooler =
            pooled.then(|| place(&names.own(POOLER), SiteKind::Linear, settings.pooler_width()));
        let classifier = names.labels.map(|labels| place(CLASSIFIER, SiteKind::Linear, labels));
        let sites = to.sites;
        let class = params.get(&names.own(CLASS))?.clone();
        let positions = params.get(&names.own(POSITIONS))?.clone();
        Ok(Vit {
            config,
            settings,
            names,
            sites,
            patches,
            tokens,
            class,
            positions,
            layers,
            norm,
            pooler,
            classifier,
            params,
        })
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &VitConfig {
        &self.settings
    }

    /// The images among the inputs, in the kind and on the device of θ.
    fn read(&self, inputs: &Tensors) -> Result<Tensor> {
        let VitConfig { num_channels: channels, image_size: side, .. } = self.settings;
        let wanted = || format!("[batch, {channels}, {side}, {side}]");
        let Some(pixels) = inputs.get("pixel_values") else {
            let given: Vec<&str> = inputs.names().collect();
            let problem = format!(
                "are not among the inputs ({}): this backbone sees images, floats of shape {}",
                given.join(", "),
                wanted()
            );
            return Err(Error::invalid("pixel_values", problem));
        };
        let shape = pixels.size();
        let fits = matches!(*shape.as_slice(), [n, c, h, w] if n > 0 && [c, h, w] == [channels, side, side]);
        if !fits || !is_float(pixels.kind()) {
            let problem = format!("{pixels:?}; wanted are floats of shape {}", wanted());
            return Err(Error::invalid("pixel_values", problem));
        }
        pixels.to_kind(self.class.kind())?.to_device(self.class.device())
    }

    /// Class token and patches `[batch, tokens, hidden]` of images.
    fn cut(&self, pixels: &Tensor, pass: Pass) -> Result<Tensor> {
        let side = self.settings.patch_size;
        let rows = pixels.len_of(0);
        let shape = [rows, self.settings.hidden_size, self.settings.tokens() - 1];
        let patches = self.patches.patches(pixels, side, pass)?;
        let patches = patches.reshape(&shape).at(&self.patches.site.path)?.transpose(1, 2)?;
        let class = self.class.expand(&[rows, -1, -1])?;
        Tensor::cat(&[class, patches], 1)
    }

    /// Positions and dropout on x `[batch, seq, hidden]`, whose last tokens are those of the image.
    fn place_tokens(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let added = x.len_of(1) - self.settings.tokens();
        let x = match added {
            0 => x.add(&self.positions)?,
            n if n > 0 => x.add(&self.positions.pad(&[0, 0, n, 0])?)?,
            _ => {
                let problem = format!("modules left {} tokens of an image", x.len_of(1));
                return Err(Error::invalid(&self.tokens.site.path, problem));
            }
        };
        let path = &self.tokens.site.path;
        dropout(x, pass.dropout(path, self.settings.hidden_dropout_prob))
    }

    /// The first hidden states `[batch, seq, hidden]` and the mask `[batch, seq]`, both longer
    /// where a module puts tokens in.
    fn embed(&self, pixels: &Tensor, mask: Tensor, pass: Pass) -> Result<(Tensor, Tensor)> {
        let x = self.cut(pixels, pass)?;
        let path = &self.tokens.site.path;
        if !self.tokens.modular(pass) {
            return Ok((self.place_tokens(&x, pass).at(path)?, mask));
        }
        let host: &HostFn = &|_, s, cx| Ok(s.replace(self.place_tokens(&s.x, pass.of(cx))?));
        let positions = Tensor::arange(x.len_of(1), x.device())?.expand(&mask.size())?;
        let with = Tensors::new().with("mask", mask).with("positions", positions);
        self.tokens.masked_tokens(path, &Signal { x, with }, pass, host)
    }

    /// Whether modules have put tokens in.
    fn lengthened(&self, mask: &Tensor) -> bool {
        mask.len_of(1) != self.settings.tokens()
    }

    /// The class token's state `[batch, hidden]` among x `[batch, seq, hidden]`.
    fn class_state(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        if !self.lengthened(mask) {
            return x.select(1, 0);
        }
        let (rows, seq) = (x.len_of(0), x.len_of(1));
        // Rows with fewer tokens of modules are padded at the end.
        let real = mask.to_kind(Kind::Int64)?.sum_dims(&[1], false)?;
        let start: Vec<i64> = (0..rows).map(|row| row * seq - self.settings.tokens()).collect();
        let index = Tensor::from_slice(&start, &[rows], x.device())?.add(&real)?;
        x.reshape(&[rows * seq, -1])?.index_select(0, &index)
    }
}

impl Backbone for Vit {
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
        self.names.canonical(path)
    }

    fn former(&self, path: &str) -> String {
        self.names.former(path)
    }

    fn segments(&self) -> Option<Box<dyn Segments + '_>> {
        Some(Box::new(self))
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let mut x = self.enter(inputs, layers, cx)?;
        for n in 0..self.layers.len() {
            x = self.segment(n, &x, layers, cx)?;
        }
        self.leave(&x, inputs, layers, cx)
    }
}

impl Segments for &Vit {
    fn segments(&self) -> usize {
        self.layers.len()
    }

    fn enter(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Signal> {
        let pixels = self.read(inputs)?;
        let size = [pixels.len_of(0), self.settings.tokens()];
        let mask = Tensor::ones(&size, pixels.kind(), pixels.device())?;
        let cx = &cx.clone().with_feature("mask", mask.clone());
        let (x, mask) = self.embed(&pixels, mask, Pass { layers, cx })?;
        Ok(Signal { x, with: Tensors::new().with("mask", mask) })
    }

    fn segment(&self, n: usize, x: &Signal, layers: &Layers, cx: &Context) -> Result<Signal> {
        let mask = x.with.need("mask")?;
        let cx = &with_mask(x, cx)?;
        let hidden_keys = if self.lengthened(mask) { additive(mask)? } else { None };
        let layer = self.layers.get(n).ok_or_else(|| Error::invalid("segment", "is not there"))?;
        let y = layer.forward(&x.x, mask, hidden_keys.as_ref(), Pass { layers, cx })?;
        Ok(x.replace(y))
    }

    fn leave(
        &self,
        x: &Signal,
        _inputs: &Tensors,
        layers: &Layers,
        cx: &Context,
    ) -> Result<Tensors> {
        let mask = x.with.need("mask")?;
        let cx = &with_mask(x, cx)?;
        let pass = Pass { layers, cx };
        let x = self.norm.layer_norm(&x.x, self.settings.layer_norm_eps, pass)?;
        let class = self.class_state(&x, mask)?;
        let mut outputs = Tensors::new().with("last_hidden_state", x);
        if let Some(pooler) = &self.pooler {
            let pooled = pooler.linear_then(&class, pass, self.settings.pooler_act)?;
            outputs.set("pooler_output", pooled);
        }
        if let Some(classifier) = &self.classifier {
            outputs.set("logits", classifier.linear(&class, pass)?);
        }
        if self.lengthened(mask) {
            outputs.set("attention_mask", mask.to_kind(Kind::Int64)?);
        }
        Ok(outputs)
    }
}
