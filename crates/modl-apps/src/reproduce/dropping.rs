//! AdapterDrop (Rücklé et al. 2021, arXiv 2010.11918): without adapters in its first layers a network
//! computes these once for all tasks. A small BERT (`encoder.rs`) with adapters for eight label tasks.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, Result};
use modl_aggregate::WeightedSum;
use modl_compute::function::load_dropped;
use modl_compute::{AdapterDrop, Bottleneck, Nested};
use modl_core::{
    Backbone, Context, Layers, Modular, ModuleConfig, ParamStore, Registry, Segments, Select,
    Signal, Site, Tensor, Tensors, no_grad,
};
use modl_models::Bert;
use modl_route::Fixed;
use serde_json::{Value, json};

use super::chains::World;
use super::encoder::{self, Pretrained, TASKS, Texts, WIDTH, classes, states};
use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::fit::{module, told};
use super::mlp::{accuracy, network, output, train};
use crate::trials::{Measure, View};

const LAYERS: usize = 4;
/// How many layers are without adapters.
const DROPPED: usize = LAYERS / 2;
/// In training the adapters of 0 to so many layers are skipped.
const RANDOM: usize = LAYERS - 1;
const REDUCTION: f64 = 16.0;
/// Texts with labels, and texts that accuracies are of.
fn texts(quick: bool) -> [usize; 2] {
    if quick { [64, 40] } else { [2048, 400] }
}

/// Texts of each task in a step.
const BATCH: usize = 8;
const RATE: f64 = 2e-3;
/// Texts in a timed pass, and how often all ways are timed, side by side.
const TIMED: i64 = 32;
const REPEATS: usize = 11;

/// Key, name, and how many layers' adapters may be skipped in a step of training.
const WAYS: [(&str, &str, usize); 2] = [
    ("random", "adapters of 0 to 3 layers skipped in training", RANDOM),
    ("plain", "all adapters in training", 0),
];

/// Steps of pre-training and of the adapters.
fn steps(quick: bool) -> [u64; 2] {
    if quick { [2, 2] } else { [encoder::STEPS, 200] }
}

/// The experiment.
#[derive(Debug, Default)]
pub(super) struct Dropping(Pretrained);

