//! α: which modules are active for what, and with which weights.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{Device, Error, Kind, Result, Tensor, Tensors};

/// What gets an α of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// One α for the whole batch.
    Static,
    /// One α for each row.
    #[default]
    Example,
    /// One α for each token.
    Token,
}

/// The scores α over `m` modules in one of five forms.
#[derive(Debug, Clone)]
pub enum Weights {
    /// The same modules with the same weights for all: `[(module, weight)]`.
    Fixed(Vec<(usize, f64)>),
    /// For each row of the batch its modules and weights; a row with none is left to f_θ.
    Rows(Vec<Vec<(usize, f64)>>),
    /// All modules: `[m]`, `[batch, m]` or `[batch, seq, m]`, through which gradients flow.
    Dense(Tensor),
    /// Up to `k` modules each: indices (i64) and weights, `[batch, k]` or `[batch, seq, k]`.
    Sparse {
        /// Which modules; −1 stands for none, as where a full module has dropped a token.
        index: Tensor,
        /// With which weights; gradients flow through them.
        weight: Tensor,
    },
    /// Modules see mixtures of a row's tokens (Soft MoE): module j computes hⱼ(x̃ⱼ) with its slots
    /// x̃ⱼ = dispatchⱼᵀ x, and y = Σⱼ combineⱼ hⱼ(x̃ⱼ). Both are `[batch, seq, m, slots]`, and
    /// gradients flow through both.
    Slots {
        /// How much of each token goes into each slot.
        dispatch: Tensor,
        /// How much of each slot's output each token gets: its sum over the slots is α.
        combine: Tensor,
    },
}

/// How the names of notes begin that are choices of one module for each row, `[batch]` or `[batch, 1]`
/// i64, which a trainer may keep by example. In a later step the router finds what was kept in a
/// feature of the same name, −1 where there is none.
pub const ASSIGNED: &str = "assigned:";

/// What a router decided.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Routing {
    /// α.
    pub weights: Weights,
    /// The number of modules that the router chose from.
    pub modules: usize,
    /// Whether each α sums to 1, which saves the base function where it would be weighted by 0.
    pub normalised: bool,
    /// Auxiliary losses by name (balance, z-loss), which the trainer weighs and adds.
    pub losses: Vec<(String, Tensor)>,
    /// What the router wants to have at hand when it hears what became of its choice
    /// ([`crate::Router::credit`]), and what others may look at: the logarithm of the probability
    /// of what was chosen, the scores.
    pub noted: Tensors,
    /// α of parts of the modules, for aggregators that weigh part by part, as multi-head routing
    /// does: `[heads, m]` for all rows or `[batch, heads, m]`. `weights` is then their mean.
    pub heads: Option<Tensor>,
    /// Whether it was decided at an earlier site, by one router for several: then its losses were
    /// counted there, and what it noted is not to be counted again.
    pub repeated: bool,
}

impl Routing {
    /// α without auxiliary losses. `Fixed` and `Rows` are looked at to see whether they sum to 1.
    pub fn new(weights: Weights, modules: usize) -> Self {
        let one =
            |row: &[(usize, f64)]| (row.iter().map(|(_, w)| w).sum::<f64>() - 1.0).abs() < 1e-12;
        let normalised = match &weights {
            Weights::Fixed(all) => one(all),
            Weights::Rows(rows) => rows.iter().all(|r| one(r)),
            Weights::Dense(_) | Weights::Sparse { .. } | Weights::Slots { .. } => false,
        };
        let (losses, noted) = (Vec::new(), Tensors::new());
        Routing { weights, modules, normalised, losses, noted, heads: None, repeated: false }
    }

    /// Declares that each α sums to 1.
    pub fn normalised(self) -> Self {
        Routing { normalised: true, ..self }
    }

    /// Adds an auxiliary loss, `[]`.
    pub fn with_loss(mut self, name: impl Into<String>, loss: Tensor) -> Self {
        self.losses.push((name.into(), loss));
        self
    }

    /// Notes a tensor under a name.
    pub fn note(mut self, name: impl Into<String>, t: Tensor) -> Self {
        self.noted.set(name.into(), t);
        self
    }

    /// Adds an α of parts of the modules, `[heads, m]` or `[batch, heads, m]`.
    pub fn with_heads(self, heads: Tensor) -> Self {
        Routing { heads: Some(heads), ..self }
    }

    /// The same at a later site: its losses were counted at the first, its notes hold here, too.
    pub(crate) fn repeated(&self) -> Self {
        Routing { losses: Vec::new(), repeated: true, ..self.clone() }
    }

