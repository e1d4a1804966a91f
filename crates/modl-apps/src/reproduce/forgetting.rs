//! Forgetting on a stream of permutations (Lopez-Paz and Ranzato 2017, arXiv 1706.08840; Chaudhry et
//! al. 2019, arXiv 1812.00420 and 1902.10486): what replay, constraints on gradients and springs
//! leave of earlier tasks.
//!
//! Data: drawn digits (`glyphs.rs`), each task with its pixels in an order of its own. Each example is
//! seen once. Nothing carries over from one permutation to the next but the digits' frequencies, so
//! forward transfer is to be 0: that is the control.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use modl_core::Registry;
use modl_train::{Classification, Objective};
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold, largest};
use super::glyphs::{CLASSES, Hand, SIDE};
use super::sequence::{learn, permuted, together};
use crate::trials::{Measure, View};

const HAND: Hand = Hand { shift: 1, noise: 0.4 };
/// Examples of a task to learn from and to test on.
const DIGITS: [usize; 2] = [1000, 200];
const BATCH: usize = 10;
const WIDTH: i64 = 100;

/// Key, name, strategy.
const WAYS: [(&str, &str, &str); 8] = [
    ("naive", "nothing", r#""naive""#),
    // The authors' penalty has no ½.
    ("ewc", "EWC", r#"{ type = "ewc", lambda = 6.0, examples = 256 }"#),
    ("si", "SI", r#"{ type = "si", c = 0.1 }"#),
    ("lwf", "LwF", r#"{ type = "lwf", lambda = 1.0 }"#),
    ("replay", "replay", r#"{ type = "replay", memory = 5120, rows = 10 }"#),
    ("a_gem", "A-GEM", r#"{ type = "a_gem", memory = 5120, rows = 256 }"#),
    ("gem", "GEM", r#"{ type = "gem", memory_per_task = 256 }"#),
    ("joint", "all tasks at once", r#""joint""#),
];

/// Tasks, and examples of each.
fn size(quick: bool) -> (usize, [usize; 2]) {
    if quick { (3, [40, 20]) } else { (20, DIGITS) }
}

/// The experiment.
#[derive(Debug)]
pub(super) struct Forgetting;

impl Experiment for Forgetting {
    fn about(&self) -> About {
        About {
            name: "forgetting",
            title: "What is left of earlier tasks on a stream of permutations",
            citation: "Lopez-Paz and Ranzato 2017, arXiv 1706.08840",
            section: "6.2",
            claim: "A memory of examples, replayed or as a constraint on gradients, keeps more of \
                    earlier tasks than EWC does, and EWC more than nothing.",
            setup: "Drawn digits, 16 × 16, in 20 permutations of their pixels; 1,000 examples of each \
                    are seen once in batches of 10, 200 test. Two hidden layers of 100 units, SGD with a \
                    rate of 0.1. EWC with strength 3, memories of 256 examples for each task, as the \
                    authors have them for MNIST.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
            "size": size(quick),
            "hand": [HAND.shift as f64, HAND.noise],
            "batch": BATCH,
            "ways": WAYS,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |(key, series, _): &(&str, &str, &str)| Condition {
            key: (*key).to_owned(),
            group: "20 permutations".to_owned(),
            series: (*series).to_owned(),
            reference: (*key != "naive").then(|| "naive".to_owned()),
        };
        WAYS.iter().map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 4] = [
            Measure { key: "acc", title: "mean accuracy at the end", digits: 4 },
            Measure { key: "bwt", title: "backward transfer", digits: 4 },
            Measure { key: "fwt", title: "forward transfer", digits: 4 },
            Measure { key: "forgetting", title: "forgetting", digits: 4 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        let (tasks, [train, _]) = size(quick);
        (tasks * train.div_ceil(BATCH)) as u64
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let way = WAYS.iter().find(|(key, ..)| *key == condition);
        let (_, _, strategy) = way.with_context(|| format!("there is no way `{condition}`"))?;
        let (tasks, [train, test]) = size(lab.quick);
        let of = |n: usize, name: &str| {
            together((0..tasks).map(|t| permuted(t, n, HAND, lab.seed.child("data"), name)))
        };
        let recipe = format!(
            r#"
seed = {}
backbone.fresh = {{ type = "mlp", inputs = {}, hidden = [{WIDTH}, {WIDTH}] }}
data.tasks = {{ none = "none" }}
head = {{ type = "classification", classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"] }}

[[phases]]
name = "learn"
strategy = {strategy}
train = ["base.*", "heads.*"]
batch_size = {BATCH}
lr = 0.1
clip = 1000.0
optimizer = {{ type = "sgd" }}
schedule = {{ type = "constant" }}
"#,
            // TOML has no larger integers.
            lab.seed.child("recipe").0 >> 1,
            SIDE * SIDE,
        );
        let (train, test) = (of(train, "learn")?, of(test, "test")?);
        let objective = Classification {
            head: "class".to_owned(),
            dim: WIDTH,
            classes: (0..CLASSES).map(|c| c.to_string()).collect(),
            ..Classification::default()
        };
        let learned = learn(&recipe, &objective, &train, &test, lab)?;
        if condition == "joint" {
            let said = modl_train::evaluate(
                &learned.model,
                &objective,
                &test,
                256,
                &modl_train::Batch::describe,
            )?;
            let found = objective.scores(&said.iter().collect::<Vec<_>>());
            let acc = found.get("accuracy").copied().unwrap_or(f64::NAN);
            return Ok(BTreeMap::from([("acc".to_owned(), acc)]));
        }
        Ok(learned.metrics())
    }

    fn thresholds(&self) -> Vec<Threshold> {
        fn apart(v: &View, better: &str, worse: &str, measure: &'static str) -> f64 {
            100.0 * (v.mean(better, measure) - v.mean(worse, measure))
        }
        vec![
            Threshold {
                text: "points of accuracy that replay is above EWC",
                statistic: |v| apart(v, "replay", "ewc", "acc"),
                bound: Bound::Above(0.0),
            },
            Threshold {
                text: "points of accuracy that A-GEM is above EWC",
                statistic: |v| apart(v, "a_gem", "ewc", "acc"),
                bound: Bound::Above(0.0),
            },
            Threshold {
                text: "points of accuracy that EWC is above nothing",
                statistic: |v| apart(v, "ewc", "naive", "acc"),
                bound: Bound::Above(0.0),
            },
            Threshold {
                text: "points of backward transfer that replay is above nothing",
                statistic: |v| apart(v, "replay", "naive", "bwt"),
                bound: Bound::AtLeast(15.0),
            },
            Threshold {
                text: "the largest |forward transfer| of naive, EWC, replay, A-GEM",
                statistic: |v| {
                    largest(["naive", "ewc", "replay", "a_gem"].map(|w| v.mean(w, "fwt").abs()))
                },
                bound: Bound::AtMost(0.05),
            },
        ]
    }
}
