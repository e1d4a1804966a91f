//! What a step of training does in one call of libtorch: the norm of a list of tensors, AdamW in one pass over
//! memory, a multiple of another tensor added.

use crate::ffi;
use crate::{Error, Result, Tensor, no_grad};

/// The numbers of AdamW; see [`Tensor::adamw_in_place`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// t, from 1 on.
    pub step: i64,
    /// η.
    pub lr: f64,
    /// β₁ and β₂.
    pub betas: (f64, f64),
    /// λ.
    pub weight_decay: f64,
    /// ε.
    pub eps: f64,
}

impl Tensor {
    /// √Σ‖tᵢ‖² over all of `tensors`; 0 of none.
    ///
    /// # Errors
    /// Where one is not made of floats.
    pub fn norm_of_all(tensors: &[&Tensor]) -> Result<f64> {
        no_grad(|| ffi::norm(tensors))
    }

    /// self ← c · self: in its memory where nobody else has it, and otherwise in memory of its own.
    ///
    /// # Errors
    /// Where libtorch refuses it.
    pub fn scale(&mut self, c: f64) -> Result<()> {
        ffi::scale(self, c)
    }

    /// self ← self + c · other, in place.
    ///
    /// # Errors
    /// Where the shapes do not fit.
    pub fn add_scaled_in_place(&mut self, other: &Tensor, c: f64) -> Result<()> {
        ffi::add_scaled(self, other, c)
    }

    /// θ ← (1 − ηλ) θ; m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²;
    /// θ ← θ − η · m⁄(1−β₁ᵗ) ⁄ (√(v⁄(1−β₂ᵗ)) + ε), in place in `self`, `mean` and `square`, by libtorch's
    /// fused kernel.
    ///
    /// # Errors
    /// Where they are not of one shape, kind and place, or `mean` or `square` is a view that is not
    /// contiguous.
    pub fn adamw_in_place(
        &mut self,
        grad: &Tensor,
        mean: &mut Tensor,
        square: &mut Tensor,
        by: AdamWStep,
    ) -> Result<()> {
        let alike = |t: &Tensor| {
            t.size() == self.size() && t.kind() == self.kind() && t.device() == self.device()
        };
        let dense = |t: &Tensor| t.0.is_contiguous();
        if !(alike(grad) && alike(mean) && alike(square) && dense(mean) && dense(square)) {
            let problem = "is to have a gradient and moments of its own shape, kind and place";
            let e = Error::invalid("adamw", format!("{self:?} {problem}, not {grad:?}"));
            return Err(e);
        }
        ffi::adamw(self, grad, mean, square, by)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Kind};

    fn t(values: &[f64], shape: &[i64]) -> Tensor {
        Tensor::from_slice(values, shape, Device::Cpu).unwrap()
    }

    #[test]
    fn the_norm_is_that_of_all_numbers() {
        let (a, b) = (t(&[3.0, 0.0], &[2]), t(&[4.0, 12.0], &[1, 2]));
        assert!((Tensor::norm_of_all(&[&a, &b]).unwrap() - 13.0).abs() < 1e-12);
        assert_eq!(Tensor::norm_of_all(&[]).unwrap(), 0.0);
        for x in [f64::INFINITY, f64::NAN] {
            let norm = Tensor::norm_of_all(&[&a, &t(&[x], &[1])]).unwrap();
            assert_eq!(norm.to_bits(), x.to_bits());
        }
        let whole = a.to_kind(Kind::Int64).unwrap();
        assert!(Tensor::norm_of_all(&[&whole]).is_err());
    }