    /// The same α for the modules of a part of the batch or of the sites: losses and notes stay with
    /// the whole.
    pub(crate) fn with_weights(&self, weights: Weights) -> Self {
        Routing {
            weights,
            modules: self.modules,
            normalised: self.normalised,
            losses: Vec::new(),
            noted: Tensors::new(),
            heads: self.heads.clone(),
            repeated: self.repeated,
        }
    }

    /// α of row `row` alone, for all rows that share it.
    pub(crate) fn with_row(&self, weights: Weights, row: i64) -> Result<Self> {
        let heads = match &self.heads {
            Some(h) if h.dim() == 3 => Some(h.select(0, row)?),
            all => all.clone(),
        };
        Ok(Routing { heads, ..self.with_weights(weights) })
    }

    /// What has an α of its own.
    pub fn level(&self) -> Level {
        match &self.weights {
            Weights::Fixed(_) => Level::Static,
            Weights::Rows(_) => Level::Example,
            Weights::Dense(w) => match w.dim() {
                1 => Level::Static,
                2 => Level::Example,
                _ => Level::Token,
            },
            Weights::Sparse { index, .. } if index.dim() == 2 => Level::Example,
            Weights::Sparse { .. } | Weights::Slots { .. } => Level::Token,
        }
    }

    /// α as a dense tensor `[m]`, `[batch, m]` or `[batch, seq, m]`.
    pub fn dense(&self, kind: Kind, device: Device) -> Result<Tensor> {
        let m = self.modules as i64;
        let spread = |rows: &[Vec<(usize, f64)>]| {
            let mut flat = vec![0f64; rows.len() * self.modules];
            for (r, row) in rows.iter().enumerate() {
                for (j, w) in row {
                    if let Some(slot) = flat.get_mut(r * self.modules + j) {
                        *slot += w;
                    }
                }
            }
            Tensor::from_slice(&flat, &[rows.len() as i64, m], Device::Cpu)?
                .to_kind(kind)?
                .to_device(device)
        };
        match &self.weights {
            Weights::Fixed(all) => spread(std::slice::from_ref(all))?.select(0, 0),
            Weights::Rows(rows) => spread(rows),
            Weights::Dense(w) => w.to_kind(kind)?.to_device(device),
            Weights::Sparse { index, weight } => {
                let mut shape = index.size();
                if let Some(last) = shape.last_mut() {
                    *last = m;
                }
                let first = Tensor::zeros(&[1], Kind::Int64, index.device())?;
                let none = index.lt_scalar(0.0)?;
                let weight = weight.to_kind(kind)?.masked_fill(&none, 0.0)?;
                Tensor::zeros(&shape, kind, index.device())?
                    .scatter_add(-1, &index.maximum(&first)?, &weight)?
                    .to_device(device)
            }
            Weights::Slots { combine, .. } => {
                combine.sum_dims(&[-1], false)?.to_kind(kind)?.to_device(device)
            }
        }
    }

    /// K: the modules that are active for anything, in order. Reads the indices of `Sparse`.
    pub fn support(&self) -> Result<Vec<usize>> {
        let set: BTreeSet<usize> = match &self.weights {
            Weights::Fixed(all) => active(all).collect(),
            Weights::Rows(rows) => rows.iter().flat_map(|r| active(r)).collect(),
            Weights::Dense(_) | Weights::Slots { .. } => (0..self.modules).collect(),
            Weights::Sparse { index, .. } => {
                index.to_vec::<i64>()?.into_iter().flat_map(usize::try_from).collect()
            }
        };
        Ok(set.into_iter().collect())
    }

    /// α of some rows of the batch only. Losses and notes stay with the whole.
    pub fn select_rows(&self, rows: &[i64]) -> Result<Routing> {
        let at = |t: &Tensor| {
            t.index_select(0, &Tensor::from_slice(rows, &[rows.len() as i64], t.device())?)
        };
        let weights = match &self.weights {
            Weights::Fixed(all) => Weights::Fixed(all.clone()),
            Weights::Rows(all) => Weights::Rows(
                rows.iter().filter_map(|r| all.get(usize::try_from(*r).ok()?).cloned()).collect(),
            ),
            Weights::Dense(w) if w.dim() == 1 => Weights::Dense(w.clone()),
            Weights::Dense(w) => Weights::Dense(at(w)?),
            Weights::Sparse { index, weight } => {
                Weights::Sparse { index: at(index)?, weight: at(weight)? }
            }
            Weights::Slots { dispatch, combine } => {
                Weights::Slots { dispatch: at(dispatch)?, combine: at(combine)? }
            }
        };
        let heads = match &self.heads {
            Some(h) if h.dim() == 3 => Some(at(h)?),
            all => all.clone(),
        };
        Ok(Routing { heads, ..self.with_weights(weights) })
    }

