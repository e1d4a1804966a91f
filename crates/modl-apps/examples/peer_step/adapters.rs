//! Eight LoRAs of rank 8 at `query` and `value` of MiniLM merged into one of rank 8: the work of PEFT's
//! `add_weighted_adapter`, from tensors in memory to tensors in memory.

use anyhow::Result;
use modl_aggregate::adapters::{Change, Delta, SiteChanges, Way, merge};
use modl_aggregate::merge::{MergeMethods, Settings};
use modl_core::{Device, Init, Kind, LowRank, Seed, Tensor};

const WIDTH: i64 = 384;
const SITES: usize = 12;
const ADAPTERS: usize = 8;
const RANK: i64 = 8;

/// The adapters, and how they are merged.
pub struct Adapters {
    sites: Vec<SiteChanges>,
    methods: MergeMethods,
    combination: String,
}

impl Adapters {
    /// `work` is `merge:COMBINATION`, with PEFT's name of it.
    pub fn new(work: &str) -> Result<Self> {
        let combination = work.trim_start_matches("merge:").to_owned();
        let normal =
            |shape: &[i64], seed| Init::Normal(0.02).tensor(shape, seed, Kind::Float, Device::Cpu);
        let change = |site: u64, j: u64| -> modl_core::Result<Option<Change>> {
            let seed = Seed(site).nth(j);
            let down: Tensor = normal(&[RANK, WIDTH], seed.child("down"))?;
            let up = normal(&[WIDTH, RANK], seed.child("up"))?;
            let weight = Delta::Product(LowRank { down, up, scale: 2.0 });
            Ok(Some(Change { weight, bias: None }))
        };
        let at = |site: usize| -> Result<SiteChanges> {
            let changes = (0..ADAPTERS as u64).map(|j| change(site as u64, j));
            Ok(SiteChanges { path: site.to_string(), changes: changes.collect::<Result<_, _>>()? })
        };
        let sites = (0..SITES).map(at).collect::<Result<_>>()?;
        Ok(Adapters { sites, methods: MergeMethods::default(), combination })
    }

    /// One merge.
    pub fn run(&self) -> Result<()> {
        let settings = Settings::default();
        let settings = match self.combination.starts_with("ties") {
            true => settings.set_each("density", [0.5; ADAPTERS]),
            false => settings,
        };
        let rank = self.combination.ends_with("svd").then_some(RANK);
        let way = Way::named(&self.combination, Some("peft"), &self.methods, settings, rank)?;
        let names: Vec<String> = (0..ADAPTERS).map(|j| j.to_string()).collect();
        let weights = [1.0 / ADAPTERS as f64; ADAPTERS];
        merge(self.sites.clone(), &names, &weights, &way, Seed(0))?;
        Ok(())
    }
}
