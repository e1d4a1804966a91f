//! Routers and aggregators of a model. All are made before the first one is put in its place, so
//! that a call that is refused has changed nothing.

use std::collections::BTreeMap;

use crate::undecided::Undecided;
use crate::{
    Aggregator, AggregatorConfig, Bank, Error, Modular, Outcome, ParamStore, Result, ResultExt,
    Router, RouterConfig, Routing, Select, Shared, Site, Tensor, Trace,
};

/// The key and the path of the one router for all sites.
const GLOBAL_ROUTER: &str = "routers.global";
const ROUTERS: &str = "routers.";
const AGGREGATORS: &str = "aggregators.";

/// Routers or aggregators by their sites' indices, with their parameters, that are not in the model
/// yet.
pub(crate) struct Made<T: ?Sized> {
    pub(crate) params: ParamStore,
    pub(crate) parts: Vec<(usize, Box<T>)>,
}

impl<T: ?Sized> Made<T> {
    pub(crate) fn new() -> Self {
        Self::within(ParamStore::new())
    }

    /// Parameters are made in `params`.
    fn within(params: ParamStore) -> Self {
        Made { params, parts: Vec::new() }
    }
}

impl Modular {
    pub(crate) fn router_path(&self, site: &Site) -> String {
        match &self.router {
            Some((_, true)) => GLOBAL_ROUTER.to_owned(),
            _ => format!("{ROUTERS}{}", site.path),
        }
    }

    /// The parameters of all routers, sharing their tensors with this model.
    pub(crate) fn router_params(&self) -> ParamStore {
        self.params.under(ROUTERS)
    }

    /// The parameters of all aggregators, sharing their tensors with this model.
    pub(crate) fn aggregator_params(&self) -> ParamStore {
        self.params.under(AGGREGATORS)
    }

    pub(crate) fn forget_routers(&mut self) {
        self.router = None;
        self.params.take_under(ROUTERS);
        for site in self.modular_sites() {
            if let Some(layer) = self.layers.nth(site.index) {
                layer.set_router(Box::new(Undecided));
            }
        }
    }

    fn sites_for(&self, what: &str) -> Result<Vec<Site>> {
        let sites = self.modular_sites();
        if sites.is_empty() {
            return Err(Error::invalid(what, "there is no module yet; attach one first"));
        }
        Ok(sites)
    }

    /// Gives every modular site a router, and forgets the ones before. With `global` there is one
    /// for all sites: the first that is passed decides.
    ///
    /// # Errors
    /// Where no module is attached, or the router does not fit a site; then the routers before are
    /// still there.
    pub fn route(&mut self, config: Box<dyn RouterConfig>, global: bool) -> Result<()> {
        let made = self.made_routers(config.as_ref(), global, ParamStore::new())?;
        self.put_routers(config, global, made);
        Ok(())
    }

    /// Routers for all modular sites, whose parameters are made in `params`.
    pub(crate) fn made_routers(
        &self,
        config: &dyn RouterConfig,
        global: bool,
        params: ParamStore,
    ) -> Result<Made<dyn Router>> {
        let mut made = Made::within(params);
        for (i, site) in self.sites_for("router")?.iter().enumerate() {
            let Some(layer) = self.layer(site) else { continue };
            let path =
                if global { GLOBAL_ROUTER.into() } else { format!("{ROUTERS}{}", site.path) };
            let mut scope = self.scope_in(&mut made.params, &path);
            let mut build = || config.build(site, &layer.bank, &mut scope).at(&site.path);
            let router: Box<dyn Router> = match (global, i) {
                (true, 0) => Box::new(Shared::lead(GLOBAL_ROUTER, build()?)),
                (true, _) => Box::new(Shared::follow(GLOBAL_ROUTER)),
                (false, _) => build()?,
            };
            if router.looks_ahead() && self.backbone().causal(site) {
                return Err(Error::unsupported(
                    format!(
                        "a `{}` router, which looks at later tokens, in a decoder",
                        config.kind()
                    ),
                    "choose one that routes each token by itself: `top_k`, `soft`",
                ));
            }
            made.parts.push((site.index, router));
        }
        Ok(made)
    }

    pub(crate) fn put_routers(
        &mut self,
        config: Box<dyn RouterConfig>,
        global: bool,
        made: Made<dyn Router>,
    ) {
        self.params.take_under(ROUTERS);
        self.seat_routers(made);
        self.router = Some((config, global));
    }

    /// Puts routers in the places of those before, with their parameters.
    pub(crate) fn seat_routers(&mut self, made: Made<dyn Router>) {
        self.params.absorb(made.params);
        for (index, router) in made.parts {
            if let Some(layer) = self.layers.nth(index) {
                layer.set_router(router);
            }
        }
    }

    /// All that routers add to the loss of a pass in training, added up by name: their auxiliary
    /// losses, and what they derive from its outcome.
    ///
    /// # Errors
    /// With the path of the site where a router fails.
    pub fn router_losses(
        &self,
        trace: &Trace,
        outcome: &Outcome,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut sums = trace.losses()?;
        for (name, loss) in self.router_credits(trace, outcome)? {
            let sum = sums.get(&name).map_or(Ok(loss.clone()), |s| s.add(&loss))?;
            sums.insert(name, sum);
        }
        Ok(sums)
    }

