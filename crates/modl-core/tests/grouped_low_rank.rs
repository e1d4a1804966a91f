//! Low-rank modules on the tokens that chose them against the formula in libtorch's operations.
#![allow(clippy::unwrap_used, clippy::panic)]

use modl_core::testing::{Given, Sum};
use modl_core::{
    Bank, Base, Context, Device, Host, Init, Kind, LowRank, ModularLayer, Result, Seed, Signal,
    Site, SiteKind, Tensor, Tensors, Weights, no_grad, set_threads,
};

const MODULES: usize = 5;

fn draw(name: &str, shape: &[i64], kind: Kind) -> Tensor {
    Init::Normal(0.5).tensor(shape, Seed(5).child(name), kind, Device::Cpu).unwrap()
}

fn leaf(name: &str, shape: &[i64], kind: Kind) -> Tensor {
    let t = draw(name, shape, kind);
    t.set_requires_grad(true).unwrap();
    t
}

/// Tokens, widths, ranks of the modules, choices for each token.
struct World {
    x: Tensor,
    factors: Vec<(Tensor, Tensor)>,
    index: Tensor,
    alpha: Tensor,
    theta: Tensors,
    site: Site,
}

type F = fn(&Tensors, &Signal, &Context) -> Result<Signal>;

/// A function whose backward pass looks at its output.
fn bent(theta: &Tensors, x: &Signal, _: &Context) -> Result<Signal> {
    Ok(x.replace(x.x.linear(theta.need("weight")?, None)?.tanh()?))
}

/// A function without a product: how libtorch divides those among threads is its own affair.
fn repeated(_: &Tensors, x: &Signal, _: &Context) -> Result<Signal> {
    let more = x.x.narrow(-1, 0, 328 - 200)?;
    Ok(x.replace(Tensor::cat(&[x.x.clone(), more], -1)?.tanh()?))
}

/// A function that is exact in any kind, for outputs up to twice as wide as x.
fn doubled(theta: &Tensors, x: &Signal, _: &Context) -> Result<Signal> {
    let more = theta.need("weight")?.len_of(0) - x.x.len_of(-1);
    Ok(x.replace(Tensor::cat(&[x.x.clone(), x.x.narrow(-1, 0, more)?], -1)?))
}

fn world(tokens: i64, (input, output): (i64, i64), kind: Kind) -> World {
    let factors = (0..MODULES as i64).map(|j| {
        let rank = [1, 8, 4, 7, 3][j as usize];
        // One of them as a view that is not contiguous, as merged and sliced factors are.
        let down = match j {
            2 => leaf("down 2", &[input, rank], kind).t().unwrap(),
            _ => leaf(&format!("down {j}"), &[rank, input], kind),
        };
        (down, leaf(&format!("up {j}"), &[output, rank], kind))
    });
    // Module 4 is nobody's, module 0 has many tokens, and every seventh choice is dropped.
    let choose = |s: i64| if s % 7 == 3 { -1 } else { [0, 0, 1, 3, 0, 2][(s % 6) as usize] };
    let index: Vec<i64> = (0..2 * tokens).map(choose).collect();
    World {
        x: leaf("x", &[1, tokens, input], kind),
        factors: factors.collect(),
        index: Tensor::from_slice(&index, &[1, tokens, 2], Device::Cpu).unwrap(),
        alpha: leaf("alpha", &[1, tokens, 2], kind),
        theta: Tensors::new().with("weight", draw("weight", &[output, input], kind)),
        site: Site { path: "s".into(), kind: SiteKind::Linear, input, output, index: 0 },
    }
}

impl World {
    /// The same numbers, as far as they fit: x in one kind, factors in one, and α in one.
    fn in_kinds(&self, x: Kind, factors: Kind, alpha: Kind) -> World {
        let own = |t: &Tensor, kind| {
            let t = t.detach().unwrap().to_kind(kind).unwrap();
            t.set_requires_grad(true).unwrap();
            t
        };
        World {
            x: own(&self.x, x),
            factors: self.factors.iter().map(|(a, b)| (own(a, factors), own(b, factors))).collect(),
            index: self.index.clone(),
            alpha: own(&self.alpha, alpha),
            theta: self.theta.clone(),
            site: self.site.clone(),
        }
    }

