//! Modules and routing in files that describe themselves.
//!
//! Methods that PEFT or AdapterHub know are better kept in those projects' formats; this one takes
//! every method: a safetensors file whose metadata holds a [`ModuleHeader`] as JSON under `modl`.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::{self, Checkpoint};
use crate::{Error, Modular, ParamStore, Registry, Result, Select, Targets};

const FORMAT: u32 = 1;

/// What a module file says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleHeader {
    /// Version of this format.
    pub format: u32,
    /// The module's name.
    pub name: String,
    /// The configuration, with `type`.
    pub config: Value,
    /// What it was attached to.
    pub targets: Targets,
    /// Fingerprint of the backbone that it was made for.
    pub base: String,
}

/// What a routing file says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RoutingHeader {
    format: u32,
    /// The modules, in the order of α.
    modules: Vec<String>,
    router: Option<Value>,
    global: bool,
    aggregator: Option<Value>,
    base: String,
}

impl ModuleHeader {
    /// Reads the header of a module file.
    ///
    /// # Errors
    /// Where the file is not one.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        header(&Checkpoint::open(path)?)
    }
}

fn header<H: serde::de::DeserializeOwned>(file: &Checkpoint) -> Result<H> {
    let metadata = file.metadata();
    let text = metadata.get("modl").ok_or_else(|| {
        Error::file(file.path(), "has no `modl` metadata; is it a PEFT adapter or a model instead?")
    })?;
    let value = crate::parse_json(file.path(), text)?;
    match value.get("format").and_then(Value::as_u64) {
        Some(v) if v == u64::from(FORMAT) => {}
        other => {
            let problem = format!("is of format {other:?}, this version reads {FORMAT}");
            return Err(Error::file(file.path(), problem));
        }
    }
    serde_json::from_value(value).map_err(|e| Error::file(file.path(), e))
}

fn metadata(header: &impl Serialize) -> Result<HashMap<String, String>> {
    let text =
        serde_json::to_string(header).map_err(|e| Error::invalid("header", e.to_string()))?;
    Ok(HashMap::from([("modl".to_owned(), text), ("format".to_owned(), "pt".to_owned())]))
}

/// A configuration with its `type` in front.
fn tagged(kind: &str, config: Value) -> Value {
    let mut table = serde_json::Map::from_iter([("type".to_owned(), Value::from(kind))]);
    if let Value::Object(rest) = config {
        table.extend(rest);
    }
    Value::Object(table)
}

impl Modular {
    /// The configuration of a module with its `type`, as [`crate::Registry`] reads it.
    ///
    /// # Errors
    /// [`Error::Unknown`] where there is no such module.
    pub fn configuration(&self, name: &str) -> Result<Value> {
        let (config, _) = self.recipe(name)?;
        Ok(tagged(config.kind(), config.to_json()?))
    }

    /// Refuses a file that was made for another backbone.
    ///
    /// # Errors
    /// [`Error::File`] naming both fingerprints.
    pub fn check_base(&self, path: &Path, base: &str) -> Result<()> {
        let own = self.backbone().fingerprint()?;
        if own == base {
            return Ok(());
        }
        let problem = format!(
            "was made for the backbone {base}, this one is {own}; open the model that it belongs to"
        );
        Err(Error::file(path, problem))
    }

    /// Saves one module: its parameters, its recipe and where it stands.
    pub fn save_module(&self, name: &str, path: impl AsRef<Path>) -> Result<()> {
        let (config, targets) = self.recipe(name)?;
        let header = ModuleHeader {
            format: FORMAT,
            name: name.to_owned(),
            config: tagged(config.kind(), config.to_json()?),
            targets: targets.clone(),
            base: self.backbone().fingerprint()?,
        };
        let params = self.params().below(&format!("modules.{name}."));
        let tensors = params.iter().map(|(n, p)| (n, p.tensor()));
        checkpoint::save(path, tensors, metadata(&header)?)
    }

