//! Model soups (Wortsman et al. 2022, arXiv 2203.05482): the average of models that were fine-tuned
//! from one start with several rates and seeds, against the best of them.
//!
//! Data: drawn digits (`glyphs.rs`). A network is trained on easy ones, then twelve times on the same
//! few hard ones. Models are chosen by held-out digits, and tested on others. The control has twelve
//! starts of its own.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use modl_aggregate::soups::{Convention, greedy, weighted};
use modl_core::{Registry, Seed, Tensor, Tensors, no_grad};
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::fit::below;
use super::glyphs::{CLASSES, Hand, SIDE, glyphs};
use super::mlp::{accuracy, copy, network, output, train};
use crate::trials::{Measure, View};

const EASY: Hand = Hand { shift: 0, noise: 0.3 };
const HARD: Hand = Hand { shift: 2, noise: 0.6 };
const WIDTHS: [i64; 4] = [(SIDE * SIDE) as i64, 128, 128, CLASSES];
const BATCH: usize = 64;
const RATE: f64 = 1e-3;
/// Rates of the fine-tunings, each of which is done with as many seeds.
const RATES: [f64; 3] = [3e-4, 1e-3, 3e-3];
const EACH: usize = 4;
/// Digits to learn from, to choose by, to test on.
const DIGITS: [usize; 3] = [1000, 1000, 4000];

/// Key, group and name.
const WAYS: [(&str, &str, &str); 5] = [
    ("best", "one start", "best model"),
    ("greedy", "one start", "greedy soup"),
    ("uniform", "one start", "uniform soup"),
    ("apart_best", "twelve starts", "best model"),
    ("apart_uniform", "twelve starts", "uniform soup"),
];

/// Steps on easy digits, and of each fine-tuning.
fn steps(quick: bool) -> (u64, u64) {
    if quick { (10, 3) } else { (500, 300) }
}

/// The experiment.
#[derive(Debug)]
pub(super) struct Soups;

