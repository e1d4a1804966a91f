//! AdapterFusion (Pfeiffer et al. 2021, arXiv 2005.00247): what adapters of other tasks know helps a
//! task with few examples, and does not harm one with many.
//!
//! Data: drawn digits (`glyphs.rs`). A task is a split of the ten digits into five and five. A network
//! is trained to tell easy digits apart, and stays as it is; six adapters, each with a head, learn a
//! split each on hard digits. The target is a seventh split, of which there are 64 or 2,048 digits: an
//! adapter of its own, then a fusion of all seven, both on those digits.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use modl_aggregate::{Fusion, WeightedSum};
use modl_core::{
    AggregatorConfig, Context, Device, Modular, Registry, Seed, Select, Targets, Tensor, Tensors,
    no_grad,
};
use modl_route::Fixed;
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::fit::{below, module};
use super::glyphs::{CLASSES, Hand, SIDE, glyphs};
use super::mlp::{accuracy, network, output, train};
use super::network::{After, Before, Network, SITE};
use crate::trials::{Measure, View};

const EASY: Hand = Hand { shift: 0, noise: 0.3 };
const HARD: Hand = Hand { shift: 2, noise: 0.6 };
const WIDTH: i64 = 128;
const SOURCES: usize = 6;
const FEW: usize = 64;
const MANY: usize = 2048;
const RANK: i64 = 8;
const BATCH: usize = 64;
/// Of networks, adapters and heads; a fusion learns at half of it, as in the paper.
const RATE: f64 = 1e-3;
const TESTS: usize = 4000;
/// The target's own adapter.
const OWN: &str = "own";

/// Key and name.
const WAYS: [(&str, &str); 7] = [
    ("single", "own adapter"),
    ("fusion", "fusion of all seven"),
    ("sources", "fusion of the six others"),
    ("average", "average of all seven"),
    ("random", "fusion, others of random labels"),
    ("wide", "own adapter, equal parameters"),
    ("head", "head alone"),
];

/// Steps: of the network, of each of the others' adapters, of each phase of the target.
fn steps(quick: bool) -> [u64; 3] {
    if quick { [10, 3, 3] } else { [500, 500, 500] }
}

/// The rank at which a LoRA has as many parameters as the target's own and the fusion.
const fn wide() -> i64 {
    RANK + (3 * WIDTH * WIDTH + 2 * WIDTH) / (2 * WIDTH)
}

/// The experiment.
#[derive(Debug)]
pub(super) struct Fusing;

