//! Ponti, Sordoni, Bengio, Reddy 2023, *Combining Parameter-efficient Modules for Task-level
//! Generalisation*, arXiv 2202.13914: tasks as subsets of skills, against one module for all tasks
//! and one for each.
//!
//! Data: y = (W₀ + mean of Uₛ over the task's skills s) x with x ~ N(0, I₃₂), four skills of rank 2
//! and W₀ known to all. Of the 15 subsets of skills, eight are those of the held-out tasks, and 24
//! tasks to learn from share the other seven. Each task has 16 examples.
//!
//! A model is trained on the 24 tasks, and then for each held-out task by itself on that task's 16
//! examples: all parameters go on from where they are, except that what belongs to a task (its row of
//! Z, its embedding) is new. A row of a batch is a task with all of its examples, so that a task's
//! skills are drawn once in a step.
//!
//! The paper averages the factors of LoRAs and then multiplies them, which leaves a change of rank 2
//! for every task; the world is a mean of products, the other order. Both are here.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use modl_aggregate::{Average, WeightedSum};
use modl_compute::{HyperLora, Lora, Nested};
use modl_core::{
    AggregatorConfig, Kind, Modular, ModuleConfig, Registry, RouterConfig, Seed, Select, Targets,
    Tensor,
};
use modl_route::stats::assignment;
use modl_route::{Choice, Fixed, Polytropon, SkillSettings, TaskLabels};
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::fit::{Fit, below, module};
use super::network::{After, Before, Network, SITE};
use super::skills::{HELD, RANK, SEEN, SHOTS, SKILLS, Subset, TESTS, WIDTH, World, squared, task};
use crate::trials::{Measure, View};

/// Tasks of a step.
const BATCH: usize = 8;
const RATE: f64 = 5e-3;
/// Of Z, as the paper has it: logits are of the same size whatever the modules are.
const ROUTER_RATE: f64 = 1e-2;
/// What −ln P(Z) counts beside the mean loss of an example: it is there once for all examples.
const PRIOR: f64 = 1.0 / (SEEN as f64 * SHOTS as f64);

/// What a task's change of W₀ is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Of {
    /// The skills that the world has it made of.
    Known,
    /// Skills that are learned, with the prior or without it.
    Learned { prior: bool },
    /// A subset of the skills by lot.
    Random,
    /// One LoRA of this rank for all tasks.
    Shared(i64),
    /// A LoRA of its own, whose rank suffices for any task.
    Private,
    /// One that a network makes of the task's embedding.
    Generated,
}

