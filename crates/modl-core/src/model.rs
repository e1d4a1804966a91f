//! A frozen backbone with modules at its sites.

use std::collections::BTreeMap;

use crate::undecided::Undecided;
use crate::{
    AggregatorConfig, Attachment, Backbone, Bank, Context, Error, Kind, Layers, ModularLayer,
    ModuleConfig, ParamStore, Result, ResultExt, Router, RouterConfig, Scope, Seed, Select, Shared,
    Site, Step, Targets, Tensor, Tensors,
};

/// The key and the path of the one router for all sites.
const GLOBAL_ROUTER: &str = "routers.global";

/// A module that has been attached: its recipe and where it stands.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) config: Box<dyn ModuleConfig>,
    pub(crate) targets: Targets,
    pub(crate) sites: Vec<usize>,
}

/// A backbone with modules, routers and aggregators at its sites.
///
/// Parameters are named by what they belong to: `modules.NAME.SITE.PARAM`, `routers.SITE.PARAM`
/// (`routers.global.PARAM` for one router for all sites), `aggregators.SITE.PARAM`; the backbone's
/// own are `base.` and their name there. A [`Select`] takes any of them.
#[derive(Debug)]
pub struct Modular {
    backbone: Box<dyn Backbone>,
    pub(crate) layers: Layers,
    params: ParamStore,
    attached: BTreeMap<String, Attached>,
    pub(crate) router: Option<(Box<dyn RouterConfig>, bool)>,
    pub(crate) aggregator: Option<Box<dyn AggregatorConfig>>,
    seed: Seed,
    /// θ as it was before a merge: the site's index, the short name, and the value.
    pub(crate) unmerged: Vec<(usize, String, Tensor)>,
}

impl Modular {
    /// A backbone without modules. Whatever is attached later starts from `seed`.
    ///
    /// # Errors
    /// Where θ cannot be frozen.
    pub fn new(backbone: impl Backbone + 'static, seed: Seed) -> Result<Self> {
        Self::from_box(Box::new(backbone), seed)
    }

    /// [`Modular::new`] for a backbone whose type is not known.
    pub fn from_box(backbone: Box<dyn Backbone>, seed: Seed) -> Result<Self> {
        backbone.params().train_only(&Select::none())?;
        Ok(Modular {
            layers: Layers::none(backbone.sites().len()),
            backbone,
            params: ParamStore::new(),
            attached: BTreeMap::new(),
            router: None,
            aggregator: None,
            seed,
            unmerged: Vec::new(),
        })
    }

    /// The backbone.
    pub fn backbone(&self) -> &dyn Backbone {
        self.backbone.as_ref()
    }

    /// φ, ρ and γ: everything but the backbone's own parameters.
    pub fn params(&self) -> &ParamStore {
        &self.params
    }

