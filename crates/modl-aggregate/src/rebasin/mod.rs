//! Git Re-Basin: the hidden units of one network put into the order of another's, so that their
//! average makes sense (Ainsworth, Hayase, Srinivasa 2023, arXiv 2209.04836; survey §5.1).
//!
//! The units of a layer can be exchanged if everything that makes them and everything that reads them
//! is exchanged alike; the function stays the same. [`match_weights`] looks for the orders π under
//! which Σ ⟨θ_a, π(θ_b)⟩ over all tensors is largest: layer after layer in random order, each exactly,
//! as an assignment with the others held, until none gains. Layers that share no tensor are solved at once. [`match_activations`] takes the orders in
//! which units fire together on data.

mod permutations;

use modl_core::{Device, Error, Kind, Result, Seed, Tensor, Tensors, assignment};
use rayon::prelude::*;

use permutations::{Fitted, index, reorder};
pub use permutations::{Layer, Permutations, permuted};

/// Sweeps after which a search ends in any case.
const SWEEPS: usize = 100;
/// A gain below this share of Σ ‖θ_a‖ ‖θ_b‖ is rounding.
const GAIN: f64 = 1e-9;

/// Orders that were found.
#[derive(Debug, Clone)]
pub struct Matched {
    /// For each layer the unit of b that stands at the place of each unit of a.
    pub orders: Vec<Vec<usize>>,
    /// b with its units in these orders.
    pub model: Tensors,
    /// Σ ⟨θ_a, π(θ_b)⟩ over the tensors of the layers: at the start, and after each gain.
    pub objective: Vec<f64>,
    /// Sweeps over all layers.
    pub sweeps: usize,
}

/// Puts the units of b into the order in which its weights are most like a's. Which of several local
/// optima is found depends on the seed.
///
/// # Errors
/// Where the models do not have the layers' tensors in the same shapes.
pub fn match_weights(
    layers: &Permutations,
    a: &Tensors,
    b: &Tensors,
    seed: Seed,
) -> Result<Matched> {
    let fitted = layers.fitted(a)?;
    let float = |t: &Tensor| t.detach()?.to_kind(Kind::Float);
    let (a, moved) = (a.map(|_, t| float(t))?, b.map(|_, t| float(t))?);
    let mut names: Vec<&str> =
        fitted.iter().flat_map(|(x, _)| x.iter().map(|(n, _)| n.as_str())).collect();
    names.sort_unstable();
    names.dedup();
    let (mut value, mut scale) = (0.0, 0.0);
    for name in names {
        let (a, b) = (a.need(name)?, moved.need(name)?);
        if a.size() != b.size() {
            return Err(Error::invalid(name, format!("is {:?} and {:?}", a.size(), b.size())));
        }
        value += a.mul(b)?.sum()?.item()?;
        scale += a.norm()?.item()? * b.norm()?.item()?;
    }
    let mut orders: Vec<Vec<usize>> = fitted.iter().map(|(_, n)| (0..*n).collect()).collect();
    let (mut objective, mut sweeps) = (vec![value], 0);
    let mut search = Search::new(&fitted, a, moved);
    while sweeps < SWEEPS && search.stale.contains(&true) {
        let turns = shuffled(fitted.len(), seed.nth(sweeps as u64));
        for group in apart(turns, &search.neighbours) {
            for (k, found) in search.solve(group)? {
                if let Some((order, gain)) = search.improve(k, found, GAIN * scale)? {
                    orders[k] = order.iter().map(|j| orders[k][*j]).collect();
                    value += gain;
                    objective.push(value);
                }
            }
        }
        sweeps += 1;
        search.doubt();
    }
    let model = permuted(layers, b, &orders)?;
    Ok(Matched { orders, model, objective, sweeps })
}