impl Experiment for Fusing {
    fn about(&self) -> About {
        About {
            name: "fusion",
            title: "Adapters of other tasks for a task with few examples",
            citation: "Pfeiffer et al. 2021, arXiv 2005.00247",
            section: "5.2.2",
            claim: "A fusion with adapters of other tasks is better than the task's own adapter where \
                    there are few examples, and as good where there are many.",
            setup: "Drawn digits, 16 × 16; a task is a split of the digits into five and five. A \
                    network of two layers of 128 units is trained on easy digits for 500 steps and \
                    frozen. At its second layer LoRAs of rank 8 stand for adapters: six are trained on \
                    fresh hard digits of a split each for 500 steps, batch 64, Adam 0.001. The target \
                    is a seventh split with 64 or 2,048 digits: its own adapter and a head for 500 \
                    steps, then a fusion and a head for 500 at half the rate; accuracy on 4,000 digits. \
                    Controls: a fusion without the own adapter, the average of all with a head, a \
                    fusion of others that were trained on random labels, one LoRA with as many \
                    parameters as fusion and own adapter, a head alone. The paper has BERT and sixteen \
                    tasks of sentences.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
            "steps": steps(quick),
            "hands": [EASY.shift as f64, EASY.noise, HARD.shift as f64, HARD.noise],
            "width": WIDTH,
            "sources": SOURCES,
            "rank": [RANK, wide()],
            "batch": BATCH,
            "lr": RATE,
            "tests": TESTS,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let of = |n: usize| {
            WAYS.iter().map(move |(key, name)| Condition {
                key: format!("{key}-{n}"),
                group: format!("{n} digits"),
                series: (*name).to_owned(),
                reference: (*key != "single").then(|| format!("single-{n}")),
            })
        };
        [FEW, MANY].into_iter().flat_map(of).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 2] = [
            Measure { key: "accuracy", title: "accuracy", digits: 3 },
            Measure { key: "learned", title: "accuracy on what was learned from", digits: 3 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        let [first, _, own] = steps(quick);
        first + own
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let (way, n) = condition.split_once('-').context("a way and a number of digits")?;
        let n: usize = n.parse()?;
        let [_, _, many] = steps(lab.quick);
        let (x, y) = digits(n, SOURCES, lab, lab.seed.child("target"))?;
        let learn = |step: u64| batch(&x, &y, lab.seed.child("batch").nth(step));
        let mut target = Target::new(lab)?;
        let others: Vec<String> = match way {
            "fusion" | "sources" | "average" => target.sources(false, lab)?,
            "random" => target.sources(true, lab)?,
            _ => Vec::new(),
        };
        let own = match way {
            "single" | "fusion" | "average" | "random" => Some(RANK),
            "wide" => Some(wide()),
            "sources" | "head" => None,
            other => bail!("there is no way `{other}`"),
        };
        if let Some(rank) = own {
            target.adapter(OWN, rank, lab)?;
            target.learn(OWN, &format!("modules.{OWN}.*"), many, RATE, lab, &learn)?;
        }
        if !matches!(way, "single" | "wide") {
            let all = others.iter().cloned().chain(own.map(|_| OWN.to_owned()));
            let fuse: Box<dyn AggregatorConfig> = match way {
                "average" | "head" => Box::new(WeightedSum::default()),
                _ => Box::new(Fusion::default()),
            };
            target.together(all.collect(), fuse)?;
            target.learn("together", "aggregators.*", many, RATE / 2.0, lab, &learn)?;
        }
        let test = digits(TESTS, SOURCES, lab, lab.seed.child("test"))?;
        Ok(BTreeMap::from([
            ("accuracy".to_owned(), target.right(&test.0, &test.1)?),
            ("learned".to_owned(), target.right(&x, &y)?),
        ]))
    }

    fn thresholds(&self) -> Vec<Threshold> {
        fn points(v: &View, n: usize) -> f64 {
            let of = |way: &str| v.mean(&format!("{way}-{n}"), "accuracy");
            100.0 * (of("fusion") - of("single"))
        }
        vec![
            Threshold {
                text: "64 digits: points that the fusion is above the own adapter",
                statistic: |v| points(v, FEW),
                bound: Bound::AtLeast(2.0),
            },
            Threshold {
                text: "2,048 digits: points between the fusion and the own adapter",
                statistic: |v| points(v, MANY).abs(),
                bound: Bound::AtMost(1.0),
            },
        ]
    }
}

/// Hard digits and on which side of a split each is.
fn digits(n: usize, split: usize, lab: &Lab, seed: Seed) -> Result<(Tensor, Tensor)> {
    let (x, y) = glyphs(n, 0, HARD, seed)?;
    let sides = sides(lab.seed.child("split").nth(split as u64));
    let sides = Tensor::from_slice(&sides, &[CLASSES], Device::Cpu)?;
    Ok((x, sides.index_select(0, &y)?))
}

/// Five digits by lot have 1, the others 0.
fn sides(seed: Seed) -> Vec<i64> {
    let mut order: Vec<i64> = (0..CLASSES).collect();
    order.sort_by_key(|d| seed.nth(*d as u64).0);
    (0..CLASSES).map(|d| i64::from(order.iter().take(5).any(|o| *o == d))).collect()
}

/// Some of the digits that there are.
fn batch(x: &Tensor, y: &Tensor, seed: Seed) -> Result<(Tensor, Tensor)> {
    let rows = below(x.len_of(0) as usize, BATCH, seed)?;
    let rows: Vec<i64> = rows.into_iter().map(|r| r as i64).collect();
    let rows = Tensor::from_slice(&rows, &[BATCH as i64], x.device())?;
    Ok((x.index_select(0, &rows)?, y.index_select(0, &rows)?))
}

/// The frozen network with adapters, and the head of what was learned last.
struct Target {
    model: Modular,
    head: Tensors,
}

impl Target {
    fn new(lab: &Lab) -> Result<Self> {
        let widths = [(SIDE * SIDE) as i64, WIDTH, WIDTH, CLASSES];
        let net = network(&widths, lab.seed.child("network"))?;
        train(&[("net", &net)], steps(lab.quick)[0], RATE, lab.tick, |step| {
            let (x, y) = glyphs(BATCH, 0, EASY, lab.seed.child("easy").nth(step))?;
            Ok(output(&net, &x)?.cross_entropy(&y)?)
        })?;
        let of = |name: &str| net.need(name).cloned();
        let (w, b, last) = (of("0.weight")?, of("0.bias")?, of("1.bias")?);
        let network = Network::new(WIDTH, WIDTH, lab.seed, |_| {
            let before: Before = Box::new(move |x| x.need("x")?.linear(&w, Some(&b))?.relu());
            let after: After = Box::new(move |y| y.add(&last)?.relu());
            Ok((before, after))
        })?;
        let network = network.over(net.need("1.weight")?)?;
        let model = Modular::new(network, lab.seed.child("modules"))?;
        Ok(Target { model, head: Tensors::new() })
    }

    fn adapter(&mut self, name: &str, rank: i64, lab: &Lab) -> Result<()> {
        let lora = json!({"type": "lora", "r": rank, "alpha": 2 * rank});
        self.model.attach(name, lab.registry.modules.parse(&lora)?, &Targets::names([SITE]))?;
        self.together(vec![name.to_owned()], Box::new(WeightedSum::default()))
    }

    fn together(&mut self, names: Vec<String>, how: Box<dyn AggregatorConfig>) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        self.model.aggregate(how)?;
        Ok(self.model.route(Box::new(Fixed::modules(names)), false)?)
    }

    /// The others' adapters, each trained on its split, or on labels that say nothing.
    fn sources(&mut self, random: bool, lab: &Lab) -> Result<Vec<String>> {
        let names: Vec<String> = (0..SOURCES).map(module).collect();
        for (split, name) in names.iter().enumerate() {
            self.adapter(name, RANK, lab)?;
            let seed = lab.seed.child("source").nth(split as u64);
            let draw = |step: u64| {
                let (x, y) = digits(BATCH, split, lab, seed.nth(step))?;
                if !random {
                    return Ok((x, y));
                }
                let lot = below(2, BATCH, seed.child("lot").nth(step))?;
                let lot: Vec<i64> = lot.into_iter().map(|l| l as i64).collect();
                Ok((x, Tensor::from_slice(&lot, &y.size(), Device::Cpu)?))
            };
            let steps = steps(lab.quick)[1];
            self.learn(name, &format!("modules.{name}.*"), steps, RATE, lab, &draw)?;
        }
        Ok(names)
    }

    /// Trains what is selected, and a new head.
    fn learn(
        &mut self,
        name: &str,
        select: &str,
        steps: u64,
        lr: f64,
        lab: &Lab,
        draw: &dyn Fn(u64) -> Result<(Tensor, Tensor)>,
    ) -> Result<()> {
        let seed = lab.seed.child(name);
        self.head = network(&[WIDTH, 2], seed.child("head"))?;
        self.model.train_only(&Select::new(select))?;
        let own: Tensors = self.model.trainable().into_iter().collect();
        train(&[("own", &own), ("head", &self.head)], steps, lr, lab.tick, |step| {
            let (x, y) = draw(step)?;
            let cx = Context::train(seed, step);
            let loss = self.logits(&x, &cx)?.cross_entropy(&y)?;
            Ok(match self.model.penalty(&cx)? {
                Some(penalty) => loss.add(&penalty)?,
                None => loss,
            })
        })
    }

    fn logits(&self, x: &Tensor, cx: &Context) -> modl_core::Result<Tensor> {
        let found = self.model.forward(&Tensors::new().with("x", x.clone()), cx)?;
        output(&self.head, found.need("predicted")?)
    }

    fn right(&self, x: &Tensor, y: &Tensor) -> Result<f64> {
        accuracy(&no_grad(|| self.logits(x, &Context::eval()))?, y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_halves_and_not_all_the_same() {
        let all: Vec<Vec<i64>> = (0..20).map(|s| sides(Seed(s))).collect();
        assert!(all.iter().all(|s| s.len() == 10 && s.iter().sum::<i64>() == 5));
        assert!(all.iter().any(|s| *s != all[0]));
        // Own LoRA and fusion have as many parameters as the wide LoRA.
        assert_eq!(2 * WIDTH * wide(), 2 * WIDTH * RANK + 3 * WIDTH * WIDTH + 2 * WIDTH);
    }
}
