//! Operations of [`Tensor`] that change it in place.

use crate::tensor::op_error;
use crate::{Result, Tensor};

impl Tensor {
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
