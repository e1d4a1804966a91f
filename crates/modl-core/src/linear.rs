//! x Wᵀ + b, by the fastest kernel that libtorch has for it.
//!
//! For f32 on the CPU libtorch calls MKL, which keeps to AVX2 on AMD's processors even where they
//! have AVX-512. oneDNN uses it: on Zen 5 it is twice as fast, forward and backward; on Zen 4, which makes two
//! halves of 512 bits, a seventh faster with large matrices and slower with small ones, by what a
//! convolution costs beside the product. Libtorch reaches it through convolutions. A linear layer is
//! a convolution with a 1 × 1 kernel over rows that lie in memory channels-last, which is how `[…, in]`
//! lies anyway: nothing is copied.

use std::sync::OnceLock;

use crate::tensor::op_error;
use crate::{Device, Kind, Result, Tensor};

/// Rows and widths from which the detour is worth it, and the product of the three on Zen 4.
const SMALLEST: i64 = 64;
const LARGE: i64 = 1 << 28;

/// oneDNN's convolutions are chosen for at least so many images, or for several threads.
const IMAGES: i64 = 16;

impl Tensor {
    /// x Wᵀ + b: x `[…, in]`, weight `[out, in]`, bias `[out]` → `[…, out]`.
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if let Some(least) = convolution_from()
            && self.suits_convolution(weight, bias, least)
        {
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

    fn suits_convolution(&self, weight: &Tensor, bias: Option<&Tensor>, least: i64) -> bool {
        let [out, width] = weight.size()[..] else { return false };
        let rows = self.numel() as i64 / width.max(1);
        let plain = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu;
        self.dim() >= 2
            && self.len_of(-1) == width
            && [rows, width, out].iter().all(|n| *n >= SMALLEST)
            && rows.saturating_mul(width).saturating_mul(out) >= least
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

/// The product of rows and widths from which MKL leaves a part of this processor unused; nothing where it
/// never does.
fn convolution_from() -> Option<i64> {
    static LEAST: OnceLock<Option<i64>> = OnceLock::new();
    *LEAST.get_or_init(|| least(&crate::machine::cpu_info()))
}

/// [`convolution_from`] by what Linux says about the processor.
fn least(cpu: &str) -> Option<i64> {
    if !cpu.contains("AuthenticAMD") || !cpu.contains("avx512f") {
        return None;
    }
    let family = cpu.lines().find(|line| line.starts_with("cpu family"));
    let family = family.and_then(|line| line.rsplit(':').next()?.trim().parse::<u32>().ok());
    // Zen 4 is of family 25, Zen 5 of 26.
    Some(if family.is_some_and(|n| n < 26) { LARGE } else { 0 })
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
            assert!(x32.suits_convolution(&w32, b32.as_ref(), 0));
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
    fn processors_are_known_by_vendor_extension_and_family() {
        let cpu = |vendor: &str, family: &str, flags: &str| {
            least(&format!("vendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n"))
        };
        assert_eq!(cpu("AuthenticAMD", "26", "fpu avx512f"), Some(0));
        assert_eq!(cpu("AuthenticAMD", "25", "fpu avx512f"), Some(LARGE));
        assert_eq!(cpu("AuthenticAMD", "25", "fpu avx2"), None);
        assert_eq!(cpu("GenuineIntel", "6", "fpu avx512f"), None);
        assert_eq!(least(""), None);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused_as_ever() {
        let x = random(&[64, 96], "x").to_kind(Kind::Float).unwrap();
        let w = random(&[80, 95], "w").to_kind(Kind::Float).unwrap();
        let e = x.linear(&w, None).unwrap_err().to_string();
        assert!(e.contains("linear on f32[64, 96], f32[80, 95]"), "{e}");
    }
}
