//! The assignment with the least cost, exactly.
//!
//! Jonker and Volgenant 1987: prices of columns under which many rows have a cheapest column of their
//! own already (where there are as many rows as columns), then one shortest augmenting path for each
//! row that is left, with respect to the reduced costs c(i, j) − v(j). Time O(n² m) for n ≤ m.

use crate::{Error, Result};

/// No row or no column.
const NONE: usize = usize::MAX;

/// For each row of `cost` its column, so that the sum of the costs is least and no column is taken
/// twice. Where there are more rows than columns, rows that are left over have `None`.
///
/// # Errors
/// Where rows are of different lengths, or a cost is not a finite number.
pub fn assignment(cost: &[Vec<f64>]) -> Result<Vec<Option<usize>>> {
    let (n, m) = (cost.len(), cost.first().map_or(0, Vec::len));
    if cost.iter().any(|row| row.len() != m) {
        return Err(Error::invalid("costs", "rows are of different lengths"));
    }
    if cost.iter().flatten().any(|c| !c.is_finite()) {
        return Err(Error::invalid("costs", "are to be finite numbers"));
    }
    if n <= m {
        return Ok(columns(cost, m).into_iter().map(Some).collect());
    }
    let turned: Vec<Vec<f64>> = (0..m).map(|j| cost.iter().map(|row| row[j]).collect()).collect();
    let mut rows = vec![None; n];
    for (j, i) in columns(&turned, n).into_iter().enumerate() {
        rows[i] = Some(j);
    }
    Ok(rows)
}

/// The column of each row, of which there are no more than the `m` columns.
fn columns(cost: &[Vec<f64>], m: usize) -> Vec<usize> {
    let n = cost.len();
    let mut found =
        Matching { cost, price: vec![0.0; m], column: vec![NONE; n], row: vec![NONE; m] };
    // With columns to spare, prices have to start from 0.
    let mut free: Vec<usize> = (0..n).collect();
    if n == m && n > 1 {
        found.reduce_columns();
        free = found.free_rows();
        for _ in 0..2 {
            free = found.reduce_rows(free);
        }
    }
    let mut path = Path { length: vec![0.0; m], before: vec![0; m], order: (0..m).collect() };
    for i in free {
        found.augment(i, &mut path);
    }
    found.column
}

/// A matching of some rows, with prices under which each matched row has its cheapest column.
struct Matching<'a> {
    cost: &'a [Vec<f64>],
    price: Vec<f64>,
    column: Vec<usize>,
    row: Vec<usize>,
}

/// What the search for a path keeps for each column.
struct Path {
    length: Vec<f64>,
    /// The row from which the path comes to the column.
    before: Vec<usize>,
    /// Columns: those that are done, those at the least length, the others.
    order: Vec<usize>,
}

