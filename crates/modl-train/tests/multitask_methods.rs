//! The methods that make one step of several tasks' losses and gradients, against closed forms, brute
//! force and the properties that their papers state.
#![allow(clippy::unwrap_used, clippy::panic)]

use modl_core::{Device, Init, Kind, Seed, Tensor};
use modl_train::Sampling;
use modl_train::joint::{
    Form, Gram, TaskGradients, cagrad, dwa_weights, gradnorm_slopes, mgda, nash_bargain, nash_mtl,
    pcgrad,
};
use rand::Rng;
use rand::distributions::{Distribution, WeightedIndex};

type Vectors = Vec<Vec<f64>>;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn combine(vectors: &Vectors, w: &[f64]) -> Vec<f64> {
    let at = |k: usize| vectors.iter().zip(w).map(|(g, w)| w * g[k]).sum();
    (0..vectors[0].len()).map(at).collect()
}

fn gram(vectors: &Vectors) -> Gram {
    let row = |a: &Vec<f64>| vectors.iter().map(|b| dot(a, b)).collect();
    Gram::new(&vectors.iter().map(row).collect::<Vec<_>>()).unwrap()
}

/// Gradients whose lengths differ by up to a factor of 100.
fn vectors(tasks: usize, dim: usize, seed: u64) -> Vectors {
    let mut rng = Seed(seed).rng();
    let mut one = || {
        let scale = 10f64.powf(rng.gen_range(-1.0..1.0));
        (0..dim).map(|_| scale * rng.gen_range(-1.0..1.0)).collect()
    };
    (0..tasks).map(|_| one()).collect()
}

/// All points of the simplex on a grid with steps of 1⁄n.
fn grid(tasks: usize, n: usize) -> Vec<Vec<f64>> {
    let h = 1.0 / n as f64;
    match tasks {
        2 => (0..=n).map(|i| vec![i as f64 * h, (n - i) as f64 * h]).collect(),
        _ => (0..=n)
            .flat_map(|i| (0..=n - i).map(move |j| (i, j)))
            .map(|(i, j)| vec![i as f64 * h, j as f64 * h, (n - i - j) as f64 * h])
            .collect(),
    }
}

fn tensors(vectors: &Vectors) -> Vec<Vec<Option<Tensor>>> {
    let one =
        |v: &Vec<f64>| vec![Some(Tensor::from_slice(v, &[v.len() as i64], Device::Cpu).unwrap())];
    vectors.iter().map(one).collect()
}

#[test]
fn pcgrad_of_two_that_conflict_is_the_papers_formula() {
    for seed in 0..50 {
        let mut g = vectors(2, 7, seed);
        let product = dot(&g[0], &g[1]);
        if product > 0.0 {
            g[1].iter_mut().for_each(|v| *v = -*v);
        }
        let p = dot(&g[0], &g[1]);
        // What is left of each stands at right angles to the other.
        let first = combine(&g, &[1.0, -p / dot(&g[1], &g[1])]);
        let second = combine(&g, &[-p / dot(&g[0], &g[0]), 1.0]);
        assert!((dot(&first, &g[1]) / (norm(&first) * norm(&g[1]))).abs() < 1e-6);
        let d = combine(&g, &pcgrad(&gram(&g), Seed(seed)));
        for (k, d) in d.iter().enumerate() {
            assert!((d - first[k] - second[k]).abs() < 1e-9 * (1.0 + d.abs()), "{d}");
        }
        // The other task's projection adds nothing against a task: g₁·d = g₁′·g₁ ≥ 0.
        let d_g1 = dot(&d, &g[0]);
        assert!((d_g1 - dot(&first, &g[0])).abs() < 1e-9 * (1.0 + d_g1.abs()));
    }
}

