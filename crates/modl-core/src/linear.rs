//! x Wᵀ + b, by the fastest kernel that libtorch has for it.
//!
//! For f32 on the CPU libtorch calls MKL, which keeps to AVX2 on AMD's processors even where they
//! have AVX-512. oneDNN uses it, and is twice as fast there, forward and backward; libtorch reaches
//! it through convolutions. A linear layer is a convolution with a 1 × 1 kernel over rows that lie
//! in memory channels-last, which is how `[…, in]` lies anyway: nothing is copied.

use std::sync::OnceLock;

use crate::tensor::op_error;
use crate::{Device, Kind, Result, Tensor};

/// Rows and widths from which the detour is worth it.
const SMALLEST: i64 = 64;

/// oneDNN's convolutions are chosen for at least so many images, or for several threads.
const IMAGES: i64 = 16;

impl Tensor {
    /// x Wᵀ + b: x `[…, in]`, weight `[out, in]`, bias `[out]` → `[…, out]`.
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if mkl_is_slow() && self.suits_convolution(weight, bias) {
            return self.linear_by_convolution(weight, bias);
        }
        self.0
            .f_linear(&weight.0, bias.map(|b| &b.0))
            .map(Tensor)
            .map_err(|e| op_error("linear", &[&self.0, &weight.0], e))
    }

    /// self + x Wᵀ for a thin x, as low-rank changes have it: self `[…, out]`, x `[…, r]`, weight
    /// `[out, r]` → `[…, out]`. The product is added onto self in one pass over memory.
    pub fn add_linear(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let rows = |t: &Tensor| t.reshape(&[-1, t.len_of(-1)]);
        // Wᵀ is laid out anew because autograd follows its layout: the products of the backward
        // pass are then three times as fast, which a copy of r·out numbers is worth.
        let sum = rows(self)?.addmm(&rows(x)?, &weight.t()?.contiguous()?)?;
        sum.reshape(&self.size())
    }

    fn suits_convolution(&self, weight: &Tensor, bias: Option<&Tensor>) -> bool {
        let [out, width] = weight.size()[..] else { return false };
        let rows = self.numel() as i64 / width.max(1);
        let plain = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu;
        self.dim() >= 2
            && self.len_of(-1) == width
            && [rows, width, out].iter().all(|n| *n >= SMALLEST)
            && [Some(self), Some(weight), bias].into_iter().flatten().all(plain)
            && bias.is_none_or(|b| b.size() == [out])
            && self.0.is_contiguous()
    }

    fn linear_by_convolution(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let mut shape = self.size();
        let [out, width] = [weight.len_of(0), weight.len_of(1)];
        let rows = self.numel() as i64 / width;
        let images = if rows % IMAGES == 0 { IMAGES } else { 1 };
        // [images, in, 1, rows of one], channels-last
        let x = self.reshape(&[images, rows / images, width])?.transpose(1, 2)?.unsqueeze(2)?;
        let kernel = weight.reshape(&[out, width, 1, 1])?;
        let y = Self::op("linear", &[&x, &kernel], |t| {
            let bias = bias.map(|b| &b.0);
            t[0].f_conv2d(t[1], bias, [1, 1].as_slice(), [0, 0].as_slice(), [1, 1].as_slice(), 1)
        })?;
        if let Some(last) = shape.last_mut() {
            *last = out;
        }
        y.squeeze(2)?.transpose(1, 2)?.reshape(&shape)
    }
}

/// Whether MKL leaves half of this processor unused.
fn mkl_is_slow() -> bool {
    static SLOW: OnceLock<bool> = OnceLock::new();
    *SLOW.get_or_init(|| {
        let cpu = crate::machine::cpu_info();
        cpu.contains("AuthenticAMD") && cpu.contains("avx512f")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Init, Seed};

    fn random(shape: &[i64], name: &str) -> Tensor {
        let init = Init::Normal(1.0);
        init.tensor(shape, Seed(4).child(name), Kind::Double, Device::Cpu).unwrap()
    }

    fn gradients(y: &Tensor, g: &Tensor, of: &[&Tensor]) -> Vec<Tensor> {
        let loss = y.mul(g).unwrap().sum().unwrap();
        loss.gradients(of, false).unwrap().into_iter().map(Option::unwrap).collect()
    }

    #[test]
    fn the_convolution_is_the_product_in_value_and_gradient() {
        for (shape, bias) in [([4, 32, 96], true), ([3, 37, 96], false)] {
            let (x, w, b) = (random(&shape, "x"), random(&[80, 96], "w"), random(&[80], "b"));
            let b = bias.then_some(b);
            let g = random(&[shape[0], shape[1], 80], "g");
            let exact = x.matmul(&w.t().unwrap()).unwrap();
            let exact = b.as_ref().map_or(exact.clone(), |b| exact.add(b).unwrap());
            let f32 = |t: &Tensor| {
                let t = t.to_kind(Kind::Float).unwrap();
                t.set_requires_grad(true).unwrap();
                t
            };
            let (x32, w32, b32) = (f32(&x), f32(&w), b.as_ref().map(f32));
            assert!(x32.suits_convolution(&w32, b32.as_ref()));
            let y = x32.linear_by_convolution(&w32, b32.as_ref()).unwrap();
            assert!(y.all_close(&exact, 2e-5, 1e-5).unwrap());
            let found = gradients(&y, &g.to_kind(Kind::Float).unwrap(), &[&x32, &w32]);
            let (rows, flat) = (g.reshape(&[-1, 80]).unwrap(), x.reshape(&[-1, 96]).unwrap());
            let dx = g.matmul(&w).unwrap();
            let dw = rows.t().unwrap().matmul(&flat).unwrap();
            assert!(found[0].all_close(&dx, 2e-5, 1e-5).unwrap());
            assert!(found[1].all_close(&dw, 5e-5, 1e-5).unwrap());
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused_as_ever() {
        let x = random(&[64, 96], "x").to_kind(Kind::Float).unwrap();
        let w = random(&[80, 95], "w").to_kind(Kind::Float).unwrap();
        let e = x.linear(&w, None).unwrap_err().to_string();
        assert!(e.contains("linear on f32[64, 96], f32[80, 95]"), "{e}");
    }
}
