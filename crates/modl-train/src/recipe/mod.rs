//! Recipes: a whole experiment in one TOML file.
//!
//! ```toml
//! seed = 1
//!
//! [backbone]
//! path = "assets/all-MiniLM-L6-v2"   # or `fresh`: see [`BackboneSpec`]
//!
//! [data]
//! tasks = { tweets = "assets/sentiment/tweets.tsv", news = "assets/sentiment/nyt.tsv" }
//! test = 0.2                  # the share that is held out
//!
//! [modules.tweets]
//! type = "lora"               # `modl list modules`
//! targets = ["query", "value"]
//! r = 8
//!
//! [modules.news]
//! type = "lora"
//! targets = ["query", "value"]
//!
//! [router]
//! type = "fixed"              # `modl list routers`
//!
//! [aggregator]
//! type = "weighted_sum"       # `modl list aggregators`
//!
//! [head]
//! type = "regression"         # or "classification", "next_token": see [`Head`]
//!
//! [loss_weights]              # what losses of routers count in all phases; a phase may say its own
//! balance = 0.01              # where neither does, it is what the router's paper has
//!
//! [[phases]]
//! name = "fit"
//! strategy = "joint"          # `modl list strategies`
//! epochs = 3
//! lr = 3e-4
//! optimizer = { type = "adamw", weight_decay = 0.01 }   # or lion, rmsprop, adafactor, sgd
//! # lora_plus_ratio = 16      # LoRA+: B of each LoRA learns 16 times faster than its A
//! schedule = { type = "cosine", warmup = 0.06 }
//! # ema = 0.999              # the average of the parameters is what is measured and given
//! # stop = { metric = "loss", every = 50, patience = 3 }   # ends before its time, gives the best
//! # accumulate = 4            # a step of four batches, of which one is in memory
//! # tasks = ["news"]          # trains on the examples of some tasks only
//! # head = { type = "masked_tokens" }   # another than the recipe's for this phase; so `router`, `aggregator`
//! # limit = 16                # so many examples of each task only
//! # next_task = true          # in a later phase: PathNet keeps its paths, all else begins again
//! ```
//!
//! Reading is strict: an unknown key anywhere is an error with its line, the nearest known key and
//! all known ones.

mod backbone;
mod data;
mod features;
mod head;
mod parts;
mod phase;
mod reading;
pub(crate) mod routing;
mod source;
pub(crate) mod stream;
mod task_files;

use std::path::{Path, PathBuf};

use modl_core::{Error, Modular, Result, Seed};
use serde_json::{Map, Value};

pub use backbone::BackboneSpec;
pub use data::DataSpec;
pub use features::Feature;
pub use head::{Head, Heads};
pub use parts::{Dtype, ModuleSpec, Place, RouterSpec};
pub use phase::Phase;
pub use stream::Stream;
pub use task_files::TaskFiles;

pub use crate::formats::{Columns, DataFormat};

use crate::Methods;
use parts::Top;
use source::Source;

/// An experiment: what is trained, on what, and how.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Where all random numbers come from.
    pub seed: u64,
    /// The network.
    pub backbone: BackboneSpec,
    /// Examples by task.
    pub data: DataSpec,
    /// The inventory, in the order of α.
    pub modules: Vec<ModuleSpec>,
    /// The router; none where modules are only prepared.
    pub router: Option<RouterSpec>,
    /// The aggregator's configuration with its `type`.
    pub aggregator: Option<Value>,
    /// What is predicted.
    pub head: Head,
    /// The steps of training, in order.
    pub phases: Vec<Phase>,
    source: Source,
    values: Map<String, Value>,
}

impl Recipe {
    /// Reads a recipe. `path` is for messages, and for paths within the recipe.
    ///
    /// # Errors
    /// [`Error::Invalid`] with file and line where anything is unknown, missing or does not fit.
    pub fn parse(text: &str, path: impl AsRef<Path>, methods: &Methods) -> Result<Self> {
        let (source, values) = Source::parse(text, path.as_ref())?;
        Self::from_values(source, values, methods)
    }

