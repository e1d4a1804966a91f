//! The methods of one adapter, each at its sites: one, or several in a union.

use modl_core::{Backbone, Error, ModuleConfig, Result, Site, Targets, Tensors};
use serde_json::Value;

use super::{METHODS, Method, Param, Read, Standing, settings};
use crate::{Nested, Part as UnionPart, Union};

/// One method at its sites.
#[derive(Debug)]
struct Part {
    method: &'static Method,
    config: Value,
    /// What its parameters are called below in the module: `part0.` in a union, else nothing.
    below: String,
    standing: Standing,
}

/// All methods of one adapter.
#[derive(Debug)]
pub(super) struct Parts(Vec<Part>);

/// What `read` found as one module with its sites.
pub(super) fn join(mut read: Vec<Read>) -> Result<Read> {
    if read.len() == 1
        && let Some(only) = read.pop()
    {
        return Ok(only);
    }
    let parts = read
        .into_iter()
        .map(|(config, targets)| UnionPart { targets, config: Nested::from_box(config) });
    let union = Union::new(parts);
    let targets = union.usual_targets();
    Ok((Box::new(union), targets))
}

impl Parts {
    /// Of an adapter called `name` at the sites that `targets` takes.
    ///
    /// # Errors
    /// Where AdapterHub has no format for the module.
    pub(super) fn new(
        module: &dyn ModuleConfig,
        targets: &Targets,
        name: &str,
        backbone: &dyn Backbone,
    ) -> Result<Self> {
        let all = backbone.sites();
        let sites: Vec<Site> = targets.select(all)?.into_iter().cloned().collect();
        if module.kind() != "union" {
            let part = Part::new(module, String::new(), Standing::new(name, sites, all))?;
            return Ok(Parts(vec![part]));
        }
        let union: Union = modl_core::from_json("union", module.to_json()?)?;
        let parts = union.parts.iter().enumerate().map(|(i, part)| {
            let own = part.targets.select(&sites)?.into_iter().cloned().collect();
            Part::new(&*part.config, format!("part{i}."), Standing::new(name, own, all))
        });
        parts.collect::<Result<_>>().map(Parts)
    }

    /// The key of the parameter `full`: `SITE.PARAM`, or `PARAM` where all sites share it.
    pub(super) fn key(&self, full: &str) -> Result<String> {
        let at = |part: &Part| {
            let Standing { name, model, sites, .. } = &part.standing;
            let key = |site: &str, own: &str| {
                (part.method.key)(&Param { model, site, own, adapter: name })
            };
            let own = sites.iter().filter_map(|s| {
                let own = full.strip_prefix(s.path.as_str())?.strip_prefix('.')?;
                Some((s.path.as_str(), own.strip_prefix(&part.below)?))
            });
            match own.max_by_key(|(site, _)| site.len()) {
                Some((site, own)) => Some(key(site, own)),
                None => full.strip_prefix(&part.below).map(|own| key("", own)),
            }
        };
        let found = self.0.iter().find_map(at);
        found.ok_or_else(|| Error::invalid(full, "is a parameter of no part"))
    }

    /// From the tensors of a file to those that [`Parts::key`] names.
    pub(super) fn unpack(&self, tensors: Tensors) -> Result<Tensors> {
        self.0.iter().try_fold(tensors, |all, part| match part.method.unpack {
            Some(unpack) => unpack(all, &part.config, &part.standing),
            None => Ok(all),
        })
    }

    /// From the tensors that [`Parts::key`] names to those of a file.
    pub(super) fn pack(&self, tensors: Tensors) -> Result<Tensors> {
        self.0.iter().try_fold(tensors, |all, part| match part.method.pack {
            Some(pack) => pack(all, &part.config, &part.standing),
            None => Ok(all),
        })
    }

    /// The settings.
    pub(super) fn settings(&self) -> Result<serde_json::Map<String, Value>> {
        let written = self.0.iter().map(|p| (p.method.write)(p.config.clone(), &p.standing));
        settings::write(written.collect::<Result<_>>()?)
    }
}

impl Part {
    fn new(module: &dyn ModuleConfig, below: String, standing: Standing) -> Result<Self> {
        let method = METHODS.iter().find(|m| m.kind == module.kind()).ok_or_else(|| {
            Error::unsupported(
                format!("saving a module of kind `{}` as an AdapterHub folder", module.kind()),
                "AdapterHub has no format for it; use Modular::save_module",
            )
        })?;
        Ok(Part { method, config: module.to_json()?, below, standing })
    }
}
