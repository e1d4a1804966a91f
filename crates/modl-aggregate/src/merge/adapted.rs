//! Adapters that are merged into a tensor piece by piece, as it is read: W + s B A, with DoRA's m where
//! there is one, and a bias.

use modl_core::{Error, Result};

use super::Elements;
use super::elements::Adapted;

/// Numbers of the base that are read together to find norms.
const READ: usize = 1 << 15;

/// What a low-rank adapter makes of a matrix W `[rows, columns]`: W + s L R, and for DoRA
/// (W + s L R) · m ⁄ ‖W + s L R‖ with the norm of each output.
#[derive(Debug, Clone)]
pub struct AddedProduct {
    /// L `[rows, rank]`.
    left: Vec<f32>,
    /// R `[rank, columns]`.
    right: Vec<f32>,
    columns: usize,
    rank: usize,
    scale: f32,
    /// DoRA's m ⁄ ‖·‖ of each output.
    factors: Vec<f32>,
    /// Whether outputs are columns, as GPT-2 and tables of embeddings have them.
    by_column: bool,
}

impl AddedProduct {
    /// B `[out, rank]` and A `[rank, in]`, for a weight `[out, in]`, or with `transposed` `[in, out]`.
    ///
    /// # Errors
    /// Where B and A are not of this rank.
    pub fn new(b: &[f32], a: &[f32], rank: usize, scale: f64, transposed: bool) -> Result<Self> {
        if rank == 0 || !b.len().is_multiple_of(rank) || !a.len().is_multiple_of(rank) {
            let problem =
                format!("have {} and {} numbers, and the rank is {rank}", b.len(), a.len());
            return Err(Error::invalid("B and A", problem));
        }
        let (outputs, inputs) = (b.len() / rank, a.len() / rank);
        let (left, right, columns) = match transposed {
            false => (b.to_vec(), a.to_vec(), inputs),
            true => (turned(a, rank, inputs), turned(b, outputs, rank), outputs),
        };
        let (factors, scale) = (Vec::new(), scale as f32);
        Ok(AddedProduct { left, right, columns, rank, scale, factors, by_column: transposed })
    }

    /// With DoRA's m, one number for each output; reads the base once, to know the norms.
    ///
    /// # Errors
    /// Where there are more or fewer outputs, or the base cannot be read.
    pub fn with_magnitude(mut self, m: &[f32], base: &dyn Elements) -> Result<Self> {
        let outputs = if self.by_column { self.columns } else { self.rows() };
        if m.len() != outputs {
            let problem = format!("has {} numbers for {outputs} outputs", m.len());
            return Err(Error::invalid("DoRA's magnitude", problem));
        }
        let (mut squares, mut at) = (vec![0f64; outputs], 0);
        let all = self.rows() * self.columns;
        while at < all {
            let mut values = vec![0.0; READ.min(all - at)];
            base.read(at, &mut values)?;
            self.apply(at, &mut values)?;
            for (n, x) in values.iter().enumerate() {
                if let Some(s) = squares.get_mut(self.output(at + n)) {
                    *s += f64::from(*x).powi(2);
                }
            }
            at += values.len();
        }
        self.factors = m.iter().zip(squares).map(|(m, s)| m / s.sqrt() as f32).collect();
        Ok(self)
    }

    /// The shape of the weight that it is for.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows(), self.columns]
    }

    fn rows(&self) -> usize {
        self.left.len() / self.rank
    }

    /// The output that a number belongs to.
    fn output(&self, place: usize) -> usize {
        if self.by_column { place % self.columns } else { place / self.columns }
    }
}

