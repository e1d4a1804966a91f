//! The names and shapes of ViT's parameters, and the names under which files have them: those of
//! transformers before 5, which are also those that its later versions write to checkpoints.

use modl_core::{Error, Result};
use serde_json::Value;

use super::{CLASS, CLASSIFIER, NORM, PATCHES, POOLER, POSITIONS, VitConfig};
use crate::folder::Shapes;
use crate::settings::{class, labels};

/// The network's name in a model with a classifier.
const PREFIX: &str = "vit.";

/// The list of layers, formerly and now.
const LAYERS: [&str; 2] = ["encoder.layer.", "layers."];

/// Former names within a layer, and today's. The first that fits counts.
const WITHIN: [[&str; 2]; 8] = [
    ["attention.attention.query", "attention.q_proj"],
    ["attention.attention.key", "attention.k_proj"],
    ["attention.attention.value", "attention.v_proj"],
    ["attention.output.dense", "attention.o_proj"],
    ["attention.output", "attention.output"],
    ["attention.attention", "attention"],
    ["intermediate.dense", "mlp.fc1"],
    ["output.dense", "mlp.fc2"],
];

/// How the class in `config.json` names things.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    /// In front of the network's paths: its name where there is a classifier, else nothing.
    prefix: &'static str,
    /// The classes of the classifier, where there is one.
    pub(super) labels: Option<i64>,
}

impl Names {
    /// # Errors
    /// Where the class is neither the network alone nor the one with a classifier.
    pub(super) fn read(config: &Value) -> Result<Self> {
        match class(config, "ViTModel") {
            "ViTModel" => Ok(Names { prefix: "", labels: None }),
            "ViTForImageClassification" => {
                Ok(Names { prefix: PREFIX, labels: Some(labels(config)) })
            }
            class => Err(Error::unsupported(
                format!("the architecture {class}"),
                "set `architectures` to ViTModel or ViTForImageClassification",
            )),
        }
    }

    /// The path of what is called `path` in the network alone.
    pub(super) fn own(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }

    /// This model's path for one of the network with or without a classifier, by former or
    /// today's names.
    pub(super) fn canonical(&self, path: &str) -> String {
        match after(path, CLASSIFIER) {
            Some(_) => path.to_owned(),
            None => self.own(&translate(path.strip_prefix(PREFIX).unwrap_or(path), [0, 1])),
        }
    }

    /// What `path` of this model was called formerly.
    pub(super) fn former(&self, path: &str) -> String {
        match path.strip_prefix(self.prefix) {
            Some(path) => self.own(&translate(path, [1, 0])),
            None => path.to_owned(),
        }
    }

    /// The name of a stored tensor in this model, or `None` where it is not part of it.
    pub(super) fn stored(&self, stored: &str) -> Option<String> {
        let foreign = after(stored, CLASSIFIER).is_some() && self.labels.is_none();
        (!foreign).then(|| self.canonical(stored))
    }
}

/// A path of the network alone by the names of one column of the tables in those of another.
fn translate(path: &str, [from, to]: [usize; 2]) -> String {
    let layer = path.strip_prefix(LAYERS[from]);
    let Some((number, rest)) = layer.map(|l| l.split_once('.').unwrap_or((l, ""))) else {
        return path.to_owned();
    };
    let renamed = WITHIN.iter().find_map(|names| Some((names[to], after(rest, names[from])?)));
    let rest = renamed.map_or(rest.to_owned(), |(name, end)| format!("{name}{end}"));
    let dot = if rest.is_empty() { "" } else { "." };
    format!("{}{number}{dot}{rest}", LAYERS[to])
}

/// What follows `name` in a path that starts with it: nothing, or a dot and more.
fn after<'a>(path: &'a str, name: &str) -> Option<&'a str> {
    path.strip_prefix(name).filter(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// All parameters with their shapes.
pub(super) fn shapes(settings: &VitConfig, names: &Names, pooled: bool) -> Shapes {
    let (width, inner) = (settings.hidden_size, settings.intermediate_size);
    let mut all = Shapes::new();
    let mut one = |path: &str, shape: &[i64]| {
        all.insert(names.own(path), shape.to_vec());
    };
    one(CLASS, &[1, 1, width]);
    one(POSITIONS, &[1, settings.tokens(), width]);
    let mut pair = |path: &str, weight: &[i64], bias: bool| {
        if bias {
            one(&format!("{path}.bias"), weight.get(..1).unwrap_or_default());
        }
        one(&format!("{path}.weight"), weight);
    };
    let patch = settings.patch_size;
    pair(PATCHES, &[width, settings.num_channels, patch, patch], true);
    for i in 0..settings.num_hidden_layers {
        let layer = format!("layers.{i}");
        for name in ["q_proj", "k_proj", "v_proj"] {
            pair(&format!("{layer}.attention.{name}"), &[width, width], settings.qkv_bias);
        }
        pair(&format!("{layer}.attention.o_proj"), &[width, width], true);
        pair(&format!("{layer}.layernorm_before"), &[width], true);
        pair(&format!("{layer}.layernorm_after"), &[width], true);
        pair(&format!("{layer}.mlp.fc1"), &[inner, width], true);
        pair(&format!("{layer}.mlp.fc2"), &[width, inner], true);
    }
    pair(NORM, &[width], true);
    if pooled {
        pair(POOLER, &[settings.pooler_width(), width], true);
    }
    if let Some(labels) = names.labels {
        all.insert(format!("{CLASSIFIER}.weight"), vec![labels, width]);
        all.insert(format!("{CLASSIFIER}.bias"), vec![labels]);
    }
    all
}