impl Experiment for Soups {
    fn about(&self) -> About {
        About {
            name: "soups",
            title: "Averages of fine-tuned models against the best of them",
            citation: "Wortsman et al. 2022, arXiv 2203.05482",
            section: "5.1",
            claim: "The greedy soup of models that were fine-tuned from one start is as good as the \
                    best of them or better; models with starts of their own have no good average.",
            setup: "Drawn digits, 16 × 16; networks of two hidden layers of 128 units. 500 steps on \
                    easy digits, then twelve times 300 steps on the same 1,000 hard ones, with three \
                    rates and four seeds each; batch 64, Adam. 1,000 held-out digits choose, 4,000 \
                    test. Control: twelve networks without the common start. The paper has CLIP, ALIGN \
                    and BASIC, whose pretraining is far richer.",
            seeds: 10,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 2,
            "steps": steps(quick),
            "hands": [EASY.shift as f64, EASY.noise, HARD.shift as f64, HARD.noise],
            "widths": WIDTHS,
            "batch": BATCH,
            "lr": RATE,
            "rates": RATES,
            "each": EACH,
            "digits": DIGITS,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |(key, group, series): &(&str, &str, &str)| Condition {
            key: (*key).to_owned(),
            group: (*group).to_owned(),
            series: (*series).to_owned(),
            reference: (*series != "best model")
                .then(|| if *group == "one start" { "best" } else { "apart_best" }.to_owned()),
        };
        WAYS.iter().map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 3] = [
            Measure { key: "accuracy", title: "accuracy", digits: 4 },
            Measure { key: "apart", title: "mean accuracy of its models", digits: 4 },
            Measure { key: "members", title: "models in it", digits: 1 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        let (first, each) = steps(quick);
        first + (RATES.len() * EACH) as u64 * each
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let models = models(condition.starts_with("apart"), lab)?;
        let [_, choose, test] = DIGITS;
        let score = |net: &Tensors, name: &str, n: usize| -> Result<f64> {
            let (x, y) = glyphs(n, 0, HARD, lab.seed.child(name))?;
            accuracy(&no_grad(|| output(net, &x))?, &y)
        };
        let alone: Vec<f64> =
            models.iter().map(|m| score(m, "choose", choose)).collect::<Result<_>>()?;
        let mean = |members: &[usize]| {
            let share = 1.0 / members.len() as f64;
            let some: Vec<(&Tensors, f64)> =
                members.iter().filter_map(|m| models.get(*m)).map(|m| (m, share)).collect();
            weighted(&some)
        };
        let members: Vec<usize> = match condition {
            "uniform" | "apart_uniform" => (0..models.len()).collect(),
            "greedy" => {
                let soup = greedy(&alone, Convention::Paper, |members| {
                    score(&mean(members)?, "choose", choose)
                        .map_err(|e| modl_core::Error::invalid("score", e.to_string()))
                })?;
                soup.members
            }
            "best" | "apart_best" => {
                let first = |best: usize, (m, s): (usize, &f64)| {
                    if alone.get(best).is_some_and(|b| s > b) { m } else { best }
                };
                vec![alone.iter().enumerate().fold(0, first)]
            }
            other => bail!("there is no way `{other}`"),
        };
        let apart = members.iter().filter_map(|m| models.get(*m)).map(|m| score(m, "test", test));
        let apart = apart.sum::<Result<f64>>()? / members.len() as f64;
        Ok(BTreeMap::from([
            ("accuracy".to_owned(), score(&mean(&members)?, "test", test)?),
            ("members".to_owned(), members.len() as f64),
            ("apart".to_owned(), apart),
        ]))
    }

    fn thresholds(&self) -> Vec<Threshold> {
        fn share(v: &View, holds: fn(greedy: f64, best: f64) -> bool) -> f64 {
            v.mean_of(|of| {
                let (greedy, best) = (of("greedy", "accuracy"), of("best", "accuracy"));
                if greedy.is_nan() || best.is_nan() {
                    return f64::NAN;
                }
                f64::from(u8::from(holds(greedy, best)))
            })
        }
        vec![
            Threshold {
                text: "share of seeds in which the greedy soup is at most 0.2 points below the best",
                statistic: |v| share(v, |greedy, best| greedy >= best - 0.002),
                bound: Bound::AtLeast(1.0),
            },
            Threshold {
                text: "share of seeds in which the greedy soup is above the best",
                statistic: |v| share(v, |greedy, best| greedy > best),
                bound: Bound::AtLeast(0.6),
            },
            Threshold {
                text: "twelve starts: points that the uniform soup is below the best",
                statistic: |v| {
                    100.0 * (v.mean("apart_best", "accuracy") - v.mean("apart_uniform", "accuracy"))
                },
                bound: Bound::AtLeast(20.0),
            },
        ]
    }
}

/// The twelve models, from one start or from twelve.
fn models(apart: bool, lab: &Lab) -> Result<Vec<Tensors>> {
    let (first, each) = steps(lab.quick);
    let start = network(&WIDTHS, lab.seed.child("start"))?;
    if !apart {
        train(&[("net", &start)], first, RATE, lab.tick, |step| {
            let (x, y) = glyphs(BATCH, 0, EASY, lab.seed.child("easy").nth(step))?;
            Ok(output(&start, &x)?.cross_entropy(&y)?)
        })?;
    }
    let [many, ..] = DIGITS;
    let (x, y) = glyphs(many, 0, HARD, lab.seed.child("learn"))?;
    let mut all = Vec::new();
    for (r, rate) in RATES.iter().enumerate() {
        for n in 0..EACH {
            let seed = lab.seed.child("model").nth((r * EACH + n) as u64);
            let net = if apart { network(&WIDTHS, seed.child("start"))? } else { copy(&start)? };
            train(&[("net", &net)], each, *rate, lab.tick, |step| {
                let (x, y) = batch(&x, &y, seed.nth(step))?;
                Ok(output(&net, &x)?.cross_entropy(&y)?)
            })?;
            all.push(net);
        }
    }
    Ok(all)
}

/// Some of the digits to learn from.
fn batch(x: &Tensor, y: &Tensor, seed: Seed) -> Result<(Tensor, Tensor)> {
    let rows: Vec<i64> =
        below(x.len_of(0) as usize, BATCH, seed)?.into_iter().map(|r| r as i64).collect();
    let rows = Tensor::from_slice(&rows, &[BATCH as i64], x.device())?;
    Ok((x.index_select(0, &rows)?, y.index_select(0, &rows)?))
}