#[test]
fn pcgrad_without_conflict_is_the_plain_sum_bit_for_bit() {
    // All in one quadrant, of several shapes, f32.
    let shapes: [&[i64]; 3] = [&[5, 3], &[7], &[2, 2, 2]];
    let grads: Vec<Vec<Option<Tensor>>> = (0..5)
        .map(|t| {
            let draw = |(n, s): (u64, &&[i64])| {
                let g = Init::Uniform(1.0).tensor(s, Seed(t).nth(n), Kind::Float, Device::Cpu);
                Some(g.unwrap().abs().unwrap())
            };
            (0..).zip(&shapes).map(draw).collect()
        })
        .collect();
    let all = TaskGradients::new(grads.clone()).unwrap();
    let factors = pcgrad(&all.gram().unwrap(), Seed(1));
    assert_eq!(factors, [1.0; 5]);
    let d = all.combine(&factors, &[1.0; 5]).unwrap();
    for (k, d) in d.iter().enumerate() {
        let own = |t: usize| grads[t][k].as_ref().unwrap();
        let sum = (1..5).fold(own(0).clone(), |sum, t| sum.add(own(t)).unwrap());
        assert!(d.as_ref().unwrap().bit_equal(&sum).unwrap());
    }
}

#[test]
fn pcgrad_of_many_is_the_projection_of_the_vectors_themselves() {
    // The paper's algorithm on whole vectors, over all orders of three tasks: each result is one of
    // those, and different seeds meet different orders.
    let g = vec![vec![1.0, 0.2, 0.0], vec![-1.0, 0.4, 0.3], vec![-0.5, -1.0, 0.2]];
    let mut possible = Vec::new();
    for orders in 0..8 {
        let mut d = [0.0; 3];
        for i in 0..3 {
            let mut others: Vec<usize> = (0..3).filter(|j| *j != i).collect();
            if orders >> i & 1 == 1 {
                others.reverse();
            }
            let mut own = g[i].clone();
            for j in others {
                let p = dot(&own, &g[j]);
                if p < 0.0 {
                    let f = p / dot(&g[j], &g[j]);
                    own.iter_mut().zip(&g[j]).for_each(|(v, g)| *v -= f * g);
                }
            }
            d.iter_mut().zip(own).for_each(|(d, v)| *d += v);
        }
        possible.push(d);
    }
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..64 {
        let d = combine(&g, &pcgrad(&gram(&g), Seed(seed)));
        let near = |p: &[f64; 3]| p.iter().zip(&d).all(|(a, b)| (a - b).abs() < 1e-12);
        seen.insert(possible.iter().position(near).unwrap());
    }
    assert!(seen.len() > 2, "{seen:?}");
    // A gradient of 0 is passed over.
    let zero = vec![vec![1.0, 0.0], vec![0.0, 0.0], vec![-1.0, 1.0]];
    let factors = pcgrad(&gram(&zero), Seed(0));
    assert!(factors.iter().all(|f| f.is_finite()) && factors[1] == 1.0, "{factors:?}");
}

#[test]
fn cagrad_keeps_its_distance_and_closes_the_gap_to_its_dual() {
    for (tasks, dim) in [(2, 5), (3, 5), (3, 2), (8, 20), (8, 4), (20, 50)] {
        for seed in 0..20 {
            let g = vectors(tasks, dim, seed);
            let gram = gram(&g);
            let mean = vec![1.0 / tasks as f64; tasks];
            let g0 = combine(&g, &mean);
            assert_eq!(cagrad(&gram, 0.0), mean);
            for c in [0.2, 0.5, 0.9] {
                let factors = cagrad(&gram, c);
                let d = combine(&g, &factors);
                if factors == mean {
                    // Nothing to add: some weights make the gradients cancel.
                    assert!(norm(&combine(&g, &mgda(&gram))) < 1e-6 * gram.largest().sqrt());
                    continue;
                }
                let away: Vec<f64> = d.iter().zip(&g0).map(|(d, g)| d - g).collect();
                let radius = c * norm(&g0);
                assert!((norm(&away) / radius - 1.0).abs() < 1e-9, "{tasks} {seed} {c}");
                // d has the dual's weights in it; strong duality holds at the optimum alone.
                let w: Vec<f64> = away.iter().map(|v| v / radius).collect();
                let worst = g.iter().map(|g| dot(g, &d)).fold(f64::INFINITY, f64::min);
                let weights: Vec<f64> = factors.iter().zip(&mean).map(|(f, m)| f - m).collect();
                let sum: f64 = weights.iter().sum();
                let g_w = combine(&g, &weights.iter().map(|w| w / sum).collect::<Vec<_>>());
                let dual = dot(&g_w, &g0) + radius * norm(&g_w);
                let scale = gram.largest();
                assert!(weights.iter().all(|w| *w >= 0.0) && norm(&w) > 0.0);
                assert!((dual - worst).abs() < 1e-9 * scale, "{tasks} {seed} {c}: {dual} {worst}");
            }
        }
    }
}

