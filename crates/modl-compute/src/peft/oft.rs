//! `peft_type` OFT: PEFT's `OFTConfig` as of version 0.21.2.

use serde_json::{Value, json};

use super::same_names::{self, SameNames};
use super::{PeftType, Provenance};
use crate::low_rank::Oft;

pub(super) const OFT: PeftType = same_names::of::<Oft>();

impl SameNames for Oft {
    const TYPE: &'static str = "OFT";
    const KIND: &'static str = "oft";
    const NAMES: &'static [&'static str] = &[
        "r",
        "oft_block_size",
        "module_dropout",
        "coft",
        "eps",
        "block_share",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "init_weights",
    ];

    fn others() -> Value {
        json!({ "bias": "none", "fan_in_fan_out": false })
    }

    fn peft(&self) -> &Provenance {
        &self.peft
    }
}
