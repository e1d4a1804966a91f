//! AdapterDrop: a method without its modules in the first layers.
//!
//! Specialised: the layers below `first` have no module. Robust: in each step of training the
//! modules of the first n layers are skipped, n drawn uniformly from 0 … `random`, so that any of
//! them may be dropped later. What is meant by a layer is the first number in a site's path; sites
//! without one always keep their module.
//!
//! Rücklé et al. 2021, *AdapterDrop: On the Efficiency of Adapters in Transformers*, arXiv
//! 2010.11918. Survey §3.3, function composition.

use std::path::Path;

use modl_core::checkpoint::Checkpoint;
use modl_core::{
    Attachment, Context, Error, Host, LowRank, Modular, Module, ModuleConfig, ModuleHeader,
    ParamStore, Result, Scope, Select, Signal, Step, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Bottleneck, Nested};
use crate::absent::Absent;

/// Configuration of AdapterDrop around another method, at that one's sites.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterDrop {
    /// The method whose modules are dropped; default: bottleneck adapters after Pfeiffer et al.
    pub config: Nested,
    /// So many of the lowest layers have no module; default 5.
    pub first: i64,
    /// In each step of training the modules of the first 0 to so many layers are skipped, layers
    /// counted from 0; default 0, never.
    pub random: i64,
}

impl Default for AdapterDrop {
    fn default() -> Self {
        AdapterDrop { config: Nested::new(Bottleneck::pfeiffer()), first: 5, random: 0 }
    }
}

impl ModuleConfig for AdapterDrop {
    fn kind(&self) -> &'static str {
        "adapter_drop"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.config.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let (first, random) = (self.first, self.random);
        if first < 0 || random < 0 {
            let problem = format!("first is {first}, random is {random}; want numbers from 0");
            return Err(Error::invalid("adapter_drop", problem));
        }
        let layer = at.site.layer();
        if layer.is_some_and(|l| l < first) {
            return Ok(Box::new(Absent));
        }
        let inner = self.config.build(at, scope)?;
        Ok(match layer {
            Some(layer) if layer < random => {
                let place = scope.common().path().to_owned();
                Box::new(SometimesSkipped { inner, layer, random, place })
            }
            _ => inner,
        })
    }

    fn after_step(&self, params: &ParamStore, step: &Step) -> Result<()> {
        self.config.after_step(params, step)
    }
}

/// Attaches a module from its file without its modules below layer `first`: what was trained
/// robustly is used with as many layers as there is time for. The file's method may be AdapterDrop
/// or any method of this crate.
///
/// # Errors
/// Where the file has no modules for layers from `first` on because it was made with a larger one,
/// and otherwise as [`Modular::load_module`]; then nothing has been attached.
pub fn load_dropped(
    model: &mut Modular,
    path: impl AsRef<Path>,
    name: Option<&str>,
    first: i64,
) -> Result<String> {
    let path = path.as_ref();
    let header = ModuleHeader::read(path)?;
    model.check_base(path, &header.base)?;
    let saved: Nested = modl_core::from_json("module", header.config.clone())?;
    let whole = model.parameters_of(&*saved, &header.targets)?;
    let tensors = Checkpoint::open(path)?.tensors(model.device())?;
    let found = tensors.iter().map(|(n, t)| (n.as_str(), t));
    whole.load(&path.display().to_string(), found, &Select::all())?;

    let config = from_layer(saved, first).map_err(|e| Error::file(path, e))?;
    let name = name.unwrap_or(&header.name);
    let left = left_of(model, &whole, &config, &header.targets)?;
    model.attach_with(name, Box::new(config), &header.targets, &left)?;
    Ok(name.to_owned())
}

/// Puts in the place of an attached module the same one without its modules below layer `first`. Routers
/// are forgotten, as by [`Modular::detach`].
///
/// # Errors
/// Where there is no such module, it has none from `first` on because it was made with a larger one, or
/// its method is not of this crate; then nothing has been changed.
pub fn drop_layers(model: &mut Modular, name: &str, first: i64) -> Result<()> {
    let saved: Nested = modl_core::from_json("module", model.configuration(name)?)?;
    let config = from_layer(saved, first)
        .map_err(|problem| Error::invalid(format!("module `{name}`"), problem))?;
    let targets = model.recipe(name)?.1.clone();
    let whole = model.params().below(&format!("modules.{name}."));
    let left = left_of(model, &whole, &config, &targets)?;
    model.detach(name)?;
    model.attach_with(name, Box::new(config), &targets, &left)
}

/// A method from layer `first` on.
fn from_layer(saved: Nested, first: i64) -> Result<AdapterDrop, String> {
    if saved.kind() != "adapter_drop" {
        return Ok(AdapterDrop { config: saved, first, random: 0 });
    }
    let read =
        |saved: &Nested| modl_core::from_json::<AdapterDrop>("adapter_drop", saved.to_json()?);
    let before = read(&saved).map_err(|e| e.to_string())?;
    match before.first > first {
        true => Err(format!("has no modules below layer {}, not {first}", before.first)),
        false => Ok(AdapterDrop { first, ..before }),
    }
}

/// Of the parameters of a whole module those that are left under `config`.
fn left_of(
    model: &Modular,
    whole: &ParamStore,
    config: &AdapterDrop,
    targets: &Targets,
) -> Result<ParamStore> {
    let left = model.parameters_of(config, targets)?;
    let kept: Vec<&str> = left.iter().map(|(n, _)| n).collect();
    let kept = whole.iter().filter(|(n, _)| kept.contains(n)).map(|(n, p)| (n, p.tensor()));
    left.load(&format!("modules from layer {} on", config.first), kept, &Select::all())?;
    Ok(left)
}

/// A module that some steps of training skip.
#[derive(Debug)]
struct SometimesSkipped {
    inner: Box<dyn Module>,
    layer: i64,
    random: i64,
    /// What all layers draw by, so that they draw the same n.
    place: String,
}

impl SometimesSkipped {
    fn skipped(&self, cx: &Context) -> bool {
        if !cx.train {
            return false;
        }
        // A seed is a well mixed number already.
        let n = (cx.draw(&self.place).nth(0).0 % (self.random as u64 + 1)) as i64;
        self.layer < n
    }
}

impl Module for SometimesSkipped {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if self.skipped(cx) { f.call(x, cx) } else { self.inner.forward(f, x, cx) }
    }

    fn delta(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        if self.skipped(cx) { Ok(None) } else { self.inner.delta(f, x, cx) }
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        self.inner.compose(theta)
    }

    fn low_rank(&self, cx: &Context) -> Option<LowRank> {
        if self.skipped(cx) { None } else { self.inner.low_rank(cx) }
    }

    fn penalty(&self, cx: &Context) -> Result<Option<Tensor>> {
        self.inner.penalty(cx)
    }

    fn phi(&self) -> Tensors {
        self.inner.phi()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let (layer, random, place) = (self.layer, self.random, self.place.clone());
        let inner = self.inner.with_phi(phi)?;
        Ok(Box::new(SometimesSkipped { inner, layer, random, place }))
    }

    fn signature(&self) -> String {
        self.inner.signature()
    }
}
