//! How large a run of the demo is, and with which numbers it trains.

use std::path::Path;

use anyhow::{Context as _, Result};
use modl_core::{Kind, checkpoint};
use modl_train::{Decay, Schedule, TrainConfig, Warmup};
use serde::{Deserialize, Serialize};

use super::data::{Corpus, DOMAINS};
use crate::cli::Precision;

/// How many texts are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Size {
    Quick,
    Standard,
    Full,
}

impl Size {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Size::Quick => "quick",
            Size::Standard => "standard",
            Size::Full => "full",
        }
    }

    pub(crate) fn seeds(self) -> u64 {
        if self == Size::Quick { 1 } else { 3 }
    }

    /// Texts of each domain for training and held out.
    pub(crate) fn texts(self) -> (usize, usize) {
        match self {
            Size::Quick => (400, 200),
            Size::Standard => (900, 400),
            Size::Full => (usize::MAX, usize::MAX),
        }
    }
}

/// Everything that a result depends on beside the seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Setting {
    pub(crate) version: u32,
    pub(crate) size: Size,
    pub(crate) bf16: bool,
    pub(crate) device: String,
    /// Texts are cut to so many tokens.
    pub(crate) max_len: usize,
    /// The share of texts held out.
    pub(crate) held_out: f64,
    pub(crate) rank: i64,
    pub(crate) alpha: f64,
    pub(crate) module: TrainConfig,
    pub(crate) router: TrainConfig,
}

impl Setting {
    pub(crate) fn new(size: Size, precision: Precision, device: &str) -> Self {
        let module = TrainConfig {
            train: vec!["modules.*".into()],
            epochs: Some(3),
            batch_size: 16,
            lr: 2e-3,
            schedule: Schedule {
                decay: Decay::Linear,
                warmup: Warmup::Share(0.06),
                ..Schedule::default()
            },
            checkpoint_every: 25,
            ..TrainConfig::default()
        };
        let router = TrainConfig {
            train: vec!["routers.*".into()],
            epochs: Some(1),
            lr: 5e-2,
            loss_weights: [("balance".to_owned(), 0.0), ("z".to_owned(), 0.0)].into(),
            ..module.clone()
        };
        Setting {
            version: 1,
            size,
            bf16: precision.kind() == Kind::BFloat16,
            device: device.to_owned(),
            max_len: 64,
            held_out: 0.25,
            rank: 8,
            alpha: 16.0,
            module,
            router,
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        if self.bf16 { Kind::BFloat16 } else { Kind::Float }
    }

    /// Takes a folder for this setting, or refuses it if it holds another's results.
    pub(crate) fn claim(&self, folder: &Path) -> Result<()> {
        let path = folder.join("setting.json");
        let own = serde_json::to_value(self)?;
        if path.is_file() {
            let text = std::fs::read_to_string(&path)?;
            let found: serde_json::Value = serde_json::from_str(&text).with_context(|| {
                format!("{}: is damaged; start again with --fresh", path.display())
            })?;
            anyhow::ensure!(
                found == own,
                "{}: holds results of another setting (precision, device or version); use --fresh or another --out",
                folder.display()
            );
            return Ok(());
        }
        checkpoint::write_whole(&path, serde_json::to_string_pretty(&own)?.as_bytes())?;
        Ok(())
    }

    /// What will be done, for people.
    pub(crate) fn summary(&self, corpus: &Corpus, seeds: u64) -> String {
        let (train, test) = self.size.texts();
        let of = |n: usize| if n == usize::MAX { "all".to_owned() } else { format!("up to {n}") };
        format!(
            "{} texts in {} domains; each seed trains on {} and tests on {} held-out ones of each domain; \
             {seeds} seed{}, LoRA of rank {}, {} on {}, {} threads",
            corpus.len(),
            DOMAINS.len(),
            of(train),
            of(test),
            if seeds == 1 { "" } else { "s" },
            self.rank,
            if self.bf16 { "bf16" } else { "f32" },
            self.device,
            modl_core::threads(),
        )
    }
}
