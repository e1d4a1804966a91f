//! Product keys: the k best of very many modules at the cost of comparing with 2√m keys.
//!
//! The m modules stand in a table of a × b (√m × √m where m is a square, else the most even a · b =
//! m), in the order of the bank. A query q = W x̄ + b is cut in halves q₁ and q₂, which are scored
//! against a and b sub-keys: module (i, j) has the score q₁·uᵢ + q₂·vⱼ. The k best pairs are among
//! the products of the k best i and the k best j, so that the choice is exact. α = softmax of the k
//! scores.
//!
//! With several heads each has a query of its own, and α is the sum over heads; each has sub-keys of
//! its own, too, unless they share them, as in PEER, where modules are single neurons (He 2024,
//! arXiv 2407.04153). The batch norm of queries in both papers is left out: rows would depend on
//! each other.
//!
//! Lample et al. 2019, arXiv 1907.05242, §3.1; survey §4.2.3.
//!
//! ```toml
//! router = { type = "product_key", k = 8, heads = 4, input = "tokens" }
//! ```

use modl_core::{
    Bank, Context, Error, Init, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Scores;
use crate::scores::Scorer;
use crate::top_k::check_k;

/// The k best by two halves of a query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProductKey {
    /// How many modules are active for a head. Default: 2.
    pub k: usize,
    /// The number of heads. Default: 1.
    pub heads: usize,
    /// The width of a query, an even number. Default: 32.
    pub query: usize,
    /// Whether heads share their sub-keys (PEER). Default: false.
    pub shared_keys: bool,
    /// What the query is made of. Where `init_std` is 0, W starts with variance 1 ⁄ width, since
    /// queries of 0 let no gradient through to the keys. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for ProductKey {
    fn default() -> Self {
        ProductKey { k: 2, heads: 1, query: 32, shared_keys: false, scores: Scores::default() }
    }
}

impl RouterConfig for ProductKey {
    fn kind(&self) -> &'static str {
        "product_key"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        check_k("product_key.k", self.k, bank.len())?;
        if self.heads == 0 {
            return Err(Error::invalid("product_key.heads", "is to be 1 or more"));
        }
        if self.query == 0 || !self.query.is_multiple_of(2) {
            let problem = format!("is {}, and is to be an even number above 0", self.query);
            return Err(Error::invalid("product_key.query", problem));
        }
        let scores = self.scores.starting(1.0, site);
        let scorer =
            scores.build("product_key", site, self.heads.saturating_mul(self.query), scope)?;
        let (rows, columns) = most_even(bank.len());
        let half = self.query as i64 / 2;
        let heads = if self.shared_keys { 1 } else { self.heads as i64 };
        let init = Init::Normal(1.0 / (half as f64).sqrt());
        let mut keys = |name: &str, n: usize| scope.param(name, &[heads, n as i64, half], init);
        let keys = [keys("row_keys", rows)?, keys("column_keys", columns)?];
        Ok(Box::new(ProductKeyRouter { config: self.clone(), scorer, keys }))
    }
}

/// a ≤ b with a · b = m and a as large as it can be.
fn most_even(m: usize) -> (usize, usize) {
    let a = (1..=m).take_while(|a| a * a <= m).filter(|a| m.is_multiple_of(*a)).last().unwrap_or(1);
    (a, m / a)
}

#[derive(Debug)]
struct ProductKeyRouter {
    config: ProductKey,
    /// Makes the queries.
    scorer: Scorer,
    /// u `[heads, a, query ⁄ 2]` and v `[heads, b, query ⁄ 2]`; with shared keys heads are 1.
    keys: [Tensor; 2],
}

impl ProductKeyRouter {
    /// The best scores of a half of the queries, `[…, heads, up to k]`, and whose they are.
    fn half(&self, queries: &Tensor, n: usize) -> Result<(Tensor, Tensor)> {
        let keys = self.keys[n].to_kind(queries.kind())?;
        let half = self.config.query as i64 / 2;
        let part = queries.narrow(-1, n as i64 * half, half)?;
        let scores = part.unsqueeze(-2)?.matmul(&keys.t()?)?.squeeze(-2)?;
        scores.topk((self.config.k as i64).min(keys.len_of(1)), -1)
    }
}

impl Router for ProductKeyRouter {
    fn kind(&self) -> &'static str {
        "product_key"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let flat = self.scorer.scores(x, cx)?.logits; // [batch, (seq,) heads · query]
        let (heads, query) = (self.config.heads as i64, self.config.query as i64);
        let of_unit = |last: &[i64]| {
            let mut shape = flat.size();
            shape.pop();
            shape.extend(last);
            shape
        };
        let queries = flat.reshape(&of_unit(&[heads, query]))?;
        let (first, rows) = self.half(&queries, 0)?;
        let (second, columns) = self.half(&queries, 1)?;
        let pairs = first.unsqueeze(-1)?.add(&second.unsqueeze(-2)?)?;
        let (a, b) = (first.len_of(-1), second.len_of(-1));
        let pairs = pairs.reshape(&of_unit(&[heads, a * b]))?;
        // i · b + j of each pair, the place of a module in the bank.
        let table = self.keys[1].len_of(1);
        let start = Tensor::op("mul", &[&rows], |t| t[0].f_mul_scalar(table))?.unsqueeze(-1)?;
        let places = start.add(&columns.unsqueeze(-2)?)?.reshape(&of_unit(&[heads, a * b]))?;
        let (best, at) = pairs.topk(self.config.k as i64, -1)?;
        best.check_finite("scores of a `product_key` router")?;
        let last = of_unit(&[heads * self.config.k as i64]);
        let weight = best.softmax(-1)?.reshape(&last)?;
        let index = places.gather(-1, &at)?.reshape(&last)?;
        let routing = Routing::new(Weights::Sparse { index, weight }, bank.len());
        Ok(if heads == 1 { routing.normalised() } else { routing })
    }
}

#[cfg(test)]
mod tests {
    use super::most_even;

    #[test]
    fn tables_are_as_square_as_they_can_be() {
        let found = [1, 3, 9, 12, 16, 30].map(most_even);
        assert_eq!(found, [(1, 1), (1, 3), (3, 3), (3, 4), (4, 4), (5, 6)]);
    }
}
