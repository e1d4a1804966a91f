//! AdaMerging against derivatives by differences, and the trimming of its task vectors against a plain
//! program.

#![allow(clippy::unwrap_used)]

use modl_core::{Device, Init, Kind, Result, Seed, Tensor, Tensors};
use modl_train::{AdaMerging, Factors, entropy, task_vectors, trimmed};

fn draw(shape: &[i64], seed: u64) -> Tensor {
    Init::Normal(0.6).tensor(shape, Seed(seed), Kind::Double, Device::Cpu).unwrap()
}

/// x → W₁ tanh(W₀ x).
fn model(seed: u64) -> Tensors {
    Tensors::new().with("0", draw(&[6, 4], seed)).with("1", draw(&[3, 6], seed + 50))
}

fn loss(model: &Tensors) -> Result<Tensor> {
    let x = draw(&[20, 4], 99).mul_scalar(2.0)?;
    entropy(&x.linear(model.need("0")?, None)?.tanh()?.linear(model.need("1")?, None)?)
}

/// θ₀ + Σ λτ by hand.
fn at(base: &Tensors, vectors: &[Tensors], lambda: &[[f64; 2]]) -> Tensors {
    let mut n = 0;
    base.map(|name, t| {
        let mut sum = t.clone();
        for (v, l) in vectors.iter().zip(lambda) {
            sum = sum.add(&v.need(name)?.mul_scalar(l[n])?)?;
        }
        n += 1;
        Ok(sum)
    })
    .unwrap()
}

