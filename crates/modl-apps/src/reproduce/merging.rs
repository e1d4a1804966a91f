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

use anyhow::{Context as _, Result, bail};
use modl_aggregate::connectivity::curve;
use modl_aggregate::merge::{Base, Elements, Group, Input, MergeMethods, Settings, merge_group};
use modl_aggregate::rebasin::{Permutations, match_weights};
use modl_aggregate::statistics::diagonal_fisher;
use modl_core::{Device, Kind, Registry, Seed, Tensor, Tensors, no_grad};
use modl_train::{AdaMerging, Factors, entropy, task_vectors, trimmed};
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::glyphs::{CLASSES, Hand, SIDE, VIEWS, glyphs};
use super::mlp::{accuracy, activations, copy, network, output, train};
use crate::trials::{Measure, View};

const EASY: Hand = Hand { shift: 0, noise: 0.3 };
const HARD: Hand = Hand { shift: 2, noise: 0.6 };
const WIDTH: i64 = 128;
const BATCH: usize = 64;
const RATE: f64 = 1e-3;
/// Examples of each view that tests are on.
const TESTS: usize = 1000;
/// Examples of each view that Fisher information and products of inputs are of.
const STATISTICS: (usize, usize) = (64, 1000);
/// AdaMerging's examples of each view in a step.
const UNLABELLED: usize = 16;
/// Points of a line.
const POINTS: usize = 25;

/// Key and name.
const METHODS: [(&str, &str); 10] = [
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
];
const LINES: [(&str, i64); 2] = [("line-512", 512), ("line-16", 16)];

