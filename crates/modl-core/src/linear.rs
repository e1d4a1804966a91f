//! x Wᵀ + b, by the fastest products that there are for it.
//!
//! For f32 on the CPU libtorch calls MKL, which keeps to AVX2 on AMD's processors even where they
//! have AVX-512, and for bf16 oneDNN, which takes 15 µs to find a product of its own and waits for weights that
//! come from memory. Two ways do better:
//!
//! * Products of our own, see `cpp/products.h`. On Zen 4 those of f32 were not slower than MKL and oneDNN in
//!   anything that was measured: a tenth faster with large matrices, 1.4 times as fast where weights come from
//!   memory and few tokens share them, as experts' do. A single token is left to MKL. Those of bf16 are as fast
//!   as oneDNN's with large matrices (0.92 to 1.08), 1.2 to 1.6 times as fast where weights come from memory,
//!   1.1 to 1.9 times for a single token, and up to 8 times with small matrices.
//! * oneDNN's convolutions, twice as fast as MKL on Zen 5, forward and backward. A linear layer is a
//!   convolution with a 1 × 1 kernel over rows that lie in memory channels-last, which is how `[…, in]`
//!   lies anyway: nothing is copied. What a convolution costs beside the product is too much for small
//!   matrices, which have the first way there, too.

use std::sync::OnceLock;

use crate::tensor::op_error;
use crate::{Device, Kind, Result, Tensor, ffi};

/// Rows and widths from which the convolution is worth it.
const SMALLEST: i64 = 64;

/// oneDNN's convolutions are chosen for at least so many images, or for several threads.
const IMAGES: i64 = 16;

/// What f32 and bf16 on this processor go by.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    /// Libtorch's choice.
    Libtorch,
    /// Products of our own.
    Products,
    /// Where matrices are large, convolutions for f32 and libtorch's choice for bf16; else products of our own.
    Convolutions,
}