    /// Attaches a module from its file, under its own name or another.
    ///
    /// # Errors
    /// Where the method is not in `registry`, the backbone is another one, or tensors do not fit;
    /// then nothing has been attached.
    pub fn load_module(
        &mut self,
        path: impl AsRef<Path>,
        name: Option<&str>,
        registry: &Registry,
    ) -> Result<String> {
        let path = path.as_ref();
        let file = Checkpoint::open(path)?;
        let header: ModuleHeader = header(&file)?;
        self.check_base(path, &header.base)?;
        let name = name.unwrap_or(&header.name);
        let config = registry.modules.parse(&header.config)?;
        let params = self.parameters_of(config.as_ref(), &header.targets)?;
        let tensors = file.tensors(self.device())?;
        let found = tensors.iter().map(|(n, t)| (n.as_str(), t));
        params.load(&path.display().to_string(), found, &Select::all())?;
        self.attach_with(name, config, &header.targets, &params)?;
        Ok(name.to_owned())
    }

    /// Saves routers and aggregators with their recipes.
    pub fn save_routing(&self, path: impl AsRef<Path>) -> Result<()> {
        let router = match &self.router {
            Some((r, _)) => Some(tagged(r.kind(), r.to_json()?)),
            None => None,
        };
        let aggregator = match &self.aggregator {
            Some(a) => Some(tagged(a.kind(), a.to_json()?)),
            None => None,
        };
        let header = RoutingHeader {
            format: FORMAT,
            modules: self.bank_names(),
            router,
            global: self.router.as_ref().is_some_and(|(_, global)| *global),
            aggregator,
            base: self.backbone().fingerprint()?,
        };
        let select = Select::any(["routers.*", "aggregators.*"]);
        let tensors: Vec<_> = self.params().select(&select).collect();
        checkpoint::save(path, tensors, metadata(&header)?)
    }

    /// Makes routers and aggregators from a file, over the modules that are attached.
    ///
    /// # Errors
    /// Where the modules are not those that the routers were made for, a method is not in
    /// `registry`, the backbone is another one, or tensors do not fit; then routers and
    /// aggregators are those of before.
    pub fn load_routing(&mut self, path: impl AsRef<Path>, registry: &Registry) -> Result<()> {
        let path = path.as_ref();
        let file = Checkpoint::open(path)?;
        let header: RoutingHeader = header(&file)?;
        self.check_base(path, &header.base)?;
        if self.bank_names() != header.modules {
            let problem = format!(
                "routes over {}, attached are {}; attach them in that order",
                header.modules.join(", "),
                self.bank_names().join(", ")
            );
            return Err(Error::file(path, problem));
        }
        let router = header.router.as_ref().map(|c| registry.routers.parse(c)).transpose()?;
        let aggregator = &header.aggregator;
        let aggregator = aggregator.as_ref().map(|c| registry.aggregators.parse(c)).transpose()?;
        // By shape alone at first: a file cannot ask for more than it holds.
        let make = |new: fn() -> ParamStore| -> Result<_> {
            let (router, aggregator) = (router.as_deref(), aggregator.as_deref());
            let routers = router.map(|c| self.made_routers(c, header.global, new())).transpose()?;
            let aggregators = aggregator.map(|c| self.made_aggregators(c, new())).transpose()?;
            let mut wanted = ParamStore::new();
            wanted.absorb(match &routers {
                Some(made) => made.params.under(""),
                None => self.router_params(),
            });
            wanted.absorb(match &aggregators {
                Some(made) => made.params.under(""),
                None => self.aggregator_params(),
            });
            Ok((routers, aggregators, wanted))
        };
        let source = path.display().to_string();
        let (_, _, wanted) = make(ParamStore::of_shapes)?;
        let tensors = file.tensors(self.device())?;
        let all = || tensors.iter().map(|(n, t)| (n.as_str(), t));
        wanted.check(&source, all(), &Select::all())?;
        let (routers, aggregators, wanted) = make(ParamStore::new)?;
        wanted.load(&source, all(), &Select::all())?;
        if let Some((config, made)) = router.zip(routers) {
            self.put_routers(config, header.global, made);
        }
        if let Some((config, made)) = aggregator.zip(aggregators) {
            self.put_aggregators(config, made);
        }
        Ok(())
    }

    /// The names in the bank of the first modular site, in the order of α.
    fn bank_names(&self) -> Vec<String> {
        let first = self.modular_sites().into_iter().next();
        let layer = first.as_ref().and_then(|s| self.layer(s));
        layer.map(|l| l.bank.names().to_vec()).unwrap_or_default()
    }
}
