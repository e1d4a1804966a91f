//! Balanced assignment: each of n tokens to one of m modules, so that Σₜ A[t, e(t)] is as large as it
//! can be while no module gets more than ⌈n ⁄ m⌉ tokens, nor fewer than ⌊n ⁄ m⌋.
//!
//! The result is an optimum, not an approximation. In two parts:
//!
//! 1. Prices λ by steps against loads that are too large or too small; e(t) = argmaxₑ A[t, e] − λₑ is
//!    the best assignment for the loads that it has, whatever the prices are.
//! 2. Successive shortest paths (Ahuja, Magnanti, Orlin 1993, *Network Flows*, §9.7) over a graph
//!    whose nodes are the modules. An arc from a to b costs what is lost by the token of a that minds
//!    least, min {A[t, a] − A[t, b] : e(t) = a}. Along a shortest path from modules with too many
//!    tokens to one with too few each module hands one token on, and the assignment stays the best
//!    one for its loads. λ are the potentials that keep all costs at 0 or above.
//!
//! Good prices leave few paths: p paths of length l take O(n·m + p·(m² + l·m·ln n)). Where m does not
//! divide n, n mod m modules have a place more, and which ones is part of the optimum: a further node
//! stands for handing a place on at no cost.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use modl_core::{Error, Result};

/// The module of each token; `affinity` is `[tokens, modules]` row by row. The same affinities give
/// the same result, also where there are several optima.
///
/// # Errors
/// Where an affinity is NaN or infinite, or the rows are not all `modules` long.
pub fn balanced_assignment(affinity: &[f64], modules: usize) -> Result<Vec<usize>> {
    if affinity.is_empty() {
        return Ok(Vec::new());
    }
    if !affinity.len().is_multiple_of(modules) {
        let problem = format!("are {}, which is no multiple of {modules} modules", affinity.len());
        return Err(Error::invalid("affinities", problem));
    }
    if !affinity.iter().all(|a| a.is_finite()) {
        return Err(Error::invalid("affinities", "are not all finite numbers"));
    }
    let mut transport = Transport::new(affinity, modules, prices(affinity, modules));
    while transport.improve() {}
    Ok(transport.owner)
}

/// Prices under which loads are about even.
fn prices(affinity: &[f64], modules: usize) -> Vec<f64> {
    let tokens = affinity.len() / modules;
    let most = tokens.div_ceil(modules);
    // Under these each module has as many tokens that would pay its price as it has places.
    let mut column = vec![0.0; tokens];
    let quantile = |e: usize| {
        for (c, a) in column.iter_mut().zip(affinity.iter().skip(e).step_by(modules)) {
            *c = *a;
        }
        *column.select_nth_unstable_by(most - 1, |a, b| b.total_cmp(a)).1
    };
    let mut prices: Vec<f64> = (0..modules).map(quantile).collect();
    let mut best = (usize::MAX, prices.clone(), Vec::new());
    let (mut step, mut failures) = (0.5 * spread(affinity, &prices), 0);
    for _ in 0..16 {
        let mut load = vec![0usize; modules];
        for row in affinity.chunks_exact(modules) {
            let e = dearest(row, &prices, &load);
            load[e] += 1;
        }
        let excess: usize = load.iter().map(|n| n.saturating_sub(most)).sum();
        if excess < best.0 {
            (best, failures, step) = ((excess, prices.clone(), load), 0, 1.25 * step);
        } else {
            (failures, step) = (failures + 1, 0.4 * step);
        }
        // A path for one token of 64 costs less than a further round.
        if excess * 64 < tokens || failures == 3 {
            break;
        }
        for ((price, before), n) in prices.iter_mut().zip(&best.1).zip(&best.2) {
            // A module without tokens counts a third of one.
            let demand = (*n as f64).max(1.0 / 3.0) * modules as f64 / tokens as f64;
            *price = before + step * demand.ln();
        }
    }
    best.1
}

/// How far the net affinities of a token are apart: the root of their mean variance.
fn spread(affinity: &[f64], prices: &[f64]) -> f64 {
    let variance = |row: &[f64]| {
        let net = || row.iter().zip(prices).map(|(a, p)| a - p);
        let mean = net().sum::<f64>() / prices.len() as f64;
        net().map(|v| (v - mean).powi(2)).sum::<f64>()
    };
    let sum: f64 = affinity.chunks_exact(prices.len()).map(variance).sum();
    (sum / affinity.len() as f64).sqrt()
}

/// argmaxₑ row[e] − prices[e], of equal ones the one with the smallest load.
fn dearest(row: &[f64], prices: &[f64], load: &[usize]) -> usize {
    let net = || row.iter().zip(prices).map(|(a, p)| a - p);
    let most = net().fold(f64::NEG_INFINITY, |m, v| if v > m { v } else { m });
    let equal = net().zip(load).enumerate().filter(|(_, (v, _))| *v == most);
    equal.min_by_key(|(_, (_, n))| **n).map_or(0, |(e, _)| e)
}

/// A token that could leave a module, and what is lost by it. The largest loses least; of equal ones
/// it is the one that comes first.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Move {
    loss: f64,
    token: usize,
}

impl Eq for Move {}