/// The orders in which b's units fire most like a's: for each layer the activations of both models on
/// the same inputs, `[inputs, units]`. The correlations of matched units are largest in sum.
///
/// # Errors
/// Where activations are not of the same shape.
pub fn match_activations(a: &[Tensor], b: &[Tensor]) -> Result<Vec<Vec<usize>>> {
    if a.len() != b.len() {
        return Err(Error::invalid("activations", format!("{} and {} layers", a.len(), b.len())));
    }
    let standard = |x: &Tensor| {
        let x = x.detach()?.to_kind(Kind::Double)?;
        let x = x.sub(&x.mean_dims(&[0], true)?)?;
        // A unit that never changes is like no other.
        x.div(&x.square()?.sum_dims(&[0], true)?.sqrt()?.clamp(1e-12, f64::INFINITY)?)
    };
    let one = |(a, b): (&Tensor, &Tensor)| {
        if a.size() != b.size() || a.dim() != 2 {
            let problem = format!("are {:?} and {:?}, not [inputs, units]", a.size(), b.size());
            return Err(Error::invalid("activations", problem));
        }
        let alike = standard(a)?.t()?.matmul(&standard(b)?)?;
        Ok(assignment(&costs(&alike)?)?.into_iter().flatten().collect())
    };
    a.iter().zip(b).map(one).collect()
}

/// Where a search for orders stands.
struct Search<'a> {
    fitted: &'a [Fitted],
    a: Tensors,
    /// b in the orders of now.
    moved: Tensors,
    /// For each layer those that have a tensor of it, too.
    neighbours: Vec<Vec<usize>>,
    /// How alike the units of layers with neighbours are. It follows what the neighbours do, at a cost
    /// that goes with the units that they move.
    known: Vec<Option<Tensor>>,
    /// Layers whose neighbours have moved since they were seen last; others have nothing to gain.
    stale: Vec<bool>,
    /// Whether something that is known has followed others, and so has their rounding in it.
    followed: bool,
}

impl<'a> Search<'a> {
    fn new(fitted: &'a [Fitted], a: Tensors, moved: Tensors) -> Self {
        let neighbours = (0..fitted.len()).map(|k| neighbours(fitted, k)).collect();
        let (known, stale) = (vec![None; fitted.len()], vec![true; fitted.len()]);
        Search { fitted, a, moved, neighbours, known, stale, followed: false }
    }

    /// The best orders of stale layers, of which none has a tensor of another: side by side.
    fn solve(&mut self, group: Vec<usize>) -> Result<Vec<(usize, Found)>> {
        let mut asked = Vec::new();
        for k in group {
            if !std::mem::take(&mut self.stale[k]) {
                continue;
            }
            let (axes, units) = &self.fitted[k];
            let alike = match self.known[k].take() {
                Some(alike) => alike,
                None => likeness(axes, *units, &self.a, &self.moved)?,
            };
            asked.push((k, costs(&alike)?, alike));
        }
        let one = |(k, cost, alike): (usize, Vec<Vec<f64>>, Tensor)| {
            let order: Vec<usize> = assignment(&cost)?.into_iter().flatten().collect();
            let gains = cost.iter().zip(&order).enumerate().map(|(i, (row, j))| row[i] - row[*j]);
            let gain = gains.sum();
            Ok((k, Found { alike, order, gain }))
        };
        asked.into_par_iter().map(one).collect()
    }

    /// Puts the units of a layer into their best order, and what is gained; nothing where it is no more
    /// than `least`.
    fn improve(&mut self, k: usize, found: Found, least: f64) -> Result<Option<(Vec<usize>, f64)>> {
        let Found { alike, order, gain } = found;
        let fitted = self.fitted;
        let (axes, units) = &fitted[k];
        let alone = self.neighbours[k].is_empty();
        if gain <= least {
            self.known[k] = Some(alike).filter(|_| !alone);
            return Ok(None);
        }
        let before = self.moved.clone();
        reorder(axes, &order, &mut self.moved)?;
        if alone {
            return Ok(Some((order, gain)));
        }
        let changed: Vec<usize> = (0..*units).filter(|i| order[*i] != *i).collect();
        let changed = index(&changed, alike.device())?;
        for other in &self.neighbours[k] {
            self.stale[*other] = true;
            let Some(theirs) = self.known[*other].take() else { continue };
            let follow = Follow { axes: &fitted[*other].0, by: axes, changed: &changed };
            self.known[*other] = Some(follow.apply(theirs, &self.a, &before, &self.moved)?);
            self.followed = true;
        }
        self.known[k] = Some(alike.index_select(1, &index(&order, alike.device())?)?);
        Ok(Some((order, gain)))
    }