impl Adapted for AddedProduct {
    fn apply(&self, at: usize, values: &mut [f32]) -> Result<()> {
        let short = || Error::invalid("adapter", "has fewer numbers than the tensor");
        let mut sums = vec![0.0; self.columns];
        let (mut place, mut rest) = (at, values);
        while !rest.is_empty() {
            let (row, from) = (place / self.columns, place % self.columns);
            let (now, later) = rest.split_at_mut((self.columns - from).min(rest.len()));
            let sums = sums.get_mut(..now.len()).unwrap_or_default();
            sums.fill(0.0);
            let left = self.left.get(row * self.rank..(row + 1) * self.rank).ok_or_else(short)?;
            for (l, line) in left.iter().zip(self.right.chunks_exact(self.columns)) {
                let line = line.get(from..from + sums.len()).unwrap_or_default();
                sums.iter_mut().zip(line).for_each(|(s, r)| *s += l * r);
            }
            now.iter_mut().zip(sums.iter()).for_each(|(x, s)| *x += self.scale * s);
            if !self.factors.is_empty() {
                for (n, x) in now.iter_mut().enumerate() {
                    *x *= self.factors.get(self.output(place + n)).ok_or_else(short)?;
                }
            }
            place += now.len();
            rest = later;
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        4 * (self.left.len() + self.right.len() + self.factors.len()) as u64
    }
}

/// A vector that is added to a bias.
#[derive(Debug, Clone)]
pub struct AddedBias(pub Vec<f32>);

impl Adapted for AddedBias {
    fn apply(&self, at: usize, values: &mut [f32]) -> Result<()> {
        let own = self.0.get(at..at + values.len());
        let own =
            own.ok_or_else(|| Error::invalid("adapter", "has fewer numbers than the bias"))?;
        values.iter_mut().zip(own).for_each(|(x, b)| *x += b);
        Ok(())
    }

    fn bytes(&self) -> u64 {
        4 * self.0.len() as u64
    }
}

/// The transpose of a matrix `[rows, columns]`.
fn turned(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns)
        .flat_map(|c| (0..rows).map(move |r| x.get(r * columns + c).copied().unwrap_or_default()))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    /// Pieces of any length are pieces of the whole, in both orders of the axes.
    #[test]
    fn pieces_are_parts_of_the_formula() {
        let (outputs, rank, inputs) = (5, 2, 3);
        let b: Vec<f32> = (0..outputs * rank).map(|n| (n as f32 * 0.7).sin()).collect();
        let a: Vec<f32> = (0..rank * inputs).map(|n| (n as f32 * 1.3).cos()).collect();
        let m: Vec<f32> = (0..outputs).map(|n| 1.0 + n as f32).collect();
        let base: Vec<f32> = (0..outputs * inputs).map(|n| (n as f32).sin() + 0.1).collect();
        for (transposed, dora) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut change = AddedProduct::new(&b, &a, rank, 0.5, transposed).unwrap();
            // Row o, column i of ΔW, wherever it is stored.
            let at = |o: usize, i: usize| if transposed { i * outputs + o } else { o * inputs + i };
            if dora {
                change = change.with_magnitude(&m, &base).unwrap();
            }
            let mut wanted = vec![0f64; base.len()];
            for o in 0..outputs {
                let line: Vec<f64> = (0..inputs)
                    .map(|i| {
                        let sum: f64 = (0..rank)
                            .map(|r| f64::from(b[o * rank + r]) * f64::from(a[r * inputs + i]))
                            .sum();
                        f64::from(base[at(o, i)]) + 0.5 * sum
                    })
                    .collect();
                let norm = line.iter().map(|x| x * x).sum::<f64>().sqrt();
                let factor = if dora { f64::from(m[o]) / norm } else { 1.0 };
                line.iter().enumerate().for_each(|(i, x)| wanted[at(o, i)] = x * factor);
            }
            for piece in 1..=base.len() {
                let mut values = base.clone();
                for (n, part) in values.chunks_mut(piece).enumerate() {
                    change.apply(n * piece, part).unwrap();
                }
                for (x, w) in values.iter().zip(&wanted) {
                    assert!((f64::from(*x) - w).abs() < 1e-5, "{x} {w} {transposed} {dora}");
                }
            }
        }
    }
}