    /// Checks that α fits a bank of `modules` modules and a batch of `rows` rows.
    ///
    /// # Errors
    /// Where indices are out of range or shapes do not fit.
    pub fn check(&self, modules: usize, rows: i64) -> Result<()> {
        let wrong = |problem: String| Err(Error::invalid("routing", problem));
        if self.modules != modules {
            return wrong(format!("α is over {} modules, the bank holds {modules}", self.modules));
        }
        if let Some(heads) = &self.heads {
            let of_rows = heads.dim() == 3 && heads.len_of(0) == rows;
            if heads.len_of(-1) != modules as i64 || !(heads.dim() == 2 || of_rows) {
                return wrong(format!("heads are {heads:?} for {rows} rows, {modules} modules"));
            }
        }
        let in_range = |row: &[(usize, f64)]| row.iter().all(|(j, _)| *j < modules);
        match &self.weights {
            Weights::Fixed(all) if !in_range(all) => {
                wrong(format!("α names a module beyond {modules}"))
            }
            Weights::Rows(all) if all.len() as i64 != rows => {
                wrong(format!("α has {} rows, the batch has {rows}", all.len()))
            }
            Weights::Rows(all) if !all.iter().all(|r| in_range(r)) => {
                wrong(format!("α names a module beyond {modules}"))
            }
            Weights::Dense(w) if w.len_of(-1) != modules as i64 => {
                wrong(format!("α is {w:?}, its last dimension is to be {modules}"))
            }
            Weights::Dense(w) if w.dim() > 1 && w.len_of(0) != rows => {
                wrong(format!("α is {w:?}, the batch has {rows} rows"))
            }
            Weights::Sparse { index, weight } if index.size() != weight.size() => {
                wrong(format!("indices are {index:?}, weights {weight:?}"))
            }
            Weights::Sparse { index, .. } if index.len_of(0) != rows => {
                wrong(format!("α is {index:?}, the batch has {rows} rows"))
            }
            Weights::Slots { dispatch, combine } => match dispatch.size().as_slice() {
                &[batch, _, m, _] if m == modules as i64 && batch == rows => {
                    if combine.size() == dispatch.size() {
                        return Ok(());
                    }
                    wrong(format!("slots are filled by {dispatch:?} and read by {combine:?}"))
                }
                _ => wrong(format!("slots are {dispatch:?} for {rows} rows, {modules} modules")),
            },
            _ => Ok(()),
        }
    }

    /// Mean α of each module over all rows or tokens, `[m]` in f64: the survey's importance. With
    /// hard choices of weight 1 it is the load.
    pub fn importance(&self) -> Result<Vec<f64>> {
        let flat =
            self.dense(Kind::Double, Device::Cpu)?.detach()?.reshape(&[-1, self.modules as i64])?;
        flat.mean_dims(&[0], false)?.to_vec::<f64>()
    }
}

fn active(row: &[(usize, f64)]) -> impl Iterator<Item = usize> + '_ {
    row.iter().filter(|(_, w)| *w != 0.0).map(|(j, _)| *j)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(v: &[f64], shape: &[i64]) -> Tensor {
        Tensor::from_slice(v, shape, Device::Cpu).unwrap()
    }

    #[test]
    fn all_forms_say_the_same() {
        let rows = Routing::new(Weights::Rows(vec![vec![(2, 1.0)], vec![(0, 0.25), (1, 0.75)]]), 3);
        let index = Tensor::from_slice(&[2i64, 0, 0, 1], &[2, 2], Device::Cpu).unwrap();
        let sparse = Weights::Sparse { index, weight: t(&[1.0, 0.0, 0.25, 0.75], &[2, 2]) };
        let expected = [0.0, 0.0, 1.0, 0.25, 0.75, 0.0];
        for routing in
            [rows, Routing::new(sparse, 3), Routing::new(Weights::Dense(t(&expected, &[2, 3])), 3)]
        {
            let dense = routing.dense(Kind::Double, Device::Cpu).unwrap();
            assert_eq!(dense.to_vec::<f64>().unwrap(), expected);
            assert_eq!(routing.importance().unwrap(), [0.125, 0.375, 0.5]);
            assert_eq!(routing.support().unwrap(), [0, 1, 2]);
            let last = routing.select_rows(&[1]).unwrap().dense(Kind::Double, Device::Cpu).unwrap();
            assert_eq!(last.to_vec::<f64>().unwrap(), expected[3..]);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Routing::new(Weights::Fixed(vec![(3, 1.0)]), 3).check(3, 2).is_err());
        assert!(Routing::new(Weights::Fixed(vec![(0, 1.0)]), 3).check(2, 2).is_err());
        assert!(Routing::new(Weights::Rows(vec![vec![]]), 3).check(3, 2).is_err());
        assert!(Routing::new(Weights::Dense(t(&[0.5, 0.5], &[1, 2])), 2).check(2, 3).is_err());
    }
}
