//! The output embedding: a backbone's own input embeddings, with which states are compared.
//!
//! logits = E x + b with E the input embeddings (Press and Wolf 2017, arXiv 1608.05859). Where an
//! invertible adapter A has changed the input embeddings, x is A⁻¹ of the state, so that what is compared
//! is again in the space of E (MAD-X, arXiv 2005.00052, section 3.2).

use modl_compute::{Coupling, Invertible};
use modl_core::{
    Context, Error, Modular, ModularLayer, Result, Signal, Site, SiteKind, Tensor, Weights,
};

/// The input embeddings of a backbone.
#[derive(Debug)]
pub(super) struct OutputEmbedding {
    site: Site,
}

impl OutputEmbedding {
    /// # Errors
    /// Where the backbone has none.
    pub(super) fn of(model: &Modular) -> Result<Self> {
        let site = model.backbone().sites().iter().find(|s| s.kind == SiteKind::Embedding);
        let site = site.cloned().ok_or_else(|| {
            Error::unsupported(
                "`masked_tokens` on a backbone without an embedding of words",
                "take one that reads texts, such as BERT",
            )
        })?;
        Ok(OutputEmbedding { site })
    }

    /// Words and width.
    pub(super) fn size(&self) -> [i64; 2] {
        [self.site.input, self.site.output]
    }

    /// The logits `[batch, n, words]` of states `[batch, n, width]`.
    pub(super) fn logits(
        &self,
        model: &Modular,
        states: &Tensor,
        bias: &Tensor,
        cx: &Context,
    ) -> Result<Tensor> {
        let theta = model.backbone().theta(&self.site)?;
        let words = theta.need("weight")?.to_kind(states.kind())?;
        undone(model, states, cx)?.linear(&words, Some(bias))
    }
}

/// States without what the active invertible adapters do to embeddings.
fn undone(model: &Modular, states: &Tensor, cx: &Context) -> Result<Tensor> {
    let sites = model.modular_sites();
    let Some(site) = sites.iter().find(|s| s.kind == SiteKind::Tokens) else {
        return Ok(states.clone());
    };
    let Some(layer) = model.layer(site) else { return Ok(states.clone()) };
    let mut couplings = Vec::with_capacity(layer.bank.len());
    for (j, name) in layer.bank.names().iter().enumerate() {
        let module = layer.bank.module(j);
        let config = model.configuration(name)?;
        couplings.push(module.map(|m| Invertible::coupling_of(m, &config)).transpose()?.flatten());
    }
    if couplings.iter().all(Option::is_none) {
        return Ok(states.clone());
    }
    if layer.router().kind() != "fixed" {
        return Err(no_inverse(&format!("a router `{}`", layer.router().kind())));
    }
    let routing = layer.router().route(&Signal::from(states.clone()), &layer.bank, cx)?;
    let of = |active: &[(usize, f64)], states: &Tensor| match active_one(layer, &couplings, active)?
    {
        Some(coupling) => coupling.inverse(states),
        None => Ok(states.clone()),
    };
    match &routing.weights {
        Weights::Fixed(active) => of(active, states),
        Weights::Rows(rows) => {
            let each = rows
                .iter()
                .enumerate()
                .map(|(row, active)| of(active, &states.narrow(0, row as i64, 1)?));
            Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)
        }
        _ => Err(no_inverse("weights that are learned")),
    }
}

/// The only active one of some adapters.
fn active_one<'a>(
    layer: &ModularLayer,
    couplings: &'a [Option<Coupling>],
    active: &[(usize, f64)],
) -> Result<Option<&'a Coupling>> {
    let own = active.iter().filter(|(_, weight)| *weight != 0.0);
    let own: Vec<(&Coupling, f64)> =
        own.filter_map(|(j, w)| Some((couplings.get(*j)?.as_ref()?, *w))).collect();
    match own.as_slice() {
        [] => Ok(None),
        // Places in a stack have no weight.
        [(coupling, weight)] if *weight == 1.0 || layer.aggregator().kind() == "stack" => {
            Ok(Some(*coupling))
        }
        _ => Err(no_inverse("several at once, or one with a weight other than 1")),
    }
}

fn no_inverse(why: &str) -> Error {
    Error::unsupported(
        format!("the inverse of invertible adapters under {why}"),
        "name one for each row by `fixed`, with `stack` where other modules stand on it",
    )
}
