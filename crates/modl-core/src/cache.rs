//! What a decoder keeps of the tokens that it has seen, so that each further token costs one token
//! and not the whole sequence.
//!
//! A pass with a cache takes the new tokens alone. Each attention site stores the keys and values
//! that it would get without modules, and sees those of all tokens; modules at the site act on the
//! whole in every pass, modules that lengthen the sequence in the first one alone
//! ([`Context::past`](crate::Context::past) is 0 there).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::{Error, Result, ResultExt, Signal, Tensor, Tensors};

/// The name of the companion under which values go with keys.
const VALUE: &str = "value";

/// Keys, values and masks of the tokens that have been seen. Clones share them, and so one cache
/// serves the passes of one sequence, one after the other.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    seen: Rc<RefCell<Seen>>,
    /// The rows of the batch that this handle is for; all where `None`.
    rows: Option<Vec<i64>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// `[batch, past]`.
    mask: Option<Tensor>,
    /// By attention site, `[batch, groups, past, head_dim]`.
    keys: BTreeMap<String, Signal>,
    /// The same with the tokens of this pass, in parts of the batch.
    fresh: BTreeMap<String, Vec<(Vec<i64>, Signal)>>,
}

impl Cache {
    /// A cache that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of tokens that it has seen, with those that modules put in and with padding.
    pub fn past(&self) -> i64 {
        self.seen.borrow().mask.as_ref().map_or(0, |m| m.len_of(1))
    }

    /// The mask `[batch, past]` of what it has seen: 1 for tokens, 0 for padding.
    pub fn mask(&self) -> Result<Option<Tensor>> {
        self.seen.borrow().mask.as_ref().map(|m| self.own(m)).transpose()
    }

    /// For a backbone: forgets what a pass that failed has left, and checks the number of rows.
    ///
    /// # Errors
    /// Where the cache is of a batch with another number of rows.
    pub fn begin(&self, rows: i64) -> Result<()> {
        let mut seen = self.seen.borrow_mut();
        seen.fresh.clear();
        match seen.mask.as_ref().map(|m| m.len_of(0)) {
            Some(n) if n != rows => {
                let problem = format!("is of {n} rows, and the batch has {rows}; start a new one");
                Err(Error::invalid("cache", problem))
            }
            _ => Ok(()),
        }
    }

    /// For a backbone: all keys and values at `site`, given those of the new tokens
    /// `[batch, groups, new, head_dim]`.
    pub fn extend(&self, site: &str, key: &Tensor, value: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut seen = self.seen.borrow_mut();
        let (key, value) = match seen.keys.get(site) {
            None => (key.clone(), value.clone()),
            Some(past) => {
                let join = |past: &Tensor, new: &Tensor| {
                    Tensor::cat(&[self.own(past)?, new.clone()], 2).at(site)
                };
                (join(&past.x, key)?, join(past.with.need(VALUE)?, value)?)
            }
        };
        let with = Tensors::new().with(VALUE, value.clone());
        let rows = self.rows.clone().unwrap_or_else(|| (0..key.len_of(0)).collect());
        let part = (rows, Signal { x: key.clone(), with });
        seen.fresh.entry(site.to_owned()).or_default().push(part);
        Ok((key, value))
    }

    /// For a backbone: ends a pass over tokens with `mask` `[batch, new]`.
    ///
    /// # Errors
    /// Where a module ran an attention site not exactly once for each row, so that it is not clear
    /// what to keep; then the cache is as it was before the pass.
    pub fn commit(&self, mask: &Tensor) -> Result<()> {
        let mut seen = self.seen.borrow_mut();
        let rows = mask.len_of(0);
        let fresh = std::mem::take(&mut seen.fresh);
        let mut keys = BTreeMap::new();
        for (site, mut parts) in fresh {
            let whole = match parts.as_slice() {
                [(one, _)] if one.iter().copied().eq(0..rows) => parts.pop().map(|(_, all)| all),
                _ => Signal::join(&parts, rows).ok(),
            };
            keys.insert(site.clone(), whole.ok_or_else(|| ambiguous(&site))?);
        }
        if let Some(site) = seen.keys.keys().find(|site| !keys.contains_key(*site)) {
            return Err(ambiguous(site));
        }
        let mask = match &seen.mask {
            None => mask.clone(),
            Some(past) => Tensor::cat(&[past.clone(), mask.clone()], 1)?,
        };
        seen.mask = Some(mask);
        seen.keys = keys;
        Ok(())
    }

