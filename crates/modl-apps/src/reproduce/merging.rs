//! Merging models of several tasks, and of one task that were trained apart: RegMean (Jin et al.
//! 2023), AdaMerging (Yang et al. 2023), TIES (Yadav et al. 2023), Git Re-Basin (Ainsworth et al.
//! 2023).
//!
//! Data: drawn digits (`glyphs.rs`) under eight views. A trunk of two layers is trained on the easy
//! versions of all views, with a head for each; then trunk and head go on for each view alone, on its
//! hard version. The eight trunks are merged, the heads kept.
//!
//! Lines: two networks that differ in all of their seeds, on the hard version of the first view; the
//! barrier of the cross-entropy on the straight line between them, as they are and after their units
//! were matched by weights.

use std::collections::BTreeMap;

use anyhow::Result;
use modl_aggregate::connectivity::curve;
use modl_aggregate::rebasin::{Permutations, match_weights};
use modl_core::{Kind, Registry, Tensors, no_grad};
use modl_train::entropy;
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::glyphs::{CLASSES, Hand, SIDE, VIEWS, glyphs};
use super::merged::{Tasks, logits};
use super::mlp::{accuracy, network, output, train};
use crate::trials::{Measure, View};

pub(super) const EASY: Hand = Hand { shift: 0, noise: 0.3 };
pub(super) const HARD: Hand = Hand { shift: 2, noise: 0.6 };
pub(super) const WIDTH: i64 = 128;
pub(super) const BATCH: usize = 64;
pub(super) const RATE: f64 = 1e-3;
/// Examples of each view that tests are on.
const TESTS: usize = 1000;
/// Examples of each view that Fisher information and products of inputs are of.
pub(super) const STATISTICS: (usize, usize) = (64, 1000);
/// AdaMerging's examples of each view in a step.
pub(super) const UNLABELLED: usize = 16;
/// Points of a line.
const POINTS: usize = 25;

/// Key and name.
const METHODS: [(&str, &str); 11] = [
    ("average", "average"),
    ("pretrained", "before fine-tuning"),
    ("individual", "each its own"),
    ("task_arithmetic", "task arithmetic, 0.3"),
    ("ties", "TIES"),
    ("fisher", "Fisher"),
    ("reg_mean", "RegMean"),
    ("ada_tasks", "AdaMerging, by task"),
    ("ada_layers", "AdaMerging, by layer"),
    ("ada_layers_pp", "AdaMerging++, by layer"),
    ("ada_labels", "the same factors, by labels"),
];
const LINES: [(&str, i64); 2] = [("line-512", 512), ("line-16", 16)];

/// Steps: on all views, on each, AdaMerging's, of each network of a line.
pub(super) fn steps(quick: bool) -> [u64; 4] {
    if quick { [10, 3, 3, 10] } else { [1000, 300, 500, 1000] }
}

/// The experiment.
#[derive(Debug)]
pub(super) struct Merging;

