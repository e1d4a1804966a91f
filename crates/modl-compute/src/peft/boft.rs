//! `peft_type` BOFT: PEFT's `BOFTConfig` as of version 0.21.2.

use serde_json::{Value, json};

use super::same_names::{self, SameNames};
use super::{PeftType, Provenance};
use crate::low_rank::Boft;

pub(super) const BOFT: PeftType = same_names::of::<Boft>();

impl SameNames for Boft {
    const TYPE: &'static str = "BOFT";
    const KIND: &'static str = "boft";
    const NAMES: &'static [&'static str] = &[
        "boft_block_size",
        "boft_block_num",
        "boft_n_butterfly_factor",
        "boft_dropout",
        "init_weights",
    ];

    fn others() -> Value {
        json!({ "bias": "none", "fan_in_fan_out": false })
    }

    fn peft(&self) -> &Provenance {
        &self.peft
    }
}