    fn leaves(&self) -> Vec<&Tensor> {
        let factors = self.factors.iter().take(4).flat_map(|(a, b)| [a, b]);
        factors.chain([&self.x, &self.alpha]).collect()
    }

    /// The leaves that some token reaches: one or two choose too few modules.
    fn reached(&self) -> Vec<&Tensor> {
        match self.x.len_of(1) > 2 {
            true => self.leaves(),
            false => vec![&self.x, &self.alpha],
        }
    }

    fn fast(&self, f: F) -> Result<Tensor> {
        let mut bank = Bank::new();
        for (j, (down, up)) in self.factors.iter().enumerate() {
            let (down, up, scale) = (down.clone(), up.clone(), 0.5 + j as f64);
            bank.insert(format!("{j}"), Box::new(LowRank { down, up, scale }))?;
        }
        let sparse = Weights::Sparse { index: self.index.clone(), weight: self.alpha.clone() };
        let layer = ModularLayer::new(bank, Given(sparse), Sum(Base::Kept));
        let host = Host::new(&self.site, &self.theta, &f);
        Ok(layer.forward(&host, &Signal::from(self.x.clone()), &Context::eval())?.x)
    }

    /// y = f(x) + Σⱼ (Σ over choices of j of α) · scaleⱼ Bⱼ Aⱼ x, every module on every token.
    fn formula(&self, f: F) -> Result<Tensor> {
        let y = f(&self.theta, &Signal::from(self.x.clone()), &Context::eval())?.x;
        (0..MODULES).zip(&self.factors).try_fold(y, |y, (j, (a, b))| {
            let own = self.index.equal(&Tensor::full(&[], j as f64, Kind::Int64, Device::Cpu)?)?;
            let own = own.to_kind(self.x.kind())?.mul(&self.alpha)?.sum_dims(&[-1], true)?;
            let change = self.x.matmul(&a.t()?)?.matmul(&b.t()?)?;
            y.add(&change.mul(&own)?.mul_scalar(0.5 + j as f64)?)
        })
    }
}

fn largest(t: &Tensor) -> Result<f64> {
    Ok(t.to_vec::<f64>()?.into_iter().fold(0.0, |all, v| all.max(v.abs())))
}

/// Gradients of y's inner product with a probe, themselves differentiable or not.
fn gradients_by(
    probe: &Tensor,
    y: &Tensor,
    of: &[&Tensor],
    differentiable: bool,
) -> Result<Vec<Tensor>> {
    let loss = y.mul(probe)?.sum()?;
    Ok(loss.gradients(of, differentiable)?.into_iter().map(|g| g.unwrap()).collect())
}

fn gradients(y: &Tensor, of: &[&Tensor]) -> Result<Vec<Tensor>> {
    gradients_by(&draw("probe", &y.size(), y.kind()), y, of, false)
}

/// Widths that fill vectors and panels and that do not, one token and more than a thread takes at
/// once.
#[test]
fn values_and_gradients_are_the_formulas() -> Result<()> {
    set_threads(3);
    for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
        for widths in [(5, 6), (64, 48), (531, 37), (37, 1100)] {
            for tokens in [1, 2, 6, 333] {
                let w = world(tokens, widths, kind);
                // Sums over so many tokens and columns are large; what counts is the error in them.
                let close = |a: &Tensor, b: &Tensor| -> Result<bool> {
                    let scale = largest(b)?.max(1.0);
                    a.all_close(b, tolerance * scale, tolerance)
                };
                let what = format!("{kind:?}, {widths:?}, {tokens} tokens");
                let (fast, plain) = (w.fast(bent)?, w.formula(bent)?);
                assert!(close(&fast, &plain)?, "{what}");
                let of = w.reached();
                for (a, b) in gradients(&fast, &of)?.iter().zip(gradients(&plain, &of)?) {
                    assert!(close(a, &b)?, "{what}: {a:?}");
                }
                let silent = no_grad(|| w.fast(bent))?;
                assert!(!silent.requires_grad() && silent.bit_equal(&fast.detach()?)?, "{what}");
            }
        }
    }
    Ok(())
}