    #[test]
    fn what_others_have_is_not_scaled_for_them() {
        let mut own = t(&[1.0, 2.0], &[2]);
        let place = own.0.data_ptr();
        own.scale(2.0).unwrap();
        assert_eq!(own.0.data_ptr(), place);
        let (other, part) = (own.clone(), own.narrow(0, 1, 1).unwrap());
        own.scale(2.0).unwrap();
        assert_eq!(own.to_vec::<f64>().unwrap(), [4.0, 8.0]);
        assert_eq!(other.to_vec::<f64>().unwrap(), [2.0, 4.0]);
        assert_eq!(part.to_vec::<f64>().unwrap(), [4.0]);
    }

    #[test]
    fn gradients_are_scaled_where_they_lie() {
        let (x, w) = (t(&[1.0, 2.0], &[1, 2]), t(&[1.0, 2.0, 3.0, 4.0], &[2, 2]));
        w.set_requires_grad(true).unwrap();
        let loss = x.linear(&w, None).unwrap().sum().unwrap();
        let mut grad = loss.gradients(&[&w], false).unwrap().remove(0).unwrap();
        let place = grad.0.data_ptr();
        no_grad(|| grad.scale(0.5)).unwrap();
        assert_eq!(grad.0.data_ptr(), place);
        assert_eq!(grad.contiguous().unwrap().to_vec::<f64>().unwrap(), [0.5, 1.0, 0.5, 1.0]);
    }

    #[test]
    fn a_multiple_is_added() {
        let mut a = t(&[1.0, 2.0], &[2]);
        a.add_scaled_in_place(&t(&[10.0, 20.0], &[2]), -0.5).unwrap();
        assert_eq!(a.to_vec::<f64>().unwrap(), [-4.0, -8.0]);
        assert!(a.add_scaled_in_place(&t(&[1.0, 2.0, 3.0], &[3]), 1.0).is_err());
    }

    /// θ and g as columns of wider tensors, against the formula.
    #[test]
    fn adamw_follows_its_formula_whatever_the_strides() {
        let values: Vec<f64> = (0..40).map(|i| f64::from(i).sin()).collect();
        let whole = t(&values, &[10, 4]);
        let mut theta = whole.narrow(1, 1, 2).unwrap();
        let (mut mean, mut square) = (t(&[0.0; 20], &[10, 2]), t(&[0.0; 20], &[10, 2]));
        let mut wanted = theta.to_vec::<f64>().unwrap();
        let (mut m, mut v) = ([0.0; 20], [0.0; 20]);
        for step in 1..=3i64 {
            let by = AdamWStep { step, lr: 0.1, betas: (0.9, 0.99), weight_decay: 0.2, eps: 1e-3 };
            // Transposed, as the backward pass of a product may give it.
            let grad = t(&values[..20], &[2, 10]).t().unwrap().mul_scalar(step as f64).unwrap();
            theta.adamw_in_place(&grad, &mut mean, &mut square, by).unwrap();
            let grad = grad.contiguous().unwrap().to_vec::<f64>().unwrap();
            for i in 0..20 {
                m[i] = 0.9 * m[i] + 0.1 * grad[i];
                v[i] = 0.99 * v[i] + 0.01 * grad[i] * grad[i];
                let (m, v) = (
                    m[i] / (1.0 - 0.9f64.powi(step as i32)),
                    v[i] / (1.0 - 0.99f64.powi(step as i32)),
                );
                wanted[i] -= 0.1 * 0.2 * wanted[i] + 0.1 * m / (v.sqrt() + 1e-3);
            }
        }
        for (a, b) in theta.to_vec::<f64>().unwrap().iter().zip(&wanted) {
            assert!((a - b).abs() < 1e-12, "{a} is not {b}");
        }
        let others = whole.narrow(1, 0, 1).unwrap().to_vec::<f64>().unwrap();
        assert!(others.iter().zip((0..).step_by(4)).all(|(x, i)| *x == f64::from(i).sin()));
        let by = AdamWStep { step: 1, lr: 0.1, betas: (0.9, 0.99), weight_decay: 0.0, eps: 1e-8 };
        assert!(theta.adamw_in_place(&whole, &mut mean, &mut square, by).is_err());
    }
}
