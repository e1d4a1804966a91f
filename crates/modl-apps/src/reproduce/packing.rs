//! PackNet (Mallya and Lazebnik 2018, arXiv 1711.05769): several tasks in one network, each with weights
//! of its own, against a network for each.
//!
//! Data: drawn digits (`glyphs.rs`), each task a way to look at them with a head of its own. Four tasks
//! with three quarters of a task's weights given back; the capacity is put to the test by eight, with
//! three quarters and with half of them given back.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use modl_core::Registry;
use modl_train::{Classification, Dataset};
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold, largest};
use super::glyphs::{CLASSES, Hand, SIDE, glyphs};
use super::sequence::{dataset, learn, together};
use crate::trials::{Measure, View};

const HAND: Hand = Hand { shift: 1, noise: 0.6 };
/// Examples of a task to learn from and to test on.
const DIGITS: [usize; 2] = [2000, 2000];
const WIDTH: i64 = 256;
const BATCH: usize = 64;

/// Key, group, name, tasks, and what is given back.
const WAYS: [(&str, &str, &str, usize, Option<f64>); 5] = [
    ("alone_4", "4 tasks", "a network each", 4, None),
    ("packed_4_75", "4 tasks", "PackNet, 75 % given back", 4, Some(0.75)),
    ("alone_8", "8 tasks", "a network each", 8, None),
    ("packed_8_75", "8 tasks", "PackNet, 75 % given back", 8, Some(0.75)),
    ("packed_8_50", "8 tasks", "PackNet, 50 % given back", 8, Some(0.5)),
];

fn steps(quick: bool) -> u64 {
    if quick { 4 } else { 600 }
}

/// The experiment.
#[derive(Debug)]
pub(super) struct Packing;

