//! The recipe's router over modules that do not all stand at the same sites.

use std::collections::BTreeSet;

use modl_core::{Error, Modular, Result};
use modl_route::{Choice, Fixed};
use serde_json::Value;

use super::Recipe;

impl Recipe {
    /// The router's configuration. Where modules stand at different sites and nothing is said about
    /// it, `fixed` leaves out at each site those that do not stand there, as `modl forward` does; the
    /// names that it would refuse there are looked up among all modules here.
    pub(super) fn router_for(&self, model: &Modular) -> Result<Option<Value>> {
        let Some(router) = &self.router else { return Ok(None) };
        let said = |key: &str| router.config.get(key);
        let sites = model.modular_sites();
        let banks = sites.iter().filter_map(|site| model.layer(site)).map(|l| l.bank.len());
        let everywhere = banks.into_iter().all(|n| n == model.modules().len());
        if everywhere || said("type") != Some(&"fixed".into()) || said("skip_absent").is_some() {
            return Ok(Some(router.config.clone()));
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
            (None, None) => return Ok(Some(config)),
        }
        let known = model.modules();
        if let Some(name) = names.into_iter().find(|name| !known.contains(name)) {
            return Err(Error::unknown("module of the router", name, known));
        }
        if let Some(table) = config.as_object_mut() {
            table.insert("skip_absent".to_owned(), true.into());
        }
        Ok(Some(config))
    }
}

fn named(choice: &Choice) -> Vec<&str> {
    match choice {
        Choice::One(name) => vec![name],
        Choice::Equal(names) => names.iter().map(String::as_str).collect(),
        Choice::Weighted(weights) => weights.keys().map(String::as_str).collect(),
    }
}
