//! Hash layers: e = table\[id\], the module of a token is a function of its id alone.
//!
//! Roller, Sukhbaatar, Szlam, Weston 2021, arXiv 2106.04426; survey §4.1. Nothing is learned; the
//! table is a buffer `table` `[vocab]` and is saved with the model. It is made in one of four ways:
//!
//! - `random`: each id has a module by lot;
//! - `balanced`: ids by falling frequency, each to the module that has the least so far, so that all
//!   modules see about as many tokens;
//! - clustered: ids whose vectors are close to one another share a module, by k-means
//!   ([`Hash::clustered`]);
//! - `given`: a table that is written down.
//!
//! Ids are the feature `input_ids` `[batch, seq]`, which a model takes from its inputs. x is to have
//! these very tokens: a prompt before them or an encoder's states in a decoder do not fit.
//!
//! ```toml
//! router = { type = "hash", vocab = 30522 }
//! router = { type = "hash", assignment = "balanced", counts = [812.0, 40.0, 3.0] }
//! router = { type = "hash", assignment = "given", table = [0, 1, 1] }
//! ```

use modl_core::{
    Bank, Context, Device, Error, Init, Kind, Result, Router, RouterConfig, Routing, Scope, Seed,
    Signal, Site, SiteKind, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::k_means::k_means;

/// More ids than any vocabulary has, so that a file cannot ask for all of the memory.
const MOST_IDS: i64 = 1 << 26;

/// How ids come to their modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Assignment {
    /// By lot.
    #[default]
    Random,
    /// So that modules see about as many tokens.
    Balanced,
    /// By a table.
    Given,
}

/// A module for each id.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hash {
    /// How ids come to their modules. Default: `random`.
    pub assignment: Assignment,
    /// The number of ids, for `random`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab: Option<i64>,
    /// How often each id occurs, for `balanced`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub counts: Vec<f64>,
    /// The place of the module of each id, for `given`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub table: Vec<i64>,
    /// Where lots and the order of ties come from, the same at all sites. Default: 0.
    pub seed: u64,
}

impl Hash {
    /// A table by k-means over the vectors of the ids, `[vocab, width]`: each cluster is a module.
    ///
    /// # Errors
    /// Where there are fewer vectors than modules, or one is NaN or infinite.
    pub fn clustered(vectors: &Tensor, modules: usize, seed: u64) -> Result<Hash> {
        let table = k_means(vectors, modules, Seed(seed).child("hash"))?;
        Ok(Hash { assignment: Assignment::Given, table, seed, ..Hash::default() })
    }

    fn made(&self, modules: usize) -> Result<Vec<i64>> {
        let wrong =
            |key: &str, problem: String| Err(Error::invalid(format!("hash.{key}"), problem));
        let seed = Seed(self.seed).child("hash");
        match self.assignment {
            Assignment::Random => match self.vocab {
                Some(vocab) if (1..=MOST_IDS).contains(&vocab) => {
                    let lots = uniform(vocab, seed)?;
                    let last = modules.saturating_sub(1) as i64;
                    Ok(lots.iter().map(|u| ((u * modules as f64) as i64).min(last)).collect())
                }
                _ => wrong("vocab", format!("is to be the number of ids, 1 to {MOST_IDS}")),
            },
            Assignment::Balanced => {
                if self.counts.is_empty() || !self.counts.iter().all(|c| *c >= 0.0 && c.is_finite())
                {
                    return wrong("counts", "is to say how often each id occurs".into());
                }
                balanced(&self.counts, modules, seed)
            }
            Assignment::Given => {
                let last = modules as i64 - 1;
                match self.table.iter().find(|j| !(0..=last).contains(*j)) {
                    _ if self.table.is_empty() => {
                        wrong("table", "is to have the place of a module for each id".into())
                    }
                    Some(j) => wrong("table", format!("has {j}, modules are 0 to {last}")),
                    None => Ok(self.table.clone()),
                }
            }
        }
    }
}

fn uniform(n: i64, seed: Seed) -> Result<Vec<f64>> {
    let lots = Init::Uniform(0.5).tensor(&[n], seed, Kind::Double, Device::Cpu)?;
    lots.add_scalar(0.5)?.to_vec()
}

/// Ids by falling count, each to the module with the least so far; equal counts in the order of a
/// lot, and among modules with as much to the one with fewer ids.
fn balanced(counts: &[f64], modules: usize, seed: Seed) -> Result<Vec<i64>> {
    let lots = uniform(counts.len() as i64, seed)?;
    let mut ids: Vec<(usize, f64, f64)> =
        counts.iter().zip(lots).enumerate().map(|(id, (c, lot))| (id, *c, lot)).collect();
    ids.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.2.total_cmp(&b.2)));
    let mut loads = vec![(0.0f64, 0usize); modules];
    let mut table = vec![0i64; counts.len()];
    for (id, count, _) in ids {
        let least = (0..)
            .zip(loads.iter_mut())
            .min_by(|(_, a), (_, b)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        if let (Some((j, load)), Some(slot)) = (least, table.get_mut(id)) {
            *slot = j;
            *load = (load.0 + count, load.1 + 1);
        }
    }
    Ok(table)
}

impl RouterConfig for Hash {
    fn kind(&self) -> &'static str {
        "hash"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        if site.kind == SiteKind::Attention {
            return Err(Error::unsupported(
                "an α for each token of an attention",
                "choose sites that take each token by itself: linear layers, sub-layers",
            ));
        }
        let table = self.made(bank.len())?;
        let table = Tensor::from_slice(&table, &[table.len() as i64], Device::Cpu)?;
        Ok(Box::new(HashRouter { table: scope.buffer("table", &table)? }))
    }
}

#[derive(Debug)]
struct HashRouter {
    /// `[vocab]`, i64.
    table: Tensor,
}

impl Router for HashRouter {
    fn kind(&self) -> &'static str {
        "hash"
    }

    fn reads_ids(&self) -> bool {
        true
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let ids = cx.feature("input_ids")?.to_device(self.table.device())?;
        let [rows, len] = ids.size()[..] else {
            return Err(Error::invalid("input_ids", format!("are {ids:?}, not [batch, seq]")));
        };
        if x.x.dim() < 2 || x.rows() != rows || x.x.len_of(1) != len {
            let problem = format!("{rows} rows of {len} ids do not fit x {:?}", x.x);
            return Err(Error::invalid("input_ids", problem));
        }
        let vocab = self.table.len_of(0);
        if let Some(id) = ids.to_vec::<i64>()?.iter().find(|id| !(0..vocab).contains(*id)) {
            let problem = format!("{id} is beyond the {vocab} ids of a `hash` router's table");
            return Err(Error::invalid("input_ids", problem));
        }
        let index = self.table.index_select(0, &ids.reshape(&[-1])?)?.reshape(&[rows, len, 1])?;
        let weight = Tensor::ones(&[rows, len, 1], Kind::Float, index.device())?;
        Ok(Routing::new(Weights::Sparse { index, weight }, bank.len()).normalised())
    }
}
