//! Shazeer et al. 2017, arXiv 1701.06538, appendix A, table 6: losses that balance the load of a
//! mixture's experts; and Wang et al. 2024, arXiv 2408.15664: biases that balance it without a loss.
//!
//! Data: clusters around prototypes ~ N(0, I₆₄), x = prototype + σ·N(0, I); y = U x with the
//! cluster's own U, 8 × 64. Network: 16 experts 64 → 16 → 8 alone, two of which are chosen for each x
//! by a router that sees x.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use modl_aggregate::WeightedSum;
use modl_core::{Base, Device, Init, Kind, Modular, Registry, Seed, Targets, Tensor, Tensors};
use modl_route::RoutingStats;
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::expert::Expert;
use super::fit::{Examples, Fit, below, module, noise, told};
use super::network::{After, Before, Network, SITE};
use crate::trials::{Measure, View};

const EXPERTS: usize = 16;
const CHOSEN: i64 = 2;
/// Hidden width of an expert.
const WIDTH: i64 = 16;
const CLUSTERS: usize = 10;
const INPUT: i64 = 64;
const OUTPUT: i64 = 8;
/// σ.
const SPREAD: f64 = 0.5;
/// Rows of a step: 64 choices for each expert.
const BATCH: usize = 512;
const RATE: f64 = 1e-3;

/// A way to choose experts.
struct Way {
    key: &'static str,
    title: &'static str,
    /// The router's configuration.
    router: fn() -> Value,
    /// What its losses count.
    weights: &'static [(&'static str, f64)],
    /// Its modules.
    modules: Modules,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Modules {
    /// The experts.
    Experts,
    /// The experts, of which the context names one by the cluster.
    Known,
    /// The experts, of which the context names any.
    Random,
    /// One network with the parameters of all.
    AllParameters,
    /// One network with the operations of those that are chosen.
    AllOperations,
}

fn noisy() -> Value {
    json!({"type": "noisy_top_k", "k": CHOSEN})
}

/// W starts as PyTorch's linear layers do, with this standard deviation.
fn plain() -> Value {
    json!({"type": "top_k", "k": CHOSEN, "init_std": (3.0 * INPUT as f64).sqrt().recip()})
}

fn biased() -> Value {
    json!({"type": "deepseek", "k": CHOSEN, "init_std": (3.0 * INPUT as f64).sqrt().recip()})
}

fn by_name() -> Value {
    json!({"type": "fixed"})
}

fn first() -> Value {
    json!({"type": "fixed", "modules": [module(0)]})
}

const WAYS: [Way; 11] = {
    use Modules::{AllOperations, AllParameters, Experts, Known, Random};
    const fn way(
        key: &'static str,
        title: &'static str,
        router: fn() -> Value,
        weights: &'static [(&'static str, f64)],
        modules: Modules,
    ) -> Way {
        Way { key, title, router, weights, modules }
    }
    [
        way("none", "noisy, no loss", noisy, &[], Experts),
        way("importance", "noisy, importance 0.2", noisy, &[("importance", 0.2)], Experts),
        way("load", "noisy, load 0.2", noisy, &[("load", 0.2)], Experts),
        way("both", "noisy, both 0.1", noisy, &[("importance", 0.1), ("load", 0.1)], Experts),
        way("plain", "top-k, no loss", plain, &[], Experts),
        way("switch", "top-k, balance 0.01", plain, &[("balance", 0.01)], Experts),
        way("bias", "biases (DeepSeek)", biased, &[], Experts),
        way("known", "known cluster", by_name, &[], Known),
        way("random", "random expert", by_name, &[], Random),
        way("parameters", "one, equal parameters", first, &[], AllParameters),
        way("operations", "one, equal operations", first, &[], AllOperations),
    ]
};

/// The experiment.
#[derive(Debug)]
pub(super) struct Balance;

fn steps(quick: bool) -> u64 {
    if quick { 20 } else { 2000 }
}

fn tests(quick: bool) -> usize {
    if quick { 256 } else { 8192 }
}

