//! EfficientNet-Lite: EfficientNet (Tan & Le 2019, arXiv 1905.11946) without squeeze-and-excite and
//! with ReLU6, as TensorFlow's authors published it for small devices. Convolutions are padded as
//! TensorFlow's `same`: ⌈side ⁄ stride⌉ positions, the odd one of the padding at the end.
//!
//! | site | kind |
//! |---|---|
//! | `_conv_stem`, `_conv_head` | conv |
//! | `_bn0`, `_bn1` | batch norm |
//! | `_blocks.N` | conv block |
//! | `_blocks.N.{_expand_conv,_depthwise_conv,_project_conv}` | conv |
//! | `_blocks.N.{_bn0,_bn1,_bn2}` | batch norm |
//! | `_fc` | linear |
//!
//! Names are those of the published PyTorch checkpoints. Normalisation is by the stored averages in
//! training, too: they are part of θ, which is frozen. Dropping whole blocks in training, as the
//! authors did, is left out.

mod block;
mod config;

use std::path::Path;

use modl_core::{
    Backbone, Context, Device, Error, Init, Kind, Layers, ParamStore, Result, ResultExt, Seed,
    Site, SiteKind, Tensors, checkpoint,
};
use serde_json::Value;

use block::{Block, ConvNorm};
pub use config::{EfficientNetConfig, Stage};

use crate::LoadOptions;
use crate::dropout::dropout;
use crate::folder::{Shapes, Weights};
use crate::place::{Pass, Place, Surveyor, theta_of};

/// The convolution whose kind is the checkpoint's.
const STEM: &str = "_conv_stem";
const HEAD: &str = "_conv_head";
const CLASSIFIER: &str = "_fc";

/// An EfficientNet-Lite.
///
/// Input: `pixel_values` `[batch, channels, height, width]`, for the published models
/// (value − 127) ⁄ 128 of each of the three colours from 0 to 255, at 224 × 224 for Lite0. Outputs:
/// `features` `[batch, features]`, the means over all positions; `logits` `[batch, classes]`.
#[derive(Debug)]
pub struct EfficientNet {
    config: Value,
    settings: EfficientNetConfig,
    params: ParamStore,
    sites: Vec<Site>,
    stem: ConvNorm,
    blocks: Vec<Block>,
    head: ConvNorm,
    classifier: Place,
}

impl EfficientNet {
    /// Loads a file of weights, safetensors or PyTorch's, for the given settings.
    ///
    /// # Errors
    /// Where the file is broken, a setting is out of range, or the tensors are not exactly those of
    /// the settings: then with all that is missing, unexpected or misshapen.
    pub fn load(
        file: impl AsRef<Path>,
        settings: EfficientNetConfig,
        options: &LoadOptions,
    ) -> Result<Self> {
        let file = file.as_ref();
        let weights = Weights::of(file, vec![checkpoint::open(file)?], canonical)?;
        Self::of(weights, settings, options)
    }

    pub(crate) fn from_config(dir: &Path, config: Value, options: &LoadOptions) -> Result<Self> {
        let settings = EfficientNetConfig::read(&config).at(dir.to_string_lossy())?;
        Self::of(Weights::open(dir, canonical)?, settings, options)
    }

    fn of(
        weights: Weights,
        mut settings: EfficientNetConfig,
        options: &LoadOptions,
    ) -> Result<Self> {
        if let Some(p) = options.dropout {
            settings.dropout = p;
        }
        settings.check()?;
        let params = weights.load(&shapes(&settings), &format!("{STEM}.weight"), options)?;
        Self::assemble(settings, params)
    }

    /// A network that has not learned anything: weights normal with variance 2 ⁄ (outputs · kernel),
    /// normalisations the identity, biases 0.
    ///
    /// # Errors
    /// Where a setting is out of range.
    pub fn untrained(
        settings: EfficientNetConfig,
        seed: Seed,
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        settings.check()?;
        let mut params = ParamStore::new();
        for (name, shape) in shapes(&settings) {
            let init = match (name.rsplit('.').next(), shape.as_slice()) {
                (Some("weight" | "running_var"), [_]) => Init::Ones,
                (Some("weight"), [output, _, kernel @ ..]) => {
                    let fan = output * kernel.iter().product::<i64>();
                    Init::Normal((2.0 / fan as f64).sqrt())
                }
                _ => Init::Zeros,
            };
            let value = init.tensor(&shape, seed.child(&name), kind, device)?;
            params.insert(name, value)?;
        }
        Self::assemble(settings, params)
    }

