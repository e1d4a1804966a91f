//! Soft and top-k routing against arithmetic in f64, and against closed forms.

#![allow(clippy::unwrap_used, clippy::panic)]

mod made;

use made::{Made, assert_close, bank, numbered, site, softmax, t, top};
use modl_core::{Context, Device, Kind, Result, Routing, Seed, Tensor, Weights};
use proptest::prelude::*;
use serde_json::{Value, json};

fn made(config: Value, modules: usize, width: i64, kind: Kind) -> Result<Made> {
    let bank = bank(&numbered(modules), width);
    Made::build(config, bank, &site(width), "router", kind)
}

/// x `[ROWS, LEN, WIDTH]` with a mask, W `[MODULES, WIDTH]` and b.
#[derive(Debug, Clone)]
struct Case {
    x: Vec<f64>,
    real: Vec<usize>,
    w: Vec<f64>,
    b: Vec<f64>,
    tau: f64,
}

const ROWS: usize = 4;
const LEN: usize = 3;
const WIDTH: usize = 5;
const MODULES: usize = 6;

fn case() -> impl Strategy<Value = Case> {
    let numbers = |n: usize| prop::collection::vec(-2.0f64..2.0, n);
    let real = prop::collection::vec(1..=LEN, ROWS);
    (numbers(ROWS * LEN * WIDTH), real, numbers(MODULES * WIDTH), numbers(MODULES), 0.3f64..3.0)
        .prop_map(|(x, real, w, b, tau)| Case { x, real, w, b, tau })
}

impl Case {
    fn tensor(&self) -> Tensor {
        t(&self.x, &[ROWS as i64, LEN as i64, WIDTH as i64])
    }

    fn context(&self) -> Context {
        let mask: Vec<f64> = self
            .real
            .iter()
            .flat_map(|n| (0..LEN).map(move |i| if i < *n { 1.0 } else { 0.0 }))
            .collect();
        Context::train(Seed(3), 0).with_feature("mask", t(&mask, &[ROWS as i64, LEN as i64]))
    }

    fn token(&self, r: usize, i: usize) -> &[f64] {
        &self.x[(r * LEN + i) * WIDTH..][..WIDTH]
    }

    /// The mean over real tokens of each row.
    fn means(&self) -> Vec<Vec<f64>> {
        let mean = |(r, n): (usize, &usize)| {
            (0..WIDTH)
                .map(|c| (0..*n).map(|i| self.token(r, i)[c]).sum::<f64>() / *n as f64)
                .collect()
        };
        self.real.iter().enumerate().map(mean).collect()
    }

    fn logits(&self, x: &[f64]) -> Vec<f64> {
        let score = |j: usize| {
            let row = &self.w[j * WIDTH..][..WIDTH];
            (row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + self.b[j]) / self.tau
        };
        (0..MODULES).map(score).collect()
    }

    fn made(&self, mut config: Value, kind: Kind) -> Made {
        config["temperature"] = json!(self.tau);
        let made = made(config, MODULES, WIDTH as i64, kind).unwrap();
        made.set("router.weight", &self.w);
        made.set("router.bias", &self.b);
        made
    }
}