impl Experiment for Merging {
    fn about(&self) -> About {
        About {
            name: "merging",
            title: "Merged models of eight tasks, and barriers between models",
            citation: "Jin et al. 2023, arXiv 2212.09849; Yang et al. 2023, arXiv 2310.02575; \
                       Yadav et al. 2023, arXiv 2306.01708; Ainsworth et al. 2023, arXiv 2209.04836",
            section: "5.1",
            claim: "Models that were fine-tuned from one start are merged better by RegMean and \
                    layer-wise AdaMerging than by averaging, and no worse by TIES; networks that were \
                    trained apart can be averaged once their units are matched, the wider the better.",
            setup: "Drawn digits, 16 × 16, under eight views. A trunk of two layers of 128 units and a \
                    head for each view are trained on easy digits of all views for 1,000 steps, then \
                    trunk and head for each view alone on hard ones for 300; batch 64, Adam 0.001. \
                    Trunks are merged, heads kept; accuracy on 1,000 hard digits of each view. TIES \
                    keeps 20 % of all numbers, RegMean 0.9 off the diagonal, AdaMerging takes 500 \
                    steps of 16 examples without labels for each view. Control: its factors by layer \
                    with the cross-entropy in place of the entropy, from the same start in as many \
                    steps. Slopes: the cosine between the derivatives of entropy and cross-entropy by \
                    the factors at their start. Lines: networks of two hidden \
                    layers, 1,000 steps each, 25 points.",
            seeds: 10,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 2,
            "steps": steps(quick),
            "hands": [EASY.shift as f64, EASY.noise, HARD.shift as f64, HARD.noise],
            "width": WIDTH,
            "batch": BATCH,
            "lr": RATE,
            "tests": TESTS,
            "statistics": STATISTICS,
            "unlabelled": UNLABELLED,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let merged = METHODS.iter().map(|(key, name)| Condition {
            key: (*key).to_owned(),
            group: "eight tasks".to_owned(),
            series: (*name).to_owned(),
            reference: (*key != "average").then(|| "average".to_owned()),
        });
        let lines = LINES.iter().map(|(key, width)| Condition {
            key: (*key).to_owned(),
            group: "line".to_owned(),
            series: format!("width {width}"),
            reference: None,
        });
        merged.chain(lines).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 7] = [
            Measure { key: "accuracy", title: "accuracy", digits: 3 },
            Measure { key: "entropy", title: "entropy of predictions", digits: 3 },
            Measure {
                key: "commonest",
                title: "share of the class that is predicted most",
                digits: 3,
            },
            Measure { key: "slopes", title: "cosine of slopes", digits: 3 },
            Measure { key: "naive", title: "barrier", digits: 3 },
            Measure { key: "matched", title: "barrier after matching", digits: 3 },
            Measure { key: "ratio", title: "share of the barrier that is left", digits: 3 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        let [all, each, ..] = steps(quick);
        all + VIEWS as u64 * each
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        if let Some((_, width)) = LINES.iter().find(|(key, _)| *key == condition) {
            return line(*width, lab);
        }
        let tasks = Tasks::train(lab)?;
        let trunks: Vec<Tensors> = match condition {
            "individual" => tasks.trunks.clone(),
            _ => vec![tasks.merged(condition, lab)?; VIEWS],
        };
        let mut found = BTreeMap::new();
        for (view, (trunk, head)) in trunks.iter().zip(&tasks.heads).enumerate() {
            let seed = lab.seed.child("test").nth(view as u64);
            let (x, y) = glyphs(TESTS, view, HARD, seed)?;
            let logits = no_grad(|| logits(trunk, head, &x))?;
            for (key, value) in [
                ("accuracy", accuracy(&logits, &y)?),
                ("entropy", no_grad(|| entropy(&logits)?.item())?),
                ("commonest", commonest(&logits.argmax(1)?.to_vec()?)),
            ] {
                *found.entry(key.to_owned()).or_insert(0.0) += value / VIEWS as f64;
            }
        }
        if condition == "ada_layers" {
            found.insert("slopes".to_owned(), tasks.slopes(lab)?);
        }
        Ok(found)
    }

    fn thresholds(&self) -> Vec<Threshold> {
        fn points(v: &View, method: &str) -> f64 {
            100.0 * (v.mean(method, "accuracy") - v.mean("average", "accuracy"))
        }
        vec![
            Threshold {
                text: "points that RegMean is above averaging",
                statistic: |v| points(v, "reg_mean"),
                bound: Bound::AtLeast(3.0),
            },
            Threshold {
                text: "points that layer-wise AdaMerging is above averaging",
                statistic: |v| points(v, "ada_layers"),
                bound: Bound::AtLeast(3.0),
            },
            Threshold {
                text: "share of seeds in which TIES is not below averaging",
                statistic: |v| {
                    v.mean_of(|of| {
                        let (ties, average) = (of("ties", "accuracy"), of("average", "accuracy"));
                        if ties.is_nan() || average.is_nan() {
                            return f64::NAN;
                        }
                        f64::from(u8::from(ties >= average))
                    })
                },
                bound: Bound::AtLeast(0.7),
            },
            Threshold {
                text: "width 512: barrier after matching, of that before",
                statistic: |v| v.mean("line-512", "ratio"),
                bound: Bound::AtMost(0.25),
            },
            Threshold {
                text: "the same of width 16, less that of width 512",
                statistic: |v| v.mean("line-16", "ratio") - v.mean("line-512", "ratio"),
                bound: Bound::Above(0.0),
            },
        ]
    }
}

/// The share of the class that occurs most.
fn commonest(classes: &[i64]) -> f64 {
    let times = |c: i64| classes.iter().filter(|k| **k == c).count();
    (0..CLASSES).map(times).max().unwrap_or(0) as f64 / classes.len() as f64
}

/// The barriers between two networks of this width.
fn line(width: i64, lab: &Lab) -> Result<BTreeMap<String, f64>> {
    let many = steps(lab.quick)[3];
    let one = |name: &str| -> Result<Tensors> {
        let seed = lab.seed.child(name);
        let net = network(&[(SIDE * SIDE) as i64, width, width, CLASSES], seed.child("start"))?;
        train(&[("net", &net)], many, RATE, lab.tick, |step| {
            let (x, y) = glyphs(BATCH, 0, HARD, seed.child("digits").nth(step))?;
            Ok(output(&net, &x)?.cross_entropy(&y)?)
        })?;
        Ok(net)
    };
    let (a, b) = (one("first")?, one("second")?);
    let (x, y) = glyphs(TESTS, 0, HARD, lab.seed.child("test"))?;
    let barrier = |b: &Tensors| -> Result<f64> {
        let loss = |net: &Tensors| no_grad(|| output(net, &x)?.cross_entropy(&y)?.item());
        Ok(curve(&a, b, POINTS, loss)?.barrier)
    };
    let layers = Permutations::mlp(&["0", "1", "2"]);
    let matched = match_weights(&layers, &a, &b, lab.seed.child("matching"))?;
    let (naive, matched) = (barrier(&b)?, barrier(&matched.model)?);
    let right = accuracy(&no_grad(|| output(&a, &x))?.to_kind(Kind::Float)?, &y)?;
    Ok(BTreeMap::from([
        ("accuracy".to_owned(), right),
        ("naive".to_owned(), naive),
        ("matched".to_owned(), matched),
        ("ratio".to_owned(), if naive > 0.0 { matched / naive } else { f64::NAN }),
    ]))
}