    /// A place for further parameters, such as the heads of tasks.
    pub fn scope(&mut self, path: &str) -> Scope<'_> {
        let (seed, kind, device) = (self.seed, self.module_kind(), self.device());
        Scope::at(&mut self.params, path, seed).on(kind, device)
    }

    /// Where the backbone is.
    pub fn device(&self) -> crate::Device {
        self.base_tensor().map_or(crate::Device::Cpu, Tensor::device)
    }

    /// The kind in which the backbone computes.
    pub fn kind(&self) -> Kind {
        self.base_tensor().map_or(Kind::Float, Tensor::kind)
    }

    fn base_tensor(&self) -> Option<&Tensor> {
        self.backbone.params().iter().next().map(|(_, p)| p.tensor())
    }

    /// Modules are trained in f32 also where the backbone computes in bf16.
    fn module_kind(&self) -> Kind {
        if self.kind() == Kind::Double { Kind::Double } else { Kind::Float }
    }

    /// The names of the attached modules, sorted.
    pub fn modules(&self) -> Vec<&str> {
        self.attached.keys().map(String::as_str).collect()
    }

    pub(crate) fn attachment(&self, name: &str) -> Result<&Attached> {
        let known = || Error::unknown("module", name, self.attached.keys());
        self.attached.get(name).ok_or_else(known)
    }

    /// The recipe of an attached module and what it was attached to.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    pub fn recipe(&self, name: &str) -> Result<(&dyn ModuleConfig, &Targets)> {
        self.attachment(name).map(|a| (a.config.as_ref(), &a.targets))
    }

    /// Attaches a module, freshly initialised, at every site that `targets` takes.
    ///
    /// # Errors
    /// Where the name is taken or is not made of letters, digits, `_` and `-`, no site fits, or the
    /// module does not fit a site; then nothing has been attached.
    pub fn attach(
        &mut self,
        name: &str,
        config: Box<dyn ModuleConfig>,
        targets: &Targets,
    ) -> Result<()> {
        if self.attached.contains_key(name) {
            return Err(Error::Duplicate { kind: "module", name: name.to_owned() });
        }
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c)) {
            return Err(Error::invalid(
                format!("module name `{name}`"),
                "is to be made of letters, digits, `_` and `-`",
            ));
        }
        let sites: Vec<Site> =
            targets.select(self.backbone.sites())?.into_iter().cloned().collect();
        let built = self.build_all(name, config.as_ref(), &sites);
        if let Err(e) = built {
            self.drop_module(name);
            return Err(e);
        }
        let sites = sites.iter().map(|s| s.index).collect();
        let attached = Attached { config, targets: targets.clone(), sites };
        self.attached.insert(name.to_owned(), attached);
        Ok(())
    }

    fn build_all(&mut self, name: &str, config: &dyn ModuleConfig, sites: &[Site]) -> Result<()> {
        let mut grown = false;
        for site in sites {
            let theta = self.backbone.theta(site)?;
            let mut top = self.scope(&format!("modules.{name}"));
            let at = Attachment { site, theta: &theta, sites };
            let module = config.build(&at, &mut top.sub(&site.path)).at(&site.path)?;
            if self.layers.at(site).is_none() {
                let fresh = ModularLayer::new(Bank::new(), Undecided, Undecided);
                *self.layers.slot(site)? = Some(fresh);
                // A site that had no layer has neither router nor aggregator yet.
                grown = true;
            }
            if let Some(layer) = self.layers.slot(site)? {
                layer.bank.insert(name, module)?;
            }
        }
        config.check_built(&self.params.below(&format!("modules.{name}.")))?;
        if self.router.is_some() {
            self.grow_routers(sites, grown)?;
        }
        if grown && let Some(config) = self.aggregator.take() {
            self.aggregate(config)?;
        }
        Ok(())
    }

    fn grow_routers(&mut self, sites: &[Site], new_sites: bool) -> Result<()> {
        if new_sites {
            return Err(Error::unsupported(
                "attaching a module at a site that had none, after the routers were made",
                "attach all modules first, then call Modular::route",
            ));
        }
        for site in sites {
            let path = self.router_path(site);
            self.at_layer(site, &path, |layer, scope| {
                let modules = layer.bank.len();
                layer.router_mut().grow(modules, scope)
            })?;
        }
        Ok(())
    }

    /// Works on the layer at `site`, if there is one, with a scope at `path` for its parameters.
    fn at_layer(
        &mut self,
        site: &Site,
        path: &str,
        work: impl FnOnce(&mut ModularLayer, &mut Scope) -> Result<()>,
    ) -> Result<()> {
        let (seed, kind, device) = (self.seed, self.module_kind(), self.device());
        let mut scope = Scope::at(&mut self.params, path, seed).on(kind, device);
        match self.layers.slot(site)? {
            Some(layer) => work(layer, &mut scope).at(&site.path),
            None => Ok(()),
        }
    }

    fn router_path(&self, site: &Site) -> String {
        match &self.router {
            Some((_, true)) => GLOBAL_ROUTER.to_owned(),
            _ => format!("routers.{}", site.path),
        }
    }

    /// Takes a module out. Routers that were made for it are taken out, too.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    pub fn detach(&mut self, name: &str) -> Result<()> {
        self.attachment(name)?;
        self.attached.remove(name);
        self.drop_module(name);
        self.forget_routers();
        Ok(())
    }

    fn drop_module(&mut self, name: &str) {
        self.params.remove_below(&format!("modules.{name}."));
        for site in self.backbone.sites() {
            if let Ok(slot) = self.layers.slot(site)
                && let Some(layer) = slot
            {
                layer.bank.remove(name);
                if layer.bank.is_empty() {
                    *slot = None;
                }
            }
        }
    }

    fn forget_routers(&mut self) {
        self.router = None;
        self.params.remove_below("routers.");
        for site in self.modular_sites() {
            if let Ok(Some(layer)) = self.layers.slot(&site) {
                layer.set_router(Box::new(Undecided));
            }
        }
    }

    /// The sites at which modules stand, in the order of a forward pass.
    pub fn modular_sites(&self) -> Vec<Site> {
        let sites = self.backbone.sites().iter();
        sites.filter(|s| self.layers.at(s).is_some()).cloned().collect()
    }

    /// The modular layer at a site, if there is one.
    pub fn layer(&self, site: &Site) -> Option<&ModularLayer> {
        self.layers.at(site)
    }

    /// Gives every modular site a router, and forgets the ones before. With `global` there is one
    /// for all sites: the first that is passed decides.
    ///
    /// # Errors
    /// Where no module is attached, or the router does not fit a site.
    pub fn route(&mut self, config: Box<dyn RouterConfig>, global: bool) -> Result<()> {
        let sites = self.modular_sites();
        if sites.is_empty() {
            return Err(Error::invalid("router", "there is no module yet; attach one first"));
        }
        self.forget_routers();
        for (i, site) in sites.iter().enumerate() {
            let path = if global { GLOBAL_ROUTER.into() } else { format!("routers.{}", site.path) };
            self.at_layer(site, &path, |layer, scope| {
                let router: Box<dyn Router> = match (global, i) {
                    (true, 0) => {
                        let leader = config.build(site, &layer.bank, scope)?;
                        Box::new(Shared::lead(GLOBAL_ROUTER, leader))
                    }
                    (true, _) => Box::new(Shared::follow(GLOBAL_ROUTER)),
                    (false, _) => config.build(site, &layer.bank, scope)?,
                };
                layer.set_router(router);
                Ok(())
            })?;
        }
        self.router = Some((config, global));
        Ok(())
    }

    /// Gives every modular site an aggregator, and forgets the ones before.
    ///
    /// # Errors
    /// Where no module is attached, or the aggregator does not fit a site.
    pub fn aggregate(&mut self, config: Box<dyn AggregatorConfig>) -> Result<()> {
        let sites = self.modular_sites();
        if sites.is_empty() {
            return Err(Error::invalid("aggregator", "there is no module yet; attach one first"));
        }
        self.params.remove_below("aggregators.");
        for site in &sites {
            self.at_layer(site, &format!("aggregators.{}", site.path), |layer, scope| {
                layer.set_aggregator(config.build(site, scope)?);
                Ok(())
            })?;
        }
        self.aggregator = Some(config);
        Ok(())
    }

    /// One pass of the backbone with its modules. Outputs are named as transformers names them.
    ///
    /// # Errors
    /// With the site's path where something does not fit there.
    pub fn forward(&self, inputs: &Tensors, cx: &Context) -> Result<Tensors> {
        let Some(kept) = cx.activation_checkpoints() else {
            return self.backbone.forward(inputs, &self.layers, cx);
        };
        if matches!(self.router, Some((_, true))) {
            return Err(Error::unsupported(
                "activation checkpointing with one router for all sites",
                "give each site its own, or train without `activation_checkpointing`",
            ));
        }
        kept.forward(self.backbone.as_ref(), &self.layers, inputs, cx)
    }

    /// One pass of the backbone alone.
    pub fn forward_base(&self, inputs: &Tensors, cx: &Context) -> Result<Tensors> {
        self.backbone.forward(inputs, &Layers::none(self.backbone.sites().len()), cx)
    }

    /// What all attached modules add to the loss in training, if any.
    ///
    /// # Errors
    /// With the path of the site where it fails.
    pub fn penalty(&self, cx: &Context) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for site in self.backbone.sites() {
            let Some(layer) = self.layers.at(site) else { continue };
            for j in 0..layer.bank.len() {
                let Some(module) = layer.bank.module(j) else { continue };
                let Some(own) = module.penalty(cx).at(&site.path)? else { continue };
                sum = Some(match sum {
                    Some(s) => s.add(&own)?,
                    None => own,
                });
            }
        }
        Ok(sum)
    }

    /// Lets every attached module do what it does after a step of training. `gradients` are by the
    /// names of [`Modular::trainable`]. What comes back are the names of parameters that start anew:
    /// an optimiser is to forget what it keeps of them.
    ///
    /// # Errors
    /// With the name of the module where it fails.
    pub fn after_step(&self, gradients: &Tensors, done: u64, total: u64) -> Result<Vec<String>> {
        let mut restarted = Vec::new();
        for (name, attached) in &self.attached {
            let prefix = format!("modules.{name}.");
            let own =
                |(n, g): (&str, &Tensor)| Some((n.strip_prefix(&prefix)?.to_owned(), g.clone()));
            let gradients = gradients.iter().filter_map(own).collect();
            let params = self.params.below(&prefix);
            let step = Step::new(done, total, gradients);
            crate::no_grad(|| attached.config.after_step(&params, &step)).at(&prefix)?;
            restarted.extend(step.restarted().into_iter().map(|n| prefix.clone() + &n));
        }
        Ok(restarted)
    }

    /// Makes exactly the selected parameters trainable.
    pub fn train_only(&self, select: &Select) -> Result<()> {
        self.params.train_only(select)?;
        for (name, p) in self.backbone.params().iter() {
            p.tensor().set_requires_grad(select.matches(&format!("base.{name}")))?;
        }
        Ok(())
    }

    /// The trainable parameters, sorted by name.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        let own = self.params.trainable().map(|(n, t)| (n.to_owned(), t.clone()));
        let base = self.backbone.params().trainable();
        let mut all: Vec<_> =
            base.map(|(n, t)| (format!("base.{n}"), t.clone())).chain(own).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}