#[test]
fn the_first_step_goes_against_the_derivative_of_each_factor() -> Result<()> {
    let base = model(1);
    let vectors = task_vectors(&base, &[model(2), model(3)])?;
    let lr = 1e-3;
    let run = AdaMerging { lr, steps: 1, ..AdaMerging::default() };
    let found = run.run(&base, &vectors, |_, m| loss(m))?;
    let value = |l: &[[f64; 2]]| loss(&at(&base, &vectors, l)).unwrap().item().unwrap();
    assert!((found.curve[0] - value(&[[0.3; 2]; 2])).abs() < 1e-7);
    for t in 0..2 {
        for l in 0..2 {
            let moved = |by: f64| {
                let mut all = [[0.3; 2]; 2];
                all[t][l] += by;
                value(&all)
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            assert!(slope.abs() > 1e-4, "the test would say nothing");
            // Adam's first step is η in the direction of the sign.
            let step = found.factors[t][l] - 0.3;
            assert!((step + lr * slope.signum()).abs() < 1e-6, "{step} {slope}");
        }
    }
    // One factor for each task: the sum of the derivatives.
    let tasks = AdaMerging { factors: Factors::Tasks, ..run };
    let found = tasks.run(&base, &vectors, |_, m| loss(m))?;
    assert_eq!(found.factors.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
    for t in 0..2 {
        let moved = |by: f64| {
            let mut all = [[0.3; 2]; 2];
            all[t] = [0.3 + by; 2];
            value(&all)
        };
        let step = found.factors[t][0] - 0.3;
        assert!((step + lr * (moved(1e-4) - moved(-1e-4)).signum()).abs() < 1e-6);
    }
    Ok(())
}

#[test]
fn the_entropy_falls_within_the_bounds_and_nothing_else_is_trained() -> Result<()> {
    let base = model(1);
    let before: Vec<Tensor> = base.iter().map(|(_, t)| t.copy().unwrap()).collect();
    let vectors = task_vectors(&base, &[model(2), model(3)])?;
    let run = AdaMerging { lr: 0.05, steps: 80, ..AdaMerging::default() };
    let found = run.run(&base, &vectors, |_, m| loss(m))?;
    let (first, last) = (found.curve[0], loss(&found.model)?.item()?);
    assert!(last < 0.8 * first, "{first} {last}");
    assert!(found.factors.iter().flatten().all(|l| (0.0..=1.0).contains(l)), "{:?}", found.factors);
    let lambda: Vec<[f64; 2]> = found.factors.iter().map(|f| [f[0], f[1]]).collect();
    let by_hand = at(&base, &vectors, &lambda);
    assert!(found.model.need("1")?.max_abs_diff(by_hand.need("1")?)? < 1e-6);
    for ((_, t), b) in base.iter().zip(&before) {
        assert!(t.bit_equal(b)? && !t.requires_grad());
    }
    assert!(!found.model.need("0")?.requires_grad());

    let apart = run.run(&base, &vectors, |_, _| draw(&[], 1).square()).unwrap_err().to_string();
    assert!(apart.contains("does not depend"), "{apart}");
    assert!(run.run(&base, &[], |_, m| loss(m)).is_err());
    let other = Tensors::new().with("0", draw(&[2, 2], 1)).with("1", draw(&[3, 6], 1));
    assert!(run.run(&base, &[other], |_, m| loss(m)).is_err());
    Ok(())
}

#[test]
fn entropy_is_that_of_the_probabilities() -> Result<()> {
    let p = [[0.5f64, 0.25, 0.25], [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]];
    let flat: Vec<f64> = p.iter().flatten().map(|p| p.ln() + 3.0).collect();
    let found = entropy(&Tensor::from_slice(&flat, &[2, 3], Device::Cpu)?)?.item()?;
    let expected = (1.5 * 2f64.ln() + 3f64.ln()) / 2.0;
    assert!((found - expected).abs() < 1e-12);
    Ok(())
}

#[test]
fn trimming_keeps_the_largest_that_have_the_elected_sign() -> Result<()> {
    let vectors: Vec<Tensors> = (0..3)
        .map(|s| Tensors::new().with("a", draw(&[5, 4], s)).with("b", draw(&[10], s + 20)))
        .collect();
    let flat = |v: &Tensors| -> Vec<f64> {
        v.iter().flat_map(|(_, t)| t.reshape(&[-1]).unwrap().to_vec::<f64>().unwrap()).collect()
    };
    let whole: Vec<Vec<f64>> = vectors.iter().map(flat).collect();
    let mut kept = whole.clone();
    for tau in &mut kept {
        let mut sizes: Vec<f64> = tau.iter().map(|t| t.abs()).collect();
        sizes.sort_by(|a, b| b.total_cmp(a));
        tau.iter_mut().for_each(|t| {
            if t.abs() < sizes[5] {
                *t = 0.0
            }
        }); // 6 of 30
    }
    let sums: Vec<f64> = (0..30).map(|n| kept.iter().map(|t| t[n]).sum()).collect();
    let found = trimmed(&vectors, 0.2)?;
    for (f, k) in found.iter().map(flat).zip(&kept) {
        for (n, (f, k)) in f.iter().zip(k).enumerate() {
            let expected = if k * sums[n] > 0.0 { *k } else { 0.0 };
            assert_eq!(*f, expected, "{n}");
        }
    }
    assert_eq!(found[0].need("a")?.size(), [5, 4]);
    // All of one task is itself.
    let alone = trimmed(&vectors[..1], 1.0)?;
    assert_eq!(flat(&alone[0]), whole[0]);
    assert!(trimmed(&vectors, 0.0).is_err() && trimmed(&vectors, 1.1).is_err());
    Ok(())
}

/// Adam as Kingma and Ba have it, on derivatives by differences, all in f64.
#[test]
fn many_steps_go_as_adam_goes_on_differences_of_the_entropy() -> Result<()> {
    let base = model(1);
    let vectors = task_vectors(&base, &[model(2), model(3)])?;
    let (lr, steps) = (0.02, 40);
    let run = AdaMerging { lr, steps, ..AdaMerging::default() };
    let found = run.run(&base, &vectors, |_, m| loss(m))?;
    let value = |l: &[f64]| -> f64 {
        let l: Vec<f64> = l.iter().map(|l| l.clamp(0.0, 1.0)).collect();
        loss(&at(&base, &vectors, &[[l[0], l[1]], [l[2], l[3]]])).unwrap().item().unwrap()
    };
    let (mut lambda, mut m, mut v) = ([0.3; 4], [0.0; 4], [0.0; 4]);
    for step in 0..steps as i32 {
        let at = lambda;
        assert!((found.curve[step as usize] - value(&at)).abs() < 1e-5, "step {step}");
        for i in 0..4 {
            let moved = |by: f64| {
                let mut all = at;
                all[i] += by;
                value(&all)
            };
            let g = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            let (m, v) =
                (m[i] / (1.0 - 0.9f64.powi(step + 1)), v[i] / (1.0 - 0.999f64.powi(step + 1)));
            lambda[i] -= lr * m / (v.sqrt() + 1e-8);
        }
    }
    let far = lambda.iter().any(|l| (l - 0.3).abs() > 0.2);
    assert!(far, "the test would say little: {lambda:?}");
    for (f, l) in found.factors.iter().flatten().zip(lambda) {
        assert!((f - l.clamp(0.0, 1.0)).abs() < 1e-4, "{f} {l}");
    }
    Ok(())
}

#[test]
fn the_minimum_is_found_where_it_is_known() -> Result<()> {
    let number = |x: f64| Tensor::from_slice(&[x], &[1], Device::Cpu);
    let base = Tensors::new().with("w", number(0.0)?);
    let vectors = [Tensors::new().with("w", number(1.0)?)];
    let run = AdaMerging { lr: 0.01, steps: 400, ..AdaMerging::default() };
    let rows = |margins: &[Tensor]| -> Result<Tensor> {
        let margins = Tensor::stack(margins, 0)?; // [rows, 1]
        entropy(&Tensor::cat(&[margins.clone(), margins.zeros_like()?], 1)?)
    };
    // Margins 6λ and 6(1 − λ): by symmetry 1⁄2 is stationary, and a minimum, since a binary entropy
    // of margin m is convex from m tanh(m⁄2) = 1 on, m = 1.54.
    let both = |_: u64, m: &Tensors| {
        let w = m.need("w")?;
        rows(&[w.mul_scalar(6.0)?, w.neg()?.add_scalar(1.0)?.mul_scalar(6.0)?])
    };
    let found = run.run(&base, &vectors, both)?;
    assert!((found.factors[0][0] - 0.5).abs() < 1e-3, "{:?}", found.factors);
    // Of one margin alone the entropy falls as far as λ may go.
    let found = run.run(&base, &vectors, |_, m| rows(&[m.need("w")?.mul_scalar(6.0)?]))?;
    assert_eq!(found.factors, [[1.0]]);
    Ok(())
}
