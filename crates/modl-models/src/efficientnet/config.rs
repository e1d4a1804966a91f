//! The settings of EfficientNet-Lite.

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::settings::{MOST_LAYERS, check_dropout, check_positive, refuse};

/// No network is near it; widths are multiplied.
const MOST_CHANNELS: i64 = 1 << 20;

/// The settings of an EfficientNet-Lite; the defaults are those of Lite0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EfficientNetConfig {
    /// `efficientnet-lite`.
    pub model_type: String,
    /// Channels of the images.
    pub channels: i64,
    /// Channels after the first convolution, whose stride is 2.
    pub stem: i64,
    /// The stages of blocks.
    pub stages: Vec<Stage>,
    /// Channels of the features.
    pub features: i64,
    /// Classes of the classifier.
    pub classes: i64,
    /// ε of the batch normalisations.
    pub batch_norm_eps: f64,
    /// Dropout in front of the classifier.
    pub dropout: f64,
}

/// Blocks of one width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// The number of blocks.
    pub repeats: usize,
    /// Side of the depthwise kernel, an odd number.
    pub kernel: i64,
    /// Stride of the first block; that of the others is 1.
    pub stride: i64,
    /// How many times wider a block is within.
    pub expand: i64,
    /// Channels of the output.
    pub output: i64,
}

impl Default for EfficientNetConfig {
    fn default() -> Self {
        let stage = |[repeats, kernel, stride, expand, output]: [i64; 5]| Stage {
            repeats: repeats as usize,
            kernel,
            stride,
            expand,
            output,
        };
        let stages = [
            [1, 3, 1, 1, 16],
            [2, 3, 2, 6, 24],
            [2, 5, 2, 6, 40],
            [3, 3, 2, 6, 80],
            [3, 5, 1, 6, 112],
            [4, 5, 2, 6, 192],
            [1, 3, 1, 6, 320],
        ];
        EfficientNetConfig {
            model_type: "efficientnet-lite".to_owned(),
            channels: 3,
            stem: 32,
            stages: stages.map(stage).to_vec(),
            features: 1280,
            classes: 1000,
            batch_norm_eps: 1e-3,
            dropout: 0.2,
        }
    }
}

impl EfficientNetConfig {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// By name where a setting is unknown, has the wrong type or is out of range.
    pub fn read(config: &Value) -> Result<Self> {
        let all = Self::deserialize(config).map_err(|e| Error::invalid("config", e.to_string()))?;
        all.check()?;
        Ok(all)
    }

    pub(super) fn check(&self) -> Result<()> {
        let whole = [
            ("channels", self.channels),
            ("stem", self.stem),
            ("features", self.features),
            ("classes", self.classes),
        ];
        let staged = self.stages.iter().flat_map(|stage| {
            let Stage { kernel, stride, expand, output, .. } = *stage;
            [("kernel", kernel), ("stride", stride), ("expand", expand), ("output", output)]
        });
        let all: Vec<(&str, i64)> = whole.into_iter().chain(staged).collect();
        check_positive(&all)?;
        if let Some((name, n)) = all.iter().find(|(_, n)| *n > MOST_CHANNELS) {
            refuse(name, n, "is too large")?;
        }
        if let Some(stage) = self.stages.iter().find(|stage| stage.kernel % 2 == 0) {
            refuse("kernel", stage.kernel, "is to be odd")?;
        }
        let blocks = self.stages.iter().fold(0usize, |n, s| n.saturating_add(s.repeats));
        if blocks > MOST_LAYERS {
            refuse("stages", blocks, "blocks are too many")?;
        }
        check_dropout(&[("dropout", self.dropout)])
    }

    /// Input channels, stride and stage of each block.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (i64, i64, Stage)> {
        let mut input = self.stem;
        self.stages.iter().flat_map(|stage| (0..stage.repeats).map(move |i| (i, *stage))).map(
            move |(i, stage)| {
                let stride = if i == 0 { stage.stride } else { 1 };
                (std::mem::replace(&mut input, stage.output), stride, stage)
            },
        )
    }
}