impl Tensor {
    /// x Wᵀ + b: x `[…, in]`, weight `[out, in]`, bias `[out]` → `[…, out]`.
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let way = way();
        if way == Way::Convolutions && self.is_large(weight) {
            if self.suits_convolution(weight, bias) {
                return self.linear_by_convolution(weight, bias);
            }
        } else if way != Way::Libtorch
            && let Some(y) = ffi::linear(self, weight, bias, false)?
        {
            return Ok(y);
        }
        self.0
            .f_linear(&weight.0, bias.map(|b| &b.0))
            .map(Tensor)
            .map_err(|e| op_error("linear", &[&self.0, &weight.0], e))
    }

    /// max(0, x Wᵀ + b) for the same x, W and b, in one pass each way where products of our own are
    /// taken.
    ///
    /// # Errors
    /// Where the shapes do not fit.
    pub fn linear_relu(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if way() == Way::Products
            && let Some(y) = ffi::linear(self, weight, bias, true)?
        {
            return Ok(y);
        }
        self.linear(weight, bias)?.relu()
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

    /// Whether rows, width and out are as many as a convolution is worth.
    fn is_large(&self, weight: &Tensor) -> bool {
        let [out, width] = weight.size()[..] else { return false };
        let rows = self.numel() as i64 / width.max(1);
        [rows, width, out].iter().all(|n| *n >= SMALLEST)
    }

    fn suits_convolution(&self, weight: &Tensor, bias: Option<&Tensor>) -> bool {
        let [out, width] = weight.size()[..] else { return false };
        let plain = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu;
        self.dim() >= 2
            && self.len_of(-1) == width
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

/// What this processor goes by.
fn way() -> Way {
    static WAY: OnceLock<Way> = OnceLock::new();
    *WAY.get_or_init(|| way_of(&crate::machine::cpu_info()))
}

/// [`way`] by what Linux says about the processor.
fn way_of(cpu: &str) -> Way {
    if !cpu.contains("AuthenticAMD") || !cpu.contains("avx512f") {
        return Way::Libtorch;
    }
    let family = cpu.lines().find(|line| line.starts_with("cpu family"));
    let family = family.and_then(|line| line.rsplit(':').next()?.trim().parse::<u32>().ok());
    // Zen 4 is of family 25, Zen 5 of 26.
    if family.is_some_and(|n| n < 26) { Way::Products } else { Way::Convolutions }
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

    /// x Wᵀ + b in f64 and its gradients for g, by products of libtorch's.
    fn exact(x: &Tensor, w: &Tensor, b: Option<&Tensor>, g: &Tensor) -> (Tensor, Vec<Tensor>) {
        let [out, width] = w.size()[..] else { panic!("{w:?}") };
        let (rows, flat) = (g.reshape(&[-1, out]).unwrap(), x.reshape(&[-1, width]).unwrap());
        let y = x.matmul(&w.t().unwrap()).unwrap();
        let y = b.map_or(y.clone(), |b| y.add(b).unwrap());
        let dx = g.matmul(w).unwrap();
        let dw = rows.t().unwrap().matmul(&flat).unwrap();
        (y, vec![dx, dw, rows.sum_dims(&[0], false).unwrap()])
    }

    fn leaf(t: &Tensor) -> Tensor {
        leaf_of(t, Kind::Float)
    }

    fn leaf_of(t: &Tensor, kind: Kind) -> Tensor {
        let t = t.to_kind(kind).unwrap();
        t.set_requires_grad(true).unwrap();
        t
    }

    /// ‖a − b‖∞ in units of what f32 may lose in sums of `n` products of about 1: with each term half an ulp of
    /// a sum of about √n, and so ε n, four times for the worst of many.
    fn lost(a: &Tensor, b: &Tensor, n: i64) -> f64 {
        let apart = a.to_kind(Kind::Double).unwrap().sub(b).unwrap().abs().unwrap();
        let worst = apart.to_vec::<f64>().unwrap().into_iter().fold(0.0, f64::max);
        worst / (4.0 * f64::from(f32::EPSILON) * n.max(32) as f64)
    }

    #[test]
    fn the_convolution_is_the_product_in_value_and_gradient() {
        for (shape, bias) in [([4, 32, 96], true), ([3, 37, 96], false)] {
            let (x, w, b) = (random(&shape, "x"), random(&[80, 96], "w"), random(&[80], "b"));
            let b = bias.then_some(b);
            let g = random(&[shape[0], shape[1], 80], "g");
            let (y64, exact) = exact(&x, &w, b.as_ref(), &g);
            let (x32, w32, b32) = (leaf(&x), leaf(&w), b.as_ref().map(leaf));
            assert!(x32.is_large(&w32) && x32.suits_convolution(&w32, b32.as_ref()));
            let y = x32.linear_by_convolution(&w32, b32.as_ref()).unwrap();
            assert!(y.all_close(&y64, 2e-5, 1e-5).unwrap());
            let found = gradients(&y, &g.to_kind(Kind::Float).unwrap(), &[&x32, &w32]);
            assert!(found[0].all_close(&exact[0], 2e-5, 1e-5).unwrap());
            assert!(found[1].all_close(&exact[1], 5e-5, 1e-5).unwrap());
        }
    }

    /// Products of our own where this processor has them, and else what it goes by.
    fn by_products(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Tensor {
        ffi::linear(x, w, b, false).unwrap().unwrap_or_else(|| x.linear(w, b).unwrap())
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]

        /// Across all borders: few tokens and many, tiles, panels, blocks, what is left of each.
        #[test]
        fn products_are_those_of_f64_in_value_and_gradient(
            batch in 1i64..4,
            seq in proptest::prop_oneof![1i64..40, 40i64..330],
            out in proptest::prop_oneof![1i64..70, 70i64..300],
            width in proptest::prop_oneof![1i64..70, 70i64..600, 1000i64..1100],
            bias: bool,
        ) {
            let (x, w, b) = (random(&[batch, seq, width], "x"), random(&[out, width], "w"), random(&[out], "b"));
            let b = bias.then_some(b);
            let g = random(&[batch, seq, out], "g");
            let (y64, exact) = exact(&x, &w, b.as_ref(), &g);
            let (x32, w32, b32) = (leaf(&x), leaf(&w), b.as_ref().map(leaf));
            let y = by_products(&x32, &w32, b32.as_ref());
            proptest::prop_assert!(lost(&y, &y64, width) < 1.0);
            let of: Vec<&Tensor> = [&x32, &w32].into_iter().chain(&b32).collect();
            let found = gradients(&y, &g.to_kind(Kind::Float).unwrap(), &of);
            for ((found, exact), n) in found.iter().zip(&exact).zip([out, batch * seq, batch * seq]) {
                proptest::prop_assert_eq!(found.size(), exact.size());
                proptest::prop_assert!(lost(found, exact, n) < 1.0);
            }
        }
    }

    /// ‖a − b‖∞ in units of what bf16 and a sum in f32 of `n` products may lose: half an ulp of each number, which
    /// is at most its 2⁻⁸, and what [`lost`] says.
    fn lost_in_bf16(a: &Tensor, b: &Tensor, n: i64) -> f64 {
        let of = |t: &Tensor| t.to_kind(Kind::Double).unwrap().to_vec::<f64>().unwrap();
        let sum = 4.0 * f64::from(f32::EPSILON) * n.max(32) as f64;
        let each = of(a).into_iter().zip(of(b));
        each.map(|(a, b)| (a - b).abs() / (b.abs() / 256.0 + sum)).fold(0.0, f64::max)
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]

        /// Odd widths, which have no words of two, and sums that are longer than what is taken at once, too.
        #[test]
        fn products_of_bf16_are_those_of_f64_rounded_once(
            tokens in proptest::prop_oneof![2i64..40, 40i64..330, 2040i64..2060],
            out in proptest::prop_oneof![2i64..70, 70i64..300, 2040i64..2060],
            width in proptest::prop_oneof![24i64..70, 70i64..600, 8180i64..8200],
            bias: bool,
        ) {
            // Not all three are long at once: that is slow in f64.
            proptest::prop_assume!(tokens * out * width < 60_000_000);
            let rounded = |shape: &[i64], name| {
                random(shape, name).to_kind(Kind::BFloat16).unwrap().to_kind(Kind::Double).unwrap()
            };
            let (x, w, b) = (rounded(&[tokens, width], "x"), rounded(&[out, width], "w"), rounded(&[out], "b"));
            let b = bias.then_some(b);
            let g = rounded(&[tokens, out], "g");
            let (y64, exact) = exact(&x, &w, b.as_ref(), &g);
            let of = |t: &Tensor| leaf_of(t, Kind::BFloat16);
            let (x16, w16, b16) = (of(&x), of(&w), b.as_ref().map(of));
            let y = by_products(&x16, &w16, b16.as_ref());
            proptest::prop_assert_eq!(y.kind(), Kind::BFloat16);
            proptest::prop_assert!(lost_in_bf16(&y, &y64, width) < 1.0);
            let of: Vec<&Tensor> = [&x16, &w16].into_iter().chain(&b16).collect();
            let found = gradients(&y, &g.to_kind(Kind::BFloat16).unwrap(), &of);
            for ((found, exact), n) in found.iter().zip(&exact).zip([out, tokens, tokens]) {
                proptest::prop_assert_eq!(found.size(), exact.size());
                proptest::prop_assert!(lost_in_bf16(found, exact, n) < 1.0);
            }
        }
    }

    #[test]
    fn a_product_has_the_gradients_that_are_asked_for_and_gradients_of_these() {
        let (x, w, g) = (random(&[5, 40], "x"), random(&[30, 40], "w"), random(&[5, 30], "g"));
        let (_, exact) = exact(&x, &w, None, &g);
        let g32 = g.to_kind(Kind::Float).unwrap();
        let frozen = |t: &Tensor| t.to_kind(Kind::Float).unwrap();
        let (x32, w32) = (leaf(&x), leaf(&w));
        let dx = gradients(&by_products(&x32, &frozen(&w), None), &g32, &[&x32]);
        assert!(lost(&dx[0], &exact[0], 30) < 1.0);
        let dw = gradients(&by_products(&frozen(&x), &w32, None), &g32, &[&w32]);
        assert!(lost(&dw[0], &exact[1], 5) < 1.0);
        assert!(!by_products(&frozen(&x), &frozen(&w), None).requires_grad());
        // z = Σ y²: ∂z/∂x = 2 x WᵀW, and the gradient of Σ (∂z/∂x)∘h for x is 2 h WᵀW.
        let h = random(&[5, 40], "h");
        let y = by_products(&x32, &w32, None);
        let first = y.mul(&y).unwrap().sum().unwrap().gradients(&[&x32], true).unwrap();
        let found = gradients(first[0].as_ref().unwrap(), &frozen(&h), &[&x32, &w32]);
        let twice = |t: &Tensor| t.matmul(&w.t().unwrap()).unwrap().mul_scalar(2.0).unwrap();
        assert!(found[0].all_close(&twice(&h).matmul(&w).unwrap(), 1e-4, 1e-5).unwrap());
        // For W: 2 (h Wᵀ)ᵀ x + 2 (x Wᵀ)ᵀ h.
        let of_w = twice(&h).t().unwrap().matmul(&x).unwrap();
        let of_w = of_w.add(&twice(&x).t().unwrap().matmul(&h).unwrap()).unwrap();
        assert!(found[1].all_close(&of_w, 1e-4, 1e-4).unwrap());
    }

    /// So that modules of a few rows each give what they give a whole batch.
    #[test]
    fn a_token_has_the_same_bits_whatever_tokens_are_beside_it() {
        let kinds = [Kind::Float, Kind::BFloat16];
        let shapes = [(100, 784), (37, 1500), (16, 40), (13, 4200)];
        for ((out, width), kind) in shapes.iter().flat_map(|s| kinds.map(|kind| (*s, kind))) {
            let of = |shape: &[i64], name| random(shape, name).to_kind(kind).unwrap();
            let (x, w, b) = (of(&[300, width], "x"), of(&[out, width], "w"), of(&[out], "b"));
            let Some(all) = ffi::linear(&x, &w, Some(&b), false).unwrap() else { continue };
            for (first, rows) in [(0, 2), (7, 3), (20, 24), (33, 25), (100, 40), (3, 290)] {
                let few = x.narrow(0, first, rows).unwrap();
                let few = ffi::linear(&few, &w, Some(&b), false).unwrap().unwrap();
                assert!(few.bit_equal(&all.narrow(0, first, rows).unwrap()).unwrap(), "{rows}");
            }
        }
    }

    #[test]
    fn relu_in_the_same_pass_is_relu_after_it() {
        for (tokens, out) in [(5, 30), (40, 30), (300, 70)] {
            let (x, w, b) =
                (random(&[tokens, 40], "x"), random(&[out, 40], "w"), random(&[out], "b"));
            let g = random(&[tokens, out], "g").to_kind(Kind::Float).unwrap();
            let (x32, w32, b32) = (leaf(&x), leaf(&w), leaf(&b));
            let leaves = [&x32, &w32, &b32];
            let apart = by_products(&x32, &w32, Some(&b32)).relu().unwrap();
            let fused = ffi::linear(&x32, &w32, Some(&b32), true).unwrap();
            let fused = fused.unwrap_or_else(|| x32.linear_relu(&w32, Some(&b32)).unwrap());
            assert!(fused.bit_equal(&apart).unwrap());
            let (a, f) = (gradients(&apart, &g, &leaves), gradients(&fused, &g, &leaves));
            assert!(a.iter().zip(&f).all(|(a, f)| a.bit_equal(f).unwrap()));
        }
        // The gradient of a gradient: of z = Σ max(0, W x)², 2 Wᵀ D W x with D = [W x > 0].
        let (x, w, h) = (random(&[5, 40], "x"), random(&[30, 40], "w"), random(&[5, 40], "h"));
        let (x32, w32) = (leaf(&x), leaf(&w));
        let y = x32.linear_relu(&w32, None).unwrap();
        let z = y.mul(&y).unwrap().sum().unwrap();
        let first = z.gradients(&[&x32], true).unwrap().remove(0).unwrap();
        let found = gradients(&first, &h.to_kind(Kind::Float).unwrap(), &[&x32]).remove(0);
        let open = x.matmul(&w.t().unwrap()).unwrap().gt_scalar(0.0).unwrap();
        let through = h.matmul(&w.t().unwrap()).unwrap();
        let through = through.mul(&open.to_kind(Kind::Double).unwrap()).unwrap();
        let exact = through.matmul(&w).unwrap().mul_scalar(2.0).unwrap();
        assert!(found.all_close(&exact, 1e-4, 1e-4).unwrap());
        // What is no number stays none.
        let nan = x32.mul_scalar(f64::NAN).unwrap().linear_relu(&w32, None).unwrap();
        assert!(nan.to_vec::<f32>().unwrap().iter().all(|v| v.is_nan()));
    }

    #[test]
    fn a_gradient_may_come_from_memory_in_any_order() {
        let (x, w) = (random(&[6, 40], "x"), random(&[30, 40], "w"));
        let (x32, w32) = (leaf(&x), leaf(&w));
        let y = by_products(&x32, &w32, None);
        // The gradient of a sum is one number for all places, that of a transposed one lies turned.
        let ones = Tensor::ones(&[6, 30], Kind::Double, Device::Cpu).unwrap();
        let (_, exact_of_sum) = exact(&x, &w, None, &ones);
        let found = y.sum().unwrap().gradients(&[&x32, &w32], true).unwrap();
        for (found, exact) in found.iter().zip(&exact_of_sum) {
            assert!(lost(found.as_ref().unwrap(), exact, 30) < 1.0);
        }
        let y = by_products(&x32, &w32, None);
        let g = random(&[30, 6], "g");
        let (_, exact_of_turned) = exact(&x, &w, None, &g.t().unwrap());
        let turned = y.t().unwrap();
        let found = gradients(&turned, &g.to_kind(Kind::Float).unwrap(), &[&x32, &w32]);
        for (found, exact) in found.iter().zip(&exact_of_turned) {
            assert!(lost(found, exact, 30) < 1.0);
        }
    }

    #[test]
    fn processors_are_known_by_vendor_extension_and_family() {
        let way = |vendor: &str, family: &str, flags: &str| {
            way_of(&format!("vendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n"))
        };
        assert_eq!(way("AuthenticAMD", "26", "fpu avx512f"), Way::Convolutions);
        assert_eq!(way("AuthenticAMD", "25", "fpu avx512f"), Way::Products);
        assert_eq!(way("AuthenticAMD", "25", "fpu avx2"), Way::Libtorch);
        assert_eq!(way("GenuineIntel", "6", "fpu avx512f"), Way::Libtorch);
        assert_eq!(way_of(""), Way::Libtorch);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused_as_ever() {
        let x = random(&[64, 96], "x").to_kind(Kind::Float).unwrap();
        let w = random(&[80, 95], "w").to_kind(Kind::Float).unwrap();
        let e = x.linear(&w, None).unwrap_err().to_string();
        assert!(e.contains("linear on f32[64, 96], f32[80, 95]"), "{e}");
    }
}
