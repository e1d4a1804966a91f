//! Capacity: who finds a place.

use modl_core::{Context, Tensor};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::support::*;

/// Tokens whose coordinates are their scores.
#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    seq: usize,
    modules: usize,
    x: Vec<f64>,
    real: Vec<usize>,
    factor: f64,
    over_batch: bool,
}

fn case() -> impl Strategy<Value = Case> {
    (1..4usize, 1..8usize, 2..7usize, 0.2f64..2.5, any::<bool>()).prop_flat_map(
        |(rows, seq, modules, factor, over_batch)| {
            let x = prop::collection::vec(-2.0f64..2.0, rows * seq * modules);
            let real = prop::collection::vec(0..=seq, rows);
            (x, real).prop_map(move |(x, real)| Case {
                rows,
                seq,
                modules,
                x,
                real,
                factor,
                over_batch,
            })
        },
    )
}

impl Case {
    fn tensor(&self) -> Tensor {
        t(&self.x, &[self.rows as i64, self.seq as i64, self.modules as i64])
    }

    fn is_real(&self, unit: usize) -> bool {
        unit % self.seq < self.real[unit / self.seq]
    }

    fn context(&self, cx: Context) -> Context {
        let mask: Vec<f64> =
            (0..self.rows * self.seq).map(|u| f64::from(u8::from(self.is_real(u)))).collect();
        cx.with_feature("mask", t(&mask, &[self.rows as i64, self.seq as i64]))
    }

    fn made(&self, kind: &str, more: Value) -> Made {
        let over = if self.over_batch { "batch" } else { "row" };
        let mut config = json!({"type": kind, "input": "tokens", "bias": false, "over": over,
            "capacity_factor": self.factor, "eval_capacity_factor": self.factor});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let made = Made::new(config, self.modules, self.modules as i64).unwrap();
        made.set("router.weight", &identity(self.modules, self.modules));
        made
    }

    fn groups(&self) -> Vec<Vec<usize>> {
        let units: Vec<usize> = (0..self.rows * self.seq).collect();
        let size = if self.over_batch { units.len() } else { self.seq };
        let real = |g: &[usize]| g.iter().copied().filter(|u| self.is_real(*u)).collect();
        units.chunks(size).map(real).collect()
    }

    fn places(&self, units: usize, k: usize) -> usize {
        ((self.factor * (units * k) as f64 / self.modules as f64) as usize).max(1)
    }