/// The weight of module j by p and the modules that are kept.
type Weight<'a> = &'a dyn Fn(&[f64], &[usize], usize) -> f64;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn soft_is_the_softmax_of_the_masked_mean(case in case()) {
        let expected: Vec<f64> =
            case.means().iter().flat_map(|x| softmax(&case.logits(x))).collect();
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
            let made = case.made(json!({"type": "soft"}), kind);
            let x = case.tensor().to_kind(kind).unwrap();
            let routing = made.route(&x, &case.context()).unwrap();
            let Weights::Dense(alpha) = &routing.weights else { panic!("{routing:?}") };
            prop_assert_eq!(alpha.kind(), kind);
            assert_close(&alpha.to_vec::<f64>().unwrap(), &expected, tolerance);
        }
    }

    #[test]
    fn tokens_and_features_are_scored_as_they_are(case in case()) {
        let tokens = (0..ROWS).flat_map(|r| (0..LEN).map(move |i| (r, i)));
        let expected: Vec<f64> =
            tokens.flat_map(|(r, i)| softmax(&case.logits(case.token(r, i)))).collect();
        let made = case.made(json!({"type": "soft", "input": "tokens"}), Kind::Double);
        assert_close(&made.alpha(&case.tensor(), &case.context()).unwrap(), &expected, 1e-12);

        let feature: Vec<f64> = case.means().concat();
        let cx = Context::eval().with_feature("seen", t(&feature, &[ROWS as i64, WIDTH as i64]));
        let made = case.made(json!({"type": "soft", "input": "feature:seen"}), Kind::Double);
        let expected: Vec<f64> =
            case.means().iter().flat_map(|x| softmax(&case.logits(x))).collect();
        assert_close(&made.alpha(&case.tensor(), &cx).unwrap(), &expected, 1e-12);
    }

    #[test]
    fn top_k_keeps_the_largest(case in case(), k in 1..=MODULES) {
        let p: Vec<Vec<f64>> = case.means().iter().map(|x| softmax(&case.logits(x))).collect();
        let expected = |weight: Weight| -> Vec<f64> {
            p.iter().flat_map(|p| {
                let kept = top(p, k);
                let one = |j| if kept.contains(&j) { weight(p, &kept, j) } else { 0.0 };
                (0..MODULES).map(one).collect::<Vec<_>>()
            }).collect()
        };
        let sum = |p: &[f64], kept: &[usize]| kept.iter().map(|j| p[*j]).sum::<f64>();
        let run = |extra: Value| {
            let mut config = json!({"type": "top_k", "k": k});
            config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            case.made(config, Kind::Double).alpha(&case.tensor(), &case.context()).unwrap()
        };
        let renormalised = expected(&|p, kept, j| p[j] / sum(p, kept));
        assert_close(&run(json!({"renormalise": true})), &renormalised, 1e-12);
        assert_close(&run(json!({"renormalise": false})), &expected(&|p, _, j| p[j]), 1e-12);
        let even = expected(&|_, _, _| 1.0 / k as f64);
        assert_close(&run(json!({"straight_through": true})), &even, 1e-12);
    }

    #[test]
    fn the_losses_are_their_formulas_over_real_tokens(case in case(), k in 1..=3usize) {
        let units: Vec<Vec<f64>> = (0..ROWS)
            .flat_map(|r| (0..case.real[r]).map(move |i| (r, i)))
            .map(|(r, i)| case.logits(case.token(r, i)))
            .collect();
        let n = units.len() as f64;
        let (mut f, mut mean_p, mut z) = (vec![0.0; MODULES], vec![0.0; MODULES], 0.0);
        for logits in &units {
            let p = softmax(logits);
            top(&p, k).iter().for_each(|j| f[*j] += 1.0 / (n * k as f64));
            mean_p.iter_mut().zip(&p).for_each(|(m, p)| *m += p / n);
            z += logits.iter().map(|l| l.exp()).sum::<f64>().ln().powi(2) / n;
        }
        let balance = MODULES as f64 * f.iter().zip(&mean_p).map(|(f, p)| f * p).sum::<f64>();
        let config = json!({"type": "top_k", "k": k, "input": "tokens"});
        let routing =
            case.made(config, Kind::Double).route(&case.tensor(), &case.context()).unwrap();
        let names: Vec<&str> = routing.losses.iter().map(|(n, _)| n.as_str()).collect();
        prop_assert_eq!(names, ["balance", "z"]);
        let losses: Vec<f64> = routing.losses.iter().map(|(_, l)| l.item().unwrap()).collect();
        assert_close(&losses, &[balance, z], 1e-10);
    }

    #[test]
    fn exchanging_modules_exchanges_their_weights(case in case(), by in 1..MODULES) {
        let mut turned = case.clone();
        turned.w.rotate_left(by * WIDTH);
        turned.b.rotate_left(by);
        for config in [json!({"type": "soft"}), json!({"type": "top_k", "k": 2})] {
            let alpha = |c: &Case| {
                c.made(config.clone(), Kind::Double).alpha(&c.tensor(), &c.context()).unwrap()
            };
            let mut expected = alpha(&case);
            expected.chunks_mut(MODULES).for_each(|row| row.rotate_left(by));
            assert_close(&alpha(&turned), &expected, 1e-12);
        }
    }
}

