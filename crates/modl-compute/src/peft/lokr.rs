//! `peft_type` LOKR: PEFT's `LoKrConfig` as of version 0.21.2.

use modl_core::Result;
use serde_json::{Map, Value, json};

use super::same_names::{self, SameNames};
use super::{Fields, PeftType, Provenance};
use crate::low_rank::{Lokr, LokrInit};

pub(super) const LOKR: PeftType = same_names::of::<Lokr>();

impl SameNames for Lokr {
    const TYPE: &'static str = "LOKR";
    const KIND: &'static str = "lokr";
    const NAMES: &'static [&'static str] = &[
        "r",
        "alpha",
        "rank_dropout",
        "module_dropout",
        "use_effective_conv2d",
        "decompose_both",
        "decompose_factor",
        "rank_dropout_scale",
        "rank_pattern",
        "alpha_pattern",
        "init_weights",
    ];

    fn others() -> Value {
        json!({ "alpha_pattern": {}, "rank_pattern": {} })
    }

    fn peft(&self) -> &Provenance {
        &self.peft
    }

    /// How the factors started is of no use to a trained one, but is written again. PEFT says it by
    /// a truth value or a name.
    fn from_peft(fields: &mut Fields) -> Result<()> {
        let start: Value = fields.optional("init_weights")?.unwrap_or(json!(true));
        let start = match (start.as_bool(), start.as_str()) {
            (Some(true), _) => "standard",
            (Some(false), _) => "random",
            (_, Some("lycoris")) => "lycoris",
            _ => {
                fields.refuse("init_weights", &start);
                "standard"
            }
        };
        fields.give("init_weights", json!(start));
        Ok(())
    }

    fn to_peft(&self, fields: &mut Map<String, Value>) {
        same_names::whole(fields, "alpha");
        same_names::whole(fields, "alpha_pattern");
        let start = match self.init_weights {
            LokrInit::Standard => json!(true),
            LokrInit::Random => json!(false),
            LokrInit::Lycoris => json!("lycoris"),
        };
        fields.insert("init_weights".to_owned(), start);
    }
}