impl Experiment for Dropping {
    fn about(&self) -> About {
        About {
            name: "dropping",
            title: "Eight tasks over layers without adapters",
            citation: "Rücklé et al. 2021, arXiv 2010.11918",
            section: "3.3",
            claim: "Where the first half of the layers has no adapters, it is computed once for all \
                    tasks, which is faster; adapters that were trained with random layers skipped \
                    lose little.",
            setup: "Texts of 16 words whose halves are each of one of four Markov chains over 32 \
                    words. A BERT of 4 layers, width 128, inner width 256, is pre-trained as a masked \
                    language model for 5,000 steps of 64 texts, Adam 0.001. Eight tasks: the domains of \
                    both halves, whether they are the same, whether the sum of their numbers is odd, \
                    and whether the second half has more words of each quarter of the vocabulary. \
                    Adapters after Pfeiffer et al. of width 8 and a linear head for each: 200 steps \
                    of 8 texts of each task out of 2,048, Adam 0.002. Then the adapters of the first 2 \
                    layers are dropped; accuracy on 400 texts. Time: 32 texts for all eight tasks, one \
                    thread, the ways in turn, the median of 11 ratios. Separate passes are eight of \
                    the same model with the same adapters dropped.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 2,
            "steps": steps(quick),
            "pretraining": [encoder::BATCH as f64, encoder::RATE],
            "layers": [LAYERS, DROPPED, RANDOM],
            "reduction": REDUCTION,
            "texts": texts(quick),
            "batch": BATCH,
            "lr": RATE,
            "timed": [TIMED, REPEATS as i64],
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |(key, name, _): &(&str, &str, usize)| Condition {
            key: (*key).to_owned(),
            group: "eight tasks".to_owned(),
            series: (*name).to_owned(),
            reference: (*key != "plain").then(|| "plain".to_owned()),
        };
        WAYS.iter().map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 6] = [
            Measure { key: "whole", title: "accuracy with all adapters", digits: 3 },
            Measure { key: "dropped", title: "accuracy without the first", digits: 3 },
            Measure { key: "separate", title: "times faster than separate", digits: 2 },
            Measure { key: "stacked", title: "times faster than one batch", digits: 2 },
            Measure { key: "adapters", title: "times faster than with all adapters", digits: 2 },
            Measure { key: "apart", title: "largest difference of a logit", digits: 7 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        steps(quick).iter().sum()
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let way = WAYS.iter().find(|(key, ..)| *key == condition);
        let (_, _, random) = way.with_context(|| format!("there is no way `{condition}`"))?;
        let world = World::new(lab.seed)?;
        let [many, tests] = texts(lab.quick);
        let encoder = || self.0.encoder(LAYERS, steps(lab.quick)[0], &world, lab);

        let mut whole = Modular::new(encoder()?, lab.seed.child("modules"))?;
        let config = || AdapterDrop {
            config: Nested::new(Bottleneck {
                reduction_factor: REDUCTION,
                ..Bottleneck::pfeiffer()
            }),
            first: 0,
            random: *random as i64,
        };
        for task in 0..TASKS {
            whole.attach(&module(task), Box::new(config()), &config().usual_targets())?;
        }
        whole.aggregate(Box::new(WeightedSum::default()))?;
        whole.route(Box::new(Fixed::default()), false)?;
        let heads = learn(&whole, &Texts::new(&world, lab.seed.child("learn"), many)?, lab)?;

        let shared = Shared { bert: encoder()?, first: DROPPED };
        let mut dropped = Modular::new(shared, lab.seed.child("modules"))?;
        let folder = tempfile::tempdir()?;
        for task in 0..TASKS {
            let path = folder.path().join(module(task));
            whole.save_module(&module(task), &path)?;
            load_dropped(&mut dropped, &path, None, DROPPED as i64)?;
        }
        dropped.aggregate(Box::new(WeightedSum::default()))?;
        dropped.route(Box::new(Fixed::default()), false)?;

        let test = Texts::new(&world, lab.seed.child("test"), tests)?;
        let mut right = [0.0; 2];
        for (task, head) in heads.iter().enumerate() {
            for (model, right) in [&whole, &dropped].into_iter().zip(&mut right) {
                let logits = output(head, &alone(model, &test.ids, task)?)?;
                *right += accuracy(&logits, test.labels(task)?)? / TASKS as f64;
            }
        }
        let timed = Timed { whole: &whole, dropped: &dropped, heads: &heads };
        let mut metrics = timed.run(&test.ids.narrow(0, 0, TIMED)?, lab.quick)?;
        metrics.insert("whole".to_owned(), right[0]);
        metrics.insert("dropped".to_owned(), right[1]);
        Ok(metrics)
    }

    fn thresholds(&self) -> Vec<Threshold> {
        fn lost(v: &View, from: &str, way: &str) -> f64 {
            100.0 * (v.mean(from, "whole") - v.mean(way, "dropped"))
        }
        vec![
            Threshold {
                text: "times that eight tasks are faster with the first half of the layers shared",
                statistic: |v| v.mean("random", "separate"),
                bound: Bound::AtLeast(1.3),
            },
            Threshold {
                text: "largest difference of a logit between shared and separate",
                statistic: |v| v.mean("random", "apart"),
                bound: Bound::AtMost(1e-4),
            },
            Threshold {
                text: "trained with random layers skipped: points lost by dropping",
                statistic: |v| lost(v, "random", "random"),
                bound: Bound::AtMost(2.0),
            },
            Threshold {
                text: "the same, of the accuracy of plain adapters in all layers",
                statistic: |v| lost(v, "plain", "random"),
                bound: Bound::AtMost(2.0),
            },
            Threshold {
                text: "control: points more that plain adapters lose by dropping",
                statistic: |v| lost(v, "plain", "plain") - lost(v, "random", "random"),
                bound: Bound::Above(0.0),
            },
        ]
    }
}

/// A BERT whose first layers are without modules, and are computed once where the context has more
/// rows than the inputs: these are several tasks, one after the other, of the same texts.
#[derive(Debug)]
struct Shared {
    bert: Bert,
    first: usize,
}

impl Backbone for Shared {
    fn sites(&self) -> &[Site] {
        self.bert.sites()
    }

    fn params(&self) -> &ParamStore {
        self.bert.params()
    }

    fn theta(&self, site: &Site) -> modl_core::Result<Tensors> {
        self.bert.theta(site)
    }

    fn config(&self) -> &Value {
        self.bert.config()
    }

    fn forward(
        &self,
        inputs: &Tensors,
        layers: &Layers,
        cx: &Context,
    ) -> modl_core::Result<Tensors> {
        let (bert, none) = (&self.bert, Layers::none(self.sites().len()));
        let mut x = bert.enter(inputs, &none, cx)?;
        for n in 0..self.first {
            x = bert.segment(n, &x, &none, cx)?;
        }
        let times = cx.tasks()?.len() / (x.rows() as usize).max(1);
        if times > 1 {
            let repeated = |t: &Tensor| Tensor::cat(&vec![t.clone(); times], 0);
            x = Signal { x: repeated(&x.x)?, with: x.with.map(|_, t| repeated(t))? };
        }
        for n in self.first..Segments::segments(&bert) {
            x = bert.segment(n, &x, layers, cx)?;
        }
        bert.leave(&x, inputs, layers, cx)
    }
}

/// The tasks of `n` rows of each, task by task.
fn rows_of(tasks: impl IntoIterator<Item = usize>, n: i64) -> Result<Vec<String>> {
    let all: Vec<usize> = tasks.into_iter().flat_map(|t| vec![t; n as usize]).collect();
    told(&all).context("tasks")
}

/// Trains the adapters and a head for each task on rows of all tasks.
fn learn(model: &Modular, texts: &Texts, lab: &Lab) -> Result<Vec<Tensors>> {
    let head = |t: usize| network(&[WIDTH, classes(t)], lab.seed.child("head").nth(t as u64));
    let heads: Vec<Tensors> = (0..TASKS).map(head).collect::<Result<_>>()?;
    model.train_only(&Select::new("modules.*"))?;
    let own: Tensors = model.trainable().into_iter().collect();
    let names: Vec<String> = (0..TASKS).map(|t| format!("head{t}")).collect();
    let mut parts = vec![("own", &own)];
    parts.extend(names.iter().map(String::as_str).zip(&heads));
    let tasks = rows_of(0..TASKS, BATCH as i64)?;
    let seed = lab.seed.child("batch");
    train(&parts, steps(lab.quick)[1], RATE, lab.tick, |step| {
        let rows = texts.some(TASKS * BATCH, seed.nth(step))?;
        let cx = Context::train(seed, step).with_tasks(&tasks);
        let found = states(model, &texts.ids.index_select(0, &rows)?, &cx)?;
        let mut losses = Vec::with_capacity(TASKS);
        for (task, head) in heads.iter().enumerate() {
            let (from, n) = ((task * BATCH) as i64, BATCH as i64);
            let labels = texts.labels(task)?.index_select(0, &rows.narrow(0, from, n)?)?;
            losses.push(output(head, &found.narrow(0, from, n)?)?.cross_entropy(&labels)?);
        }
        Ok(Tensor::stack(&losses, 0)?.mean()?)
    })?;
    Ok(heads)
}

/// States of texts for one task.
fn alone(model: &Modular, ids: &Tensor, task: usize) -> Result<Tensor> {
    let cx = Context::eval().with_tasks(rows_of([task], ids.len_of(0))?);
    Ok(no_grad(|| states(model, ids, &cx))?)
}

/// What is timed: texts to the logits of all tasks.
struct Timed<'a> {
    whole: &'a Modular,
    dropped: &'a Modular,
    heads: &'a [Tensors],
}

impl Timed<'_> {
    /// The logits of all tasks by a pass for each.
    fn separate(&self, model: &Modular, ids: &Tensor) -> Result<Vec<Tensor>> {
        let each = self.heads.iter().enumerate();
        each.map(|(task, head)| Ok(output(head, &alone(model, ids, task)?)?)).collect()
    }