impl Ord for Move {
    fn cmp(&self, other: &Self) -> Ordering {
        other.loss.total_cmp(&self.loss).then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Move {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// An assignment that is the best one for its loads, on the way to even loads.
struct Transport<'a> {
    affinity: &'a [f64],
    modules: usize,
    /// The module of each token.
    owner: Vec<usize>,
    load: Vec<usize>,
    /// What the load of each module is to be.
    places: Vec<usize>,
    /// ⌊n ⁄ m⌋.
    fewest: usize,
    /// For each pair of modules the move from the first to the second that loses least, if any.
    cheapest: Vec<Option<Move>>,
    /// Where a pair's cheapest move was taken once, all its moves, and some that are none any more.
    moves: Vec<BinaryHeap<Move>>,
    /// λ of each module and, last, of the node that hands places on.
    potential: Vec<f64>,
}

impl<'a> Transport<'a> {
    fn new(affinity: &'a [f64], modules: usize, mut prices: Vec<f64>) -> Self {
        let tokens = affinity.len() / modules;
        let mut load = vec![0; modules];
        let mut owner = Vec::with_capacity(tokens);
        let mut cheapest: Vec<Option<Move>> = vec![None; modules * modules];
        for (token, row) in affinity.chunks_exact(modules).enumerate() {
            let a = dearest(row, &prices, &load);
            load[a] += 1;
            owner.push(a);
            for (best, other) in cheapest[a * modules..].iter_mut().zip(row) {
                let loss = row[a] - other;
                if best.is_none_or(|b| loss < b.loss) {
                    *best = Some(Move { loss, token });
                }
            }
        }
        // The places that are left over go to the dearest modules, so that handing them on is not
        // worth while under these prices.
        let (fewest, more) = (tokens / modules, tokens % modules);
        let mut order: Vec<usize> = (0..modules).collect();
        order.sort_by(|a, b| prices[*b].total_cmp(&prices[*a]));
        let mut places = vec![fewest; modules];
        order.iter().take(more).for_each(|e| places[*e] += 1);
        prices.push(prices[order[more.saturating_sub(1)]]);
        let moves = vec![BinaryHeap::new(); modules * modules];
        Transport {
            affinity,
            modules,
            owner,
            load,
            places,
            fewest,
            cheapest,
            moves,
            potential: prices,
        }
    }

    /// What it costs to go from node a to node b under the potentials: 0 or above.
    fn cost(&self, a: usize, b: usize) -> f64 {
        let loss = match (a < self.modules, b < self.modules) {
            (true, true) => self.cheapest[a * self.modules + b].map(|m| m.loss),
            (true, false) => (self.places[a] == self.fewest).then_some(0.0), // a takes a place
            (false, true) => (self.places[b] > self.fewest).then_some(0.0),  // b gives it
            (false, false) => None,
        };
        // Below 0 by rounding alone.
        loss.map_or(f64::INFINITY, |l| (l + self.potential[b] - self.potential[a]).max(0.0))
    }

    /// Moves tokens along a shortest path (Dijkstra 1959); false where all loads are right.
    fn improve(&mut self) -> bool {
        let nodes = self.modules + 1;
        let mut before: Vec<Option<usize>> = vec![None; nodes];
        let mut done = vec![false; nodes];
        let full = |e: usize| e < self.modules && self.load[e] > self.places[e];
        let mut distance: Vec<f64> =
            (0..nodes).map(|e| if full(e) { 0.0 } else { f64::INFINITY }).collect();
        let end = loop {
            let open = (0..nodes).filter(|v| !done[*v] && distance[*v] < f64::INFINITY);
            let nearest = open.min_by(|a, b| distance[*a].total_cmp(&distance[*b]));
            let Some(a) = nearest else { return false };
            if a < self.modules && self.load[a] < self.places[a] {
                break a;
            }
            done[a] = true;
            for b in 0..nodes {
                let there = if done[b] { f64::INFINITY } else { distance[a] + self.cost(a, b) };
                if there < distance[b] {
                    (distance[b], before[b]) = (there, Some(a));
                }
            }
        };
        for (p, d) in self.potential.iter_mut().zip(&distance) {
            *p -= d.min(distance[end]);
        }
        let mut b = end;
        while let Some(a) = before[b] {
            self.hand_on(a, b);
            b = a;
        }
        true
    }

    /// One token, or one place, goes from a to b.
    fn hand_on(&mut self, a: usize, b: usize) {
        let m = self.modules;
        if b == m {
            self.places[a] += 1;
            return;
        }
        if a == m {
            self.places[b] -= 1;
            return;
        }
        let Some(Move { token, .. }) = self.cheapest[a * m + b] else { return };
        let row = &self.affinity[token * m..][..m];
        self.owner[token] = b;
        self.load[a] -= 1;
        self.load[b] += 1;
        for c in 0..m {
            let (here, there) = (a * m + c, b * m + c);
            let own = Move { loss: row[b] - row[c], token };
            if self.cheapest[there].is_none_or(|other| own > other) {
                self.cheapest[there] = Some(own);
            }
            // An empty heap was not needed so far; a used one has at least what was taken last.
            if !self.moves[there].is_empty() {
                self.moves[there].push(own);
            }
            if self.cheapest[here].is_some_and(|best| best.token == token) {
                self.cheapest[here] = self.next(a, c);
            }
        }
    }

    /// The cheapest move from a to c once the one before is taken.
    fn next(&mut self, a: usize, c: usize) -> Option<Move> {
        let (m, owner, affinity) = (self.modules, &self.owner, self.affinity);
        let heap = &mut self.moves[a * m + c];
        if heap.is_empty() {
            let own = owner.iter().enumerate().filter(|(_, e)| **e == a);
            *heap = own
                .map(|(token, _)| {
                    let row = &affinity[token * m..][..m];
                    Move { loss: row[a] - row[c], token }
                })
                .collect();
        }
        while heap.peek().is_some_and(|best| owner[best.token] != a) {
            heap.pop();
        }
        heap.peek().copied()
    }
}
