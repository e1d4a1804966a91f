//! Retrieval augmentation: what a store has on the text is put before it.
//!
//! f_θ(\[z₁; …; z_k; x\]) with the k documents of a [`Datastore`] whose keys are nearest to a query
//! vector, nearest first. A document is `[length, width]` token vectors, or `[width]` for one; φ is
//! the projection `[dim, width]` of these to the backbone's embeddings, the identity where the
//! widths agree, else drawn. The query is a feature of the context, a vector for each row, which
//! gets no gradient. It is no identity at the start.
//!
//! Lewis et al. 2020, *Retrieval-Augmented Generation*, arXiv 2005.11401; with vectors in front,
//! Borgeaud et al. 2022, arXiv 2112.04426. Survey §3.2, input composition.

use std::path::PathBuf;
use std::sync::Arc;

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, Targets,
    Tensor, Tensors, is_float,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::datastore::{Datastore, Search};
use super::prompt_tuning::entrance;
use super::virtual_tokens::{check, prepend};

const PROJECTION: &str = "projection";

/// Configuration of retrieval at the `tokens` site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retrieval {
    /// The file of the store, whose values are documents `[n, length, width]` or `[n, width]`.
    pub store: PathBuf,
    /// k, at least 1; default 1.
    pub neighbours: usize,
    /// The context's feature that is the query, `[batch, key width]`; default `query`.
    pub query: String,
    /// How neighbours are found.
    pub search: Search,
}

impl Default for Retrieval {
    fn default() -> Self {
        Retrieval {
            store: PathBuf::new(),
            neighbours: 1,
            query: "query".to_owned(),
            search: Search::Exact,
        }
    }
}

impl ModuleConfig for Retrieval {
    fn kind(&self) -> &'static str {
        "retrieval"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        entrance()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        check(self.kind(), at.site, 1)?;
        let store = open(self.kind(), &self.store, self.neighbours, self.search)?;
        let (shape, kind) = store.value()?;
        let (1 | 2, Some(width)) = (shape.len(), shape.last()) else {
            let problem = format!("holds values of shape {shape:?}, not token vectors");
            return Err(Error::file(&self.store, problem));
        };
        if !is_float(kind) {
            return Err(Error::file(&self.store, format!("holds values of kind {kind:?}")));
        }
        let dim = at.site.input;
        let projection = if *width == dim {
            let one = Tensor::eye(dim, scope.kind(), scope.device())?;
            scope.param_from(PROJECTION, &one)?
        } else {
            scope.param(PROJECTION, &[dim, *width], Init::Kaiming)?
        };
        let (neighbours, query) = (self.neighbours, self.query.clone());
        Ok(Box::new(Retrieved { store: Arc::new(store), projection, neighbours, query }))
    }
}

/// The store of a module of some `kind`.
///
/// # Errors
/// Where none is named, it cannot be read, or no neighbours are wanted.
pub(super) fn open(
    kind: &str,
    path: &std::path::Path,
    neighbours: usize,
    search: Search,
) -> Result<Datastore> {
    if path.as_os_str().is_empty() {
        let problem = "is missing: the path of a file that Datastore::save wrote";
        return Err(Error::invalid(format!("{kind}.store"), problem));
    }
    if neighbours < 1 {
        return Err(Error::invalid(format!("{kind}.neighbours"), "is 0, wants at least 1"));
    }
    Datastore::open(path, search)
}

/// A store before the text.
#[derive(Debug)]
struct Retrieved {
    store: Arc<Datastore>,
    projection: Tensor,
    neighbours: usize,
    query: String,
}

impl Module for Retrieved {
    fn kind(&self) -> &'static str {
        "retrieval"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if cx.past() > 0 {
            return f.call(x, cx); // The tokens seen before have the documents in front of them.
        }
        let query = cx.feature(&self.query)?;
        let found = self.store.nearest(query, self.neighbours)?;
        let documents = self.store.values(&found.rows)?.to_device(x.x.device())?;
        let projection = self.projection.to_kind(x.x.kind())?;
        let flat = [x.rows(), -1, projection.len_of(1)];
        let documents = documents.to_kind(x.x.kind())?.reshape(&flat)?;
        prepend(&documents.linear(&projection, None)?, f, x, cx)
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(PROJECTION, self.projection.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Retrieved {
            store: self.store.clone(),
            projection: phi.need(PROJECTION)?.clone(),
            neighbours: self.neighbours,
            query: self.query.clone(),
        }))
    }
}
