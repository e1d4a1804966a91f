//! Operations of [`Tensor`] that change it in place.

use crate::tensor::op_error;
use crate::{Device, Error, Kind, Result, Tensor};

impl Tensor {
    /// A tensor of a shape, all of whose elements are one 0 in memory, until
    /// [`Tensor::fill_from`].
    pub(crate) fn unfilled(shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let elements = shape.iter().try_fold(1i64, |n, d| n.checked_mul(*d).filter(|n| *n >= 0));
        // Libtorch counts bytes in 64 bits.
        if shape.iter().any(|d| *d < 0) || elements.is_none_or(|n| n > i64::MAX / 16) {
            return Err(Error::invalid("shape", format!("{shape:?} is no shape of a tensor")));
        }
        Tensor::zeros(&vec![1; shape.len()], kind, device)?.expand(shape)
    }

    /// [`Tensor::copy_from`], after giving an [`Tensor::unfilled`] tensor memory of its own.
    pub(crate) fn fill_from(&mut self, src: &Tensor) -> Result<()> {
        let one = |(n, step): (i64, i64)| n <= 1 || step == 0;
        if self.numel() > 1 && self.size().into_iter().zip(self.0.stride()).all(one) {
            let whole = Tensor::zeros(&self.size(), self.kind(), self.device())?;
            let r = self.0.f_set_data(&whole.0);
            r.map_err(|e| op_error("fill_from", &[&self.0, &src.0], e))?;
        }
        self.copy_from(src)
    }

    /// Sets all elements to zero in place.
    pub fn zero_in_place(&mut self) -> Result<()> {
        self.0.f_zero_().map(drop).map_err(|e| op_error("zero_in_place", &[&self.0], e))
    }

    /// self ← self + other, in place.
    pub fn add_in_place(&mut self, other: &Tensor) -> Result<()> {
        let r = self.0.f_add_(&other.0).map(drop);
        r.map_err(|e| op_error("add_in_place", &[&self.0, &other.0], e))
    }

    /// self ← c · self, in place.
    pub fn mul_scalar_in_place(&mut self, c: f64) -> Result<()> {
        self.0
            .f_mul_scalar_(c)
            .map(drop)
            .map_err(|e| op_error("mul_scalar_in_place", &[&self.0], e))
    }

    /// self ← self + weight·(end − self), in place.
    pub fn lerp_in_place(&mut self, end: &Tensor, weight: f64) -> Result<()> {
        let r = self.0.f_lerp_(&end.0, weight).map(drop);
        r.map_err(|e| op_error("lerp_in_place", &[&self.0, &end.0], e))
    }

    /// self ← self + c, in place.
    pub fn add_scalar_in_place(&mut self, c: f64) -> Result<()> {
        let r = self.0.f_add_scalar_(c).map(drop);
        r.map_err(|e| op_error("add_scalar_in_place", &[&self.0], e))
    }

    /// self ← self + a·b, element by element, in place; a and b broadcast.
    pub fn addcmul_in_place(&mut self, a: &Tensor, b: &Tensor) -> Result<()> {
        let r = self.0.f_addcmul_(&a.0, &b.0).map(drop);
        r.map_err(|e| op_error("addcmul_in_place", &[&self.0, &a.0, &b.0], e))
    }

    /// self ← self + a ⁄ b, element by element, in place; a and b broadcast.
    pub fn addcdiv_in_place(&mut self, a: &Tensor, b: &Tensor) -> Result<()> {
        let r = self.0.f_addcdiv_(&a.0, &b.0).map(drop);
        r.map_err(|e| op_error("addcdiv_in_place", &[&self.0, &a.0, &b.0], e))
    }
}
