//! What training has come to, as a file: φ, ρ, γ, heads, of the backbone what was trained, and which
//! modules training has attached.

use std::collections::HashMap;
use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Error, Modular, ParamStore, Result, ResultExt, Select, Targets, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Methods;

/// Where the file's metadata has the modules.
const MODULES: &str = "modl.modules";
/// And the router, where it is another than the recipe's.
const ROUTER: &str = "modl.router";

/// How a module was attached.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Attached {
    name: String,
    config: Value,
    targets: Targets,
}

/// Writes all of it, the `router` that is in the place of the recipe's, and `more` tensors under names
/// of their own.
pub(crate) fn save(
    path: &Path,
    model: &Modular,
    router: Option<&Value>,
    more: Vec<(String, Tensor)>,
) -> Result<()> {
    let mut modules = Vec::new();
    for name in model.modules() {
        let targets = model.recipe(name)?.1.clone();
        let config = model.configuration(name)?;
        modules.push(Attached { name: name.to_owned(), config, targets });
    }
    let modules = serde_json::to_string(&modules).map_err(|e| Error::file(path, e))?;
    let mut metadata = HashMap::from([(MODULES.to_owned(), modules)]);
    metadata.extend(router.map(|r| (ROUTER.to_owned(), r.to_string())));
    let mut all = own(model)?;
    for (name, p) in model.backbone().params().iter().filter(|(_, p)| p.trainable()) {
        all.insert(format!("base.{name}"), p.tensor().clone())?;
    }
    for (name, t) in more {
        all.insert(format!("{RULE}{name}"), t)?;
    }
    let tensors = all.iter().map(|(n, p)| (n, p.tensor()));
    checkpoint::save(path, tensors, metadata)
}

/// The names of what a strategy keeps beside the model start so.
const RULE: &str = "rule.";

/// What was saved beside the model.
pub(crate) struct Beside {
    /// The router that is in the place of the recipe's.
    pub(crate) router: Option<Value>,
    /// What the strategy keeps.
    pub(crate) kept: Vec<(String, Tensor)>,
}

/// Makes of a model what was saved. Modules that it lacks are attached.
pub(crate) fn load(path: &Path, model: &mut Modular, methods: &Methods) -> Result<Beside> {
    let file = Checkpoint::open(path)?;
    if let Some(text) = file.metadata().get(MODULES) {
        let modules: Vec<Attached> =
            serde_json::from_str(text).map_err(|e| Error::file(path, e))?;
        for Attached { name, config, targets } in modules {
            if !model.modules().contains(&name.as_str()) {
                let config = methods.registry.modules.parse(&config).at(&name)?;
                model.attach(&name, config, &targets)?;
            }
        }
    }
    let router: Option<Value> = match file.metadata().get(ROUTER) {
        Some(text) => Some(serde_json::from_str(text).map_err(|e| Error::file(path, e))?),
        None => None,
    };
    if let Some(config) = &router {
        model.route(methods.registry.routers.parse(config)?, false)?;
    }
    let (mut saved, mut kept) = (Vec::new(), Vec::new());
    for (name, t) in file.tensors(model.device())? {
        match name.strip_prefix(RULE) {
            Some(rest) => kept.push((rest.to_owned(), t)),
            None => saved.push((name, t)),
        }
    }
    let mut all = own(model)?;
    // Of the backbone there is only what was trained.
    for name in saved.iter().filter_map(|(n, _)| n.strip_prefix("base.")) {
        all.insert(format!("base.{name}"), model.backbone().params().get(name)?.clone())?;
    }
    let tensors = saved.iter().map(|(n, t)| (n.as_str(), t));
    all.load(&path.display().to_string(), tensors, &Select::all())?;
    Ok(Beside { router, kept })
}

fn own(model: &Modular) -> Result<ParamStore> {
    let mut all = ParamStore::new();
    for (name, p) in model.params().iter() {
        all.insert(name, p.tensor().clone())?;
    }
    Ok(all)
}