#[test]
fn cagrad_is_what_a_fine_grid_finds() {
    for (tasks, n) in [(2, 100_000), (3, 600)] {
        for seed in 0..6 {
            let g = vectors(tasks, 4, 100 + seed);
            let gram = gram(&g);
            let g0 = combine(&g, &vec![1.0 / tasks as f64; tasks]);
            let radius = 0.5 * norm(&g0);
            let dual = |w: &[f64]| {
                let g_w = combine(&g, w);
                dot(&g_w, &g0) + radius * norm(&g_w)
            };
            let lowest = grid(tasks, n).iter().map(|w| dual(w)).fold(f64::INFINITY, f64::min);
            let d = combine(&g, &cagrad(&gram, 0.5));
            let worst = g.iter().map(|g| dot(g, &d)).fold(f64::INFINITY, f64::min);
            // No point of the grid is below the optimum, and one of them is near it.
            let scale = gram.largest();
            assert!(worst <= lowest + 1e-9 * scale, "{worst} {lowest}");
            assert!(lowest - worst < 2.0 / n as f64 * scale, "{worst} {lowest}");
        }
    }
}

#[test]
fn mgda_of_two_is_the_closed_form() {
    for seed in 0..50 {
        let g = vectors(2, 6, seed);
        let apart: Vec<f64> = g[1].iter().zip(&g[0]).map(|(b, a)| b - a).collect();
        let first = (dot(&apart, &g[1]) / dot(&apart, &apart)).clamp(0.0, 1.0);
        let w = mgda(&gram(&g));
        assert!((w[0] - first).abs() < 1e-10 && (w[0] + w[1] - 1.0).abs() < 1e-12, "{w:?} {first}");
    }
}