/// Rows of bf16 beside the same numbers in f64: y is rounded once for each of two choices, x's gradient
/// for each and where it meets the one of f; what stays in f32 is not rounded to bf16 at all.
#[test]
fn bf16_rows_are_rounded_where_changes_are_added() -> Result<()> {
    set_threads(3);
    let (round, short) = (2f64.powi(-8), 1e-5);
    for factors in [Kind::Float, Kind::BFloat16] {
        for widths in [(64, 96), (531, 600), (37, 38)] {
            for tokens in [1, 2, 6, 333] {
                let w = world(tokens, widths, Kind::Double);
                let w = w.in_kinds(Kind::BFloat16, factors, Kind::Float);
                let exact = w.in_kinds(Kind::Double, Kind::Double, Kind::Double);
                let what = format!("{factors:?}, {widths:?}, {tokens} tokens");
                let check = |a: &Tensor, b: &Tensor, error: f64| -> Result<()> {
                    let error = error * largest(b)?.max(1.0);
                    let within = a.to_kind(Kind::Double)?.all_close(b, error, 0.0)?;
                    assert!(within, "{what}: {a:?}");
                    Ok(())
                };
                let (fast, plain) = (w.fast(doubled)?, exact.formula(doubled)?);
                check(&fast, &plain, 2.0 * round)?;
                let probe = draw("probe", &fast.size(), Kind::BFloat16);
                let wide = probe.to_kind(Kind::Double)?;
                let expected = gradients_by(&wide, &plain, &exact.reached(), false)?;
                for differentiable in [false, true] {
                    let y = w.fast(doubled)?;
                    let found = gradients_by(&probe, &y, &w.reached(), differentiable)?;
                    for (a, b) in found.iter().zip(&expected) {
                        let unrounded = a.kind() == Kind::Float;
                        check(&a.detach()?, b, if unrounded { short } else { 4.0 * round })?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_number_of_threads_changes_no_bit() -> Result<()> {
    let run = |threads| -> Result<Vec<Tensor>> {
        set_threads(threads);
        let w = world(700, (200, 328), Kind::Float);
        let y = w.fast(repeated)?;
        let mut all = gradients(&y, &w.leaves())?;
        all.push(y.detach()?);
        Ok(all)
    };
    let expected = run(1)?;
    for threads in [2, 3, 5] {
        for (a, b) in run(threads)?.iter().zip(&expected) {
            assert!(a.bit_equal(b)?, "{threads} threads: {a:?}");
        }
    }
    Ok(())
}

/// f may hand on what others have, which must not change.
#[test]
fn what_others_have_is_not_written() -> Result<()> {
    let w = world(9, (12, 12), Kind::Double);
    let before = w.x.to_vec::<f64>()?;
    let same: F = |_, x, _| Ok(x.clone());
    let view: F = |_, x, _| Ok(x.replace(x.x.narrow(0, 0, 1)?));
    for f in [same, view] {
        for y in [w.fast(f)?, no_grad(|| w.fast(f))?] {
            assert!(y.all_close(&w.formula(f)?, 1e-12, 1e-12)?);
            assert_eq!(w.x.to_vec::<f64>()?, before);
        }
    }
    Ok(())
}

#[test]
fn gradients_have_gradients() -> Result<()> {
    set_threads(2);
    let w = world(11, (6, 7), Kind::Double);
    let twice = |y: Tensor| -> Result<Vec<Tensor>> {
        let of = w.leaves();
        let squares = y.mul(&y)?.sum()?.gradients(&of, true)?;
        let sum = squares.iter().flatten().try_fold(y.sum()?, |s, g| s.add(&g.mul(g)?.sum()?))?;
        Ok(sum.gradients(&of, false)?.into_iter().map(|g| g.unwrap()).collect())
    };
    for (a, b) in twice(w.fast(bent)?)?.iter().zip(twice(w.formula(bent)?)?) {
        let scale = largest(&b)?;
        assert!(a.all_close(&b, 1e-10 * scale, 1e-10)?, "{a:?}");
    }
    Ok(())
}

#[test]
fn factors_that_do_not_fit_are_refused() -> Result<()> {
    let mut w = world(4, (6, 7), Kind::Double);
    w.factors[0].0 = draw("short", &[2, 5], Kind::Double);
    let e = w.fast(bent).unwrap_err().to_string();
    assert!(e.contains("low-rank modules") && e.contains("do not fit"), "{e}");
    Ok(())
}