    /// The same by one pass, over texts that are there once or once for each task.
    fn together(&self, ids: &Tensor, texts: i64) -> Result<Vec<Tensor>> {
        let cx = Context::eval().with_tasks(rows_of(0..self.heads.len(), texts)?);
        let found = no_grad(|| states(self.dropped, ids, &cx))?;
        let each = self.heads.iter().enumerate();
        each.map(|(t, head)| Ok(output(head, &found.narrow(0, t as i64 * texts, texts)?)?))
            .collect()
    }

    fn run(&self, ids: &Tensor, quick: bool) -> Result<BTreeMap<String, f64>> {
        let n = ids.len_of(0);
        let stacked = Tensor::cat(&vec![ids.clone(); self.heads.len()], 0)?;
        let mut ratios = [const { Vec::new() }; 3];
        let mut apart: f64 = 0.0;
        // The first time is to get warm.
        for time in 0..=if quick { 1 } else { REPEATS } {
            let (shared, own) = seconds(|| self.together(ids, n))?;
            let (separate, other) = seconds(|| self.separate(self.dropped, ids))?;
            let (one_batch, _) = seconds(|| self.together(&stacked, n))?;
            let (adapters, _) = seconds(|| self.separate(self.whole, ids))?;
            for (own, other) in own.iter().zip(&other) {
                apart = apart.max(own.max_abs_diff(other)?);
            }
            if time > 0 {
                for (all, other) in ratios.iter_mut().zip([separate, one_batch, adapters]) {
                    all.push(other / shared);
                }
            }
        }
        let mut metrics = BTreeMap::from([("apart".to_owned(), apart)]);
        for (name, all) in ["separate", "stacked", "adapters"].into_iter().zip(ratios) {
            metrics.insert(name.to_owned(), median(all));
        }
        Ok(metrics)
    }
}

/// How long it takes.
fn seconds<T>(f: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let clock = Instant::now();
    let made = f()?;
    Ok((clock.elapsed().as_secs_f64(), made))
}

/// The one in the middle.
fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}
