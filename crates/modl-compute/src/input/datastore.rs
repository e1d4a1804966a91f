//! What retrieval looks up: keys with a value each, and the nearest keys of a query.
//!
//! The file is safetensors with `keys` `[n, dim]` f32 and `values` `[n, …]`. Keys are read into
//! memory; values stay in the mapped file, and only those that are found are read. The graph is not
//! stored: the same seed and keys make the same one again.
//!
//! Malkov and Yashunin 2018, *Hierarchical Navigable Small World graphs*, arXiv 1603.09320, by the
//! crate `instant-distance`; exact search goes through all keys.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use instant_distance::{Builder, Hnsw, PointId};
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Device, Error, Kind, Result, Tensor};
use serde::{Deserialize, Serialize};

const KEYS: &str = "keys";
const VALUES: &str = "values";

/// How the nearest keys are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Search {
    /// By looking at all keys, n · dim operations for a query.
    #[default]
    Exact,
    /// By a graph of neighbours, which misses some but looks at few.
    Hnsw {
        /// Where the graph's layers are drawn from: the same seed gives the same graph.
        seed: u64,
        /// How many candidates are kept while building and searching, no fewer than the neighbours
        /// that are asked for: more find more and take longer.
        candidates: usize,
    },
}

/// The keys nearest to some queries, nearest first.
#[derive(Debug, Clone)]
pub struct Neighbours {
    /// Squared Euclidean distances `[queries, k]` f32.
    pub distances: Tensor,
    /// Their places in the store, `[queries, k]` i64.
    pub rows: Tensor,
}

/// Keys with values.
pub struct Datastore {
    keys: Arc<[f32]>,
    dim: usize,
    values: Values,
    graph: Option<Graph>,
}

/// Where values are.
enum Values {
    Held(Mutex<Tensor>),
    Mapped(Checkpoint),
}

impl Values {
    /// Shape and kind of all.
    fn info(&self) -> Result<(Vec<i64>, Kind)> {
        match self {
            Values::Held(_) => self.all().map(|t| (t.size(), t.kind())),
            Values::Mapped(file) => file.info(VALUES),
        }
    }

    fn all(&self) -> Result<Tensor> {
        match self {
            Values::Held(t) => Ok(t.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            Values::Mapped(file) => file.tensor(VALUES, Device::Cpu),
        }
    }

    fn rows(&self, index: &[i64]) -> Result<Tensor> {
        match self {
            Values::Mapped(file) => file.rows(VALUES, index, Device::Cpu),
            Values::Held(_) => {
                let index = Tensor::from_slice(index, &[index.len() as i64], Device::Cpu)?;
                self.all()?.index_select(0, &index)
            }
        }
    }
}

struct Graph {
    hnsw: Hnsw<Point>,
    /// The key that each point of the graph is.
    rows: Vec<usize>,
    candidates: usize,
}

impl fmt::Debug for Datastore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let graph = self.graph.as_ref().map(|g| g.candidates);
        let mut s = f.debug_struct("Datastore");
        s.field("len", &self.len()).field("dim", &self.dim).field("candidates", &graph).finish()
    }
}

/// A key or a query: some numbers of many.
#[derive(Clone)]
struct Point {
    all: Arc<[f32]>,
    at: usize,
    dim: usize,
}

impl Point {
    fn numbers(&self) -> &[f32] {
        self.all.get(self.at..self.at + self.dim).unwrap_or_default()
    }
}

impl instant_distance::Point for Point {
    fn distance(&self, other: &Self) -> f32 {
        squared(self.numbers(), other.numbers())
    }
}