/// Rows that a feature `p` names, routed with probabilities `p` (one row of `p` for each).
fn routed_with(p: &[&[f64]], config: Value) -> Result<(Made, Routing)> {
    let (n, m) = (p.len(), p[0].len());
    let made = made(config, m, n as i64, Kind::Double)?;
    let logits = (0..m).flat_map(|j| p.iter().map(move |p| p[j].max(1e-300).ln()));
    made.set("router.weight", &logits.collect::<Vec<_>>());
    let mut rows = vec![0.0; n * n];
    (0..n).for_each(|i| rows[i * n + i] = 1.0);
    let routing = made.route(&t(&rows, &[n as i64, n as i64]), &Context::train(Seed(0), 0))?;
    Ok((made, routing))
}

#[test]
fn balance_is_one_where_even_and_may_be_below_one_where_not() -> Result<()> {
    let config = || json!({"type": "top_k", "k": 1, "bias": false});
    let balance = |p: &[&[f64]]| routed_with(p, config())?.1.losses[0].1.item();
    let even: [&[f64]; 3] = [&[0.5, 0.3, 0.2], &[0.2, 0.5, 0.3], &[0.3, 0.2, 0.5]];
    assert!((balance(&even)? - 1.0).abs() < 1e-12);
    let all_on_one: [&[f64]; 1] = [&[0.8, 0.1, 0.1]];
    assert!((balance(&all_on_one)? - 2.4).abs() < 1e-12);
    // f = (½, ½, 0), P = (.17, .42, .41): a module that nobody uses, and yet 0.885.
    let apart: [&[f64]; 2] = [&[0.34, 0.33, 0.33], &[0.0, 0.51, 0.49]];
    assert!((balance(&apart)? - 0.885).abs() < 1e-12);
    Ok(())
}

#[test]
fn the_gradient_of_balance_moves_mass_to_modules_with_less_load() -> Result<()> {
    let (made, routing) =
        routed_with(&[&[0.5, 0.3, 0.2], &[0.6, 0.1, 0.3]], json!({"type": "top_k", "k": 1}))?;
    let bias = made.store.get("router.bias")?;
    let g = routing.losses[0].1.gradients(&[bias], false)?;
    let g = g[0].as_ref().unwrap().to_vec::<f64>()?;
    assert!(g[0] > 0.0 && g[1] < 0.0 && g[2] < 0.0, "{g:?}");
    Ok(())
}

#[test]
fn the_gradient_of_z_is_twice_the_logsumexp_times_p() -> Result<()> {
    let p = [0.5, 0.3, 0.2];
    let (made, routing) = routed_with(&[&p], json!({"type": "top_k", "k": 1}))?;
    // ln Σ exp ln p = 0: a shift by c makes it c, and leaves p as it is.
    made.set("router.bias", &[2.0; 3]);
    assert!(routing.losses[1].1.item()?.abs() < 1e-20);
    let x = t(&[1.0], &[1, 1]);
    let z = made.route(&x, &Context::train(Seed(0), 0))?.losses[1].1.clone();
    assert!((z.item()? - 4.0).abs() < 1e-12);
    let g = z.gradients(&[made.store.get("router.bias")?], false)?;
    assert_close(&g[0].as_ref().unwrap().to_vec::<f64>()?, &p.map(|p| 4.0 * p), 1e-12);
    Ok(())
}