/// Key, group, name within the group, and what it is.
type Way = (&'static str, &'static str, &'static str, Of);

const AVERAGE: &str = "average, then multiply";
const SUM: &str = "multiply, then average";
const OTHERS: &str = "no skills";

const WAYS: [Way; 11] = [
    ("average-known", AVERAGE, "known skills", Of::Known),
    ("average-learned", AVERAGE, "Polytropon", Of::Learned { prior: true }),
    ("average-plain", AVERAGE, "Polytropon, no prior", Of::Learned { prior: false }),
    ("average-random", AVERAGE, "random skills", Of::Random),
    ("sum-known", SUM, "known skills", Of::Known),
    ("sum-learned", SUM, "Polytropon", Of::Learned { prior: true }),
    ("sum-random", SUM, "random skills", Of::Random),
    ("shared", OTHERS, "shared, equal parameters", Of::Shared(SKILLS as i64 * RANK)),
    ("thin", OTHERS, "shared, equal operations", Of::Shared(RANK)),
    ("private", OTHERS, "private", Of::Private),
    ("hyper", OTHERS, "HyperLoRA", Of::Generated),
];

/// The experiment.
#[derive(Debug)]
pub(super) struct Skills;

/// Steps on the tasks to learn from, and on each held-out task.
fn steps(quick: bool) -> (u64, u64) {
    if quick { (20, 3) } else { (3000, 500) }
}

impl Experiment for Skills {
    fn about(&self) -> About {
        About {
            name: "polytropon",
            title: "Skills of tasks against one module for all and one for each",
            citation: "Ponti et al. 2023, arXiv 2202.13914",
            section: "4.2.3",
            claim: "Tasks that are learned as subsets of skills pass on more to new tasks with few \
                    examples than one module for all tasks, and than one for each.",
            setup: "y = (W₀ + mean of the task's skills) x for four linear skills of rank 2 on 32 \
                    numbers; W₀ is given. 24 tasks to learn from, 8 held-out ones that combine the \
                    skills anew, 16 examples each. Four LoRAs of rank 2 under a Polytropon router \
                    with its prior, whose rate is its own; Adam, squared error, 3,000 steps on 8 \
                    tasks each, then 500 on each held-out task alone. Private and shared LoRAs are \
                    of rank 8, with which any task can be expressed; HyperLoRA makes one of rank 2. \
                    Controls: the known skills, skills by lot, a shared LoRA of rank 2.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
            "steps": steps(quick),
            "world": [SKILLS as i64, RANK, WIDTH, SEEN as i64, HELD as i64, SHOTS],
            "tests": TESTS,
            "batch": BATCH,
            "lr": [RATE, ROUTER_RATE],
            "prior": PRIOR,
            "ways": WAYS.map(|(key, .., of)| format!("{key} {of:?}")),
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |(key, group, series, _): &Way| Condition {
            key: (*key).to_owned(),
            group: (*group).to_owned(),
            series: (*series).to_owned(),
            reference: (*key != "average-learned").then(|| "average-learned".to_owned()),
        };
        WAYS.iter().map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 4] = [
            Measure { key: "held_out", title: "error, held-out tasks", digits: 4 },
            Measure { key: "seen", title: "error, learned tasks", digits: 4 },
            Measure { key: "recovery", title: "skills recovered", digits: 3 },
            Measure { key: "parameters", title: "parameters", digits: 0 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        let (first, each) = steps(quick);
        first + HELD as u64 * each
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let way = WAYS.iter().find(|(key, ..)| *key == condition);
        let (_, group, _, of) = way.with_context(|| format!("there is no way `{condition}`"))?;
        let world = World::new(lab.seed)?;
        let make = |tasks: &[usize], seed: Seed| model(*of, *group == AVERAGE, &world, tasks, seed);
        let seen: Vec<usize> = (0..SEEN).collect();
        let (first, each) = steps(lab.quick);
        let learned = make(&seen, lab.seed)?;
        let fit = Fit {
            steps: first,
            lr: &|name| if name.starts_with("routers.") { ROUTER_RATE } else { RATE },
            seed: lab.seed.child("fit"),
            weights: if *of == (Of::Learned { prior: true }) { &[("ibp", PRIOR)] } else { &[] },
            more: &|_| Ok(None),
            tick: lab.tick,
        };
        fit.run(&learned, &|seed| world.shots(&below(SEEN, BATCH, seed)?), squared)?;
        let parameters: usize = learned.trainable().iter().map(|(_, t)| t.numel()).sum();
        let mut found = BTreeMap::from([
            ("seen".to_owned(), world.test(&learned, &seen, lab.seed)?),
            ("parameters".to_owned(), parameters as f64),
        ]);
        if let Of::Learned { .. } = of {
            found.insert("recovery".to_owned(), recovery(&chosen(&learned)?, &world.skills)?);
        }
        let mut sum = 0.0;
        for task in SEEN..SEEN + HELD {
            let seed = lab.seed.child("held out").nth(task as u64);
            let model = make(&[task], seed)?;
            take_over(&model, &learned)?;
            // The prior is one of a whole Z; what it says of one row more is left out.
            let fit = Fit { steps: each, seed: seed.child("fit"), weights: &[], ..fit };
            fit.run(&model, &|_| world.shots(&[task]), squared)?;
            sum += world.test(&model, &[task], lab.seed)?;
        }
        found.insert("held_out".to_owned(), sum / HELD as f64);
        Ok(found)
    }

    fn thresholds(&self) -> Vec<Threshold> {
        // The method is the paper's, which averages and then multiplies; the same of the other
        // order stands beside it.
        macro_rules! share {
            ($order:literal, $bound:literal, $text:literal, $holds:expr) => {
                Threshold {
                    text: concat!($order, ": share of seeds in which ", $text),
                    statistic: |v| share(v, $order, $holds),
                    bound: Bound::AtLeast($bound),
                }
            };
        }
        macro_rules! order {
            ($order:literal) => {
                [
                    share!(
                        $order,
                        0.8,
                        "known ≤ learned < private, learned ≤ 0.7 shared",
                        |e| {
                            e.known <= e.learned
                                && e.learned < e.private
                                && e.learned <= 0.7 * e.shared
                        }
                    ),
                    share!($order, 0.8, "known ≤ learned", |e| e.known <= e.learned),
                    share!($order, 0.8, "learned < private", |e| e.learned < e.private),
                    share!($order, 0.8, "learned ≤ 0.7 shared", |e| e.learned <= 0.7 * e.shared),
                    share!($order, 0.6, "0.8 of Z is recovered", |e| e.recovery >= 0.8),
                ]
            };
        }
        order!("average").into_iter().chain(order!("sum")).collect()
    }
}

/// What one seed gave under an order of averaging: errors on held-out tasks, and the share of Z.
struct Seeds {
    known: f64,
    learned: f64,
    private: f64,
    shared: f64,
    recovery: f64,
}

/// The share of the seeds of which something holds; NaN where one was not measured.
fn share(v: &View, order: &str, holds: fn(&Seeds) -> bool) -> f64 {
    let (known, learned) = (format!("{order}-known"), format!("{order}-learned"));
    v.mean_of(|of| {
        let s = Seeds {
            known: of(&known, "held_out"),
            learned: of(&learned, "held_out"),
            private: of("private", "held_out"),
            shared: of("shared", "held_out"),
            recovery: of(&learned, "recovery"),
        };
        let all = [s.known, s.learned, s.private, s.shared, s.recovery];
        if all.iter().any(|n| n.is_nan()) { f64::NAN } else { f64::from(u8::from(holds(&s))) }
    })
}

/// A model of these tasks.
fn model(of: Of, average: bool, world: &World, tasks: &[usize], seed: Seed) -> Result<Modular> {
    let network = Network::new(WIDTH, WIDTH, seed.child("network"), |_| {
        let before: Before = Box::new(|inputs| inputs.need("x").cloned());
        let after: After = Box::new(|y| Ok(y.clone()));
        Ok((before, after))
    })?;
    let mut model = Modular::new(network.over(&world.base)?, seed.child("modules"))?;
    // s = 1.
    let lora = |rank: i64| Lora { r: rank, alpha: rank as f64, ..Lora::default() };
    let names: Vec<String> = tasks.iter().map(|t| task(*t)).collect();
    let mut attach = |name: &str, config: Box<dyn ModuleConfig>| {
        model.attach(name, config, &Targets::names([SITE]))
    };
    let mut router: Box<dyn RouterConfig> = Box::new(Fixed::modules([module(0)]));
    match of {
        Of::Known | Of::Learned { .. } | Of::Random => {
            for j in 0..SKILLS {
                attach(&module(j), Box::new(lora(RANK)))?;
            }
            let of_tasks = if of == Of::Random { &world.lots } else { &world.skills };
            let subset = |t: &usize| {
                let skills = of_tasks.get(*t).copied().unwrap_or_default();
                let names = (0..SKILLS).filter(|s| skills.has(*s)).map(module).collect();
                (task(*t), Choice::Equal(names))
            };
            let table = Some(tasks.iter().map(subset).collect());
            router = Box::new(Fixed { table, ..Fixed::default() });
        }
        Of::Shared(rank) => attach(&module(0), Box::new(lora(rank)))?,
        Of::Private => {
            for name in &names {
                attach(name, Box::new(lora(SKILLS as i64 * RANK)))?;
            }
            router = Box::new(Fixed::default());
        }
        Of::Generated => {
            let tasks = modl_compute::Condition::names(names.clone());
            let config = Nested::new(lora(RANK));
            attach(&module(0), Box::new(HyperLora { config, tasks, skills: SKILLS as i64 }))?;
        }
    }
    if let Of::Learned { prior } = of {
        let labels = TaskLabels { tasks: names, ..TaskLabels::default() };
        // The concentration is a constant of the loss.
        let skills = SkillSettings { ibp: prior.then_some(1.0), ..SkillSettings::default() };
        router = Box::new(Polytropon { labels, skills });
    }
    model.route(router, false)?;
    let aggregator: Box<dyn AggregatorConfig> = match average {
        true => Box::new(Average::default()),
        false => Box::new(WeightedSum::default()),
    };
    model.aggregate(aggregator)?;
    Ok(model)
}

/// Gives a model the parameters of another one, except those of tasks, which have other shapes or
/// names.
fn take_over(model: &Modular, from: &Modular) -> Result<()> {
    let old = from.params();
    let alike = |name: &str, t: &Tensor| old.find(name).is_some_and(|o| o.size() == t.size());
    let same: Vec<&str> =
        model.params().iter().filter(|(n, p)| alike(n, p.tensor())).map(|(n, _)| n).collect();
    let select = Select::any(same);
    let tensors: Vec<(&str, &Tensor)> = old.select(&select).collect();
    Ok(model.params().load("the model of the tasks to learn from", tensors, &select)?)
}

/// Which skills each task has by the learned Z.
fn chosen(model: &Modular) -> Result<Vec<Subset>> {
    let mut logits = model.params().iter().filter(|(name, _)| name.starts_with("routers."));
    let (_, logits) = logits.next().context("there is no Z")?;
    let flat = logits.tensor().detach()?.to_kind(Kind::Double)?.to_vec::<f64>()?;
    let subset = |row: &[f64]| Subset((0..).zip(row).map(|(s, l)| u8::from(*l > 0.0) << s).sum());
    Ok(flat.chunks(SKILLS).map(subset).collect())
}

/// The share of entries in which a Z agrees with the world's, under the best assignment of its
/// columns to skills.
fn recovery(z: &[Subset], right: &[Subset]) -> Result<f64> {
    let wrong =
        |j: usize, s: usize| z.iter().zip(right).filter(|(a, b)| a.has(j) != b.has(s)).count();
    let cost: Vec<Vec<f64>> =
        (0..SKILLS).map(|j| (0..SKILLS).map(|s| wrong(j, s) as f64).collect()).collect();
    let skills = assignment(&cost)?;
    let of = |(row, s): (&Vec<f64>, Option<usize>)| s.and_then(|s| row.get(s).copied());
    let errors: f64 = cost.iter().zip(skills).filter_map(of).sum();
    Ok(1.0 - errors / (z.len() * SKILLS) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_z_with_its_columns_in_another_order_is_recovered() {
        let right: Vec<Subset> = (1..=15).map(Subset).collect();
        // Skill s in column s + 1.
        let turned: Vec<Subset> = right.iter().map(|z| Subset(z.0 << 1 & 15 | z.0 >> 3)).collect();
        assert_eq!(recovery(&turned, &right).unwrap(), 1.0);
        // All skills for all tasks: 7 of 15 entries of each column are wrong.
        let found = recovery(&[Subset(15); 15], &right).unwrap();
        assert!((found - 8.0 / 15.0).abs() < 1e-12, "{found}");
    }

    #[test]
    fn skills_and_the_shared_module_are_of_one_size_and_new_tasks_start_from_what_was_learned() {
        let world = World::new(Seed(0)).unwrap();
        let seen: Vec<usize> = (0..SEEN).collect();
        let size = |m: &Modular| m.params().iter().map(|(_, p)| p.tensor().numel()).sum::<usize>();
        let make = |of, tasks: &[usize], seed| model(of, true, &world, tasks, Seed(seed)).unwrap();
        assert_eq!(size(&make(Of::Known, &seen, 1)), size(&make(Of::Shared(8), &seen, 1)));
        for (of, own) in [
            (Of::Known, 0),
            (Of::Learned { prior: true }, SKILLS), // a row of Z
            (Of::Shared(8), 0),
            (Of::Private, 512),      // all of it
            (Of::Generated, SKILLS), // an embedding
        ] {
            let (old, new) = (make(of, &seen, 1), make(of, &[SEEN], 2));
            take_over(&new, &old).unwrap();
            let differs = |(name, p): (&str, &modl_core::Param)| match old.params().find(name) {
                Some(o) if o.size() == p.tensor().size() => !o.bit_equal(p.tensor()).unwrap(),
                _ => true,
            };
            let fresh = new.params().iter().filter(|(n, p)| differs((n, p)));
            assert_eq!(fresh.map(|(_, p)| p.tensor().numel()).sum::<usize>(), own, "{of:?}");
        }
    }
}