    /// What routers derive from the outcome of a pass in training, added up by name.
    ///
    /// # Errors
    /// With the path of the site where a router fails.
    pub fn router_credits(
        &self,
        trace: &Trace,
        outcome: &Outcome,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        self.decided(trace, |router, routing| {
            let Some((name, loss)) = router.credit(routing, outcome)? else { return Ok(()) };
            let sum = sums.get(&name).map_or(Ok(loss.clone()), |s| s.add(&loss))?;
            sums.insert(name, sum);
            Ok(())
        })?;
        Ok(sums)
    }

    /// Lets all routers learn without gradients what became of a pass, after the step.
    ///
    /// # Errors
    /// With the path of the site where a router fails.
    pub fn routers_learn(&self, trace: &Trace, outcome: &Outcome) -> Result<()> {
        crate::no_grad(|| self.decided(trace, |router, routing| router.learn(routing, outcome)))
    }

    /// `work` for each time that a router decided.
    fn decided(
        &self,
        trace: &Trace,
        mut work: impl FnMut(&dyn Router, &Routing) -> Result<()>,
    ) -> Result<()> {
        for (path, routing) in trace.routings.iter().filter(|(_, r)| !r.repeated) {
            let site = self.places.get(path).and_then(|n| self.backbone().sites().get(*n));
            if let Some(layer) = site.and_then(|site| self.layer(site)) {
                work(layer.router(), routing).at(path)?;
            }
        }
        Ok(())
    }

    /// The recipe of the aggregators, where they have been chosen.
    pub fn aggregator_recipe(&self) -> Option<&dyn AggregatorConfig> {
        self.aggregator.as_deref()
    }

    /// Gives every modular site an aggregator, and forgets the ones before.
    ///
    /// # Errors
    /// Where no module is attached, or the aggregator does not fit a site; then the aggregators
    /// before are still there.
    pub fn aggregate(&mut self, config: Box<dyn AggregatorConfig>) -> Result<()> {
        let made = self.made_aggregators(config.as_ref(), ParamStore::new())?;
        self.put_aggregators(config, made);
        Ok(())
    }

    /// [`Modular::aggregate`] with given parameters, named `SITE.PARAM`.
    ///
    /// # Errors
    /// As [`Modular::aggregate`]; [`Error::Mismatch`] where the parameters are not the aggregators';
    /// where they have values that are no numbers. Then the aggregators before are still there.
    pub fn aggregate_with(
        &mut self,
        config: Box<dyn AggregatorConfig>,
        params: &ParamStore,
    ) -> Result<()> {
        let made = self.made_aggregators(config.as_ref(), ParamStore::new())?;
        let given = params.iter().map(|(n, p)| (n, p.tensor()));
        made.params.below(AGGREGATORS).load(config.kind(), given, &Select::all())?;
        self.put_aggregators(config, made);
        Ok(())
    }

    /// The parameters that aggregators would have, by `SITE.PARAM`: to be filled with
    /// [`ParamStore::load`] before [`Modular::aggregate_with`]. Until then they have a shape and no
    /// memory, so that a file cannot ask for more than it holds.
    ///
    /// # Errors
    /// As [`Modular::aggregate`].
    pub fn aggregator_parameters_of(&self, config: &dyn AggregatorConfig) -> Result<ParamStore> {
        let made = self.made_aggregators(config, ParamStore::of_shapes())?;
        Ok(made.params.below(AGGREGATORS))
    }

    /// Aggregators for all modular sites, whose parameters are made in `params`.
    pub(crate) fn made_aggregators(
        &self,
        config: &dyn AggregatorConfig,
        params: ParamStore,
    ) -> Result<Made<dyn Aggregator>> {
        let mut made = Made::within(params);
        for site in self.sites_for("aggregator")? {
            self.make_aggregator(config, &site, &mut made)?;
        }
        Ok(made)
    }

    pub(crate) fn make_aggregator(
        &self,
        config: &dyn AggregatorConfig,
        site: &Site,
        made: &mut Made<dyn Aggregator>,
    ) -> Result<()> {
        let path = format!("{AGGREGATORS}{}", site.path);
        let mut scope = self.scope_in(&mut made.params, &path);
        let nobody = Bank::new();
        let bank = self.layer(site).map_or(&nobody, |l| &l.bank);
        let aggregator = config.build_over(site, bank, &mut scope).at(&site.path)?;
        if aggregator.looks_ahead() && self.backbone().causal(site) {
            return Err(Error::unsupported(
                format!(
                    "a `{}` aggregator, which looks at later tokens, in a decoder",
                    config.kind()
                ),
                "choose one that takes each token by itself: `weighted_sum`, `fusion`",
            ));
        }
        made.parts.push((site.index, aggregator));
        Ok(())
    }

    pub(crate) fn put_aggregators(
        &mut self,
        config: Box<dyn AggregatorConfig>,
        made: Made<dyn Aggregator>,
    ) {
        self.params.take_under(AGGREGATORS);
        self.seat_aggregators(made);
        self.aggregator = Some(config);
    }

    /// Puts aggregators in the places of those before, with their parameters.
    pub(crate) fn seat_aggregators(&mut self, made: Made<dyn Aggregator>) {
        self.params.absorb(made.params);
        for (index, aggregator) in made.parts {
            if let Some(layer) = self.layers.nth(index) {
                layer.set_aggregator(aggregator);
            }
        }
    }
}
