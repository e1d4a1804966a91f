//! SupSup (Wortsman et al. 2020, arXiv 2006.14769): a mask for each of 50 tasks on weights that are never
//! trained, and the task of a batch found by one gradient.
//!
//! Data: drawn digits (`glyphs.rs`), each task with its pixels in an order of its own. Nine of ten outputs
//! are superfluous: no digit is ever right there, and a network with the right mask knows it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use modl_core::Registry;
use modl_train::Classification;
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold, largest};
use super::glyphs::{CLASSES, Hand, SIDE};
use super::sequence::{learn, permuted, together};
use crate::trials::{Measure, View};

const HAND: Hand = Hand { shift: 1, noise: 0.4 };
/// Examples of a task to learn from and to test on: two batches.
const DIGITS: [usize; 2] = [2000, 256];
const WIDTH: i64 = 300;
const BATCH: usize = 128;

/// Key, name, outputs, and whether there is a mask for each task.
const WAYS: [(&str, &str, i64, bool); 3] = [
    ("naive", "one network, nothing done", 100, false),
    ("supsup_100", "SupSup, 100 outputs", 100, true),
    ("supsup_10", "SupSup, 10 outputs", 10, true),
];

/// Tasks, examples of each, and steps.
fn size(quick: bool) -> (usize, [usize; 2], u64) {
    if quick { (3, [40, 20], 4) } else { (50, DIGITS, 200) }
}

/// The experiment.
#[derive(Debug)]
pub(super) struct Superposition;

impl Experiment for Superposition {
    fn about(&self) -> About {
        About {
            name: "supsup",
            title: "Which of 50 tasks a batch is of, by one gradient",
            citation: "Wortsman et al. 2020, arXiv 2006.14769",
            section: "6.2",
            claim: "Masks on random weights learn thousands of permutations without forgetting, and a \
                    single gradient step finds the task of a batch that comes without a label.",
            setup: "Drawn digits, 16 × 16, in 50 permutations of their pixels, 2,000 examples of each, 256 \
                    test. 256-300-300-100 units without biases, weights of constant size with random \
                    signs, RMSprop with a rate of 1e-4, 200 steps of 128 for each task. The paper has \
                    MNIST and up to 2,500 permutations. Without masks: SGD with a rate of 0.1.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
            "size": size(quick),
            "hand": [HAND.shift as f64, HAND.noise],
            "width": WIDTH,
            "batch": BATCH,
            "ways": WAYS,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |(key, series, ..): &(&str, &str, i64, bool)| Condition {
            key: (*key).to_owned(),
            group: "50 permutations".to_owned(),
            series: (*series).to_owned(),
            reference: (*key != "naive").then(|| "naive".to_owned()),
        };
        WAYS.iter().map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 5] = [
            Measure { key: "acc", title: "mean accuracy at the end", digits: 4 },
            Measure { key: "bwt", title: "backward transfer", digits: 4 },
            Measure { key: "task_id", title: "share of rows whose task is found", digits: 4 },
            Measure { key: "untold", title: "mean accuracy without labels of tasks", digits: 4 },
            Measure { key: "moved", title: "most that an earlier task has changed", digits: 4 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        let (tasks, _, steps) = size(quick);
        tasks as u64 * steps
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let way = WAYS.iter().find(|(key, ..)| *key == condition);
        let (_, _, outputs, masks) =
            way.with_context(|| format!("there is no way `{condition}`"))?;
        let (tasks, [train, test], steps) = size(lab.quick);
        let of = |n: usize, part: &str| {
            together((0..tasks).map(|t| permuted(t, n, HAND, lab.seed.child("data"), part)))
        };
        let (modules, learning) = match masks {
            true => (
                r#"
modules.00 = { type = "sup_sup", targets = ["linear"] }
router.type = "fixed"
aggregator.type = "weighted_sum""#,
                r#"
strategy = { type = "module_per_task", infer = "one_shot" }
lr = 1e-4
optimizer.type = "rmsprop""#,
            ),
            false => (
                "",
                r#"
strategy = "naive"
train = ["base.*"]
lr = 0.1
optimizer.type = "sgd""#,
            ),
        };
        let recipe = format!(
            r#"
seed = {}
data.tasks.none = "none"
head = {{ type = "classification", heads = "backbone", classes = ["0", "1"] }}
{modules}

[backbone.fresh]
type = "mlp"
inputs = {}
hidden = [{WIDTH}, {WIDTH}]
outputs = {outputs}
bias = false

[[phases]]
name = "learn"
steps = {steps}
batch_size = {BATCH}
clip = 1000.0
schedule.type = "constant"
{learning}
"#,
            // TOML has no larger integers.
            lab.seed.child("recipe").0 >> 1,
            SIDE * SIDE,
        );
        let objective = Classification {
            classes: (0..CLASSES).map(|c| c.to_string()).collect(),
            of_backbone: true,
            ..Classification::default()
        };
        let learned = learn(&recipe, &objective, &of(train, "learn")?, &of(test, "test")?, lab)?;
        let mut found = learned.metrics();
        found.insert("moved".to_owned(), learned.moved()?);
        if let Some(inference) = &learned.inference {
            found.insert("task_id".to_owned(), inference.task_id());
            found.extend(inference.score().map(|score| ("untold".to_owned(), score)));
        }
        Ok(found)
    }

    fn thresholds(&self) -> Vec<Threshold> {
        vec![
            Threshold {
                text: "most that the accuracy on a task has changed since it was learned",
                statistic: |v| largest(["supsup_100", "supsup_10"].map(|key| v.mean(key, "moved"))),
                bound: Bound::AtMost(0.0),
            },
            Threshold {
                text: "share of rows whose task is found, 100 outputs",
                statistic: |v| v.mean("supsup_100", "task_id"),
                bound: Bound::AtLeast(0.98),
            },
            Threshold {
                text: "points of accuracy that are lost without labels of tasks, 100 outputs",
                statistic: |v| {
                    100.0 * (v.mean("supsup_100", "acc") - v.mean("supsup_100", "untold"))
                },
                bound: Bound::AtMost(0.0),
            },
            Threshold {
                text: "backward transfer without masks",
                statistic: |v| v.mean("naive", "bwt"),
                bound: Bound::AtMost(-0.3),
            },
            Threshold {
                text: "share of rows whose task is found: 100 outputs, less 10",
                statistic: |v: &View| {
                    v.mean("supsup_100", "task_id") - v.mean("supsup_10", "task_id")
                },
                bound: Bound::Above(0.0),
            },
        ]
    }
}
