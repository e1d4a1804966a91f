//! Mittal, Bengio, Lajoie 2022, *Is a Modular Architecture Enough?*, arXiv 2206.02713: collapse and
//! specialisation of soft routing on data made of rules.
//!
//! Data: a, b ~ N(0, 1), one of R rules, y = c₁ a + c₂ b with the rule's own c ~ N(0, 1); the network
//! sees a, b and which rule. Fresh examples in each step. Network: encoders of numbers and rules
//! 1 → e → e and R → e → e, R modules 3e → d⁄R → d, a decoder d → e → 1; e = 32, d = 128. The modules
//! get thinner as rules get more, so that the parameters stay the same.
//!
//! The authors' routers score a module by what it gives out, or see the rule alone; the one here is a
//! linear layer on all that modules see.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use modl_aggregate::WeightedSum;
use modl_core::{
    Base, Device, Init, Kind, Modular, Registry, RouterConfig, Scope, Seed, Targets, Tensor,
    Tensors, Trace,
};
use modl_route::{Fixed, Mittal, Scores, Soft};
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::expert::{Expert, Linear};
use super::fit::{Examples, Fit, below, module, told};
use super::network::{After, Before, Network, SITE};
use crate::trials::Measure;

/// The numbers of rules.
const RULES: [usize; 3] = [2, 8, 16];
/// e.
const CODE: i64 = 32;
/// d.
const WIDTH: i64 = 128;
const BATCH: usize = 256;
const RATE: f64 = 1e-3;
/// What CV(importance)² counts where use is balanced; Shazeer et al. 2017 have 0.1 to 1.
const BALANCE: f64 = 0.2;

/// Where the modules of a row come from.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    /// The rule's own.
    Known,
    /// A learned softmax.
    Soft,
    /// The same with a loss that balances use.
    Balanced,
    /// Any, drawn for each row.
    Random,
    /// There is one, as large as all.
    One,
}

const WAYS: [(Way, &str, &str); 5] = [
    (Way::Known, "known", "known rule"),
    (Way::Soft, "soft", "soft router"),
    (Way::Balanced, "balanced", "soft, balanced"),
    (Way::Random, "random", "random module"),
    (Way::One, "one", "one network"),
];

/// The experiment.
#[derive(Debug)]
pub(super) struct Rules;

fn steps(quick: bool) -> u64 {
    if quick { 20 } else { 5000 }
}

fn key(way: &str, rules: usize) -> String {
    format!("{way}-{rules}")
}

