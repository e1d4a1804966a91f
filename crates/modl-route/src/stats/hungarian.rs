//! The assignment with the least cost, exactly.
//!
//! Kuhn 1955 and Munkres 1957 in the form with potentials (Jonker and Volgenant 1987): rows are
//! added one after the other, each by the shortest augmenting path with respect to the reduced costs
//! c(i, j) − u(i) − v(j) ≥ 0. Time O(n² m) for n ≤ m.

use modl_core::{Error, Result};

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
        return Ok(shortest_paths(n, m, |i, j| cost[i][j]).into_iter().map(Some).collect());
    }
    let mut rows = vec![None; n];
    for (j, i) in shortest_paths(m, n, |j, i| cost[i][j]).into_iter().enumerate() {
        rows[i] = Some(j);
    }
    Ok(rows)
}

/// The column of each of `n` ≤ `m` rows. Row and column 0 of the arrays stand for "none".
fn shortest_paths(n: usize, m: usize, cost: impl Fn(usize, usize) -> f64) -> Vec<usize> {
    let (mut u, mut v) = (vec![0.0; n + 1], vec![0.0; m + 1]);
    let mut row_of = vec![0; m + 1]; // by column
    for i in 1..=n {
        let mut least = vec![f64::INFINITY; m + 1]; // the shortest path to each column
        let mut before = vec![0; m + 1]; // the column before it on that path
        let mut done = vec![false; m + 1];
        row_of[0] = i;
        let mut j = 0;
        while row_of[j] != 0 {
            done[j] = true;
            let row = row_of[j];
            let (mut delta, mut next) = (f64::INFINITY, 0);
            for k in (1..=m).filter(|k| !done[*k]) {
                let reduced = cost(row - 1, k - 1) - u[row] - v[k];
                if reduced < least[k] {
                    (least[k], before[k]) = (reduced, j);
                }
                if least[k] < delta {
                    (delta, next) = (least[k], k);
                }
            }
            for k in 0..=m {
                if done[k] {
                    u[row_of[k]] += delta;
                    v[k] -= delta;
                } else {
                    least[k] -= delta;
                }
            }
            j = next;
        }
        while j != 0 {
            row_of[j] = row_of[before[j]];
            j = before[j];
        }
    }
    let mut columns = vec![0; n];
    for (j, row) in row_of.iter().enumerate().skip(1).filter(|(_, row)| **row != 0) {
        columns[row - 1] = j - 1;
    }
    columns
}

#[cfg(test)]
mod tests {
    use modl_core::{Device, Init, Kind, Seed};

    use super::*;

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
}