impl Matching<'_> {
    /// Each column's price becomes its least cost; the row of it takes the column where it has none.
    /// What a row with one column could pay more goes to that column's price.
    fn reduce_columns(&mut self) {
        let mut cheapest = vec![0; self.row.len()];
        self.price.clone_from(&self.cost[0]);
        for (i, row) in self.cost.iter().enumerate().skip(1) {
            for ((price, who), c) in self.price.iter_mut().zip(&mut cheapest).zip(row) {
                if c < price {
                    (*price, *who) = (*c, i);
                }
            }
        }
        let mut wanted = vec![0; self.cost.len()];
        for j in (0..self.row.len()).rev() {
            let i = cheapest[j];
            wanted[i] += 1;
            if wanted[i] == 1 {
                (self.column[i], self.row[j]) = (j, i);
            }
        }
        for i in (0..self.cost.len()).filter(|i| wanted[*i] == 1) {
            let own = self.column[i];
            let reduced = self.cost[i].iter().zip(&self.price).map(|(c, v)| c - v).enumerate();
            let second = reduced
                .filter(|(j, _)| *j != own)
                .fold(f64::INFINITY, |least, (_, c)| least.min(c));
            self.price[own] -= second;
        }
    }

    fn free_rows(&self) -> Vec<usize> {
        (0..self.column.len()).filter(|i| self.column[*i] == NONE).collect()
    }

    /// Lets each free row take its cheapest column and pay what the second cheapest would cost more;
    /// the row that had it is free. Which rows are left.
    fn reduce_rows(&mut self, mut free: Vec<usize>) -> Vec<usize> {
        let (mut left, mut next) = (Vec::new(), 0);
        // Prices that fall by less than rounding could go on for long.
        let mut patience = 4 * self.row.len();
        while let Some(&i) = free.get(next) {
            next += 1;
            let [(mut j, least), (other, second)] = self.two_cheapest(i);
            let mut displaced = self.row[j];
            let lower = least < second;
            if lower {
                self.price[j] -= second - least;
            } else if displaced != NONE {
                j = other;
                displaced = self.row[j];
            }
            (self.column[i], self.row[j]) = (j, i);
            if displaced != NONE {
                self.column[displaced] = NONE;
                if lower && patience > 0 {
                    patience -= 1;
                    next -= 1;
                    free[next] = displaced;
                } else {
                    left.push(displaced);
                }
            }
        }
        left
    }

    /// The two columns of the least reduced costs in a row.
    fn two_cheapest(&self, i: usize) -> [(usize, f64); 2] {
        let mut two = [(0, f64::INFINITY), (0, f64::INFINITY)];
        for (j, (c, v)) in self.cost[i].iter().zip(&self.price).enumerate() {
            let reduced = c - v;
            if reduced < two[1].1 {
                two[1] = (j, reduced);
                if reduced < two[0].1 {
                    two.swap(0, 1);
                }
            }
        }
        two
    }

    /// Gives a free row a column by the shortest path over columns that others have.
    fn augment(&mut self, free: usize, path: &mut Path) {
        let Path { length, before, order } = path;
        for ((d, c), v) in length.iter_mut().zip(&self.cost[free]).zip(&self.price) {
            *d = c - v;
        }
        before.fill(free);
        let (mut done, mut reached) = (0, 0);
        let mut least = 0.0;
        let end = loop {
            if done == reached {
                // The columns that are nearest now come next.
                least = f64::INFINITY;
                for k in done..order.len() {
                    let d = length[order[k]];
                    if d <= least {
                        if d < least {
                            (least, reached) = (d, done);
                        }
                        order.swap(k, reached);
                        reached += 1;
                    }
                }
                if let Some(j) = order[done..reached].iter().find(|j| self.row[**j] == NONE) {
                    break *j;
                }
            }
            let j = order[done];
            done += 1;
            let i = self.row[j];
            let row = &self.cost[i];
            let offset = row[j] - self.price[j] - least;
            let mut found = NONE;
            let farther = reached;
            for k in farther..order.len() {
                let j = order[k];
                let d = row[j] - self.price[j] - offset;
                if d < length[j] {
                    (length[j], before[j]) = (d, i);
                    if d <= least {
                        if self.row[j] == NONE {
                            found = j;
                            break;
                        }
                        order.swap(k, reached);
                        reached += 1;
                    }
                }
            }
            if found != NONE {
                break found;
            }
        };
        for j in &order[..done] {
            self.price[*j] += length[*j] - least;
        }
        let mut j = end;
        loop {
            let i = before[j];
            self.row[j] = i;
            let last = i == free;
            std::mem::swap(&mut self.column[i], &mut j);
            if last {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Init, Kind, Seed};

    /// The least cost over all injective choices, tried one by one; rows may go without a column
    /// only where there are more of them.
    fn brute_force(cost: &[Vec<f64>], i: usize, taken: &mut Vec<bool>, spare: usize) -> f64 {
        let Some(row) = cost.get(i) else { return 0.0 };
        let mut best = f64::INFINITY;
        for j in 0..row.len() {
            if !taken[j] {
                taken[j] = true;
                best = best.min(row[j] + brute_force(cost, i + 1, taken, spare));
                taken[j] = false;
            }
        }
        if spare > 0 {
            best = best.min(brute_force(cost, i + 1, taken, spare - 1));
        }
        best
    }

    #[test]
    fn it_costs_as_little_as_the_best_of_all_permutations() {
        for (case, (n, m)) in
            [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (3, 6), (6, 3), (1, 5), (5, 1)]
                .into_iter()
                .enumerate()
        {
            for round in 0..20 {
                let seed = Seed(case as u64).nth(round);
                let flat = Init::Normal(1.0).tensor(&[n * m], seed, Kind::Double, Device::Cpu);
                // Rounded, so that many costs are equal.
                let flat: Vec<f64> =
                    flat.unwrap().to_vec::<f64>().unwrap().iter().map(|c| c.round()).collect();
                let cost: Vec<Vec<f64>> = flat.chunks(m as usize).map(<[f64]>::to_vec).collect();
                let found = assignment(&cost).unwrap();
                let mut columns: Vec<usize> = found.iter().flatten().copied().collect();
                columns.sort_unstable();
                columns.dedup();
                assert_eq!(columns.len() as i64, n.min(m), "{cost:?}: {found:?}");
                let own: f64 =
                    found.iter().zip(&cost).filter_map(|(j, row)| j.map(|j| row[j])).sum();
                let spare = (n - m).max(0) as usize;
                let best = brute_force(&cost, 0, &mut vec![false; m as usize], spare);
                assert!((own - best).abs() < 1e-9, "{cost:?}: {own} for {best}");
            }
        }
    }

    #[test]
    fn what_is_no_table_of_numbers_is_refused() {
        assert!(assignment(&[vec![1.0], vec![]]).is_err());
        assert!(assignment(&[vec![f64::NAN]]).is_err());
        assert_eq!(assignment(&[]).unwrap(), vec![]);
        assert_eq!(assignment(&[vec![], vec![]]).unwrap(), vec![None, None]);
    }

    /// Prices that certify the optimum: duality, without a second solver.
    #[test]
    fn a_large_one_is_as_good_as_its_prices_say() {
        for (case, levels) in [(0, 0.0), (1, 4.0)] {
            let n = 200;
            let seed = Seed(77).nth(case);
            let flat = Init::Normal(1.0).tensor(&[n * n], seed, Kind::Double, Device::Cpu);
            let flat: Vec<f64> = flat.unwrap().to_vec::<f64>().unwrap();
            let round = |c: &f64| if levels > 0.0 { (c * levels).round() } else { *c };
            let cost: Vec<Vec<f64>> =
                flat.chunks(n as usize).map(|r| r.iter().map(round).collect()).collect();
            let found: Vec<usize> = assignment(&cost).unwrap().into_iter().flatten().collect();
            // Σ over rows of min (c − v), plus Σ v, is a bound from below for any prices v: those of
            // Bellman and Ford over the exchange of columns are taken here.
            let n = n as usize;
            let mut v = vec![0.0f64; n];
            for _ in 0..n {
                let mut changed = false;
                for (i, row) in cost.iter().enumerate() {
                    let own = found[i];
                    for j in 0..n {
                        // The row would rather have j: its own column has to be worth more.
                        let least = row[own] - row[j] + v[j];
                        if v[own] < least - 1e-12 {
                            v[own] = least;
                            changed = true;
                        }
                    }
                }
                if !changed {
                    break;
                }
            }
            let own: f64 = found.iter().zip(&cost).map(|(j, row)| row[*j]).sum();
            let least = |row: &Vec<f64>| {
                row.iter().zip(&v).map(|(c, v)| c - v).fold(f64::INFINITY, f64::min)
            };
            let bound = cost.iter().map(least).sum::<f64>() + v.iter().sum::<f64>();
            assert!((own - bound).abs() < 1e-7, "{own} is more than {bound}");
        }
    }
}