#[test]
fn mgda_is_the_nearest_point_of_the_hull() {
    for seed in 0..6 {
        let g = vectors(3, 4, 200 + seed);
        let w = mgda(&gram(&g));
        let own = norm(&combine(&g, &w));
        let lowest =
            grid(3, 600).iter().map(|w| norm(&combine(&g, w))).fold(f64::INFINITY, f64::min);
        assert!(own <= lowest + 1e-12 && lowest - own < 0.05, "{own} {lowest}");
    }
    // gᵢ·d ≥ ‖d‖² is necessary and sufficient; also where gradients depend on each other, or repeat.
    for (tasks, dim) in [(8, 20), (8, 3), (20, 8), (30, 100)] {
        for seed in 0..20 {
            let mut g = vectors(tasks, dim, 300 + seed);
            g[1] = g[0].clone();
            let all = gram(&g);
            let w = mgda(&all);
            let d = combine(&g, &w);
            let worst = g.iter().map(|g| dot(g, &d)).fold(f64::INFINITY, f64::min);
            assert!(w.iter().all(|w| *w >= 0.0) && (w.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            let gap = (dot(&d, &d) - worst) / all.largest();
            assert!(gap < 1e-10, "{tasks} {dim} {seed}: {gap}");
        }
    }
}

#[test]
fn nash_gains_are_inverse_to_weights() {
    for (tasks, dim) in [(2, 5), (3, 10), (8, 30), (20, 100)] {
        for seed in 0..20 {
            let g = vectors(tasks, dim, 400 + seed);
            let gram = gram(&g);
            let alpha = nash_bargain(&gram).unwrap();
            for (gain, a) in gram.times(&alpha).iter().zip(&alpha) {
                assert!(*a > 0.0 && (gain * a - 1.0).abs() < 1e-9, "{gain} {a}");
            }
            let d = combine(&g, &alpha);
            assert!((dot(&d, &d) / tasks as f64 - 1.0).abs() < 1e-9);
            // A loss in other units changes nothing of the direction.
            let mut other = g.clone();
            other[0].iter_mut().for_each(|v| *v *= 1000.0);
            let same = combine(&other, &nash_bargain(&self::gram(&other)).unwrap());
            assert!(d.iter().zip(&same).all(|(a, b)| (a - b).abs() < 1e-9), "{d:?} {same:?}");
        }
    }
    // Two by hand: αᵢ = 1 ⁄ (‖gᵢ‖ √(1 + cos)).
    let g = vec![vec![2.0, 0.0], vec![3.0, 4.0]];
    let alpha = nash_bargain(&gram(&g)).unwrap();
    for (a, norm) in alpha.iter().zip([2.0, 5.0]) {
        assert!((a - 1.0 / (norm * 1.6f64.sqrt())).abs() < 1e-12, "{alpha:?}");
    }
    // Agreeing tasks: the mean. Opposite ones: no bargain, the mean again. A gradient of 0: no part.
    let same = vec![vec![1.0, 2.0]; 4];
    assert!(nash_mtl(&gram(&same)).iter().all(|c| (c - 0.25).abs() < 1e-9));
    let opposite = vec![vec![1.0, 2.0], vec![-1.0, -2.0]];
    assert_eq!(nash_bargain(&gram(&opposite)), None);
    assert_eq!(nash_mtl(&gram(&opposite)), [0.5, 0.5]);
    let zero = vec![vec![1.0, 2.0], vec![0.0, 0.0]];
    assert_eq!(nash_bargain(&gram(&zero)).unwrap()[1], 0.0);
}

#[test]
fn gradnorm_leaves_equal_tasks_alone() {
    assert_eq!(gradnorm_slopes(&[1.0; 3], &[0.7; 3], &[0.4; 3], 1.5), [0.0; 3]);
    // By hand: G = (2, 1), Ḡ = 1.5, ratios 0.5 and 1 with the mean 0.75: targets 1.5·(2⁄3) = 1 and
    // 1.5·(4⁄3) = 2 with α = 1.
    assert_eq!(gradnorm_slopes(&[0.5, 1.0], &[4.0, 1.0], &[0.5, 1.0], 1.0), [4.0, -1.0]);
    // It is the derivative of the sum of distances to targets that stay.
    let (w, n, r, alpha): ([f64; 3], [f64; 3], [f64; 3], f64) =
        ([0.8, 1.3, 0.9], [2.0, 0.5, 1.0], [0.9, 0.6, 0.3], 0.5);
    let mean = (0..3).map(|t| w[t] * n[t]).sum::<f64>() / 3.0;
    let target = |t: usize| mean * (r[t] / 0.6).powf(alpha);
    let sum = |w: &[f64; 3]| (0..3).map(|t| (w[t] * n[t] - target(t)).abs()).sum::<f64>();
    for (t, slope) in gradnorm_slopes(&w, &n, &r, alpha).into_iter().enumerate() {
        let (mut up, mut down) = (w, w);
        up[t] += 1e-6;
        down[t] -= 1e-6;
        assert!((slope - (sum(&up) - sum(&down)) / 2e-6).abs() < 1e-6);
    }
}

#[test]
fn uncertainty_is_least_at_the_logarithm_of_the_loss() {
    for loss in [0.01, 0.3, 1.0, 7.0] {
        for (form, best) in
            [(Form::Regression, f64::ln(loss)), (Form::Classification, f64::ln(2.0 * loss))]
        {
            assert!(form.slope(best, loss).abs() < 1e-12);
            for near in [best - 0.01, best + 0.01] {
                assert!(form.objective(near, loss) > form.objective(best, loss));
            }
            let numeric =
                (form.objective(0.3 + 1e-6, loss) - form.objective(0.3 - 1e-6, loss)) / 2e-6;
            assert!((form.slope(0.3, loss) - numeric).abs() < 1e-6);
        }
    }
    // The Gaussian −log-likelihood without its constant: (y − ŷ)² ⁄ 2σ² + ln σ.
    let (error, sigma) = (0.7f64, 1.9f64);
    let likelihood = error.powi(2) / (2.0 * sigma.powi(2)) + sigma.ln();
    let own = Form::Regression.objective(2.0 * sigma.ln(), error.powi(2));
    assert!((own - likelihood).abs() < 1e-12);
}

#[test]
fn dwa_is_the_papers_formula() {
    let losses = [Some((0.8, 1.0)), Some((0.3, 0.6)), Some((2.0, 1.6)), None];
    let raised = [0.4, 0.25, 0.625, 0.5].map(f64::exp);
    let sum: f64 = raised.iter().sum();
    for (w, e) in dwa_weights(&losses, 2.0).iter().zip(raised) {
        assert!((w - 4.0 * e / sum).abs() < 1e-12);
    }
    assert_eq!(dwa_weights(&[None, None, None], 2.0), [1.0; 3]);
}

#[test]
fn temperature_flattens_from_proportional_to_uniform() {
    let counts = [900, 90, 10];
    assert_eq!(Sampling::Temperature(1.0).probabilities(&counts), [0.9, 0.09, 0.01]);
    assert_eq!(Sampling::Uniform.probabilities(&[900, 90, 10, 1]), [0.25; 4]);
    let p = Sampling::Temperature(5.0).probabilities(&counts);
    assert!(
        (p[0] / p[2] - 90f64.powf(0.2)).abs() < 1e-12
            && (p.iter().sum::<f64>() - 1.0).abs() < 1e-12
    );
    assert!(Sampling::Temperature(0.5).check().is_err());
    assert!(Sampling::Temperature(f64::NAN).check().is_err());
    // Drawing by them: χ² with two degrees of freedom is below 13.8 in 999 of 1000 cases.
    let mut rng = Seed(1).rng();
    let draws = WeightedIndex::new(&p).unwrap();
    let mut seen = [0.0; 3];
    (0..10_000).for_each(|_| seen[draws.sample(&mut rng)] += 1.0);
    let chi: f64 = seen.iter().zip(&p).map(|(n, p)| (n - 1e4 * p).powi(2) / (1e4 * p)).sum();
    assert!(chi < 13.8, "{chi}");
}

#[test]
fn private_parameters_are_left_out_of_what_is_balanced() {
    let t = |v: &[f32]| Some(Tensor::from_slice(v, &[v.len() as i64], Device::Cpu).unwrap());
    let grads = vec![
        vec![t(&[1.0, 2.0]), t(&[5.0]), None, None, t(&[1.0])],
        vec![t(&[3.0, -1.0]), None, t(&[7.0]), None, None],
        vec![None, None, None, None, t(&[2.0])],
    ];
    let all = TaskGradients::new(grads).unwrap();
    assert_eq!((all.tasks(), all.shared()), (3, 2));
    let gram = all.gram().unwrap();
    let rows: Vec<Vec<f64>> = (0..3).map(|i| (0..3).map(|j| gram.get(i, j)).collect()).collect();
    assert_eq!(rows, [[6.0, 1.0, 2.0], [1.0, 10.0, 0.0], [2.0, 0.0, 4.0]]);
    let d = all.combine(&[2.0, 1.0, 0.5], &[1.0, 10.0, 1.0]).unwrap();
    let d: Vec<Option<Vec<f64>>> =
        d.iter().map(|d| d.as_ref().map(|d| d.to_vec().unwrap())).collect();
    assert_eq!(d, [Some(vec![5.0, 3.0]), Some(vec![5.0]), Some(vec![70.0]), None, Some(vec![3.0])]);
    let names = ["a", "b", "c"].map(String::from);
    let noted = gram.conflicts(&names);
    assert!((noted["conflict.cosine.a.b"] - 1.0 / 60f64.sqrt()).abs() < 1e-12);
    assert_eq!((noted["conflict.share"], noted["conflict.cosine.b.c"]), (0.0, 0.0));
    assert!(all.combine(&[1.0], &[1.0]).is_err());
}

#[test]
fn the_products_are_those_of_the_whole_vectors_over_several_blocks() {
    // Three parameters of which two together are larger than a block.
    let shapes: [&[i64]; 3] = [&[900, 1000], &[300, 700], &[11]];
    let draw = |t: u64, n: u64, s: &[i64]| {
        Init::Normal(1.0).tensor(s, Seed(t).nth(n), Kind::Float, Device::Cpu).unwrap()
    };
    let grads: Vec<Vec<Tensor>> =
        (0..3).map(|t| (0..).zip(shapes).map(|(n, s)| draw(t, n, s)).collect()).collect();
    let wide =
        |g: &[Tensor]| -> Vec<f64> { g.iter().flat_map(|g| g.to_vec::<f64>().unwrap()).collect() };
    let vectors: Vectors = grads.iter().map(|g| wide(g)).collect();
    let optional = grads.iter().map(|own| own.iter().cloned().map(Some).collect()).collect();
    let all = TaskGradients::new(optional).unwrap();
    let (own, exact) = (all.gram().unwrap(), gram(&vectors));
    for i in 0..3 {
        for j in 0..3 {
            assert!((own.get(i, j) - exact.get(i, j)).abs() < 1e-5 * exact.largest());
        }
    }
    let w = [0.5, -2.0, 0.1];
    let d: Vec<Tensor> = all.combine(&w, &w).unwrap().into_iter().map(Option::unwrap).collect();
    assert_eq!(d.iter().map(Tensor::size).collect::<Vec<_>>(), shapes.map(<[i64]>::to_vec));
    let expected = combine(&vectors, &w);
    assert!(wide(&d).iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn two_gradients_of_f32_leave_no_component_against_each_other() {
    // As in training: products and sums in f32.
    let mut g = vectors(2, 1000, 9);
    if dot(&g[0], &g[1]) > 0.0 {
        g[1].iter_mut().for_each(|v| *v = -*v);
    }
    // Seeds that hardly conflict would prove little.
    let first = g[0].clone();
    g[1].iter_mut().zip(&first).for_each(|(b, a)| *b -= 0.5 * a);
    let f32s = |v: Vec<Option<Tensor>>| -> Vec<Option<Tensor>> {
        v.into_iter().map(|t| Some(t.unwrap().to_kind(Kind::Float).unwrap())).collect()
    };
    let all = TaskGradients::new(tensors(&g).into_iter().map(f32s).collect()).unwrap();
    let gram = all.gram().unwrap();
    let factor = -gram.get(0, 1) / gram.get(1, 1);
    assert!(factor > 0.0);
    let first = all.combine(&[1.0, factor], &[1.0, 1.0]).unwrap().remove(0).unwrap();
    let first = first.to_vec::<f64>().unwrap();
    assert!((dot(&first, &g[1]) / (norm(&first) * norm(&g[1]))).abs() < 1e-6);
}