#[test]
fn straight_through_weighs_one_and_learns_as_p_does() -> Result<()> {
    let gradient = |extra: &str| -> Result<(Vec<f64>, Vec<f64>)> {
        let mut config = json!({"type": "top_k", "k": 1});
        config[extra] = json!(extra == "straight_through");
        let (made, routing) = routed_with(&[&[0.2, 0.5, 0.3], &[0.7, 0.2, 0.1]], config)?;
        let Weights::Sparse { weight, .. } = &routing.weights else { panic!("{routing:?}") };
        let g = weight.sum()?.gradients(&[made.store.get("router.weight")?], false)?;
        Ok((weight.to_vec()?, g[0].as_ref().unwrap().to_vec()?))
    };
    let (hard, through) = gradient("straight_through")?;
    let (raw, plain) = gradient("renormalise")?;
    assert_eq!(hard, [1.0, 1.0]);
    assert_close(&raw, &[0.5, 0.7], 1e-12);
    assert_eq!(through, plain);
    assert!(plain.iter().any(|g| g.abs() > 0.05));
    Ok(())
}

#[test]
fn equal_scores_spread_over_the_modules_and_repeat() -> Result<()> {
    let x = modl_core::Init::Normal(1.0).tensor(&[256, 8], Seed(5), Kind::Float, Device::Cpu)?;
    let choice = |seed: u64, x: &Tensor| -> Result<Vec<i64>> {
        let made = made(json!({"type": "top_k", "k": 1, "seed": seed}), 4, 8, Kind::Float)?;
        let routing = made.route(x, &Context::eval())?;
        let Weights::Sparse { index, .. } = routing.weights else { panic!() };
        index.to_vec()
    };
    let all = choice(0, &x)?;
    for j in 0..4 {
        let load = all.iter().filter(|c| **c == j).count();
        assert!(load > 16, "module {j} gets {load} of 256");
    }
    assert_eq!(choice(0, &x)?, all);
    assert_ne!(choice(1, &x)?, all);
    // The rule looks at the row alone.
    assert_eq!(choice(0, &x.narrow(0, 100, 3)?)?, all[100..103]);
    Ok(())
}

#[test]
fn noise_is_drawn_in_training_from_seed_and_step() -> Result<()> {
    let made = made(json!({"type": "top_k", "k": 2, "noise": 1.0}), 4, 8, Kind::Float)?;
    let x = Tensor::ones(&[16, 8], Kind::Float, Device::Cpu)?;
    let at = |seed, step| made.alpha(&x, &Context::train(Seed(seed), step));
    assert_eq!(at(1, 5)?, at(1, 5)?);
    assert_ne!(at(1, 5)?, at(1, 6)?);
    assert_ne!(at(1, 5)?, at(2, 5)?);
    let quiet = made.alpha(&x, &Context::eval())?;
    assert!(quiet.chunks(4).all(|row| row == &quiet[..4]));
    Ok(())
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let refused = |config: Value, words: &str| {
        let e = made(config, 3, 8, Kind::Float).err().unwrap().to_string();
        assert!(e.contains(words), "{e}");
    };
    refused(json!({"type": "top_k", "k": 0}), "top_k.k");
    refused(json!({"type": "top_k", "k": 4}), "3 modules");
    refused(json!({"type": "top_k", "straight_through": true, "renormalise": true}), "renormalise");
    refused(json!({"type": "top_k", "noise": -1.0}), "top_k.noise");
    refused(json!({"type": "soft", "temperature": 0.0}), "soft.temperature");
    refused(json!({"type": "soft", "init_std": -0.1}), "soft.init_std");
    refused(json!({"type": "soft", "width": 5}), "soft.width");
    refused(json!({"type": "soft", "input": "token"}), "did you mean `tokens`");
    let made = made(json!({"type": "soft", "input": "feature:e"}), 3, 8, Kind::Float).unwrap();
    let x = Tensor::ones(&[2, 8], Kind::Float, Device::Cpu).unwrap();
    let e = made.route(&x, &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("with_feature"), "{e}");
    let narrow = Tensor::ones(&[2, 5], Kind::Float, Device::Cpu).unwrap();
    let e = made.route(&x, &Context::eval().with_feature("e", narrow)).unwrap_err().to_string();
    assert!(e.contains("soft.width"), "{e}");
}
