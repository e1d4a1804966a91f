//! The network of a recipe: `[backbone]`.
//!
//! ```toml
//! [backbone]
//! path = "assets/all-MiniLM-L6-v2"                                  # a pretrained one, or
//! fresh = { type = "mlp", inputs = 784, hidden = [100, 100] }       # one that is drawn by the seed
//! ```

use std::path::PathBuf;

use modl_core::{Backbone, Error, Registry, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Recipe;
use super::source::Source;
use crate::Methods;

use super::parts::{Dtype, Place};

/// The network: either `path` or `fresh`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneSpec {
    /// The folder of a pretrained model, with `config.json` and `model.safetensors`.
    pub path: Option<PathBuf>,
    /// The configuration, with its `type`, of one without weights, which are drawn by the recipe's
    /// seed. Its own parameters are `base.*` in the patterns of `train`.
    pub fresh: Option<Value>,
    /// The kind in which it computes; f32 where nothing is said.
    #[serde(default)]
    pub dtype: Dtype,
    /// `cpu` or `cuda:0`; the CPU where nothing is said.
    #[serde(default)]
    pub device: Place,
    /// The probability of dropout in training; that of its `config.json` where nothing is said.
    pub dropout: Option<f64>,
    /// Whether a mixture of experts adds the losses of its own routers in training, by the weights
    /// of its `config.json` or those in `loss_weights`. Where nothing is said its `config.json` says
    /// it, as in transformers: `output_router_logits`, false where it is not there.
    pub router_losses: Option<bool>,
}

impl BackboneSpec {
    pub(super) fn read(source: &Source, table: &Value, registry: &Registry) -> Result<Self> {
        let keys = vec!["backbone".to_owned()];
        let spec: BackboneSpec = source.read(&keys, table)?;
        let at = |key: &str| [keys.as_slice(), &[key.to_owned()]].concat();
        match (&spec.path, &spec.fresh) {
            (None, None) => {
                let problem = "[backbone] needs `path`, or `fresh` for a network that is drawn";
                return Err(source.error(&keys, problem));
            }
            (Some(_), Some(_)) => {
                let problem = "[backbone] has `path` and `fresh`; say one of the two";
                return Err(source.error(&at("fresh"), problem));
            }
            (None, Some(table)) => {
                source.read_by(&at("fresh"), table, |v| {
                    registry.backbones.parse(v).map_err(|e| e.to_string())
                })?;
                let said = [("dropout", spec.dropout.is_some())];
                let said =
                    said.into_iter().chain([("router_losses", spec.router_losses.is_some())]);
                if let Some((key, _)) = said.into_iter().find(|(_, there)| *there) {
                    let problem = format!("`{key}` is for a network of files; `fresh` has its own");
                    return Err(source.error(&at(key), problem));
                }
            }
            (Some(_), None) => {}
        }
        Ok(spec)
    }
}

impl Recipe {
    /// The folder of the pretrained model.
    ///
    /// # Errors
    /// Where the network is a fresh one.
    pub fn backbone_folder(&self) -> Result<PathBuf> {
        let path = self.backbone.path.as_ref().map(|path| self.resolve(path));
        path.ok_or_else(|| {
            Error::unsupported(
                "a tokenizer or a file of a fresh [backbone]",
                "give it a `path`, or data that are numbers",
            )
        })
    }

    /// The network that is drawn by the recipe's seed; none where it has a folder.
    ///
    /// # Errors
    /// Where a setting is out of range.
    pub fn fresh_backbone(&self, methods: &Methods) -> Result<Option<Box<dyn Backbone>>> {
        let Some(table) = &self.backbone.fresh else { return Ok(None) };
        let keys = ["backbone".to_owned(), "fresh".to_owned()];
        let config = methods.registry.backbones.parse(table)?;
        let (kind, device) = (self.backbone.dtype.into(), self.backbone.device.0);
        let built = config.build(self.seed().child("backbone"), kind, device);
        built.map(Some).map_err(|e| self.source.error(&keys, e.to_string()))
    }
}