    /// Where no layer is stale any more, what has followed others is to be looked at anew, without
    /// rounding that has added up.
    fn doubt(&mut self) {
        if !self.followed || self.stale.contains(&true) {
            return;
        }
        self.followed = false;
        for (k, neighbours) in self.neighbours.iter().enumerate() {
            if !neighbours.is_empty() {
                (self.known[k], self.stale[k]) = (None, true);
            }
        }
    }
}

/// A layer's best order with the others held.
struct Found {
    /// How alike its units are in the order of before.
    alike: Tensor,
    order: Vec<usize>,
    gain: f64,
}

/// Layers in groups without neighbours, which have nothing to do with one another: each takes, in
/// their turn, all that fit.
fn apart(mut turns: Vec<usize>, neighbours: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut groups = Vec::new();
    while !turns.is_empty() {
        let mut group: Vec<usize> = Vec::new();
        turns.retain(|k| {
            let fits = group.iter().all(|other| !neighbours[*k].contains(other));
            if fits {
                group.push(*k);
            }
            !fits
        });
        groups.push(group);
    }
    groups
}

/// What another layer's move does to how alike a layer's units are.
struct Follow<'a> {
    /// The layer's.
    axes: &'a [(String, i64)],
    /// The other layer's.
    by: &'a [(String, i64)],
    /// The other layer's places at which units are new.
    changed: &'a Tensor,
}

impl Follow<'_> {
    fn apply(
        &self,
        alike: Tensor,
        a: &Tensors,
        before: &Tensors,
        after: &Tensors,
    ) -> Result<Tensor> {
        let mut sum = alike;
        for (name, axis) in self.axes {
            let Some((_, theirs)) = self.by.iter().find(|(n, _)| n == name) else { continue };
            let part = |of: &Tensors| of.need(name)?.index_select(*theirs, self.changed);
            let change = by_unit(&part(after)?.sub(&part(before)?)?, *axis)?;
            sum = sum.add(&by_unit(&part(a)?, *axis)?.matmul(&change.t()?)?)?;
        }
        Ok(sum)
    }
}

/// The other layers that move a tensor of layer k.
fn neighbours(fitted: &[Fitted], k: usize) -> Vec<usize> {
    let Some((own, _)) = fitted.get(k) else { return Vec::new() };
    let shared = |(name, _): &(String, i64)| own.iter().any(|(n, _)| n == name);
    let others = fitted
        .iter()
        .enumerate()
        .filter(|(other, (theirs, _))| *other != k && theirs.iter().any(shared));
    others.map(|(other, _)| other).collect()
}

/// ⟨unit i of a, unit j of b⟩ over all tensors of a layer, `[units, units]`.
fn likeness(axes: &[(String, i64)], units: usize, a: &Tensors, b: &Tensors) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (name, axis) in axes {
        let own = by_unit(a.need(name)?, *axis)?.matmul(&by_unit(b.need(name)?, *axis)?.t()?)?;
        sum = Some(sum.map_or(Ok(own.clone()), |sum| sum.add(&own))?);
    }
    let n = units as i64;
    sum.map_or_else(|| Tensor::zeros(&[n, n], Kind::Float, Device::Cpu), Ok)
}

/// A tensor with one row for each unit on an axis.
fn by_unit(t: &Tensor, axis: i64) -> Result<Tensor> {
    t.transpose(0, axis)?.reshape(&[t.len_of(axis), -1])
}

/// The rows of a matrix with the other sign: what is alike costs little.
fn costs(alike: &Tensor) -> Result<Vec<Vec<f64>>> {
    let flat = alike.neg()?.to_vec::<f64>()?;
    Ok(flat.chunks(alike.len_of(-1).max(1) as usize).map(<[f64]>::to_vec).collect())
}

/// 0 to n in an order that a seed gives.
fn shuffled(n: usize, seed: Seed) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    all.sort_by_key(|i| seed.nth(*i as u64).0);
    all
}