/// Steps: on all views, on each, AdaMerging's, of each network of a line.
fn steps(quick: bool) -> [u64; 4] {
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
                    steps of 16 examples without labels for each view. Lines: networks of two hidden \
                    layers, 1,000 steps each, 25 points.",
            seeds: 10,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
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
        const ALL: [Measure; 4] = [
            Measure { key: "accuracy", title: "accuracy", digits: 3 },
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
        let mut sum = 0.0;
        for (view, (trunk, head)) in trunks.iter().zip(&tasks.heads).enumerate() {
            let seed = lab.seed.child("test").nth(view as u64);
            let (x, y) = glyphs(TESTS, view, HARD, seed)?;
            sum += accuracy(&no_grad(|| logits(trunk, head, &x))?, &y)?;
        }
        Ok(BTreeMap::from([("accuracy".to_owned(), sum / VIEWS as f64)]))
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

/// The logits of a trunk under a head.
fn logits(trunk: &Tensors, head: &Tensors, x: &Tensor) -> modl_core::Result<Tensor> {
    output(head, &output(trunk, x)?.relu()?)
}

/// A trunk from which trunks and heads of all views were fine-tuned.
struct Tasks {
    start: Tensors,
    trunks: Vec<Tensors>,
    heads: Vec<Tensors>,
}

impl Tasks {
    fn train(lab: &Lab) -> Result<Self> {
        let [all, each, ..] = steps(lab.quick);
        let start = network(&[(SIDE * SIDE) as i64, WIDTH, WIDTH], lab.seed.child("trunk"))?;
        let head =
            |view: usize| network(&[WIDTH, CLASSES], lab.seed.child("head").nth(view as u64));
        let heads: Vec<Tensors> = (0..VIEWS).map(head).collect::<Result<_>>()?;
        let names: Vec<String> = (0..VIEWS).map(|v| format!("head{v}")).collect();
        let mut parts: Vec<(&str, &Tensors)> = vec![("trunk", &start)];
        parts.extend(names.iter().map(String::as_str).zip(&heads));
        train(&parts, all, RATE, lab.tick, |step| {
            let mut sum: Option<Tensor> = None;
            for (view, head) in heads.iter().enumerate() {
                let seed = lab.seed.child("easy").nth(step).nth(view as u64);
                let (x, y) = glyphs(BATCH / VIEWS, view, EASY, seed)?;
                let loss = logits(&start, head, &x)?.cross_entropy(&y)?;
                sum = Some(sum.map_or(Ok(loss.clone()), |s| s.add(&loss))?);
            }
            Ok(sum.context("no view")?.mul_scalar(1.0 / VIEWS as f64)?)
        })?;
        let mut trunks = Vec::new();
        for (view, head) in heads.iter().enumerate() {
            let trunk = copy(&start)?;
            let seed = lab.seed.child("hard").nth(view as u64);
            train(&[("trunk", &trunk), ("head", head)], each, RATE, lab.tick, |step| {
                let (x, y) = glyphs(BATCH, view, HARD, seed.nth(step))?;
                Ok(logits(&trunk, head, &x)?.cross_entropy(&y)?)
            })?;
            trunks.push(trunk);
        }
        Ok(Tasks { start, trunks, heads })
    }

    /// One trunk of all.
    fn merged(&self, condition: &str, lab: &Lab) -> Result<Tensors> {
        let ada = AdaMerging { steps: steps(lab.quick)[2], ..AdaMerging::default() };
        let tasks = AdaMerging { factors: Factors::Tasks, ..ada.clone() };
        let plain = Settings::default;
        let each = |name: &str, c: f64| plain().set_each(name, [c; VIEWS]);
        Ok(match condition {
            "pretrained" => copy(&self.start)?,
            "average" => self.by("linear", &[], each("weight", 1.0))?,
            "task_arithmetic" => self.by("task_arithmetic", &[], each("weight", 0.3))?,
            "ties" => {
                // The paper's: the mean of those that agree.
                let settings = each("weight", 1.0).set_each("density", [0.2; VIEWS]);
                self.by("ties", &[], settings.set("convention", "peft"))?
            }
            "fisher" => self.by("fisher", &self.fisher(lab)?, plain())?,
            "reg_mean" => self.by("reg_mean", &self.grams(lab)?, plain())?,
            "ada_tasks" => self.adapted(&tasks, &self.vectors()?, lab)?,
            "ada_layers" => self.adapted(&ada, &self.vectors()?, lab)?,
            "ada_layers_pp" => self.adapted(&ada, &trimmed(&self.vectors()?, 0.2)?, lab)?,
            other => bail!("there is no method `{other}`"),
        })
    }

    fn vectors(&self) -> Result<Vec<Tensors>> {
        Ok(task_vectors(&self.start, &self.trunks)?)
    }

    fn adapted(&self, ada: &AdaMerging, vectors: &[Tensors], lab: &Lab) -> Result<Tensors> {
        let found = ada.run(&self.start, vectors, |step, trunk| {
            let mut sum: Option<Tensor> = None;
            for (view, head) in self.heads.iter().enumerate() {
                let seed = lab.seed.child("unlabelled").nth(step).nth(view as u64);
                let x = glyphs(UNLABELLED, view, HARD, seed)
                    .map_err(|e| modl_core::Error::invalid("digits", e.to_string()))?
                    .0;
                let own = entropy(&logits(trunk, head, &x)?)?;
                sum = Some(sum.map_or(Ok(own.clone()), |s| s.add(&own))?);
            }
            sum.ok_or_else(|| modl_core::Error::invalid("views", "there is none"))
        })?;
        Ok(found.model)
    }

    /// The Fisher information of each trunk on its own view.
    fn fisher(&self, lab: &Lab) -> Result<Vec<Tensors>> {
        let (n, _) = STATISTICS;
        let n = if lab.quick { 2 } else { n };
        let one = |(view, (trunk, head)): (usize, (&Tensors, &Tensors))| {
            let seed = lab.seed.child("statistics").nth(view as u64);
            let (x, _) = glyphs(n, view, HARD, seed)?;
            Ok(diagonal_fisher(trunk, n, |i| {
                let row = x.narrow(0, i as i64, 1)?;
                logits(trunk, head, &row)?.squeeze(0)?.log_softmax(0)
            })?)
        };
        self.trunks.iter().zip(&self.heads).enumerate().map(one).collect()
    }

    /// XᵀX of the inputs of each trunk's layers on its own view.
    fn grams(&self, lab: &Lab) -> Result<Vec<Tensors>> {
        let (_, n) = STATISTICS;
        let one = |(view, trunk): (usize, &Tensors)| {
            let seed = lab.seed.child("statistics").nth(view as u64);
            let (x, _) = glyphs(n, view, HARD, seed)?;
            let all = no_grad(|| activations(trunk, &x))?;
            let mut grams = Tensors::new();
            for (layer, x) in all.iter().take(trunk.len() / 2).enumerate() {
                grams.set(format!("{layer}.weight"), x.t()?.matmul(x)?);
            }
            Ok(grams)
        };
        self.trunks.iter().enumerate().map(one).collect()
    }

    /// The trunks merged by a method. TIES trims over all tensors as one; the others don't mind.
    fn by(&self, method: &str, statistics: &[Tensors], settings: Settings) -> Result<Tensors> {
        let methods = MergeMethods::default();
        let method = methods.find(method)?;
        let spec = method.spec();
        let start = (spec.base != Base::Input).then_some(&self.start);
        let models: Vec<&Tensors> = self.trunks.iter().chain(start).collect();
        let numbers = |t: &Tensor| t.reshape(&[-1])?.to_vec::<f32>();
        let merge = |shape: &[i64], tensors: Vec<Vec<f32>>, known: Vec<Vec<f32>>| {
            let shape: Vec<usize> = shape.iter().map(|n| *n as usize).collect();
            let inputs = tensors.iter().enumerate().map(|(i, t)| {
                Input::new("m", t).with_statistics(known.get(i).map(|s| s as &dyn Elements))
            });
            let group = Group::new("trunk", &shape, inputs.collect(), Seed(0));
            let group = if start.is_some() { group.with_base(tensors.len() - 1) } else { group };
            merge_group(method, group, settings.clone())
        };
        if !statistics.is_empty() {
            return Ok(self.start.map(|name, t| {
                let of = |m: &&Tensors| numbers(m.need(name)?);
                let tensors = models.iter().map(of).collect::<modl_core::Result<_>>()?;
                let known = statistics.iter().filter_map(|s| s.get(name)).map(numbers);
                let known = known.collect::<modl_core::Result<_>>()?;
                Tensor::from_slice(&merge(&t.size(), tensors, known)?, &t.size(), Device::Cpu)
            })?);
        }
        let flat = |m: &&Tensors| -> modl_core::Result<Vec<f32>> {
            let parts: Vec<Vec<f32>> =
                m.iter().map(|(_, t)| numbers(t)).collect::<modl_core::Result<_>>()?;
            Ok(parts.concat())
        };
        let tensors: Vec<Vec<f32>> = models.iter().map(flat).collect::<modl_core::Result<_>>()?;
        let n = tensors.first().map_or(0, Vec::len);
        let merged = merge(&[n as i64], tensors, Vec::new())?;
        let mut rest = merged.as_slice();
        Ok(self.start.map(|_, t| {
            let (own, others) = rest.split_at(t.numel().min(rest.len()));
            rest = others;
            Tensor::from_slice(own, &t.size(), Device::Cpu)
        })?)
    }
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
