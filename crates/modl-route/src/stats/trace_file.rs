//! Traces as files: safetensors that say themselves what they hold.
//!
//! The metadata has `format` and, as JSON, `contents`: for each split its `name`, its distinct
//! `labels`, and its `sites` with their `paths` and `modules`. Split s has the tensor `s.label` (the
//! number of each row's label), and its site i has, for units and their choices one after the other,
//! `s.i.row`, `s.i.length` (how many choices each unit has), `s.i.module`, `s.i.weight`, and
//! `s.i.dropped` where choices were dropped. Whole numbers are u8, i16 or i32, as they fit; weights are
//! f32 where that changes none of them, and f64 else.

use std::collections::HashMap;
use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Device, Error, Kind, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::trace::{Kept, RoutingTrace, Split};
use super::units::Units;

const FORMAT: &str = "modl routing trace 1";

#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    splits: Vec<SplitContents>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SplitContents {
    name: String,
    labels: Vec<String>,
    sites: Vec<SiteContents>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SiteContents {
    paths: Vec<String>,
    modules: Vec<String>,
}

impl RoutingTrace {
    /// Writes the trace, whole or not at all.
    ///
    /// # Errors
    /// Where the disk refuses.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        let mut splits = Vec::new();
        for (s, split) in self.splits.iter().enumerate() {
            let mut labels: Vec<String> = split.labels.clone();
            labels.sort_unstable();
            labels.dedup();
            let number = |l: &String| labels.binary_search(l).unwrap_or_default() as i32;
            let rows: Vec<i32> = split.labels.iter().map(number).collect();
            tensors.push((format!("{s}.label"), whole(&rows)?));
            for (i, site) in split.sites.iter().enumerate() {
                let own = site.units.tensors()?;
                tensors.extend(own.into_iter().map(|(name, t)| (format!("{s}.{i}.{name}"), t)));
            }
            let site =
                |k: &Kept| SiteContents { paths: k.paths.clone(), modules: k.modules.clone() };
            let sites = split.sites.iter().map(site).collect();
            splits.push(SplitContents { name: split.name.clone(), labels, sites });
        }
        let contents =
            serde_json::to_string(&Contents { splits }).map_err(|e| Error::file(path, e))?;
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("contents".to_owned(), contents),
        ]);
        checkpoint::save(path, tensors.iter().map(|(n, t)| (n.as_str(), t)), metadata)
    }

    /// Reads a trace.
    ///
    /// # Errors
    /// Where the file is not there, is no trace, or its numbers do not fit each other.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = Checkpoint::open(path)?;
        let metadata = file.metadata();
        let contents = match (metadata.get("format"), metadata.get("contents")) {
            (Some(format), Some(contents)) if format == FORMAT => contents,
            _ => {
                let problem = "is no routing trace; `modl route-report RUN` writes one";
                return Err(Error::file(path, problem));
            }
        };
        let contents: Contents = serde_json::from_str(contents).map_err(|e| broken(path, e))?;
        let split = |(s, said): (usize, SplitContents)| -> Result<Split> {
            let whole = |name: &str| -> Result<Vec<i32>> {
                file.tensor(name, Device::Cpu)?.to_kind(Kind::Int)?.to_vec()
            };
            let label = |n: &i32| said.labels.get(usize::try_from(*n).ok()?).cloned();
            let labels: Option<Vec<String>> =
                whole(&format!("{s}.label"))?.iter().map(label).collect();
            let labels = labels.ok_or_else(|| broken(path, "a row has an unknown label"))?;
            let mut sites = Vec::new();
            for (i, SiteContents { paths, modules }) in said.sites.into_iter().enumerate() {
                let units = Units::read(&file, &format!("{s}.{i}"))?;
                if paths.is_empty() || !units.fit(labels.len(), modules.len()) {
                    return Err(broken(path, format!("the numbers of site {i} do not fit")));
                }
                sites.push(Kept { paths, modules, units });
            }
            Ok(Split { name: said.name, labels, sites })
        };
        let splits = contents.splits.into_iter().enumerate().map(split).collect::<Result<_>>()?;
        Ok(RoutingTrace { splits })
    }
}

impl Units {
    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let signed = |v: &[u32]| v.iter().map(|n| *n as i32).collect::<Vec<_>>();
        let starts = std::iter::once(&0).chain(&self.ends);
        let lengths: Vec<i32> = self.ends.iter().zip(starts).map(|(b, a)| (b - a) as i32).collect();
        let mut tensors = vec![
            ("row", whole(&signed(&self.rows))?),
            ("length", whole(&lengths)?),
            ("module", whole(&signed(&self.chosen))?),
            ("weight", compact(&self.weights)?),
        ];
        if self.dropped.iter().any(|d| *d != 0.0) {
            tensors.push(("dropped", compact(&self.dropped)?));
        }
        Ok(tensors)
    }

    fn read(file: &Checkpoint, place: &str) -> Result<Units> {
        let tensor = |name: &str| file.tensor(&format!("{place}.{name}"), Device::Cpu);
        let numbers = |name: &str| tensor(name)?.to_kind(Kind::Double)?.to_vec::<f64>();
        let whole = |name: &str| -> Result<Vec<u32>> {
            let all = tensor(name)?.to_kind(Kind::Int)?.to_vec::<i32>()?;
            // A number below 0 becomes one that is too large, which `fit` refuses.
            Ok(all.into_iter().map(|n| u32::try_from(n).unwrap_or(u32::MAX)).collect())
        };
        let rows = whole("row")?;
        let mut end = 0usize;
        let add = |n: u32| {
            end = end.saturating_add(n as usize);
            end
        };
        let ends = whole("length")?.into_iter().map(add).collect();
        let dropped = match file.info(&format!("{place}.dropped")) {
            Ok(_) => numbers("dropped")?,
            Err(_) => vec![0.0; rows.len()],
        };
        let (chosen, weights) = (whole("module")?, numbers("weight")?);
        Ok(Units { rows, ends, chosen, weights, dropped })
    }

    /// Whether all numbers are of `rows` rows and `modules` modules, and lists are of one length.
    fn fit(&self, rows: usize, modules: usize) -> bool {
        let below = |all: &[u32], limit: usize| all.iter().all(|n| (*n as usize) < limit);
        let lengths = [self.ends.len(), self.dropped.len()] == [self.rows.len(); 2]
            && self.weights.len() == self.chosen.len()
            && self.ends.last().copied().unwrap_or(0) == self.chosen.len();
        let finite = self.weights.iter().chain(&self.dropped).all(|w| w.is_finite());
        lengths && finite && below(&self.rows, rows) && below(&self.chosen, modules)
    }
}

fn whole(values: &[i32]) -> Result<Tensor> {
    let t = Tensor::from_slice(values, &[values.len() as i64], Device::Cpu)?;
    match values.iter().max() {
        Some(largest) if *largest <= i32::from(u8::MAX) => t.to_kind(Kind::Uint8),
        Some(largest) if *largest <= i32::from(i16::MAX) => t.to_kind(Kind::Int16),
        _ => Ok(t),
    }
}

fn compact(values: &[f64]) -> Result<Tensor> {
    let t = Tensor::from_slice(values, &[values.len() as i64], Device::Cpu)?;
    let exact = values.iter().all(|v| f64::from(*v as f32) == *v);
    if exact { t.to_kind(Kind::Float) } else { Ok(t) }
}

fn broken(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::file(path, format!("is a damaged trace ({what}); record it again"))
}