impl Experiment for Packing {
    fn about(&self) -> About {
        About {
            name: "packing",
            title: "Several tasks in one network against a network for each",
            citation: "Mallya and Lazebnik 2018, arXiv 1711.05769",
            section: "6.2",
            claim: "Pruning frees weights for further tasks: several tasks share one network with an \
                    error close to that of networks of their own, and earlier tasks lose nothing.",
            setup: "Drawn digits, 16 × 16, in eight views, each a task with a head of its own; two hidden \
                    layers of 256 units, 600 steps of Adam on 2,000 examples of each, half of them after \
                    pruning. The paper has VGG-16 on images.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
            "steps": steps(quick),
            "hand": [HAND.shift as f64, HAND.noise],
            "digits": DIGITS,
            "width": WIDTH,
            "batch": BATCH,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |(key, group, series, tasks, packed): &(&str, &str, &str, usize, _)| {
            let reference = Option::<f64>::is_some(packed).then(|| format!("alone_{tasks}"));
            Condition {
                key: (*key).to_owned(),
                group: (*group).to_owned(),
                series: (*series).to_owned(),
                reference,
            }
        };
        WAYS.iter().map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 3] = [
            Measure { key: "acc", title: "mean accuracy at the end", digits: 4 },
            Measure { key: "last", title: "accuracy on the last task", digits: 4 },
            Measure { key: "moved", title: "most that an earlier task has changed", digits: 4 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        8 * steps(quick)
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let way = WAYS.iter().find(|(key, ..)| *key == condition);
        let (.., tasks, packed) = way.with_context(|| format!("there is no way `{condition}`"))?;
        let [train, test] = DIGITS.map(|n| if lab.quick { 20 } else { n });
        let of = |task: usize, n: usize, part: &str| -> Result<Dataset> {
            let seed = lab.seed.child("data").child(part).nth(task as u64);
            let (x, y) = glyphs(n, task, HAND, seed)?;
            dataset(&name(task), x, &y)
        };
        let all = |n: usize, part: &str| together((0..*tasks).map(|t| of(t, n, part)));
        let mut found = BTreeMap::new();
        let mut accuracies = Vec::new();
        match packed {
            Some(prune) => {
                let modules = format!(
                    r#"
modules.{}.type = "pack_net"
modules.{}.prune = {prune:?}
modules.{}.targets = ["linear"]
router = {{ type = "fixed" }}
aggregator = {{ type = "weighted_sum" }}"#,
                    name(0),
                    name(0),
                    name(0)
                );
                let recipe = recipe(&modules, r#""module_per_task""#, "modules.{task}.*", lab);
                let objective = head(0..*tasks);
                let learned =
                    learn(&recipe, &objective, &all(train, "learn")?, &all(test, "test")?, lab)?;
                let at_the_end = |j| learned.matrix.at(tasks - 1, j);
                let all = (0..*tasks).map(at_the_end).collect::<Option<Vec<f64>>>();
                accuracies = all.context("the accuracy of each task")?;
                found.insert("moved".to_owned(), learned.moved()?);
            }
            None => {
                for t in 0..*tasks {
                    let recipe = recipe("", r#""naive""#, "base.*", lab);
                    let (train, test) = (of(t, train, "learn")?, of(t, test, "test")?);
                    let learned = learn(&recipe, &head(t..t + 1), &train, &test, lab)?;
                    accuracies.push(learned.matrix.at(0, 0).context("the accuracy of the task")?);
                }
            }
        }
        found.insert("acc".to_owned(), accuracies.iter().sum::<f64>() / accuracies.len() as f64);
        found.extend(accuracies.last().map(|last| ("last".to_owned(), *last)));
        for (t, accuracy) in accuracies.into_iter().enumerate() {
            found.insert(format!("acc_{}", t + 1), accuracy);
        }
        Ok(found)
    }

    fn thresholds(&self) -> Vec<Threshold> {
        fn lost(v: &View, packed: &str, alone: &str, measure: &'static str) -> f64 {
            100.0 * (v.mean(alone, measure) - v.mean(packed, measure))
        }
        vec![
            Threshold {
                text: "4 tasks: most points of accuracy that one of the first three loses in one network",
                statistic: |v| {
                    let lost = |m| lost(v, "packed_4_75", "alone_4", m);
                    largest(["acc_1", "acc_2", "acc_3"].map(lost))
                },
                bound: Bound::AtMost(2.0),
            },
            Threshold {
                text: "most that the accuracy on an earlier task has changed by the end",
                statistic: |v| {
                    let all = ["packed_4_75", "packed_8_75", "packed_8_50"];
                    largest(all.map(|key| v.mean(key, "moved")))
                },
                bound: Bound::AtMost(0.0),
            },
            Threshold {
                text: "8 tasks: points that the last task loses with half given back, less with three quarters",
                statistic: |v| {
                    lost(v, "packed_8_50", "alone_8", "last")
                        - lost(v, "packed_8_75", "alone_8", "last")
                },
                bound: Bound::Above(0.0),
            },
        ]
    }
}

fn name(task: usize) -> String {
    format!("view{task}")
}

/// A head for each task.
fn head(tasks: std::ops::Range<usize>) -> Classification {
    let classes: Vec<usize> = (0..CLASSES as usize).collect();
    Classification {
        head: "class".to_owned(),
        dim: WIDTH,
        classes: classes.iter().map(usize::to_string).collect(),
        tasks: tasks.map(|t| (name(t), classes.clone())).collect(),
        ..Classification::default()
    }
}

fn recipe(modules: &str, strategy: &str, trained: &str, lab: &Lab) -> String {
    format!(
        r#"
seed = {}
backbone.fresh = {{ type = "mlp", inputs = {}, hidden = [{WIDTH}, {WIDTH}] }}
data.tasks = {{ view0 = "none" }}
head = {{ type = "classification", classes = ["0", "1"] }}
{modules}

[[phases]]
name = "learn"
strategy = {strategy}
train = ["{trained}", "heads.*.{{task}}.*"]
steps = {}
batch_size = {BATCH}
lr = 1e-3
optimizer = {{ type = "adamw", weight_decay = 0.0 }}
schedule = {{ type = "constant" }}
"#,
        // TOML has no larger integers.
        lab.seed.child("recipe").0 >> 1,
        SIDE * SIDE,
        steps(lab.quick),
    )
}
