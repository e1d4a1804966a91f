//! Noisy top-k: weights, importance, and the load against a simulation.

use modl_core::{Context, Device, Kind, Tensor};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::support::*;

/// A small generator of the test's own (xorshift), and normal numbers by Marsaglia's polar method.
struct Dice(u64);

impl Dice {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        loop {
            let (a, b) = (2.0 * self.uniform() - 1.0, 2.0 * self.uniform() - 1.0);
            let s = a * a + b * b;
            if s > 0.0 && s < 1.0 {
                return a * (-2.0 * s.ln() / s).sqrt();
            }
        }
    }
}

const CLEAN: [f64; 5] = [0.9, 0.4, 0.0, -0.3, 0.7];
const RAW_NOISE: [f64; 5] = [0.5, -1.0, 0.3, 1.5, -0.2];

fn ones(n: i64) -> Tensor {
    Tensor::ones(&[n, 1], Kind::Double, Device::Cpu).unwrap()
}

fn shazeer(k: usize) -> Made {
    let config = json!({"type": "noisy_top_k", "k": k, "bias": false});
    let made = Made::new(config, 5, 1).unwrap();
    made.set("router.weight", &CLEAN);
    made.set("router.noise", &RAW_NOISE);
    made
}

#[test]
fn the_load_is_how_often_modules_would_be_chosen() {
    let n = 10_000;
    for k in [1, 2, 4] {
        let routing = shazeer(k).routed(&ones(n), &training(3));
        let load = noted(&routing, "load");

        let sigma = RAW_NOISE.map(|r| (1.0 + r.exp()).ln() + 0.01);
        let (mut dice, mut times, draws) = (Dice(88_172_645_463_325_252), [0.0; 5], 400_000);
        for _ in 0..draws {
            let h: Vec<f64> =
                CLEAN.iter().zip(&sigma).map(|(l, s)| l + s * dice.normal()).collect();
            top(&h, k).iter().for_each(|j| times[*j] += 1.0);
        }
        for (j, (load, times)) in load.iter().zip(&times).enumerate() {
            let expected = times / f64::from(draws) * n as f64;
            assert!((load / expected - 1.0).abs() < 0.02, "{k}, {j}: {load} for {expected}");
        }
        // In all, k choices a row; and the loss is of these numbers.
        assert!((load.iter().sum::<f64>() / (k as f64 * n as f64) - 1.0).abs() < 0.01);
        assert!((loss(&routing, "load").item().unwrap() - cv2(&load)).abs() < 1e-12);
    }
}

#[test]
fn each_chance_is_that_of_beating_the_kth_of_the_others() {
    // One row, whose noise can be read off its weights: H of the two kept up to a constant, and so
    // nothing of the others; hence all modules but one are kept.
    let (m, k) = (5, 4);
    let made = shazeer(k);
    for step in 0..20 {
        let routing = made.routed(&ones(1), &training(step));
        let (index, weight) = sparse(&routing);
        let load = noted(&routing, "load");
        let out = (0..m).find(|j| !index[0].contains(&(*j as i64))).unwrap();
        // The one left out has to beat the least H that is kept. All chances of the kept ones lie
        // on one line Φ((ℓⱼ − H_out) ⁄ σⱼ); solve for H_out by one, and predict the others.
        let sigma = RAW_NOISE.map(|r| (1.0 + r.exp()).ln() + 0.01);
        let of = |j: usize, to_beat: f64| phi((CLEAN[j] - to_beat) / sigma[j]);
        let even = |j: &i64| ((load[*j as usize] - 0.5).abs() * 1e9) as i64;
        let first = *index[0].iter().min_by_key(|j| even(j)).unwrap() as usize;
        let h_out = bisect(|h| of(first, h) - load[first]);
        for j in index[0].iter().map(|j| *j as usize) {
            assert!((load[j] - of(j, h_out)).abs() < 1e-5, "{j}: {}", load[j]);
        }
        // The least kept H by the chance of the one that is out; H of the others by their weights.
        let least = bisect(|h| of(out, h) - load[out]);
        assert!(least > h_out);
        close(&[weight[0].iter().sum::<f64>()], &[1.0], 1e-12);
    }
}