    /// What is chosen, and what finds a place: first choices in order, then second ones.
    fn expected(&self, k: usize) -> (Vec<Vec<i64>>, usize) {
        let mut index = vec![vec![-1; k]; self.rows * self.seq];
        let mut dropped = 0;
        for group in self.groups() {
            let mut load = vec![0; self.modules];
            let wish =
                |u: usize, choice| top(&self.x[u * self.modules..][..self.modules], k)[choice];
            let all = (0..k).flat_map(|choice| group.iter().map(move |u| (choice, *u)));
            for (choice, u) in all {
                let j = wish(u, choice);
                if load[j] < self.places(group.len(), k) {
                    load[j] += 1;
                    index[u][choice] = j as i64;
                } else {
                    dropped += 1;
                }
            }
        }
        (index, dropped)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn first_choices_fill_before_second_ones_and_the_rest_is_dropped(case in case()) {
        for (kind, k) in [("switch", 1), ("gshard", 2), ("st_moe", 2)] {
            let made = case.made(kind, json!({}));
            let routing = made.routed(&case.tensor(), &case.context(Context::eval()));
            let (index, weight) = sparse(&routing);
            let (expected, dropped) = case.expected(k);
            prop_assert_eq!(&index, &expected);
            prop_assert_eq!(noted(&routing, "overflow"), [dropped as f64]);
            for (u, (index, weight)) in index.iter().zip(&weight).enumerate() {
                let scores = &case.x[u * case.modules..][..case.modules];
                let p = softmax(scores);
                let best = top(scores, k);
                let whole = if k == 1 { 1.0 } else { best.iter().map(|j| p[*j]).sum() };
                for (c, (j, w)) in index.iter().zip(weight).enumerate() {
                    // Who stays keeps the weight that it had.
                    let one = if *j < 0 { 0.0 } else { p[best[c]] / whole };
                    prop_assert!((w - one).abs() < 1e-12, "{} is not {}", w, one);
                }
            }
        }
    }

    #[test]
    fn every_choice_is_kept_or_counted(case in case(), seed in 0u64..50) {
        for fill in ["order", "random", "score"] {
            let made = case.made("gshard", json!({"fill": fill, "threshold": 0.0}));
            let cx = case.context(training(seed));
            let routing = made.routed(&case.tensor(), &cx);
            let (index, _) = sparse(&routing);
            let kept = index.iter().flatten().filter(|j| **j >= 0).count();
            let choices: usize = 2 * case.groups().iter().map(Vec::len).sum::<usize>();
            let overflow = noted(&routing, "overflow")[0];
            prop_assert_eq!(kept as f64 + overflow, choices as f64);
            for group in case.groups() {
                let places = case.places(group.len(), 2);
                let load = |j: i64| group.iter().filter(|u| index[**u].contains(&j)).count();
                for u in &group {
                    let best = top(&case.x[u * case.modules..][..case.modules], 2);
                    for (c, j) in index[*u].iter().enumerate() {
                        // Dropped only where the module is full.
                        prop_assert!(*j >= 0 || load(best[c] as i64) == places);
                    }
                }
                prop_assert!((0..case.modules as i64).all(|j| load(j) <= places));
            }
            prop_assert_eq!(sparse(&made.routed(&case.tensor(), &cx)).0, index);
        }
    }
}

/// Eight tokens that all want the first of four modules, with more and more weight.
fn crowd(fill: &str) -> (Made, Tensor) {
    let made = Made::new(
        json!({"type": "switch", "input": "tokens", "bias": false, "jitter": 0.0, "fill": fill,
            "capacity_factor": 1.0, "eval_capacity_factor": 1.0}),
        4,
        4,
    )
    .unwrap();
    made.set("router.weight", &identity(4, 4));
    let x: Vec<f64> = (1..=8).flat_map(|i| [f64::from(i), 0.0, 0.0, 0.0]).collect();
    (made, t(&x, &[1, 8, 4]))
}

fn seated(made: &Made, x: &Tensor, cx: &Context) -> Vec<usize> {
    let (index, _) = sparse(&made.routed(x, cx));
    (0..index.len()).filter(|u| index[*u] == [0]).collect()
}

#[test]
fn places_go_to_the_first_to_the_surest_or_to_some_by_the_seed() {
    let (made, x) = crowd("order");
    assert_eq!(seated(&made, &x, &training(0)), [0, 1]);
    let (made, x) = crowd("score");
    assert_eq!(seated(&made, &x, &training(0)), [6, 7]);
    let (made, x) = crowd("random");
    assert_eq!(seated(&made, &x, &Context::eval()), [0, 1]);
    let drawn: Vec<_> = (0..400).map(|step| seated(&made, &x, &training(step))).collect();
    assert_eq!(drawn[3], seated(&made, &x, &training(3)));
    for unit in 0..8 {
        // 100 of 400 are expected; the standard deviation is 8.7.
        let times = drawn.iter().filter(|s| s.contains(&unit)).count();
        assert!((60..140).contains(&times), "token {unit} sits {times} times");
    }
}

#[test]
fn more_modules_than_tokens_and_no_limit_drop_nothing() {
    for (factor, modules) in [(1.0, 16), (0.0, 2)] {
        let config = json!({"type": "switch", "input": "tokens", "eval_capacity_factor": factor});
        let made = Made::new(config, modules, 3).unwrap();
        let routing = made.routed(&normal(&[1, 1, 3], 4), &Context::eval());
        assert_eq!(noted(&routing, "overflow"), [0.0]);
    }
    let made = Made::new(json!({"type": "switch", "eval_capacity_factor": 0.0}), 2, 3).unwrap();
    let same = Tensor::cat(&[normal(&[1, 3], 5), normal(&[1, 3], 5)], 0).unwrap();
    assert_eq!(noted(&made.routed(&same, &Context::eval()), "overflow"), [0.0]);
}
