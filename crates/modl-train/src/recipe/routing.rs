//! The routers and aggregators of a recipe and of its phases, over modules that do not all stand at the
//! same sites.

use std::collections::BTreeSet;

use modl_compute::function::drop_layers;
use modl_core::{Error, Modular, Result, ResultExt, Select, Tensor, no_grad};
use modl_route::{Choice, Fixed};
use serde_json::Value;

use super::{Phase, Recipe, RouterSpec};
use crate::Methods;

/// A router and an aggregator as a recipe has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Routing<'a> {
    router: Option<&'a RouterSpec>,
    aggregator: Option<&'a Value>,
}

/// What has been learned of the routings of earlier phases, so that a phase that goes back to one of
/// them finds it as it was left.
#[derive(Debug)]
pub(crate) struct Routings<'a> {
    now: Routing<'a>,
    left: Vec<(Routing<'a>, Vec<(String, Tensor)>)>,
}

impl<'a> Routings<'a> {
    /// Of a model with the recipe's own.
    pub(crate) fn new(recipe: &'a Recipe) -> Self {
        Routings { now: recipe.own_routing(), left: Vec::new() }
    }

    /// Gives the model the router and the aggregator of a phase, where it has others.
    pub(crate) fn turn_to(
        &mut self,
        recipe: &'a Recipe,
        phase: &'a Phase,
        model: &mut Modular,
        methods: &Methods,
    ) -> Result<()> {
        let next = recipe.routing_of(phase);
        if next == self.now {
            return Ok(());
        }
        let before = learned(model);
        self.left.retain(|(routing, _)| *routing != self.now);
        self.left.push((self.now, before));
        recipe.give(model, next, methods)?;
        if let Some((_, kept)) = self.left.iter().find(|(routing, _)| *routing == next) {
            put_back(model, kept)?;
        }
        self.now = next;
        Ok(())
    }
}

/// The parameters of routers and aggregators.
pub(crate) fn learned(model: &Modular) -> Vec<(String, Tensor)> {
    let select = Select::any(["routers.*", "aggregators.*"]);
    model.params().select(&select).map(|(n, t)| (n.to_owned(), t.clone())).collect()
}

/// Gives parameters of routers and aggregators the values that they had.
pub(crate) fn put_back(model: &Modular, kept: &[(String, Tensor)]) -> Result<()> {
    for (name, t) in kept {
        let now = model.params().get(name)?;
        no_grad(|| now.clone().copy_from(t)).at(name)?;
    }
    Ok(())
}

impl Recipe {
    fn own_routing(&self) -> Routing<'_> {
        Routing { router: self.router.as_ref(), aggregator: self.aggregator.as_ref() }
    }

    fn routing_of<'a>(&'a self, phase: &'a Phase) -> Routing<'a> {
        let own = self.own_routing();
        Routing {
            router: phase.router.as_ref().or(own.router),
            aggregator: phase.aggregator.as_ref().or(own.aggregator),
        }
    }

    fn give(&self, model: &mut Modular, routing: Routing, methods: &Methods) -> Result<()> {
        if let Some(router) = routing.router {
            let config = self.router_for(router, model)?;
            model.route(methods.registry.routers.parse(&config)?, router.global)?;
        }
        if let Some(aggregator) = routing.aggregator {
            model.aggregate(methods.registry.aggregators.parse(aggregator)?)?;
        }
        Ok(())
    }

    /// Gives the model the recipe's router and aggregator, fresh.
    pub(super) fn route(&self, model: &mut Modular, methods: &Methods) -> Result<()> {
        self.give(model, self.own_routing(), methods)
    }

    /// Gives the model a phase's router and aggregator, fresh.
    ///
    /// # Errors
    /// Where one of them does not fit the modules.
    pub fn route_in(&self, phase: &Phase, model: &mut Modular, methods: &Methods) -> Result<()> {
        self.give(model, self.routing_of(phase), methods)
    }

    /// Gives a trained model another router or aggregator, or both, fresh, each as TOML: what a run does
    /// with other routing.
    ///
    /// # Errors
    /// Where one is none, or does not fit the modules.
    pub fn reroute(
        &self,
        router: Option<&str>,
        aggregator: Option<&str>,
        model: &mut Modular,
        methods: &Methods,
    ) -> Result<()> {
        let mut other = self.clone();
        for (key, value) in [("router", router), ("aggregator", aggregator)] {
            if let Some(value) = value {
                other.change("--", &format!("{key}={value}"), methods)?;
            }
        }
        let routing = Routing {
            router: router.and(other.router.as_ref()),
            aggregator: aggregator.and(other.aggregator.as_ref()),
        };
        other.give(model, routing, methods)
    }

    /// Takes from a model, trained up to a phase, all modules of the layers below `first` (AdapterDrop,
    /// arXiv 2010.11918). Routers and aggregators stay as they are.
    ///
    /// # Errors
    /// Where a module cannot be without them, or training has attached other modules than the recipe's.
    pub fn drop_layers(
        &self,
        first: i64,
        phase: &Phase,
        model: &mut Modular,
        methods: &Methods,
    ) -> Result<()> {
        if self.modules.len() != model.modules().len() {
            return Err(Error::unsupported(
                "dropping layers of modules that training has attached",
                "train them by a recipe that names them",
            ));
        }
        let before = learned(model);
        for module in &self.modules {
            drop_layers(model, &module.name, first)?;
        }
        self.route_in(phase, model, methods)?;
        put_back(model, &before)
    }

    /// A router's configuration. Where modules stand at different sites and nothing is said about
    /// it, `fixed` leaves out at each site those that do not stand there, as `modl forward` does; the
    /// names that it would refuse there are looked up among all modules here.
    fn router_for(&self, router: &RouterSpec, model: &Modular) -> Result<Value> {
        let said = |key: &str| router.config.get(key);
        let sites = model.modular_sites();
        let banks = sites.iter().filter_map(|site| model.layer(site)).map(|l| l.bank.len());
        let everywhere = banks.into_iter().all(|n| n == model.modules().len());
        if everywhere || said("type") != Some(&"fixed".into()) || said("skip_absent").is_some() {
            return Ok(router.config.clone());
        }
        let mut config = router.config.clone();
        let mut own = config.clone();
        if let Some(table) = own.as_object_mut() {
            table.shift_remove("type");
        }
        let fixed: Fixed = modl_core::from_json("fixed", own)?;
        let mut names: BTreeSet<&str> = BTreeSet::new();
        match (&fixed.modules, &fixed.table) {
            (Some(choice), _) => names.extend(named(choice)),
            (None, Some(table)) => names.extend(table.values().flat_map(named)),
            (None, None) if fixed.label == Fixed::default().label && self.data.stream.is_none() => {
                names.extend(self.data.tasks.keys());
            }
            // Labels that only the data knows.
            (None, None) => return Ok(config),
        }
        let known = model.modules();
        if let Some(name) = names.into_iter().find(|name| !known.contains(name)) {
            return Err(Error::unknown("module of the router", name, known));
        }
        if let Some(table) = config.as_object_mut() {
            table.insert("skip_absent".to_owned(), true.into());
        }
        Ok(config)
    }
}

fn named(choice: &Choice) -> Vec<&str> {
    match choice {
        Choice::One(name) => vec![name],
        Choice::Equal(names) => names.iter().map(String::as_str).collect(),
        Choice::Weighted(weights) => weights.keys().map(String::as_str).collect(),
    }
}
