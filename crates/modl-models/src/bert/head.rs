//! Classifiers on top of the encoder: of a sentence by the pooler's output, as BERT has it, or by the
//! first token's state, as RoBERTa has it (Liu et al. 2019, arXiv 1907.11692); or of each token.

use modl_core::{Result, SiteKind, Tensor};

use crate::dropout::dropout;
use crate::place::{Pass, Place, Surveyor};

/// What a classifier looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeadKind {
    /// The pooler's output.
    Pooled,
    /// The first token, through a layer of its own.
    First,
    /// Each token.
    Tokens,
}

impl HeadKind {
    /// Its dense layers with the rows of their weights.
    pub(super) fn layers(self, width: i64, labels: i64) -> Vec<(&'static str, i64)> {
        match self {
            HeadKind::First => vec![("classifier.dense", width), ("classifier.out_proj", labels)],
            _ => vec![("classifier", labels)],
        }
    }
}

/// A classifier with its sites.
#[derive(Debug)]
pub(super) struct Head {
    kind: HeadKind,
    layers: Vec<Place>,
    dropout: f64,
}

impl Head {
    pub(super) fn new(
        to: &mut Surveyor,
        kind: HeadKind,
        [width, labels]: [i64; 2],
        dropout: f64,
    ) -> Self {
        let layers = kind.layers(width, labels).into_iter();
        let layers = layers.map(|(path, rows)| to.place(path, SiteKind::Linear, width, rows));
        Head { kind, layers: layers.collect(), dropout }
    }

    /// Hidden states `[batch, seq, hidden]` and the pooler's output → `[batch, labels]`, or
    /// `[batch, seq, labels]`.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        pooled: Option<&Tensor>,
        pass: Pass,
    ) -> Result<Tensor> {
        let mut x = match (self.kind, pooled) {
            (HeadKind::Pooled, Some(pooled)) => pooled.clone(),
            (HeadKind::Tokens, _) => hidden.clone(),
            _ => hidden.select(1, 0)?,
        };
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                x = x.tanh()?;
            }
            let draw = format!("{}.dropout", layer.site.path);
            x = layer.linear(&dropout(x, pass.dropout(&draw, self.dropout))?, pass)?;
        }
        Ok(x)
    }
}
