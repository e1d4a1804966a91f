//! A pool of prompts: choices and losses against loops in f64, and which keys learn.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod made;

use made::Made;
use modl_core::{Context, Device, Outcome, Result, Seed, Signal, Tensor, Weights};
use serde_json::{Value, json};

const M: usize = 7;
const D: usize = 5;
const ROWS: usize = 6;

fn queries() -> Vec<f64> {
    (0..ROWS * D).map(|i| ((i * i + 3 * i) as f64 * 0.37).sin()).collect()
}

fn context(train: bool, rows: usize) -> Context {
    let q = queries()[..rows * D].to_vec();
    let q = Tensor::from_slice(&q, &[rows as i64, D as i64], Device::Cpu).unwrap();
    let cx = if train { Context::train(Seed(1), 0) } else { Context::eval() };
    cx.with_feature("query", q)
}

fn config(k: usize, more: Value) -> Value {
    let mut config = json!({"type": "prompt_pool", "k": k, "input": "feature:query", "width": D});
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn made(k: usize, more: Value) -> Made {
    Made::new(config(k, more), M, 3).unwrap()
}

/// x at the site, which is not looked at.
fn x(rows: usize) -> Signal {
    Signal::from(Tensor::zeros(&[rows as i64, 2, 3], modl_core::Kind::Double, Device::Cpu).unwrap())
}

fn key(made: &Made, j: usize) -> Tensor {
    made.store.get(&format!("router.keys.m{j}")).unwrap().clone()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn distance(q: &[f64], k: &[f64]) -> f64 {
    1.0 - dot(q, k) / (dot(q, q).sqrt() * dot(k, k).sqrt())
}

/// All distances, `[rows][modules]`.
fn distances(made: &Made, rows: usize) -> Vec<Vec<f64>> {
    let keys: Vec<Vec<f64>> = (0..M).map(|j| key(made, j).to_vec().unwrap()).collect();
    let all = queries();
    all.chunks(D).take(rows).map(|q| keys.iter().map(|k| distance(q, k)).collect()).collect()
}

/// The `k` modules with the least of some numbers.
fn least(all: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|a, b| all[*a].total_cmp(&all[*b]));
    order[..k].to_vec()
}

fn chosen(weights: &Weights, share: f64) -> Vec<Vec<usize>> {
    let Weights::Rows(rows) = weights else { unreachable!("{weights:?}") };
    let row = |row: &Vec<(usize, f64)>| {
        assert!(row.iter().all(|(_, w)| *w == share), "{row:?}");
        row.iter().map(|(j, _)| *j).collect()
    };
    rows.iter().map(row).collect()
}

#[test]
fn the_nearest_keys_are_chosen_and_pulled() -> Result<()> {
    for k in [1, 3, M] {
        let made = made(k, json!({}));
        let routing = made.router.route(&x(ROWS), &made.bank, &context(true, ROWS))?;
        let found = chosen(&routing.weights, 1.0 / k as f64);
        let all = distances(&made, ROWS);
        let wanted: Vec<Vec<usize>> = all.iter().map(|row| least(row, k)).collect();
        assert_eq!(found, wanted);
        // The loss by its formula, and its gradient ∂d ⁄ ∂k = (cos · k ⁄ |k| − q ⁄ |q|) ⁄ |k|.
        let [(name, pull)] = routing.losses.as_slice() else { unreachable!() };
        assert_eq!(
            (name.as_str(), made.router.loss_weights()),
            ("pull", [("pull", 0.5)].as_slice())
        );
        let sum: f64 = wanted.iter().zip(&all).flat_map(|(c, d)| c.iter().map(|j| d[*j])).sum();
        assert!((pull.item()? - sum / ROWS as f64).abs() < 1e-14);
        let keys: Vec<Tensor> = (0..M).map(|j| key(&made, j)).collect();
        let gradients = pull.gradients(&keys.iter().collect::<Vec<_>>(), false)?;
        for (j, gradient) in gradients.iter().enumerate() {
            let mine: Vec<usize> = (0..ROWS).filter(|r| wanted[*r].contains(&j)).collect();
            let Some(gradient) = gradient else {
                assert!(mine.is_empty(), "m{j} was chosen");
                continue;
            };
            assert!(!mine.is_empty(), "m{j} was not chosen, and has a gradient");
            let own: Vec<f64> = keys[j].to_vec()?;
            let size = dot(&own, &own).sqrt();
            for (i, found) in gradient.to_vec::<f64>()?.into_iter().enumerate() {
                let of = |r: &usize| {
                    let q = &queries()[r * D..(r + 1) * D];
                    let cosine = 1.0 - all[*r][j];
                    (cosine * own[i] / size - q[i] / dot(q, q).sqrt()) / size
                };
                let wanted = mine.iter().map(of).sum::<f64>() / ROWS as f64;
                assert!((found - wanted).abs() < 1e-14, "{found} {wanted}");
            }
        }
        // Evaluation chooses the same and adds nothing.
        let routing = made.router.route(&x(ROWS), &made.bank, &context(false, ROWS))?;
        assert_eq!(chosen(&routing.weights, 1.0 / k as f64), found);
        assert!(routing.losses.is_empty());
    }
    Ok(())
}

#[test]
fn a_label_chooses_in_training_alone() -> Result<()> {
    let made = made(1, json!({"label": "task"}));
    let tasks = ["m4", "m0", "m4", "m2", "m0", "m4"];
    let routing =
        made.router.route(&x(ROWS), &made.bank, &context(true, ROWS).with_tasks(tasks))?;
    assert_eq!(chosen(&routing.weights, 1.0), [[4], [0], [4], [2], [0], [4]]);
    let keys: Vec<Tensor> = (0..M).map(|j| key(&made, j)).collect();
    let gradients = routing.losses[0].1.gradients(&keys.iter().collect::<Vec<_>>(), false)?;
    let learn: Vec<usize> = (0..M).filter(|j| gradients[*j].is_some()).collect();
    assert_eq!(learn, [0, 2, 4]);
    // Nobody says a task in the end, and nobody asks.
    let wanted: Vec<Vec<usize>> = distances(&made, ROWS).iter().map(|d| least(d, 1)).collect();
    for cx in [context(false, ROWS), context(false, ROWS).with_tasks(tasks)] {
        let routing = made.router.route(&x(ROWS), &made.bank, &cx)?;
        assert_eq!(chosen(&routing.weights, 1.0), wanted);
    }
    // What all tasks share is alone at its site.
    let alone = Made::named(config(1, json!({"label": "task"})), &["shared"], 3)?;
    let cx = context(true, ROWS).with_tasks(tasks);
    let routing = alone.router.route(&x(ROWS), &alone.bank, &cx)?;
    assert_eq!(chosen(&routing.weights, 1.0), [[0]; ROWS]);
    Ok(())
}

#[test]
fn what_was_chosen_often_is_less_likely_in_training() -> Result<()> {
    let made = made(2, json!({"diversity": true}));
    let mut counts = [0.0; M];
    for step in 0..4 {
        let cx = context(true, ROWS);
        let routing = made.router.route(&x(ROWS), &made.bank, &cx)?;
        let found = chosen(&routing.weights, 0.5);
        let total: f64 = counts.iter().sum();
        let all = distances(&made, ROWS);
        let by = |d: &Vec<f64>| {
            let share = |n: f64| if total == 0.0 { 1.0 } else { n / total };
            let weighed: Vec<f64> = d.iter().zip(counts).map(|(d, n)| d * share(n)).collect();
            least(&weighed, 2)
        };
        assert_eq!(found, all.iter().map(by).collect::<Vec<_>>(), "step {step}");
        let loss = Tensor::zeros(&[ROWS as i64], modl_core::Kind::Double, Device::Cpu)?;
        made.router.learn(&routing, &Outcome::new(&loss, &cx))?;
        for j in found.iter().flatten() {
            counts[*j] += 1.0;
        }
        assert_eq!(made.store.get("router.counts")?.to_vec::<f64>()?, counts);
        // In evaluation the nearest are chosen, however often.
        let routing = made.router.route(&x(ROWS), &made.bank, &context(false, ROWS))?;
        let wanted: Vec<Vec<usize>> = all.iter().map(|d| least(d, 2)).collect();
        assert_eq!(chosen(&routing.weights, 0.5), wanted);
    }
    assert!(counts.iter().all(|n| *n > 0.0), "all were tried: {counts:?}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let refused = |config: Value| Made::new(config, 3, 4).unwrap_err().to_string();
    assert!(refused(config(4, json!({}))).contains("there are 3 modules"));
    assert!(refused(config(2, json!({"label": "task"}))).contains("`k` is to be 1"));
    assert!(refused(config(1, json!({"input": "mean"}))).contains("width of the feature"));
    assert!(refused(json!({"type": "prompt_pool", "k": 1, "input": "tokens"})).contains("queries"));
    let narrow = Made::new(config(1, json!({"width": 2})), 3, 4).unwrap();
    let e = narrow.router.route(&x(2), &narrow.bank, &context(false, 2)).unwrap_err();
    assert!(e.to_string().contains("keys have 2 numbers"), "{e}");
}