/// Φ by Simpson's rule.
fn phi(z: f64) -> f64 {
    let density = |t: f64| (-t * t / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let (low, n) = (-10.0, 4000);
    let h = (z - low) / f64::from(n);
    let inner: f64 =
        (1..n).map(|i| density(low + h * f64::from(i)) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    (density(low) + inner + density(z)) * h / 3.0
}

/// Where a falling function is 0.
fn bisect(f: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = (-20.0, 20.0);
    for _ in 0..80 {
        let mid = (low + high) / 2.0;
        if f(mid) > 0.0 { low = mid } else { high = mid }
    }
    low
}

#[test]
fn both_losses_are_zero_only_if_all_have_the_same() {
    // All kept and equal scores without noise to speak of: uniform.
    let config = json!({"type": "noisy_top_k", "k": 3, "bias": false, "noise_epsilon": 0.0});
    let made = Made::new(config, 3, 1).unwrap();
    made.set("router.noise", &[-80.0; 3]);
    let losses = |w: &[f64]| {
        made.set("router.weight", w);
        let routing = made.routed(&ones(8), &training(0));
        let item = |name: &str| loss(&routing, name).item().unwrap();
        (item("importance"), item("load"))
    };
    let (importance, load) = losses(&[0.4; 3]);
    assert!(importance < 1e-20 && load == 0.0);
    // All are chosen, but one weighs more.
    let (importance, load) = losses(&[0.4, 0.4, 1.4]);
    let alpha = softmax(&[0.4, 0.4, 1.4]);
    assert!((importance - cv2(&alpha)).abs() < 1e-12 && importance > 0.1 && load == 0.0);
}

#[test]
fn the_load_has_a_gradient_where_hard_counts_have_none() {
    for config in [
        json!({"type": "noisy_top_k", "bias": false}),
        json!({"type": "noisy_top_k", "bias": false, "variant": "v_moe"}),
    ] {
        let made = Made::new(config, 5, 1).unwrap();
        made.set("router.weight", &CLEAN);
        let routing = made.routed(&ones(64), &training(0));
        let g = gradient(&loss(&routing, "load"), &made.param("router.weight"));
        // Less score for the module that has most.
        assert!(g[0] > 1e-3 && g.iter().all(|g| g.is_finite()), "{g:?}");
    }
}

#[test]
fn v_moe_has_fixed_noise_and_the_probabilities_of_all() {
    let config = json!({"type": "noisy_top_k", "variant": "v_moe", "bias": false});
    let made = Made::new(config, 5, 1).unwrap();
    made.set("router.weight", &CLEAN);
    let quiet = sparse(&made.routed(&ones(1), &Context::eval()));
    let p = softmax(&CLEAN);
    assert_eq!(quiet.0, [[0, 4]]);
    close(&quiet.1[0], &[p[0], p[4]], 1e-12);
    // With all kept, ln of the ratio of two weights is ℓ₀ − ℓ₄ plus noise of variance 2 ⁄ m².
    let config = json!({"type": "noisy_top_k", "variant": "v_moe", "bias": false, "k": 5});
    let all = Made::new(config, 5, 1).unwrap();
    all.set("router.weight", &CLEAN);
    let n = 4000;
    let alpha = all.alphas(&ones(n), &training(0));
    let ratios: Vec<f64> = alpha.iter().map(|a| (a[0] / a[4]).ln()).collect();
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    let variance = ratios.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / ratios.len() as f64;
    assert!((mean - 0.2).abs() < 0.015, "{mean}");
    assert!((variance / (2.0 / 25.0) - 1.0).abs() < 0.15, "{variance}");
    let routing = made.routed(&ones(n), &training(0));
    assert!((loss(&routing, "importance").item().unwrap() - cv2(&p)).abs() < 1e-9);
}

#[test]
fn at_the_start_noise_alone_decides_and_evaluation_is_quiet() {
    let made = Made::new(json!({"type": "noisy_top_k", "input": "tokens"}), 4, 6).unwrap();
    let x = normal(&[10, 40, 6], 2);
    let (index, _) = sparse(&made.routed(&x, &training(0)));
    for j in 0..4 {
        // Each is one of two of four: 200 of 400, with a standard deviation of 10.
        let times = index.iter().filter(|i| i.contains(&j)).count();
        assert!((160..240).contains(&times), "{j}: {times}");
    }
    let quiet = made.alphas(&x, &Context::eval());
    assert_eq!(quiet, made.alphas(&x, &Context::eval()));
    // Ties do not all go to the same two.
    for j in 0..4 {
        assert!(quiet.iter().filter(|a| a[j] > 0.0).count() > 40);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn weights_and_importance_are_their_formulas(
        w in prop::collection::vec(-2.0f64..2.0, 12),
        x in prop::collection::vec(-2.0f64..2.0, 18),
        k in 1..=4usize,
    ) {
        let config: Value = json!({"type": "noisy_top_k", "k": k, "bias": false});
        let made = Made::new(config, 4, 3).unwrap();
        made.set("router.weight", &w);
        let x_tensor = t(&x, &[6, 3]);
        let expected: Vec<Vec<f64>> = x.chunks(3).map(|x| {
            let l: Vec<f64> =
                w.chunks(3).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
            let kept = top(&l, k);
            let p = softmax(&kept.iter().map(|j| l[*j]).collect::<Vec<_>>());
            let at = |j| kept.iter().position(|i| *i == j).map_or(0.0, |at| p[at]);
            (0..4).map(at).collect()
        }).collect();
        let found = made.alphas(&x_tensor, &Context::eval());
        close(&found.concat(), &expected.concat(), 1e-12);

        // In training: at most k, sum 1, importance of what came out.
        let routing = made.routed(&x_tensor, &training(1));
        let alpha = rows(&routing.dense(Kind::Double, Device::Cpu).unwrap());
        prop_assert!(alpha.iter().all(|a| a.iter().filter(|w| **w != 0.0).count() <= k));
        prop_assert!(alpha.iter().all(|a| (a.iter().sum::<f64>() - 1.0).abs() < 1e-12));
        let sums: Vec<f64> = (0..4).map(|j| alpha.iter().map(|a| a[j]).sum()).collect();
        prop_assert!((loss(&routing, "importance").item().unwrap() - cv2(&sums)).abs() < 1e-10);
    }
}
