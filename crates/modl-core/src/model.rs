//! A frozen backbone with modules at its sites.

use std::collections::{BTreeMap, HashMap};

use crate::attach::Attached;
use crate::{
    AggregatorConfig, Backbone, Context, Error, Kind, Layers, ModularLayer, ModuleConfig, OwnLoss,
    ParamStore, Result, ResultExt, RouterConfig, Scope, Seed, Select, Site, Step, Targets, Tensor,
    Tensors,
};

/// The ids of the tokens, among the inputs and as a feature of the context.
const INPUT_IDS: &str = "input_ids";

/// A backbone with modules, routers and aggregators at its sites.
///
/// Parameters are named by what they belong to: `modules.NAME.SITE.PARAM`, `routers.SITE.PARAM`
/// (`routers.global.PARAM` for one router for all sites), `aggregators.SITE.PARAM`; the backbone's
/// own are `base.` and their name there. A [`Select`] takes any of them.
#[derive(Debug)]
pub struct Modular {
    backbone: Box<dyn Backbone>,
    /// The number of each of its sites by path.
    pub(crate) places: HashMap<String, usize>,
    pub(crate) layers: Layers,
    pub(crate) params: ParamStore,
    pub(crate) attached: BTreeMap<String, Attached>,
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
        let places = backbone.sites().iter().map(|s| (s.path.clone(), s.index)).collect();
        Ok(Modular {
            places,
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

    /// [`Modular::scope`] in another store, whose parameters may become this model's.
    pub(crate) fn scope_in<'a>(&self, store: &'a mut ParamStore, path: &str) -> Scope<'a> {
        Scope::at(store, path, self.seed).on(self.module_kind(), self.device())
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
    pub(crate) fn module_kind(&self) -> Kind {
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

    /// The sites at which modules stand, in the order of a forward pass.
    pub fn modular_sites(&self) -> Vec<Site> {
        let sites = self.backbone.sites().iter();
        sites.filter(|s| self.layers.at(s).is_some()).cloned().collect()
    }

    /// The modular layer at a site, if there is one.
    pub fn layer(&self, site: &Site) -> Option<&ModularLayer> {
        self.layers.at(site)
    }

    /// One pass of the backbone with its modules. Outputs are named as transformers names them.
    ///
    /// # Errors
    /// With the site's path where something does not fit there.
    pub fn forward(&self, inputs: &Tensors, cx: &Context) -> Result<Tensors> {
        let with_ids = self.with_ids(inputs, cx);
        let cx = with_ids.as_ref().unwrap_or(cx);
        let outputs = match cx.activation_checkpoints() {
            None => self.backbone.forward(inputs, &self.layers, cx)?,
            Some(kept) => kept.forward(self, inputs, cx)?,
        };
        if cx.train {
            self.record_own_losses(&outputs, cx)?;
        }
        Ok(outputs)
    }

    /// What the losses of routers and those of the backbone's own count where a recipe does not say,
    /// by name.
    pub fn loss_weights(&self) -> BTreeMap<String, f64> {
        let own = self.backbone.own_losses().into_iter().map(|l| (l.name, l.weight));
        let layers = self.backbone.sites().iter().filter_map(|s| self.layers.at(s));
        let routers = layers.flat_map(|l| l.router().loss_weights());
        routers.map(|(name, weight)| ((*name).to_owned(), *weight)).chain(own).collect()
    }

    fn record_own_losses(&self, outputs: &Tensors, cx: &Context) -> Result<()> {
        for OwnLoss { name, outputs: parts, .. } in self.backbone.own_losses() {
            let mut sum: Option<Tensor> = None;
            for part in parts.iter().filter_map(|part| outputs.get(part)) {
                sum = Some(sum.map_or(Ok(part.clone()), |s| s.add(part))?);
            }
            cx.record_own(name, sum);
        }
        Ok(())
    }

    /// The context with the ids of the tokens, where a router reads them and nobody has given them.
    fn with_ids(&self, inputs: &Tensors, cx: &Context) -> Option<Context> {
        let ids = inputs.get(INPUT_IDS)?;
        let reads = |s: &Site| self.layers.at(s).is_some_and(|l| l.router().reads_ids());
        let wanted = cx.find(INPUT_IDS).is_none() && self.backbone.sites().iter().any(reads);
        wanted.then(|| cx.clone().with_feature(INPUT_IDS, ids.clone()))
    }

    /// One pass of the backbone alone.
    pub fn forward_base(&self, inputs: &Tensors, cx: &Context) -> Result<Tensors> {
        self.backbone.forward(inputs, &Layers::none(self.backbone.sites().len()), cx)
    }

    /// What all attached modules and all aggregators add to the loss in training, if any.
    ///
    /// # Errors
    /// With the path of the site where it fails.
    pub fn penalty(&self, cx: &Context) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for site in self.backbone.sites() {
            let Some(layer) = self.layers.at(site) else { continue };
            let modules = (0..layer.bank.len()).filter_map(|j| layer.bank.module(j));
            let all = modules.map(|m| m.penalty(cx));
            for own in all.chain(std::iter::once_with(|| layer.aggregator().penalty(cx))) {
                let Some(own) = own.at(&site.path)? else { continue };
                sum = Some(match sum {
                    Some(s) => s.add(&own)?,
                    None => own,
                });
            }
        }
        Ok(sum)
    }

    /// Lets every attached module and every aggregator do what it does after a step of training.
    /// `gradients` are by the names of [`Modular::trainable`]. What comes back are the names of
    /// parameters that start anew: an optimiser is to forget what it keeps of them.
    ///
    /// # Errors
    /// With the name of the module, or the path of the site, where it fails.
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
        for site in self.backbone.sites() {
            let Some(layer) = self.layers.at(site) else { continue };
            crate::no_grad(|| layer.aggregator().after_step(done, total)).at(&site.path)?;
        }
        Ok(restarted)
    }

    /// Makes exactly the selected parameters trainable.
    ///
    /// # Errors
    /// Where a selected one is not made of floats; then nothing has been changed.
    pub fn train_only(&self, select: &Select) -> Result<()> {
        let own = self.params.iter().map(|(n, p)| (n.to_owned(), p));
        let base = self.backbone.params().iter().map(|(n, p)| (format!("base.{n}"), p));
        crate::params::train_only(own.chain(base), select)
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
