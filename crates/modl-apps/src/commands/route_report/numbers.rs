//! All numbers of a report.

use std::collections::BTreeMap;

use anyhow::Result;
use modl_core::Seed;
use modl_route::RoutingStats;
use modl_route::stats::{Mittal, RoutingTrace, Sign, SiteUse, Thresholds, overfitting, signs};
use serde::Serialize;

/// What is reported of a trace.
#[derive(Debug, Serialize)]
pub(super) struct Numbers {
    pub(super) thresholds: Thresholds,
    pub(super) splits: Vec<SplitNumbers>,
}

#[derive(Debug, Serialize)]
pub(super) struct SplitNumbers {
    pub(super) name: String,
    pub(super) rows: usize,
    pub(super) sites: Vec<SiteNumbers>,
}

#[derive(Debug, Serialize)]
pub(super) struct SiteNumbers {
    /// Sites that choose the same.
    pub(super) paths: Vec<String>,
    pub(super) modules: Vec<String>,
    pub(super) stats: RoutingStats,
    /// I(task; module), in nats.
    pub(super) mutual_information: f64,
    /// The same as a share of what is possible.
    pub(super) relative_information: Option<f64>,
    pub(super) mittal: Option<Mittal>,
    pub(super) signs: Vec<Sign>,
    pub(super) tasks: BTreeMap<String, TaskNumbers>,
    /// The mean share of each module.
    pub(super) shares: Vec<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct TaskNumbers {
    pub(super) stats: RoutingStats,
    /// The mean share of each module.
    pub(super) shares: Vec<f64>,
}

impl Numbers {
    pub(super) fn of(trace: &RoutingTrace, thresholds: &Thresholds) -> Result<Self> {
        let mut splits = Vec::new();
        for split in &trace.splits {
            let report = split.report()?;
            let sites = report.sites().iter().map(|site| SiteNumbers::of(site, thresholds));
            let sites = sites.collect::<Result<_>>()?;
            splits.push(SplitNumbers { name: split.name.clone(), rows: split.rows(), sites });
        }
        let mut numbers = Numbers { thresholds: *thresholds, splits };
        numbers.compare(trace, thresholds)?;
        Ok(numbers)
    }

    /// Adds what is seen only where there are both training and test.
    fn compare(&mut self, trace: &RoutingTrace, thresholds: &Thresholds) -> Result<()> {
        let of = |name: &str| trace.splits.iter().find(|s| s.name == name);
        let (Some(train), Some(test)) = (of("train"), of("test")) else { return Ok(()) };
        let (train, test) = (train.report()?, test.report()?);
        for site in self.splits.iter_mut().filter(|s| s.name == "test").flat_map(|s| &mut s.sites) {
            let first = site.paths.first();
            let find = |sites: &'_ [SiteUse]| {
                sites.iter().find(|s| first.is_some_and(|p| s.paths.contains(p))).cloned()
            };
            if let (Some(train), Some(test)) = (find(train.sites()), find(test.sites())) {
                site.signs.extend(overfitting(&train, &test, thresholds));
            }
        }
        Ok(())
    }
}

impl SiteNumbers {
    fn of(site: &SiteUse, thresholds: &Thresholds) -> Result<Self> {
        let tasks = site.by_label.iter().map(|(label, tally)| {
            (label.clone(), TaskNumbers { stats: tally.stats(), shares: tally.mean_shares() })
        });
        Ok(SiteNumbers {
            paths: site.paths.clone(),
            modules: site.modules.clone(),
            stats: site.stats(),
            mutual_information: site.mutual_information(),
            relative_information: site.relative_information(),
            mittal: site.mittal(Seed(0))?,
            signs: signs(site, thresholds),
            tasks: tasks.collect(),
            shares: site.all().mean_shares(),
        })
    }
}
