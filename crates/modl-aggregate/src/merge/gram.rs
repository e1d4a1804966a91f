//! Inner products of whole tensors.

/// Inner products of some tensors.
#[derive(Debug, Clone)]
pub struct Gram {
    pub(super) k: usize,
    pub(super) sums: Vec<f64>,
}

impl Gram {
    /// ⟨i, j⟩.
    pub fn dot(&self, i: usize, j: usize) -> f64 {
        let (i, j) = if i < j { (j, i) } else { (i, j) };
        self.sums.get(i * self.k + j).copied().unwrap_or_default()
    }

    /// ‖i‖.
    pub fn norm(&self, i: usize) -> f64 {
        self.dot(i, i).max(0.0).sqrt()
    }

    /// ⟨Σ aᵢ xᵢ, Σ bⱼ xⱼ⟩.
    pub fn dot_of(&self, a: &[f64], b: &[f64]) -> f64 {
        let pair = |(i, x): (usize, &f64)| -> f64 {
            b.iter().enumerate().map(|(j, y)| x * y * self.dot(i, j)).sum()
        };
        a.iter().enumerate().map(pair).sum()
    }
}

/// Lanes of a sum: enough that a processor adds several at once, fixed so that rounding is.
const LANES: usize = 8;

/// Σ (x − b)(y − b), in f64.
pub(crate) fn inner(x: &[f32], y: &[f32], less: Option<&[f32]>) -> f64 {
    let mut lanes = [0f64; LANES];
    let mut rest = 0.0;
    match less {
        None => {
            let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
            rest += tail(xs.remainder(), ys.remainder(), None);
            for (x, y) in xs.zip(ys) {
                for (l, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
                    *l += f64::from(*x) * f64::from(*y);
                }
            }
        }
        Some(b) => {
            let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
            let bs = b.chunks_exact(LANES);
            rest += tail(xs.remainder(), ys.remainder(), Some(bs.remainder()));
            for ((x, y), b) in xs.zip(ys).zip(bs) {
                for (l, ((x, y), b)) in lanes.iter_mut().zip(x.iter().zip(y).zip(b)) {
                    *l += f64::from(x - b) * f64::from(y - b);
                }
            }
        }
    }
    lanes.iter().sum::<f64>() + rest
}

fn tail(x: &[f32], y: &[f32], less: Option<&[f32]>) -> f64 {
    let b = |n: usize| less.and_then(|b| b.get(n)).copied().unwrap_or_default();
    let terms = x.iter().zip(y).enumerate();
    terms.map(|(n, (x, y))| f64::from(x - b(n)) * f64::from(y - b(n))).sum()
}
