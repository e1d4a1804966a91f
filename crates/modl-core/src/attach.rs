//! Modules that come and go. What can be refused is done beside the model first, so that a call
//! that is refused has changed nothing.

use crate::model_routing::Made;
use crate::undecided::Undecided;
use crate::{
    Aggregator, Attachment, Bank, Error, Modular, ModularLayer, Module, ModuleConfig, ParamStore,
    Result, ResultExt, Router, Scope, Seed, Select, Site, Targets,
};

/// A module that has been attached: its recipe and where it stands.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) config: Box<dyn ModuleConfig>,
    pub(crate) targets: Targets,
    pub(crate) sites: Vec<usize>,
}

/// A module that has been built, and does not stand in the model yet.
struct Built {
    /// By their full names.
    params: ParamStore,
    modules: Vec<(Site, Box<dyn Module>)>,
}

/// What the sites of a new module need besides: routers with room for it, and aggregators where
/// there were none.
struct Room {
    routers: Made<dyn Router>,
    aggregators: Made<dyn Aggregator>,
}

/// A module that was taken out, with all that is needed to put it back.
pub(crate) struct Removed {
    name: String,
    attached: Attached,
    params: ParamStore,
    /// Its places: the site's index and the position in the bank there.
    modules: Vec<(usize, usize, Box<dyn Module>)>,
    /// The layers at which it was alone.
    layers: Vec<(usize, ModularLayer)>,
}

impl Modular {
    /// Attaches a module, freshly initialised, at every site that `targets` takes.
    ///
    /// # Errors
    /// Where the name is taken or is not made of letters, digits, `_` and `-`, no site fits, the
    /// module does not fit a site, or the routers that there are cannot make room for it; then
    /// nothing has been attached.
    pub fn attach(
        &mut self,
        name: &str,
        config: Box<dyn ModuleConfig>,
        targets: &Targets,
    ) -> Result<()> {
        let built = self.built(name, config.as_ref(), targets)?;
        self.put(name, config, targets, built)
    }

    /// Attaches a module with given parameters, named `SITE.PARAM`.
    ///
    /// # Errors
    /// As [`Modular::attach`]; [`Error::Mismatch`] where the parameters are not the module's; where
    /// they have values that are no numbers. Then nothing has been attached.
    pub fn attach_with(
        &mut self,
        name: &str,
        config: Box<dyn ModuleConfig>,
        targets: &Targets,
        params: &ParamStore,
    ) -> Result<()> {
        let built = self.built(name, config.as_ref(), targets)?;
        let prefix = format!("modules.{name}.");
        let named: Vec<_> =
            params.iter().map(|(n, p)| (format!("{prefix}{n}"), p.tensor())).collect();
        let named = named.iter().map(|(n, t)| (n.as_str(), *t));
        built.params.load(name, named, &Select::all())?;
        self.put(name, config, targets, built)
    }

    /// The parameters that a module would have, by `SITE.PARAM`: to be filled with
    /// [`ParamStore::load`] before it is attached by [`Modular::attach_with`]. Until then they have
    /// a shape and no memory, so that a file cannot ask for more than it holds.
    ///
    /// # Errors
    /// Where no site fits, or the module does not fit a site.
    pub fn parameters_of(
        &self,
        config: &dyn ModuleConfig,
        targets: &Targets,
    ) -> Result<ParamStore> {
        let mut store = ParamStore::of_shapes();
        self.build_in(&mut self.scope_in(&mut store, ""), config, targets)?;
        config.check_built(&store)?;
        Ok(store)
    }