impl Experiment for Balance {
    fn about(&self) -> About {
        About {
            name: "balance",
            title: "Losses and biases that balance the load of experts",
            citation: "Shazeer et al. 2017, arXiv 1701.06538; Wang et al. 2024, arXiv 2408.15664",
            section: "4.2.1",
            claim: "Without a loss a few experts get nearly everything. Importance and load losses \
                    of any weight even the load out and do not cost quality; biases that only choose \
                    do it without a loss, and cost less.",
            setup: "Ten clusters around normal prototypes of 64 numbers, with noise of 0.5; the \
                    target is a linear map of the cluster's own to 8 numbers. 16 experts with 16 \
                    hidden units, two for each input; batches of 512 fresh inputs, Adam, squared \
                    error, 2,000 steps. Controls: the cluster's own expert, any expert, one network \
                    with as many parameters, one with as many operations.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        let ways: Vec<Value> = WAYS
            .iter()
            .map(|w| json!([w.key, (w.router)(), format!("{:?} {:?}", w.weights, w.modules)]))
            .collect();
        json!({
            "version": 2,
            "steps": steps(quick),
            "tests": tests(quick),
            "ways": ways,
            "experts": [EXPERTS as i64, CHOSEN, WIDTH],
            "data": [CLUSTERS as i64, INPUT, OUTPUT],
            "spread": SPREAD,
            "batch": BATCH,
            "lr": RATE,
        })
    }

    fn conditions(&self, registry: &Registry) -> Vec<Condition> {
        let there = |w: &&Way| {
            let kind = (w.router)();
            registry.routers.entries().iter().any(|e| kind["type"] == e.name)
        };
        let condition = |w: &Way| Condition {
            key: w.key.to_owned(),
            group: "16 experts".to_owned(),
            series: w.title.to_owned(),
            reference: (w.key != "none").then(|| "none".to_owned()),
        };
        WAYS.iter().filter(there).map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 5] = [
            Measure { key: "mse", title: "squared error", digits: 4 },
            Measure { key: "cv_load", title: "CV(load)", digits: 3 },
            Measure { key: "cv_importance", title: "CV(importance)", digits: 3 },
            Measure { key: "max_violation", title: "MaxVio", digits: 3 },
            Measure { key: "active", title: "experts in use", digits: 2 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        steps(quick)
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let way = WAYS.iter().find(|w| w.key == condition);
        let way = way.with_context(|| format!("there is no way `{condition}`"))?;
        let world = World::new(lab.seed)?;
        let model = model(way, lab)?;
        let fit = Fit {
            steps: steps(lab.quick),
            lr: &|_| RATE,
            seed: lab.seed.child("fit"),
            weights: way.weights,
            more: &|_| Ok(None),
            tick: lab.tick,
        };
        fit.run(&model, &|seed| world.draw(BATCH, way.modules, seed), squared)?;
        let examples = world.draw(tests(lab.quick), way.modules, lab.seed.child("test"))?;
        let (predicted, trace) = examples.predict(&model)?;
        let mse = squared(&predicted, &examples.target)?.mean()?.item()?;
        let mut found = BTreeMap::from([("mse".to_owned(), mse)]);
        if !matches!(way.modules, Modules::AllParameters | Modules::AllOperations) {
            let (_, routing) = trace.routings.first().context("nothing was routed")?;
            let stats = RoutingStats::of(routing)?;
            for (name, value) in [
                ("cv_load", stats.load_cv2.sqrt()),
                ("cv_importance", stats.importance_cv2.sqrt()),
                ("max_violation", stats.max_violation),
                ("active", stats.active_modules),
            ] {
                found.insert(name.to_owned(), value);
            }
        }
        Ok(found)
    }

    fn thresholds(&self) -> Vec<Threshold> {
        vec![
            Threshold {
                text: "CV(load) without a loss",
                statistic: |v| v.mean("none", "cv_load"),
                bound: Bound::AtLeast(1.0),
            },
            Threshold {
                text: "CV(load) with importance, load or both, the largest",
                statistic: |v| largest(LOSSES.map(|way| v.mean(way, "cv_load"))),
                bound: Bound::AtMost(0.2),
            },
            Threshold {
                text: "squared error with importance, load or both, of that without: the largest",
                statistic: |v| largest(LOSSES.map(|way| quotient(v, way, "none"))),
                bound: Bound::AtMost(1.01),
            },
            Threshold {
                text: "MaxVio with biases",
                statistic: |v| v.mean("bias", "max_violation"),
                bound: Bound::AtMost(0.3),
            },
            Threshold {
                text: "squared error with biases, of that with the balance loss",
                statistic: |v| quotient(v, "bias", "switch"),
                bound: Bound::AtMost(1.0),
            },
        ]
    }
}

const LOSSES: [&str; 3] = ["importance", "load", "both"];

fn quotient(v: &View, a: &str, b: &str) -> f64 {
    v.mean(a, "mse") / v.mean(b, "mse")
}

/// The largest; NaN where one is, as where a condition was not run.
fn largest(values: [f64; 3]) -> f64 {
    let missing = values.iter().any(|v| v.is_nan());
    if missing { f64::NAN } else { values.into_iter().fold(f64::NEG_INFINITY, f64::max) }
}

/// The mean squared error of each row.
fn squared(predicted: &Tensor, target: &Tensor) -> modl_core::Result<Tensor> {
    predicted.sub(target)?.square()?.mean_dims(&[-1], false)
}

fn model(way: &Way, lab: &Lab) -> Result<Modular> {
    let network = Network::new(INPUT, OUTPUT, lab.seed.child("network"), |_| {
        let before: Before = Box::new(|inputs| inputs.need("x").cloned());
        let after: After = Box::new(|y| Ok(y.clone()));
        Ok((before, after))
    })?;
    let mut model = Modular::new(network, lab.seed.child("modules"))?;
    let (experts, all) = (EXPERTS as i64, Expert { width: WIDTH }.parameters(INPUT, OUTPUT));
    let (modules, expert) = match way.modules {
        // The router's scores are parameters and operations, too.
        Modules::AllParameters => (1, Expert::of_size(experts * (all + INPUT + 1), INPUT, OUTPUT)),
        Modules::AllOperations => {
            (1, Expert::of_size(CHOSEN * all + experts * (INPUT + 1), INPUT, OUTPUT))
        }
        _ => (EXPERTS, Expert { width: WIDTH }),
    };
    for j in 0..modules {
        model.attach(&module(j), Box::new(expert), &Targets::names([SITE]))?;
    }
    model.route(lab.registry.routers.parse(&(way.router)())?, false)?;
    model.aggregate(Box::new(WeightedSum { base: Base::Replaced }))?;
    Ok(model)
}

struct World {
    /// `[clusters, 64]`.
    prototypes: Tensor,
    /// U, `[clusters, 8, 64]`.
    maps: Tensor,
}

impl World {
    fn new(seed: Seed) -> Result<Self> {
        let c = CLUSTERS as i64;
        let draw = |name: &str, std: f64, shape: &[i64]| {
            Init::Normal(std).tensor(shape, seed.child(name), Kind::Float, Device::Cpu)
        };
        // So that y is about 1.
        let scale = (INPUT as f64).sqrt().recip();
        Ok(World {
            prototypes: draw("prototypes", 1.0, &[c, INPUT])?,
            maps: draw("maps", scale, &[c, OUTPUT, INPUT])?,
        })
    }

    fn draw(&self, n: usize, modules: Modules, seed: Seed) -> Result<Examples> {
        let origin = below(CLUSTERS, n, seed.child("cluster"))?;
        let index: Vec<i64> = origin.iter().map(|c| *c as i64).collect();
        let of = |rows: &[i64]| Tensor::from_slice(rows, &[n as i64], Device::Cpu);
        let noise = noise(SPREAD, &[n as i64, INPUT], seed.child("noise"))?;
        let x = self.prototypes.index_select(0, &of(&index)?)?.add(&noise)?;
        // All maps of x, of which each row takes its cluster's.
        let all = x.matmul(&self.maps.reshape(&[-1, INPUT])?.t()?)?.reshape(&[-1, OUTPUT])?;
        let own: Vec<i64> = (0..).zip(&index).map(|(i, c)| i * CLUSTERS as i64 + c).collect();
        let target = all.index_select(0, &of(&own)?)?;
        let tasks = match modules {
            Modules::Known => told(&origin),
            Modules::Random => told(&below(EXPERTS, n, seed.child("module"))?),
            _ => None,
        };
        Ok(Examples { inputs: Tensors::new().with("x", x), target, origin, tasks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_clusters_maps_and_inputs_are_near_their_prototypes() {
        let world = World::new(Seed(1)).unwrap();
        let e = world.draw(300, Modules::Known, Seed(2)).unwrap();
        let list = |t: &Tensor| t.to_vec::<f64>().unwrap();
        let (x, y) = (list(e.inputs.need("x").unwrap()), list(&e.target));
        let (prototypes, maps) = (list(&world.prototypes), list(&world.maps));
        let mut noise = 0.0;
        for (i, c) in e.origin.iter().enumerate() {
            let x = &x[i * 64..][..64];
            for o in 0..8 {
                let row = &maps[(c * 8 + o) * 64..][..64];
                let right: f64 = row.iter().zip(x).map(|(u, x)| u * x).sum();
                assert!((y[i * 8 + o] - right).abs() < 1e-4);
            }
            let own = &prototypes[c * 64..][..64];
            noise += x.iter().zip(own).map(|(x, p)| (x - p).powi(2)).sum::<f64>() / 64.0;
        }
        // σ² = 0.25 with a standard error of 0.0026.
        assert!((noise / 300.0 - 0.25).abs() < 0.015, "{}", noise / 300.0);
    }

    #[test]
    fn the_largest_of_what_was_not_measured_is_not_a_number() {
        assert_eq!(largest([1.0, 3.0, 2.0]), 3.0);
        for i in 0..3 {
            let mut values = [1.0, 3.0, 2.0];
            values[i] = f64::NAN;
            assert!(largest(values).is_nan(), "{i}");
        }
    }
}
