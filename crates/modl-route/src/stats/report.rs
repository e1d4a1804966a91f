//! Use of modules over many batches, by site and by a label of the rows.

use std::collections::BTreeMap;

use modl_core::{Error, Result, ResultExt, Seed, Tensor, Trace};

use super::{Mittal, RoutingStats, Tally, Units, entropy, mutual_information};

/// The use of modules at all sites of a model.
#[derive(Debug, Clone, Default)]
pub struct RoutingReport {
    sites: Vec<SiteUse>,
}

/// The use of modules at a site, or at several with the same choices.
#[derive(Debug, Clone)]
pub struct SiteUse {
    /// The paths of the sites.
    pub paths: Vec<String>,
    /// The names of the modules; their numbers where names are not known.
    pub modules: Vec<String>,
    /// What the units of each label chose.
    pub by_label: BTreeMap<String, Tally>,
}

impl RoutingReport {
    /// Adds what was routed in one forward pass over a batch with such labels of its rows, at every
    /// site. Where a routing is by token, each token that `mask` `[batch, seq]` does not hide counts
    /// under its row's label.
    ///
    /// # Errors
    /// With the site where α does not fit the labels or what was added before.
    pub fn add<S: AsRef<str>>(
        &mut self,
        trace: &Trace,
        labels: &[S],
        mask: Option<&Tensor>,
    ) -> Result<()> {
        for (path, routing) in &trace.routings {
            let units = Units::of(routing, labels.len(), mask).at(path)?;
            let new = || SiteUse::new(vec![path.clone()], numbers(routing.modules));
            let known = |s: &SiteUse| (s.paths.first().cloned(), s.modules.len());
            let site = entry(&mut self.sites, path, routing.modules, known, new)?;
            site.add(&units, labels)?;
        }
        Ok(())
    }

    /// Of sites that are known already.
    pub fn of(sites: Vec<SiteUse>) -> Self {
        RoutingReport { sites }
    }

    /// The sites in the order of a forward pass.
    pub fn sites(&self) -> &[SiteUse] {
        &self.sites
    }
}

impl SiteUse {
    /// Of no unit yet.
    pub fn new(paths: Vec<String>, modules: Vec<String>) -> Self {
        SiteUse { paths, modules, by_label: BTreeMap::new() }
    }

    /// Adds units whose rows have such labels.
    ///
    /// # Errors
    /// Where a row has no label.
    pub fn add<S: AsRef<str>>(&mut self, units: &Units, labels: &[S]) -> Result<()> {
        for unit in units.iter() {
            let label = labels.get(unit.row).ok_or_else(|| {
                let problem = format!("are {}, there is a row {}", labels.len(), unit.row);
                Error::invalid("labels of rows", problem)
            })?;
            let label = label.as_ref();
            if !self.by_label.contains_key(label) {
                self.by_label.insert(label.to_owned(), Tally::new(self.modules.len()));
            }
            if let Some(tally) = self.by_label.get_mut(label) {
                tally.add(unit);
            }
        }
        Ok(())
    }

    /// All labels together.
    pub fn all(&self) -> Tally {
        let mut all = Tally::new(self.modules.len());
        self.by_label.values().for_each(|tally| all.merge(tally));
        all
    }

    /// The statistics of all labels together.
    pub fn stats(&self) -> RoutingStats {
        self.all().stats()
    }

    /// I(label; module) in nats, each unit that has a module counting 1.
    pub fn mutual_information(&self) -> f64 {
        mutual_information(&self.shares())
    }

    /// I ⁄ min(H(label), ln m), which is between 0 and 1; `None` where there is one label or one
    /// module.
    pub fn relative_information(&self) -> Option<f64> {
        let labels: Vec<f64> = self.by_label.values().map(|t| t.routed() as f64).collect();
        let most = entropy(&labels).min((self.modules.len() as f64).ln());
        (most > 0.0).then(|| self.mutual_information() / most)
    }

    /// Mittal et al.'s metrics with the labels as rules, each as frequent as the others; `None`
    /// where no unit has a module. A label none of whose units has a module is left out.
    ///
    /// # Errors
    /// None that sums over units can cause.
    pub fn mittal(&self, seed: Seed) -> Result<Option<Mittal>> {
        let routed = self.by_label.values().filter(|t| t.routed() > 0);
        let activation: Vec<Vec<f64>> = routed.map(Tally::mean_shares).collect();
        if activation.is_empty() {
            return Ok(None);
        }
        Mittal::of(&activation, seed).map(Some)
    }

    fn shares(&self) -> Vec<Vec<f64>> {
        self.by_label.values().map(|t| t.shares().to_vec()).collect()
    }
}

/// What modules are called whose names are not known.
pub(super) fn numbers(modules: usize) -> Vec<String> {
    (0..modules).map(|j| j.to_string()).collect()
}

/// The entry of the site at `path`, of which path and number of modules are `known`; a new one where
/// there is none yet.
pub(super) fn entry<'a, T>(
    sites: &'a mut Vec<T>,
    path: &str,
    modules: usize,
    known: impl Fn(&T) -> (Option<String>, usize),
    new: impl FnOnce() -> T,
) -> Result<&'a mut T> {
    let there = sites.iter().position(|s| known(s).0.as_deref() == Some(path));
    let at = there.unwrap_or(sites.len());
    if at == sites.len() {
        sites.push(new());
    }
    let was = sites.get(at).map_or(0, |s| known(s).1);
    let wrong = || Error::invalid(path, format!("has {was} modules, α is over {modules}"));
    sites.get_mut(at).filter(|_| was == modules).ok_or_else(wrong)
}