    /// The parameters with which an attached module would start from another seed, by `SITE.PARAM`:
    /// for one that is to begin again. The model stays as it is.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    pub fn fresh_parameters(&self, name: &str, seed: Seed) -> Result<ParamStore> {
        let (config, targets) = self.recipe(name)?;
        let mut store = ParamStore::new();
        let top = Scope::at(&mut store, "", seed.child(name));
        self.build_in(&mut top.on(self.module_kind(), self.device()), config, targets)?;
        Ok(store)
    }

    /// Takes a module out. Routers that were made for it are taken out, too.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    pub fn detach(&mut self, name: &str) -> Result<()> {
        self.take_out(name)?;
        self.forget_routers();
        Ok(())
    }

    fn sites_of(&self, targets: &Targets) -> Result<Vec<Site>> {
        Ok(targets.select(self.backbone().sites())?.into_iter().cloned().collect())
    }

    /// A module in a store of its own.
    fn built(&self, name: &str, config: &dyn ModuleConfig, targets: &Targets) -> Result<Built> {
        if self.attached.contains_key(name) {
            return Err(Error::Duplicate { kind: "module", name: name.to_owned() });
        }
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c)) {
            return Err(Error::invalid(
                format!("module name `{name}`"),
                "is to be made of letters, digits, `_` and `-`",
            ));
        }
        let mut params = ParamStore::new();
        let mut top = self.scope_in(&mut params, &format!("modules.{name}"));
        let modules = self.build_in(&mut top, config, targets)?;
        config.check_built(&params.below(&format!("modules.{name}.")))?;
        Ok(Built { params, modules })
    }

    /// A module at each of its sites, with its parameters below `top`.
    fn build_in(
        &self,
        top: &mut Scope,
        config: &dyn ModuleConfig,
        targets: &Targets,
    ) -> Result<Vec<(Site, Box<dyn Module>)>> {
        let sites = self.sites_of(targets)?;
        let one = |site: &Site| {
            let at = Attachment { site, theta: &self.backbone().theta(site)?, sites: &sites };
            let module = config.build(&at, &mut top.sub(&site.path)).at(&site.path)?;
            Ok((site.clone(), module))
        };
        sites.iter().map(one).collect()
    }

    /// Puts a module in its places.
    fn put(
        &mut self,
        name: &str,
        config: Box<dyn ModuleConfig>,
        targets: &Targets,
        built: Built,
    ) -> Result<()> {
        let room = self.room_for(&built)?;
        self.params().check_free(&built.params)?;
        for (site, _) in &built.modules {
            self.layers.slot(site)?;
        }
        // From here on nothing is refused.
        let sites = built.modules.iter().map(|(s, _)| s.index).collect();
        self.params.absorb(built.params);
        for (site, module) in built.modules {
            let slot = self.layers.slot(&site)?;
            let layer =
                slot.get_or_insert_with(|| ModularLayer::new(Bank::new(), Undecided, Undecided));
            layer.bank.insert(name, module)?;
        }
        self.seat_routers(room.routers);
        self.seat_aggregators(room.aggregators);
        let attached = Attached { config, targets: targets.clone(), sites };
        self.attached.insert(name.to_owned(), attached);
        Ok(())
    }

    fn room_for(&self, built: &Built) -> Result<Room> {
        let mut room = Room { routers: Made::new(), aggregators: Made::new() };
        if self.router.is_some() {
            room.routers.params = self.router_params();
        }
        for (site, _) in &built.modules {
            match (self.layer(site), &self.router, &self.aggregator) {
                (Some(layer), Some(_), _) => {
                    let path = self.router_path(site);
                    let mut scope = self.scope_in(&mut room.routers.params, &path);
                    let modules = layer.bank.len() + 1;
                    let grown = layer.router().grown(modules, &mut scope).at(&site.path)?;
                    room.routers.parts.push((site.index, grown));
                }
                (None, Some(_), _) => {
                    return Err(Error::unsupported(
                        "attaching a module at a site that had none, after the routers were made",
                        "attach all modules first, then call Modular::route",
                    ));
                }
                (None, None, Some(config)) => {
                    self.make_aggregator(config.as_ref(), site, &mut room.aggregators)?;
                }
                (_, None, _) => {}
            }
        }
        Ok(room)
    }

    /// Takes a module out and leaves the routers.
    pub(crate) fn take_out(&mut self, name: &str) -> Result<Removed> {
        let attached = self.attached.remove(name);
        let attached =
            attached.ok_or_else(|| Error::unknown("module", name, self.attached.keys()))?;
        let (mut modules, mut layers) = (Vec::new(), Vec::new());
        for index in &attached.sites {
            let Some(layer) = self.layers.nth(*index) else { continue };
            let Ok(at) = layer.bank.position(name) else { continue };
            modules.extend(layer.bank.remove(name).map(|m| (*index, at, m)));
            if layer.bank.is_empty() {
                layers.extend(self.layers.take(*index).map(|l| (*index, l)));
            }
        }
        let params = self.params.take_under(&format!("modules.{name}."));
        Ok(Removed { name: name.to_owned(), attached, params, modules, layers })
    }

    /// Puts a module back where it was. Those that were taken out after it have to be back.
    pub(crate) fn put_back(&mut self, removed: Removed) -> Result<()> {
        let Removed { name, attached, params, modules, layers } = removed;
        self.params.absorb(params);
        for (index, layer) in layers {
            self.layers.set(index, layer);
        }
        for (index, at, module) in modules {
            if let Some(layer) = self.layers.nth(index) {
                layer.bank.insert_at(at, name.as_str(), module)?;
            }
        }
        self.attached.insert(name, attached);
        Ok(())
    }
}
