//! A method's configuration inside another one's.
//!
//! In text it is what a recipe is, `{ "type": NAME, … }`, read through this crate's own catalogue.
//! So any method of the crate can stand there without a list of them that has to be kept, and in
//! code any [`ModuleConfig`] at all; what is lost is that text cannot name a third party's method
//! inside another one, for reading sees no registry of the caller's.

use modl_core::{ModuleConfig, Registry, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::{Map, Value};

/// Any method's configuration.
#[derive(Debug)]
pub struct Nested(Box<dyn ModuleConfig>);

impl Nested {
    /// That configuration.
    pub fn new(config: impl ModuleConfig + 'static) -> Self {
        Nested(Box::new(config))
    }

    pub(crate) fn from_box(config: Box<dyn ModuleConfig>) -> Self {
        Nested(config)
    }

    fn recipe(&self) -> Result<Value> {
        let mut table = Map::new();
        table.insert("type".into(), self.0.kind().into());
        if let Value::Object(settings) = self.0.to_json()? {
            table.extend(settings);
        }
        Ok(Value::Object(table))
    }
}

impl std::ops::Deref for Nested {
    type Target = dyn ModuleConfig;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref()
    }
}

impl Serialize for Nested {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.recipe().map_err(ser::Error::custom)?.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Nested {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let recipe = Value::deserialize(d)?;
        let registry = Registry::new().with(crate::register).map_err(de::Error::custom)?;
        registry.modules.parse(&recipe).map(Nested).map_err(de::Error::custom)
    }
}