    /// The same cache for some rows of the batch.
    pub(crate) fn select_rows(&self, index: &[i64]) -> Result<Cache> {
        let rows = match &self.rows {
            None => index.to_vec(),
            Some(rows) => {
                let pick = |i: &i64| rows.get(usize::try_from(*i).ok()?).copied();
                let picked: Option<Vec<i64>> = index.iter().map(pick).collect();
                picked.ok_or_else(|| Error::invalid("cache", "is of fewer rows"))?
            }
        };
        Ok(Cache { seen: self.seen.clone(), rows: Some(rows) })
    }

    fn own(&self, all: &Tensor) -> Result<Tensor> {
        match &self.rows {
            None => Ok(all.clone()),
            Some(rows) => {
                let index = Tensor::from_slice(rows, &[rows.len() as i64], all.device())?;
                all.index_select(0, &index)
            }
        }
    }
}

fn ambiguous(site: &str) -> Error {
    Error::unsupported(
        format!("a cache where modules run `{site}` not exactly once for each row"),
        "run the whole sequence without a cache",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Context, Device};

    /// Keys or values `[rows, 1, tokens, 1]`.
    fn keys(values: &[f32], rows: i64) -> Tensor {
        let tokens = values.len() as i64 / rows;
        Tensor::from_slice(values, &[rows, 1, tokens, 1], Device::Cpu).unwrap()
    }

    fn mask(rows: i64, tokens: i64) -> Tensor {
        Tensor::ones(&[rows, tokens], crate::Kind::Float, Device::Cpu).unwrap()
    }

    #[test]
    fn parts_of_the_batch_are_put_back_in_their_rows() {
        let cache = Cache::new();
        let cx = Context::eval().with_cache(cache.clone());
        cache.begin(3).unwrap();
        for (rows, values) in [(vec![2, 0], [30., 10.].as_slice()), (vec![1], &[20.])] {
            let part = cx.select_rows(&rows).unwrap();
            let k = keys(values, rows.len() as i64);
            part.cache().unwrap().extend("a", &k, &k).unwrap();
        }
        cache.commit(&mask(3, 1)).unwrap();
        assert_eq!(cx.past(), 1);
        cache.begin(3).unwrap();
        let part = cx.select_rows(&[2, 1]).unwrap().select_rows(&[1]).unwrap();
        let (k, v) = part.cache().unwrap().extend("a", &keys(&[21.], 1), &keys(&[22.], 1)).unwrap();
        assert_eq!(k.to_vec::<f32>().unwrap(), [20., 21.]);
        assert_eq!(v.to_vec::<f32>().unwrap(), [20., 22.]);
    }

    #[test]
    fn what_is_not_clear_is_refused_and_changes_nothing() {
        let cache = Cache::new();
        let once = |k: &Tensor| cache.extend("a", k, k).unwrap();
        cache.begin(1).unwrap();
        once(&keys(&[1.], 1));
        cache.commit(&mask(1, 1)).unwrap();
        cache.begin(1).unwrap();
        once(&keys(&[2.], 1));
        once(&keys(&[3.], 1));
        let e = cache.commit(&mask(1, 1)).unwrap_err().to_string();
        assert!(e.contains("run `a` not exactly once"), "{e}");
        assert!(cache.commit(&mask(1, 1)).is_err(), "the site was not run");
        assert_eq!(cache.past(), 1);
        let (k, _) = once(&keys(&[4.], 1));
        assert_eq!(k.to_vec::<f32>().unwrap(), [1., 4.]);
        assert!(cache.begin(2).is_err());
    }
}
