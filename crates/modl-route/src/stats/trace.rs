//! The choices of routers, kept to be looked at again.

use std::collections::BTreeMap;

use modl_core::{Error, Kind, Level, Modular, Result, ResultExt, Tensor, Trace};

use super::report::{entry, numbers};
use super::{RoutingReport, SiteUse, Units};

/// What was routed over some data, split by split: `train`, `test`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RoutingTrace {
    /// The splits in order.
    pub splits: Vec<Split>,
}

/// What was routed over one split.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Split {
    /// Its name.
    pub name: String,
    /// The label of each row.
    pub(super) labels: Vec<String>,
    pub(super) sites: Vec<Kept>,
}

/// The choices at a site, or at several that chose the same.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Kept {
    pub(super) paths: Vec<String>,
    pub(super) modules: Vec<String>,
    pub(super) units: Units,
}

/// Keeps choices, batch by batch.
#[derive(Debug, Default)]
pub struct Recorder {
    /// The names of modules by site.
    names: BTreeMap<String, Vec<String>>,
    split: Split,
}

impl Recorder {
    /// For a split of this name. Modules are called as in `model`.
    pub fn new(split: impl Into<String>, model: &Modular) -> Self {
        let sites = model.modular_sites();
        let named = |site: &modl_core::Site| {
            model.layer(site).map(|layer| (site.path.clone(), layer.bank.names().to_vec()))
        };
        let names = sites.iter().filter_map(named).collect();
        Recorder { names, split: Split { name: split.into(), ..Split::default() } }
    }

    /// Adds what was routed in one forward pass over a batch with such labels of its rows. Where a
    /// routing is by token, the tokens that `mask` `[batch, seq]` does not hide are kept.
    ///
    /// # Errors
    /// With the site where α does not fit the labels or the modules of before.
    pub fn add<S: AsRef<str>>(
        &mut self,
        trace: &Trace,
        labels: &[S],
        mask: Option<&Tensor>,
    ) -> Result<()> {
        for (path, routing) in &trace.routings {
            let units = Units::of(routing, labels.len(), mask).at(path)?;
            self.keep(path, routing.modules, &units)?;
        }
        self.split.labels.extend(labels.iter().map(|l| l.as_ref().to_owned()));
        Ok(())
    }

    /// [`Recorder::add`] with a label for each token of the batch, row after row, in place of one for
    /// each row: each token that `mask` `[batch, seq]` does not hide is kept as a row of its own. Sites
    /// that are not routed by these tokens are left out.
    ///
    /// # Errors
    /// Where there are not as many labels as tokens, and as there.
    pub fn add_tokens<S: AsRef<str>>(
        &mut self,
        trace: &Trace,
        labels: &[S],
        mask: &Tensor,
    ) -> Result<()> {
        let shown = mask.to_kind(Kind::Double)?.to_vec::<f64>()?;
        if shown.len() != labels.len() {
            let problem = format!("are {}, the batch has {} tokens", labels.len(), shown.len());
            return Err(Error::invalid("labels of tokens", problem));
        }
        let real = labels.iter().zip(&shown).filter(|(_, shown)| **shown != 0.0);
        let real: Vec<String> = real.map(|(l, _)| l.as_ref().to_owned()).collect();
        for (path, routing) in trace.routings.iter().filter(|(_, r)| r.level() == Level::Token) {
            let rows = mask.len_of(0).max(0) as usize;
            let mut units = Units::of(routing, rows, Some(mask)).at(path)?;
            if units.len() == real.len() {
                units.rows = (0..real.len() as u32).collect();
                self.keep(path, routing.modules, &units)?;
            }
        }
        self.split.labels.extend(real);
        Ok(())
    }

    /// Adds the units of a site, whose rows are the next ones.
    fn keep(&mut self, path: &str, modules: usize, units: &Units) -> Result<()> {
        let new = || Kept {
            paths: vec![path.to_owned()],
            modules: self.names.get(path).cloned().unwrap_or_else(|| numbers(modules)),
            units: Units::default(),
        };
        let known = |s: &Kept| (s.paths.first().cloned(), s.modules.len());
        let site = entry(&mut self.split.sites, path, modules, known, new)?;
        site.units.append(units, self.split.labels.len());
        Ok(())
    }

    /// What was kept. Sites that chose the same for all units, as those of one global router do, are
    /// kept once.
    pub fn finish(self) -> Split {
        let mut sites: Vec<Kept> = Vec::new();
        for site in self.split.sites {
            let same = |s: &&mut Kept| s.modules == site.modules && s.units == site.units;
            match sites.iter_mut().find(same) {
                Some(s) => s.paths.extend(site.paths),
                None => sites.push(site),
            }
        }
        Split { sites, ..self.split }
    }
}

impl Split {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.labels.len()
    }

    /// The use of modules over it.
    ///
    /// # Errors
    /// None that a split which was recorded or opened can cause.
    pub fn report(&self) -> Result<RoutingReport> {
        let used = |site: &Kept| {
            let mut own = SiteUse::new(site.paths.clone(), site.modules.clone());
            own.add(&site.units, &self.labels)?;
            Ok(own)
        };
        Ok(RoutingReport::of(self.sites.iter().map(used).collect::<Result<_>>()?))
    }
}