fn squared(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

impl Datastore {
    /// `keys` `[n, dim]` with `values` `[n, …]`.
    ///
    /// # Errors
    /// Where their shapes do not go together, there are none, a key is not finite, or the graph
    /// cannot be built.
    pub fn new(keys: &Tensor, values: &Tensor, search: Search) -> Result<Self> {
        let values = values.detach()?.to_device(Device::Cpu)?;
        Self::build(&keys.detach()?, Values::Held(Mutex::new(values)), search)
    }

    /// Opens a file that [`Datastore::save`] wrote.
    ///
    /// # Errors
    /// Where it is no such file, or what [`Datastore::new`] gives.
    pub fn open(path: impl AsRef<Path>, search: Search) -> Result<Self> {
        let file = Checkpoint::open(path)?;
        let keys = file.tensor(KEYS, Device::Cpu)?;
        Self::build(&keys, Values::Mapped(file), search)
    }

    fn build(keys: &Tensor, values: Values, search: Search) -> Result<Self> {
        let (size, (shape, _)) = (keys.size(), values.info()?);
        let &[n, dim] = size.as_slice() else {
            return Err(Error::invalid(KEYS, format!("have shape {size:?}, not [n, dim]")));
        };
        if n < 1 || dim < 1 || shape.first() != Some(&n) {
            let problem = format!("{size:?} do not go with values {shape:?}; one value for a key");
            return Err(Error::invalid(KEYS, problem));
        }
        let keys: Arc<[f32]> = keys.to_kind(Kind::Float)?.to_vec::<f32>()?.into();
        if keys.iter().any(|x| !x.is_finite()) {
            return Err(Error::invalid(KEYS, "are not all finite"));
        }
        let dim = dim as usize;
        let graph = match search {
            Search::Exact => None,
            Search::Hnsw { seed, candidates } => Some(Graph::build(&keys, dim, seed, candidates)?),
        };
        Ok(Datastore { keys, dim, values, graph })
    }

    /// Writes keys and values; the file appears whole or not at all.
    ///
    /// # Errors
    /// Where the disk refuses.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let keys = Tensor::from_slice(&self.keys, &[self.len(), self.dim()], Device::Cpu)?;
        let values = self.values.all()?;
        checkpoint::save(path, [(KEYS, &keys), (VALUES, &values)], HashMap::new())
    }

    /// The number of keys.
    pub fn len(&self) -> i64 {
        (self.keys.len() / self.dim) as i64
    }

    /// Whether there is none: never.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The width of keys and queries.
    pub fn dim(&self) -> i64 {
        self.dim as i64
    }

    /// The shape and kind of one value.
    pub fn value(&self) -> Result<(Vec<i64>, Kind)> {
        let (shape, kind) = self.values.info()?;
        Ok((shape.get(1..).unwrap_or_default().to_vec(), kind))
    }

    /// The `k` keys nearest to each of `queries` `[queries, dim]`, or all where there are fewer.
    ///
    /// # Errors
    /// Where the queries have another width or are not finite, or a graph keeps fewer candidates.
    pub fn nearest(&self, queries: &Tensor, k: usize) -> Result<Neighbours> {
        let size = queries.size();
        if queries.dim() != 2 || queries.len_of(1) != self.dim() {
            let problem = format!("have shape {size:?}, not [queries, {}]", self.dim);
            return Err(Error::invalid("queries", problem));
        }
        let k = k.min(self.len() as usize);
        if let Some(graph) = &self.graph
            && graph.candidates < k
        {
            let problem = format!("are {}, fewer than {k} neighbours", graph.candidates);
            return Err(Error::invalid("search.hnsw.candidates", problem));
        }
        let all: Arc<[f32]> = queries.detach()?.to_kind(Kind::Float)?.to_vec::<f32>()?.into();
        if all.iter().any(|x| !x.is_finite()) {
            return Err(Error::invalid("queries", "are not all finite"));
        }
        let (mut distances, mut rows) = (Vec::new(), Vec::new());
        for at in (0..all.len()).step_by(self.dim) {
            let query = Point { all: all.clone(), at, dim: self.dim };
            let found = match self.graph.as_ref().map(|g| g.nearest(&query, k)) {
                Some(found) if found.len() == k => found,
                // Without a graph, or where parts of it cannot be reached.
                _ => self.exact(&query, k),
            };
            distances.extend(found.iter().map(|(d, _)| *d));
            rows.extend(found.iter().map(|(_, row)| *row as i64));
        }
        let shape = [queries.len_of(0), k as i64];
        let device = queries.device();
        Ok(Neighbours {
            distances: Tensor::from_slice(&distances, &shape, device)?,
            rows: Tensor::from_slice(&rows, &shape, device)?,
        })
    }

    fn exact(&self, query: &Point, k: usize) -> Vec<(f32, usize)> {
        let keys = self.keys.chunks_exact(self.dim).enumerate();
        let mut all: Vec<(f32, usize)> =
            keys.map(|(row, key)| (squared(query.numbers(), key), row)).collect();
        let nearer = |a: &(f32, usize), b: &(f32, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        if k < all.len() {
            all.select_nth_unstable_by(k, nearer);
            all.truncate(k);
        }
        all.sort_unstable_by(nearer);
        all
    }

    /// The values at `rows` of any shape → `[rows…, …]`.
    ///
    /// # Errors
    /// Where a row is out of range.
    pub fn values(&self, rows: &Tensor) -> Result<Tensor> {
        let found = self.values.rows(&rows.to_vec::<i64>()?)?;
        let (one, _) = self.value()?;
        found.reshape(&[rows.size(), one].concat())?.to_device(rows.device())
    }
}

impl Graph {
    fn build(keys: &Arc<[f32]>, dim: usize, seed: u64, candidates: usize) -> Result<Self> {
        let point = |at| Point { all: keys.clone(), at, dim };
        let points: Vec<Point> = (0..keys.len()).step_by(dim).map(point).collect();
        let failed = |e| Error::unsupported(format!("a thread for the graph: {e}"), "try again");
        // With several threads the graph would depend on who comes first.
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(failed)?;
        let builder =
            Builder::default().seed(seed).ef_construction(candidates).ef_search(candidates);
        let (hnsw, ids) = one.install(|| builder.build_hnsw(points));
        let mut rows = vec![0; ids.len()];
        for (row, id) in ids.into_iter().enumerate() {
            if let Some(slot) = rows.get_mut(place(id)) {
                *slot = row;
            }
        }
        Ok(Graph { hnsw, rows, candidates })
    }

    fn nearest(&self, query: &Point, k: usize) -> Vec<(f32, usize)> {
        let mut search = instant_distance::Search::default();
        let found = self.hnsw.search(query, &mut search).take(k);
        found.filter_map(|item| Some((item.distance, *self.rows.get(place(item.pid))?))).collect()
    }
}

fn place(id: PointId) -> usize {
    id.into_inner() as usize
}