    fn assemble(settings: EfficientNetConfig, params: ParamStore) -> Result<Self> {
        let config =
            serde_json::to_value(&settings).map_err(|e| Error::invalid("config", e.to_string()))?;
        let eps = settings.batch_norm_eps;
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let widths = [settings.channels, settings.stem];
        let stem = ConvNorm::new(&mut to, [STEM, "_bn0"], widths, 2, 1, eps);
        let blocks: Vec<Block> = (settings.blocks().enumerate())
            .map(|(n, block)| Block::new(&mut to, &format!("_blocks.{n}"), block, eps))
            .collect();
        let width = settings.blocks().last().map_or(settings.stem, |(.., stage)| stage.output);
        let head = ConvNorm::new(&mut to, [HEAD, "_bn1"], [width, settings.features], 1, 1, eps);
        let (input, output) = (settings.features, settings.classes);
        let classifier = to.place(CLASSIFIER, SiteKind::Linear, input, output);
        let sites = to.sites;
        Ok(EfficientNet { config, settings, sites, stem, blocks, head, classifier, params })
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &EfficientNetConfig {
        &self.settings
    }
}

/// The name of a stored tensor, or `None` for the counts of batches, which nothing reads.
fn canonical(stored: &str) -> Option<String> {
    (!stored.ends_with(".num_batches_tracked")).then(|| stored.to_owned())
}

/// All parameters with their shapes.
fn shapes(settings: &EfficientNetConfig) -> Shapes {
    let mut all = Shapes::new();
    let mut pair = |conv: &str, norm: &str, weight: [i64; 4]| {
        all.insert(format!("{conv}.weight"), weight.to_vec());
        for name in ["weight", "bias", "running_mean", "running_var"] {
            all.insert(format!("{norm}.{name}"), weight[..1].to_vec());
        }
    };
    pair(STEM, "_bn0", [settings.stem, settings.channels, 3, 3]);
    let mut width = settings.stem;
    for (n, (input, _, stage)) in settings.blocks().enumerate() {
        let (inner, k) = (input * stage.expand, stage.kernel);
        let own = |name: &str| format!("_blocks.{n}.{name}");
        if stage.expand > 1 {
            pair(&own("_expand_conv"), &own("_bn0"), [inner, input, 1, 1]);
        }
        pair(&own("_depthwise_conv"), &own("_bn1"), [inner, 1, k, k]);
        pair(&own("_project_conv"), &own("_bn2"), [stage.output, inner, 1, 1]);
        width = stage.output;
    }
    pair(HEAD, "_bn1", [settings.features, width, 1, 1]);
    all.insert(format!("{CLASSIFIER}.weight"), vec![settings.classes, settings.features]);
    all.insert(format!("{CLASSIFIER}.bias"), vec![settings.classes]);
    all
}

impl Backbone for EfficientNet {
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
        let weight = self.params.get(&format!("{STEM}.weight"))?;
        let pixels = inputs.need("pixel_values")?.to_device(weight.device())?;
        let size = pixels.size();
        if size.len() != 4 || size.get(1) != Some(&self.settings.channels) {
            let wanted = self.settings.channels;
            let problem = format!("is {size:?}, wants [batch, {wanted}, height, width]");
            return Err(Error::invalid("pixel_values", problem));
        }
        let pass = Pass { layers, cx };
        let mut x = self.stem.active(&pixels.to_kind(weight.kind())?, pass)?;
        for block in &self.blocks {
            x = block.forward(&x, pass)?;
        }
        let features = self.head.active(&x, pass)?.mean_dims(&[2, 3], false)?;
        let drop = pass.dropout("_dropout", self.settings.dropout);
        let logits = self.classifier.linear(&dropout(features.clone(), drop)?, pass)?;
        Ok(Tensors::new().with("features", features).with("logits", logits))
    }
}
