//! Names to constructors: how recipes and the command line find methods, and third parties add
//! theirs.
//!
//! A registry is a value, never a global: `Registry::new()`, then the `register` function of each
//! crate. Nothing happens before `main`, and nothing is lost when a linker drops a crate.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{AggregatorConfig, Error, FreshBackbone, ModuleConfig, Result, RouterConfig};

/// A method that can be named.
pub struct Entry<T: ?Sized> {
    /// The name in recipes: `top_k`.
    pub name: &'static str,
    /// In words: `Top-k of a softmax`.
    pub title: &'static str,
    /// The paper.
    pub citation: &'static str,
    /// The section of the survey.
    pub section: &'static str,
    /// Reads the configuration, strictly.
    pub parse: fn(Value) -> Result<Box<T>>,
}

impl<T: ?Sized> std::fmt::Debug for Entry<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Entry({})", self.name)
    }
}

/// The methods of one axis, in the order in which they were registered.
pub struct Catalog<T: ?Sized> {
    /// In the singular, for errors: `router`.
    axis: &'static str,
    entries: Vec<Entry<T>>,
}

impl<T: ?Sized> std::fmt::Debug for Catalog<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.entries).finish()
    }
}

impl<T: ?Sized> Catalog<T> {
    /// An empty catalogue of the axis that is so called in the singular.
    pub fn new(axis: &'static str) -> Self {
        Catalog { axis, entries: Vec::new() }
    }

    /// Adds a method.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken.
    pub fn add(&mut self, entry: Entry<T>) -> Result<()> {
        if self.entries.iter().any(|e| e.name == entry.name) {
            return Err(Error::Duplicate { kind: self.axis, name: entry.name.to_owned() });
        }
        self.entries.push(entry);
        Ok(())
    }

    /// The methods.
    pub fn entries(&self) -> &[Entry<T>] {
        &self.entries
    }

    /// Makes the configuration of `{ "type": NAME, … }`.
    ///
    /// # Errors
    /// Where `type` is missing or unknown, or the method does not know one of the other keys.
    pub fn parse(&self, config: &Value) -> Result<Box<T>> {
        let invalid = |problem: &str| Error::invalid(self.axis, problem.to_owned());
        let mut table: Map<String, Value> =
            config.as_object().cloned().ok_or_else(|| invalid("is to be a table with a `type`"))?;
        // `remove` would move the last key into the gap and upset the order.
        let kind = table.shift_remove("type").ok_or_else(|| invalid("has no `type`"))?;
        let kind = kind.as_str().ok_or_else(|| invalid("its `type` is to be a string"))?;
        let entry = self.entries.iter().find(|e| e.name == kind);
        let entry = entry
            .ok_or_else(|| Error::unknown(self.axis, kind, self.entries.iter().map(|e| e.name)))?;
        (entry.parse)(Value::Object(table))
    }
}

/// The catalogue's `register`, for the configurations of one axis.
macro_rules! registers {
    ($config:ident) => {
        impl Catalog<dyn $config> {
            /// Adds a method under the name of its configuration `C`, with its title, its paper and
            /// the section of the survey: the one line that a method needs. Recipes are read
            /// strictly: a key that `C` does not know is an error.
            ///
            /// # Errors
            /// [`Error::Duplicate`] where the name is taken.
            pub fn register<C: $config + for<'de> Deserialize<'de> + Default + 'static>(
                &mut self,
                title: &'static str,
                citation: &'static str,
                section: &'static str,
            ) -> Result<()> {
                let name = C::default().kind();
                let parse = |v| Ok(Box::new(from_json::<C>(C::default().kind(), v)?) as _);
                self.add(Entry { name, title, citation, section, parse })
            }
        }
    };
}

registers!(ModuleConfig);
registers!(RouterConfig);
registers!(AggregatorConfig);
registers!(FreshBackbone);

/// Reads the configuration of a method.
///
/// # Errors
/// [`Error::Invalid`] naming `method` and the key that does not fit.
pub fn from_json<C: DeserializeOwned>(method: &str, config: Value) -> Result<C> {
    serde_json::from_value(config).map_err(|e| Error::invalid(method, e.to_string()))
}

/// The configuration of a method as in recipes and files.
///
/// # Errors
/// [`Error::Invalid`] naming `method` where JSON cannot hold a value.
pub fn to_json(method: &str, config: &impl Serialize) -> Result<Value> {
    serde_json::to_value(config).map_err(|e| Error::invalid(method, e.to_string()))
}

/// All methods of the three axes that meet at a site, and the networks that can be drawn afresh.
#[derive(Debug)]
pub struct Registry {
    /// Computation.
    pub modules: Catalog<dyn ModuleConfig>,
    /// Routing.
    pub routers: Catalog<dyn RouterConfig>,
    /// Aggregation.
    pub aggregators: Catalog<dyn AggregatorConfig>,
    /// Backbones that are drawn, not loaded.
    pub backbones: Catalog<dyn FreshBackbone>,
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Registry {
            modules: Catalog::new("module"),
            routers: Catalog::new("router"),
            aggregators: Catalog::new("aggregator"),
            backbones: Catalog::new("fresh backbone"),
        }
    }

    /// Adds what a crate's `register` function adds.
    pub fn with(mut self, register: impl FnOnce(&mut Registry) -> Result<()>) -> Result<Self> {
        register(&mut self)?;
        Ok(self)
    }
}