    /// Reads a recipe's file.
    ///
    /// # Errors
    /// As [`Recipe::parse`], or where the file cannot be read.
    pub fn open(path: impl AsRef<Path>, methods: &Methods) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        Self::parse(&text, path, methods)
    }

    /// Sets one value: `phases.0.lr=1e-4`. What is right of `=` is TOML, or a string where it is
    /// none.
    ///
    /// # Errors
    /// Where there is no such key, or the value does not fit it; then nothing has been changed.
    pub fn set(&mut self, assignment: &str, methods: &Methods) -> Result<()> {
        self.change("--set ", assignment, methods)
    }

    /// [`Recipe::set`] by an option of a program.
    pub(super) fn change(
        &mut self,
        option: &str,
        assignment: &str,
        methods: &Methods,
    ) -> Result<()> {
        let source = self.source.blaming(&format!("{option}{assignment}"));
        let Some((key, value)) = assignment.split_once('=') else {
            return Err(source.error(&[], "is to be KEY=VALUE, for instance phases.0.lr=1e-4"));
        };
        let value = match toml::from_str::<Map<String, Value>>(&format!("value = {value}")) {
            Ok(mut table) => table.shift_remove("value").unwrap_or_default(),
            Err(_) => Value::from(value.trim()),
        };
        let mut top = Value::Object(self.values.clone());
        let keys: Vec<&str> = key.trim().split('.').collect();
        let slot = keys.iter().try_fold(&mut top, |at, key| match at {
            Value::Array(items) => key.parse::<usize>().ok().and_then(|i| items.get_mut(i)),
            Value::Object(table) => Some(table.entry(*key).or_insert_with(|| Map::new().into())),
            _ => None,
        });
        let slot =
            slot.ok_or_else(|| source.error(&[], format!("there is no `{}`", key.trim())))?;
        *slot = value;
        if let Value::Object(values) = top {
            let fresh = Self::from_values(source, values, methods)?;
            // Later errors are the file's again.
            *self = Recipe { source: self.source.clone(), ..fresh };
        }
        Ok(())
    }

    fn from_values(source: Source, values: Map<String, Value>, methods: &Methods) -> Result<Self> {
        let top: Top = source.read(&[], &Value::Object(values.clone()))?;
        let registry = &methods.registry;
        let at = |key: &str| [key.to_owned()];
        if let Some(table) = &top.aggregator {
            parts::read_aggregator(&source, &at("aggregator"), table, registry)?;
        }
        let router = top.router.as_ref();
        let router = router.map(|v| RouterSpec::read(&source, &at("router"), v, registry));
        let module =
            |(name, table): (&String, &Value)| ModuleSpec::read(&source, name, table, registry);
        let head = Head::read(&source, &at("head"), &top.head)?;
        let several = top.phases.iter().any(|phase| phase.get("head").is_some());
        let of_recipe = phase::OfRecipe { loss_weights: &top.loss_weights, head: &head, several };
        let phase =
            |(i, table): (usize, &Value)| Phase::read(&source, i, table, &of_recipe, methods);
        let recipe = Recipe {
            seed: top.seed,
            backbone: BackboneSpec::read(&source, &top.backbone, registry)?,
            data: source.read(&["data".to_owned()], &top.data)?,
            modules: top.modules.iter().map(module).collect::<Result<_>>()?,
            router: router.transpose()?,
            phases: top.phases.iter().enumerate().map(phase).collect::<Result<_>>()?,
            head,
            aggregator: top.aggregator,
            source,
            values,
        };
        recipe.check()?;
        Ok(recipe)
    }

    /// What no single table can know.
    fn check(&self) -> Result<()> {
        let keys = |key: &str| vec![key.to_owned()];
        self.data.check(&self.source)?;
        self.check_heads()?;
        let of_classes = |head: &&Head| matches!(head, Head::Classification { .. });
        if let (Some(Stream::Split { .. }), false) =
            (&self.data.stream, self.heads().iter().all(of_classes))
        {
            let problem = "a `split` stream is of classes; give it a [head] of `classification`";
            return Err(self.source.error(&[keys("data"), keys("stream")].concat(), problem));
        }
        for (i, phase) in self.phases.iter().enumerate() {
            if self.phases.iter().take(i).any(|p| p.name == phase.name) {
                let at = [keys("phases"), keys(&i.to_string()), keys("name")].concat();
                let problem = format!("two phases are called `{}`; name them apart", phase.name);
                return Err(self.source.error(&at, problem));
            }
        }
        if !self.modules.is_empty() && (self.router.is_none() || self.aggregator.is_none()) {
            let problem = "has modules, but not both a [router] and an [aggregator]";
            return Err(self.source.error(&keys("modules"), problem));
        }
        Ok(())
    }

    /// A path of the recipe as seen from here: relative ones start at the recipe's folder.
    pub fn resolve(&self, path: impl AsRef<Path>) -> PathBuf {
        self.source.folder().join(path)
    }

    /// The recipe with all that was set, as JSON.
    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// The seed.
    pub fn seed(&self) -> Seed {
        Seed(self.seed)
    }

    /// Attaches all modules to a fresh model and gives it the router and the aggregator.
    ///
    /// # Errors
    /// Where a module fits no site, or a router does not fit the modules.
    pub fn attach(&self, model: &mut Modular, methods: &Methods) -> Result<()> {
        for m in &self.modules {
            let config = methods.registry.modules.parse(&m.config)?;
            model.attach(&m.name, config, &m.targets)?;
        }
        self.route(model, methods)
    }
}
