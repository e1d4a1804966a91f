//! `peft_type` FOURIERFT: PEFT's `FourierFTConfig` as of version 0.21.2.

use serde_json::{Value, json};

use super::same_names::{self, SameNames};
use super::{PeftType, Provenance};
use crate::low_rank::FourierFt;

pub(super) const FOURIERFT: PeftType = same_names::of::<FourierFt>();

impl SameNames for FourierFt {
    const TYPE: &'static str = "FOURIERFT";
    const KIND: &'static str = "fourierft";
    const NAMES: &'static [&'static str] =
        &["n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "init_weights"];

    fn others() -> Value {
        json!({ "bias": "none", "fan_in_fan_out": false, "n_frequency_pattern": {} })
    }

    fn peft(&self) -> &Provenance {
        &self.peft
    }
}
