//! A BERT that has not learned anything: to train from scratch, or to count.

use modl_core::{Device, Init, Kind, ParamStore, Result, Seed};
use serde_json::Value;

use super::names::{Names, shapes};
use super::{Bert, BertConfig};

impl Bert {
    /// The architecture of `config`, which is as in `config.json`, with a pooler: weights normal
    /// with standard deviation 0.02, normalisations the identity, biases 0, as transformers starts.
    ///
    /// # Errors
    /// Where a setting is missing or not supported.
    pub fn untrained(config: Value, seed: Seed, kind: Kind, device: Device) -> Result<Self> {
        let settings = BertConfig::read(&config)?;
        let mut params = ParamStore::new();
        let names = Names::new(&config, &settings);
        for (name, shape) in shapes(&settings, &names, true) {
            let init = match name.as_str() {
                n if n.ends_with(".bias") => Init::Zeros,
                n if n.ends_with("LayerNorm.weight") => Init::Ones,
                _ => Init::Normal(0.02),
            };
            let value = init.tensor(&shape, seed.child(&name), kind, device)?;
            params.insert(name, value)?;
        }
        Self::assemble(config, settings, names, params, true)
    }
}
