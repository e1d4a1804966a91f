//! `peft_type` LOHA: PEFT's `LoHaConfig` as of version 0.21.2.

use serde_json::{Map, Value, json};

use super::same_names::{self, SameNames};
use super::{PeftType, Provenance};
use crate::low_rank::Loha;

pub(super) const LOHA: PeftType = same_names::of::<Loha>();

impl SameNames for Loha {
    const TYPE: &'static str = "LOHA";
    const KIND: &'static str = "loha";
    const NAMES: &'static [&'static str] = &[
        "r",
        "alpha",
        "rank_dropout",
        "module_dropout",
        "use_effective_conv2d",
        "init_weights",
        "rank_pattern",
        "alpha_pattern",
    ];

    fn others() -> Value {
        json!({ "alpha_pattern": {}, "rank_pattern": {} })
    }

    fn peft(&self) -> &Provenance {
        &self.peft
    }

    fn to_peft(&self, fields: &mut Map<String, Value>) {
        same_names::whole(fields, "alpha");
        same_names::whole(fields, "alpha_pattern");
    }
}
