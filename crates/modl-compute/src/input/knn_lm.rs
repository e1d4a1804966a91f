//! kNN-LM: a language model that also asks what followed the most similar contexts.
//!
//! p(y|x) = λ p_kNN(y|x) + (1 − λ) p_LM(y|x) with p_kNN(y|x) ∝ Σ 1\[y = vᵢ\] exp(−dᵢ ⁄ T) over the k
//! contexts of a [`Datastore`] nearest to that of x; its keys are what goes into the output layer
//! and its values `[n]` i64 the tokens that followed. The site's output becomes ln p, whose softmax
//! is p. φ is λ alone, kept within \[0, 0.999\]; with λ = 0 the output is the model's own, bit for bit.
//!
//! Khandelwal et al. 2020, *Generalization through Memorization: Nearest Neighbor Language Models*,
//! arXiv 1911.00172, whose k, λ and squared Euclidean distances are the defaults; its keys are what
//! goes into the last feed-forward network. Survey §3.2.

use std::path::PathBuf;
use std::sync::Arc;

use modl_core::{
    Attachment, Context, Error, Host, Init, Kind, Module, ModuleConfig, Result, Scope, Signal,
    SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::datastore::{Datastore, Search};
use super::retrieval::open;

const LAMBDA: &str = "lambda";

/// Configuration of a kNN-LM at the output layer of a decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KnnLm {
    /// The file of the store: keys as wide as the hidden states, values token ids.
    pub store: PathBuf,
    /// k, at least 1; default 1024.
    pub neighbours: usize,
    /// λ at the start, in [0, 0.999]; default 0.25.
    pub lambda: f64,
    /// T, above 0; default 1.
    pub temperature: f64,
    /// How neighbours are found.
    pub search: Search,
}

impl Default for KnnLm {
    fn default() -> Self {
        KnnLm {
            store: PathBuf::new(),
            neighbours: 1024,
            lambda: 0.25,
            temperature: 1.0,
            search: Search::Exact,
        }
    }
}

/// The largest λ: with none of p_LM left, a token that no context was followed by has ln p = −∞.
const MOST: f64 = 0.999;

impl ModuleConfig for KnnLm {
    fn kind(&self) -> &'static str {
        "knn_lm"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Targets::names(["lm_head"])
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if at.site.kind != SiteKind::Linear {
            return Err(Error::unsupported(
                format!("knn_lm at a site of kind {:?}", at.site.kind),
                "attach it to the output layer, `lm_head`",
            ));
        }
        if !(0.0..=MOST).contains(&self.lambda) {
            let problem = format!("is {}, wants a number in [0, {MOST}]", self.lambda);
            return Err(Error::invalid("knn_lm.lambda", problem));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            let problem = format!("is {}, wants a number above 0", self.temperature);
            return Err(Error::invalid("knn_lm.temperature", problem));
        }
        let store = open(self.kind(), &self.store, self.neighbours, self.search)?;
        let (shape, kind) = store.value()?;
        if store.dim() != at.site.input || !shape.is_empty() || kind != Kind::Int64 {
            let problem = format!(
                "holds keys of width {} and values of shape {shape:?} and kind {kind:?}; wanted are \
                 keys of width {} and one token id for each",
                store.dim(),
                at.site.input
            );
            return Err(Error::file(&self.store, problem));
        }
        let lambda = scope.param(LAMBDA, &[], Init::Constant(self.lambda))?;
        let (neighbours, temperature) = (self.neighbours, self.temperature);
        Ok(Box::new(Mixed { store: Arc::new(store), lambda, neighbours, temperature }))
    }
}

/// p_kNN `[queries, vocabulary]` of contexts `[queries, dim]`, in f32.
///
/// # Errors
/// Where the contexts have another width than the keys, or a value is no token of the vocabulary.
pub fn neighbour_probabilities(
    store: &Datastore,
    contexts: &Tensor,
    neighbours: usize,
    temperature: f64,
    vocabulary: i64,
) -> Result<Tensor> {
    let found = store.nearest(contexts, neighbours)?;
    let tokens = store.values(&found.rows)?;
    if let Some(id) = tokens.to_vec::<i64>()?.iter().find(|id| !(0..vocabulary).contains(*id)) {
        let problem = format!("hold {id}, which is none of {vocabulary} tokens");
        return Err(Error::invalid("values", problem));
    }
    let weights = found.distances.mul_scalar(-1.0 / temperature)?.softmax(-1)?;
    let shape = [contexts.len_of(0), vocabulary];
    let none = Tensor::zeros(&shape, Kind::Float, contexts.device())?;
    none.scatter_add(1, &tokens, &weights)
}

/// An output layer with a store.
#[derive(Debug)]
struct Mixed {
    store: Arc<Datastore>,
    lambda: Tensor,
    neighbours: usize,
    temperature: f64,
}

impl Module for Mixed {
    fn kind(&self) -> &'static str {
        "knn_lm"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = f.call(x, cx)?;
        if !cx.train && self.lambda.item()? <= 0.0 {
            return Ok(y);
        }
        let contexts = x.x.reshape(&[-1, x.x.len_of(-1)])?;
        let (k, t, size) = (self.neighbours, self.temperature, y.x.size());
        let near = neighbour_probabilities(&self.store, &contexts, k, t, y.x.len_of(-1))?;
        let kind = if y.x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let near = near.to_kind(kind)?.reshape(&size)?;
        let lambda = self.lambda.to_kind(kind)?.clamp(0.0, MOST)?;
        let own = y.x.to_kind(kind)?.log_softmax(-1)?;
        let own = own.add(&lambda.neg()?.add_scalar(1.0)?.log()?)?;
        // ln(e^own + λ p_kNN), where e^own may be too small for a number. The 1 keeps the
        // derivative of ln 0 out of sums that are not taken.
        let far = near.eq_scalar(0.0)?;
        let near = near.masked_fill(&far, 1.0)?.mul(&lambda)?.log()?;
        let sum = own.add(&near.sub(&own)?.softplus()?)?;
        Ok(y.replace(own.where_else(&far, &sum)?.to_kind(y.x.kind())?))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(LAMBDA, self.lambda.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Mixed {
            store: self.store.clone(),
            lambda: phi.need(LAMBDA)?.clone(),
            neighbours: self.neighbours,
            temperature: self.temperature,
        }))
    }
}
