//! Entropies and mutual information, in nats.

/// −Σ q ln q with q = |w| ⁄ Σ|w|; 0 where all are 0.
pub fn entropy(weights: &[f64]) -> f64 {
    let total: f64 = weights.iter().map(|w| w.abs()).sum();
    let term = |w: &f64| {
        let q = w.abs() / total;
        if q > 0.0 { -q * q.ln() } else { 0.0 }
    };
    weights.iter().map(term).sum()
}

/// I = Σ J ln(J ⁄ (p(row) p(column))) for J = `table` ⁄ Σ `table`, whose rows are of one length: how
/// much knowing the row (a task) says about the column (a module). 0 where the table is empty;
/// never above the entropy of either side. What rounding puts below 0 is 0.
///
/// Estimated from N independent units it is too large by about (rows − 1)(columns − 1) ⁄ 2N (Miller
/// 1955), which matters where there are few.
pub fn mutual_information(table: &[Vec<f64>]) -> f64 {
    let total: f64 = table.iter().flatten().sum();
    let columns = column_sums(table);
    let mut sum = 0.0;
    for row in table {
        let of_row: f64 = row.iter().sum();
        for (j, of_column) in row.iter().zip(&columns) {
            if *j > 0.0 {
                sum += j / total * (j * total / (of_row * of_column)).ln();
            }
        }
    }
    sum.max(0.0)
}

/// Σ over rows of each column.
pub(super) fn column_sums(table: &[Vec<f64>]) -> Vec<f64> {
    let mut sums = vec![0.0; table.first().map_or(0, Vec::len)];
    for row in table {
        sums.iter_mut().zip(row).for_each(|(s, j)| *s += j);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn information_is_what_entropies_leave() {
        // I = H(row) + H(column) − H(both), a formula with other terms than the one above.
        let table = vec![vec![3.0, 1.0, 0.0], vec![0.5, 2.0, 7.0]];
        let rows: Vec<f64> = table.iter().map(|r| r.iter().sum()).collect();
        let both: Vec<f64> = table.iter().flatten().copied().collect();
        let wanted = entropy(&rows) + entropy(&column_sums(&table)) - entropy(&both);
        assert!((mutual_information(&table) - wanted).abs() < 1e-12);
        assert!(wanted > 0.1);
    }

    #[test]
    fn the_ends_are_nothing_and_everything() {
        let outer = vec![vec![1.0, 3.0], vec![2.0, 6.0]];
        assert!(mutual_information(&outer) < 1e-12);
        let one_to_one = vec![vec![0.0, 5.0], vec![5.0, 0.0]];
        assert!((mutual_information(&one_to_one) - 2f64.ln()).abs() < 1e-12);
        assert_eq!(mutual_information(&[]), 0.0);
        assert_eq!(mutual_information(&[vec![0.0, 0.0]]), 0.0);
    }
}
