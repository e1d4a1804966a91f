//! Trainable tokens: some rows of a table of embeddings are trained, and the rest of it is not. φ is
//! those rows, which take the place of θ's: W' = W with W'[i] = φᵢ for i in `token_indices`.
//!
//! It is how new tokens get embeddings without a copy of the whole table. The method and the names
//! are PEFT's (`TrainableTokensConfig`, and `trainable_token_indices` beside other methods). Survey
//! §3.1, parameter composition by a sparse change whose mask is given.

use std::collections::BTreeSet;

use modl_core::{
    Attachment, Context, Error, Host, Module, ModuleConfig, Result, Scope, Signal, SiteKind,
    Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::peft::Provenance;

/// The name of φ, as in PEFT's files. It is no delta there either.
pub(crate) const ROWS: &str = "trainable_tokens_delta";

/// Configuration of trainable tokens at tables of embeddings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainableTokens {
    /// The ids of the tokens whose rows are trained, each once.
    pub token_indices: Vec<i64>,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl TrainableTokens {
    /// The rows of these tokens.
    pub fn new(token_indices: impl IntoIterator<Item = i64>) -> Self {
        TrainableTokens { token_indices: token_indices.into_iter().collect(), ..Self::default() }
    }

    fn check(&self, rows: i64) -> Result<()> {
        let refuse =
            |problem: String| Err(Error::invalid("trainable_tokens.token_indices", problem));
        if self.token_indices.is_empty() {
            return refuse("are none; name one token at least".into());
        }
        if let Some(id) = self.token_indices.iter().find(|id| !(0..rows).contains(*id)) {
            return refuse(format!("have {id}, and the table has the rows 0 to {}", rows - 1));
        }
        let mut seen = BTreeSet::new();
        match self.token_indices.iter().find(|id| !seen.insert(**id)) {
            Some(id) => refuse(format!("have {id} twice")),
            None => Ok(()),
        }
    }
}

impl ModuleConfig for TrainableTokens {
    fn kind(&self) -> &'static str {
        "trainable_tokens"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if at.site.kind != SiteKind::Embedding {
            return Err(Error::unsupported(
                format!("trainable tokens at a site of kind {:?}", at.site.kind),
                "attach them to tables of embeddings, for instance with the targets `all-embedding`",
            ));
        }
        let weight = at.theta.need("weight")?;
        self.check(weight.len_of(0))?;
        let ids = self.token_indices.clone();
        let index = Tensor::from_slice(&ids, &[ids.len() as i64], weight.device())?;
        let rows = scope.param_from(ROWS, &weight.detach()?.index_select(0, &index)?)?;
        Ok(Box::new(Rows { ids, index, rows }))
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-embedding")
    }
}

/// Rows of a table in place of its own.
#[derive(Debug, Clone)]
struct Rows {
    ids: Vec<i64>,
    /// `ids` as a tensor `[n]`.
    index: Tensor,
    /// `[n, dim]`.
    rows: Tensor,
}

impl Module for Rows {
    fn kind(&self) -> &'static str {
        "trainable_tokens"
    }

    /// Without a copy of the table.
    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = f.call(x, cx)?;
        // Which of the rows each id asks for, if any: `[…, n]`, of which at most one is true.
        let same = x.x.unsqueeze(-1)?.equal(&self.index)?;
        let (hit, at) = same.to_kind(modl_core::Kind::Uint8)?.max_dim(-1)?;
        let own = self.rows.to_kind(y.x.kind())?.embedding(&at)?;
        let hit = hit.gt_scalar(0.0)?.unsqueeze(-1)?;
        Ok(y.replace(own.where_else(&hit, &y.x)?))
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        let new = w.index_copy(0, &self.index, &self.rows.to_kind(w.kind())?)?;
        Ok(Some(theta.clone().with("weight", new)))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(ROWS, self.rows.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Rows { rows: phi.need(ROWS)?.clone(), ..self.clone() }))
    }

    fn signature(&self) -> String {
        format!("trainable_tokens({:?} of {:?})", self.ids, self.rows.size())
    }
}