impl Experiment for Rules {
    fn about(&self) -> About {
        About {
            name: "mittal",
            title: "Collapse and specialisation on data made of rules",
            citation: "Mittal et al. 2022, arXiv 2206.02713",
            section: "4.2.1",
            claim: "Modules that are given the rule beat one network, more so with more rules. \
                    Routing that is learned end to end collapses and specialises far less than \
                    that, and loses part of the gain.",
            setup: "Regression: y is a linear function of two normal numbers, one of R at random, \
                    and the network is told which. R modules between shared encoders and a decoder, \
                    thinner for more rules; one network of as many parameters as modules and \
                    router; Adam, batches of 256 fresh examples, the L1 loss. Out of distribution: \
                    the numbers doubled. Known: each row has the module of its rule. Random: each \
                    row has any module. Balanced: 0.2 · CV(importance)² is added to the loss.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
            "steps": steps(quick),
            "batch": BATCH,
            "lr": RATE,
            "code": CODE,
            "width": WIDTH,
            "balance": BALANCE,
            "tests": tests(quick),
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let of = |rules: usize| {
            // The controls cost much and say the most where there are many rules.
            let ways = WAYS.iter().filter(move |(way, ..)| {
                rules == 16 || !matches!(way, Way::Balanced | Way::Random)
            });
            ways.map(move |(way, name, title)| Condition {
                key: key(name, rules),
                group: format!("{rules} rules"),
                series: (*title).to_owned(),
                reference: (*way != Way::Soft).then(|| key("soft", rules)),
            })
        };
        RULES.into_iter().flat_map(of).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const fn measure(key: &'static str, title: &'static str) -> Measure {
            Measure { key, title, digits: 3 }
        }
        const ALL: [Measure; 7] = [
            measure("l1", "L1"),
            measure("ood", "L1 out of distr."),
            measure("collapse_average", "collapse, avg"),
            measure("collapse_worst", "collapse, worst"),
            measure("specialisation", "specialisation"),
            measure("alignment", "alignment"),
            measure("adaptation", "adaptation"),
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        steps(quick)
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let (name, rules) = condition.split_once('-').context("a condition is WAY-RULES")?;
        let rules: usize = rules.parse()?;
        let known = WAYS.iter().find(|(_, own, _)| *own == name);
        let way = known.with_context(|| format!("there is no way `{name}`"))?.0;
        let world = World::new(rules, lab.seed)?;
        let model = model(way, rules, lab.seed)?;
        let balance = move |trace: &Trace| match way {
            Way::Balanced => importance_cv2(trace)?.mul_scalar(BALANCE).map(Some),
            _ => Ok(None),
        };
        let fit = Fit {
            steps: steps(lab.quick),
            lr: &|_| RATE,
            seed: lab.seed.child("fit"),
            weights: &[],
            more: &balance,
            tick: lab.tick,
        };
        fit.run(&model, &|seed| world.draw(BATCH, 1.0, way, seed), absolute)?;
        let mut found = BTreeMap::new();
        for (metric, scale) in [("l1", 1.0), ("ood", 2.0)] {
            let examples = world.draw(tests(lab.quick), scale, way, lab.seed.child("test"))?;
            let (predicted, trace) = examples.predict(&model)?;
            found
                .insert(metric.to_owned(), absolute(&predicted, &examples.target)?.mean()?.item()?);
            if scale == 1.0 && way != Way::One {
                let use_of = activation(&trace, &examples.origin, rules)?;
                let m = Mittal::of(&use_of, Seed(0))?;
                for (name, value) in [
                    ("collapse_average", m.collapse_average),
                    ("collapse_worst", m.collapse_worst),
                    ("specialisation", m.specialisation),
                    ("alignment", m.alignment),
                    ("adaptation", m.adaptation),
                ] {
                    found.insert(name.to_owned(), value);
                }
            }
        }
        Ok(found)
    }

    fn thresholds(&self) -> Vec<Threshold> {
        vec![
            Threshold {
                text: "16 rules: L1 of the known rule, of that of one network",
                statistic: |v| v.mean("known-16", "l1") / v.mean("one-16", "l1"),
                bound: Bound::AtMost(0.8),
            },
            Threshold {
                text: "alignment of the known rule: the largest of all seeds, summed over numbers of rules",
                statistic: |v| {
                    RULES.map(|r| v.largest(&key("known", r), "alignment")).into_iter().sum()
                },
                bound: Bound::AtMost(0.0),
            },
            Threshold {
                text: "16 rules: alignment of the soft router",
                statistic: |v| v.mean("soft-16", "alignment"),
                bound: Bound::AtLeast(0.2),
            },
            Threshold {
                text: "collapse (worst) of the soft router: with 16 rules less with 2",
                statistic: |v| {
                    v.mean("soft-16", "collapse_worst") - v.mean("soft-2", "collapse_worst")
                },
                bound: Bound::Above(0.0),
            },
            Threshold {
                text: "16 rules: L1 out of distribution of the known rule less the soft router's",
                statistic: |v| v.mean("known-16", "ood") - v.mean("soft-16", "ood"),
                bound: Bound::AtMost(0.0),
            },
            Threshold {
                text: "16 rules: share of the collapse (worst) that balancing takes away",
                statistic: |v| fall(v, "collapse_worst"),
                bound: Bound::AtLeast(0.5),
            },
            Threshold {
                // Not a quotient: where the collapse gets no smaller, it would hold for nothing.
                text: "16 rules: share of the misalignment that balancing takes away, less half of \
                       that of the collapse",
                statistic: |v| fall(v, "alignment") - 0.5 * fall(v, "collapse_worst"),
                bound: Bound::AtMost(0.0),
            },
        ]
    }
}

/// How much smaller a metric is where use is balanced, of what it was.
fn fall(v: &crate::trials::View, metric: &str) -> f64 {
    1.0 - v.mean("balanced-16", metric) / v.mean("soft-16", metric)
}

fn tests(quick: bool) -> usize {
    if quick { 256 } else { 8192 }
}

fn absolute(predicted: &Tensor, target: &Tensor) -> modl_core::Result<Tensor> {
    predicted.sub(target)?.abs()
}

/// R rules.
struct World {
    /// c, `[rules, 2]`.
    factors: Tensor,
    rules: usize,
}

impl World {
    fn new(rules: usize, seed: Seed) -> Result<Self> {
        let shape = [rules as i64, 2];
        let factors =
            Init::Normal(1.0).tensor(&shape, seed.child("rules"), Kind::Float, Device::Cpu)?;
        Ok(World { factors, rules })
    }

    /// `n` examples, the numbers of which are scaled by `scale`.
    fn draw(&self, n: usize, scale: f64, way: Way, seed: Seed) -> Result<Examples> {
        let normal = Init::Normal(scale);
        let numbers =
            normal.tensor(&[n as i64, 2], seed.child("numbers"), Kind::Float, Device::Cpu)?;
        let origin = below(self.rules, n, seed.child("rule"))?;
        let index: Vec<i64> = origin.iter().map(|r| *r as i64).collect();
        let rule = Tensor::from_slice(&index, &[n as i64], Device::Cpu)?;
        let factors = self.factors.index_select(0, &rule)?;
        let target = factors.mul(&numbers)?.sum_dims(&[-1], false)?;
        let tasks = match way {
            Way::Known => told(&origin),
            Way::Random => told(&below(self.rules, n, seed.child("module"))?),
            _ => None,
        };
        let inputs = Tensors::new().with("numbers", numbers).with("rule", rule);
        Ok(Examples { inputs, target, origin, tasks })
    }
}

fn model(way: Way, rules: usize, seed: Seed) -> Result<Modular> {
    let input = 3 * CODE;
    let network = Network::new(input, WIDTH, seed.child("network"), |s| ends(s, rules as i64))?;
    let mut model = Modular::new(network, seed.child("modules"))?;
    let thin = Expert { width: WIDTH / rules as i64 };
    let router = rules as i64 * (input + 1);
    let all = rules as i64 * thin.parameters(input, WIDTH) + router;
    let (modules, expert) = match way {
        Way::One => (1, Expert::of_size(all, input, WIDTH)),
        _ => (rules, thin),
    };
    for j in 0..modules {
        model.attach(&module(j), Box::new(expert), &Targets::names([SITE]))?;
    }
    let router: Box<dyn RouterConfig> = match way {
        Way::One => Box::new(Fixed::modules([module(0)])),
        Way::Known | Way::Random => Box::new(Fixed::default()),
        // As PyTorch starts a linear layer: uniform in ±1⁄√width has this standard deviation.
        Way::Soft | Way::Balanced => Box::new(Soft {
            scores: Scores { init_std: 1.0 / (3.0 * input as f64).sqrt(), ..Scores::default() },
        }),
    };
    model.route(router, false)?;
    model.aggregate(Box::new(WeightedSum { base: Base::Replaced }))?;
    Ok(model)
}

/// The encoders and the decoder.
fn ends(scope: &mut Scope, rules: i64) -> modl_core::Result<(Before, After)> {
    let number =
        [Linear::new(scope, "number.0", CODE, 1)?, Linear::new(scope, "number.1", CODE, CODE)?];
    let first = Linear::new(scope, "rule.0", CODE, rules)?;
    let rule = [first, Linear::new(scope, "rule.1", CODE, CODE)?];
    let decoder =
        [Linear::new(scope, "out.0", CODE, WIDTH)?, Linear::new(scope, "out.1", 1, CODE)?];
    let through = |[a, b]: &[Linear; 2], x: &Tensor| b.of(&a.of(x)?.relu()?);
    let before = move |inputs: &Tensors| {
        let numbers = inputs.need("numbers")?.unsqueeze(-1)?; // [batch, 2, 1]
        let numbers = through(&number, &numbers)?.reshape(&[-1, 2 * CODE])?;
        let hot = inputs.need("rule")?.one_hot(rules)?.to_kind(Kind::Float)?;
        Tensor::cat(&[numbers, through(&rule, &hot)?], -1)
    };
    let after = move |y: &Tensor| through(&decoder, y)?.squeeze(-1);
    Ok((Box::new(before), Box::new(after)))
}

/// The mean α of each module over the rows of each rule, `[rule][module]`.
fn activation(trace: &Trace, origin: &[usize], rules: usize) -> Result<Vec<Vec<f64>>> {
    let (_, routing) = trace.routings.first().context("nothing was routed")?;
    let alpha = routing.dense(Kind::Double, Device::Cpu)?.to_vec::<f64>()?;
    let mut sums = vec![vec![0.0; routing.modules]; rules];
    let mut counts = vec![0.0; rules];
    for (rule, row) in origin.iter().zip(alpha.chunks(routing.modules)) {
        if let (Some(sum), Some(count)) = (sums.get_mut(*rule), counts.get_mut(*rule)) {
            *count += 1.0;
            sum.iter_mut().zip(row).for_each(|(s, a)| *s += a);
        }
    }
    for (sum, count) in sums.iter_mut().zip(counts) {
        sum.iter_mut().for_each(|s| *s /= count);
    }
    Ok(sums)
}

/// CV(importance)² of the routing, through which gradients flow (Shazeer et al. 2017, eq. 6–7).
fn importance_cv2(trace: &Trace) -> modl_core::Result<Tensor> {
    let Some((_, routing)) = trace.routings.first() else {
        return Err(modl_core::Error::invalid("trace", "holds no routing"));
    };
    let m = routing.modules as f64;
    let importance = routing.dense(Kind::Float, Device::Cpu)?.mean_dims(&[0], false)?; // [m]
    // α sums to 1, so that the mean over modules is 1⁄m.
    importance.mul_scalar(m)?.add_scalar(-1.0)?.square()?.mean()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_rules_applied_to_the_numbers() {
        let world = World::new(8, Seed(3)).unwrap();
        let e = world.draw(500, 2.0, Way::Known, Seed(4)).unwrap();
        let numbers = e.inputs.need("numbers").unwrap().to_vec::<f64>().unwrap();
        let factors = world.factors.to_vec::<f64>().unwrap();
        let right = e.target.to_vec::<f64>().unwrap();
        let mut seen = [0; 8];
        for (i, rule) in e.origin.iter().enumerate() {
            seen[*rule] += 1;
            let (c, x) = (&factors[2 * rule..][..2], &numbers[2 * i..][..2]);
            assert!((right[i] - c[0] * x[0] - c[1] * x[1]).abs() < 1e-5);
        }
        // Each is expected 62.5 times with a standard deviation of 7.4.
        assert!(seen.iter().all(|n| (35..=90).contains(n)), "{seen:?}");
        // Twice as wide: the variance of 1,000 numbers is 4 ± 0.18.
        let variance = numbers.iter().map(|x| x * x).sum::<f64>() / 1000.0;
        assert!((variance - 4.0).abs() < 0.7, "{variance}");
        assert_eq!(e.tasks, told(&e.origin));
    }

    #[test]
    fn one_network_is_as_large_as_all_modules_with_their_router() {
        for rules in RULES {
            let count = |way| {
                let model = model(way, rules, Seed(0)).unwrap();
                model.params().iter().map(|(_, p)| p.tensor().numel()).sum::<usize>() as f64
            };
            let (modular, one) = (count(Way::Soft), count(Way::One));
            assert!((modular / one - 1.0).abs() < 0.01, "{rules}: {modular}, {one}");
        }
    }
}
