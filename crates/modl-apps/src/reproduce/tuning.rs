//! LoRA (Hu et al. 2021, arXiv 2106.09685) is as good as full fine-tuning with about 1 % of its
//! parameters. A small BERT (`encoder.rs`) is pre-trained and tuned to each of four label tasks.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use modl_aggregate::WeightedSum;
use modl_core::{Context, Modular, Registry, Select, Targets, Tensor, Tensors, no_grad};
use modl_route::Fixed;
use serde_json::{Value, json};

use super::chains::World;
use super::encoder::{self, Pretrained, Texts, WIDTH, classes, perplexity, states};
use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::mlp::{accuracy, network, output, train};
use crate::trials::{Measure, View};

const LAYERS: usize = 2;
const RANK: i64 = 3;
/// Texts with labels, and texts that accuracies are of.
fn texts(quick: bool) -> [usize; 2] {
    if quick { [64, 40] } else { [2048, 1000] }
}

const BATCH: usize = 16;
/// Of full fine-tuning, and of the others, which start from nothing.
const RATES: [f64; 2] = [1e-3, 5e-3];
/// How many times as many steps a linear probe has.
const PROBE: u64 = 10;
/// By their numbers in `encoder.rs`, with the measure of each.
const TUNED: [(usize, &str); 4] = [(0, "first"), (2, "same"), (3, "odd"), (4, "more")];
const NAME: &str = "tuned";

/// Key and name.
const WAYS: [(&str, &str); 4] = [
    ("full", "full fine-tuning"),
    ("lora", "LoRA, rank 3, at queries and values"),
    ("bitfit", "BitFit"),
    ("probe", "linear probe"),
];

/// Steps of pre-training and of a task.
fn steps(quick: bool) -> [u64; 2] {
    if quick { [3, 2] } else { [encoder::STEPS, 300] }
}

/// The experiment.
#[derive(Debug, Default)]
pub(super) struct Tuning(Pretrained);

impl Experiment for Tuning {
    fn about(&self) -> About {
        About {
            name: "tuning",
            title: "LoRA and full fine-tuning",
            citation: "Hu et al. 2021, arXiv 2106.09685",
            section: "3.1",
            claim: "LoRA with about 1 % of the parameters is as good as full fine-tuning; a linear \
                    probe is not, and BitFit is between them.",
            setup: "Texts of 16 words whose halves are each of one of four Markov chains over 32 \
                    words, rows softmax of N(0, 2²). A BERT of 2 layers, width 128, inner width 256, \
                    is pre-trained as a masked language model for 5,000 steps of 64 texts, Adam 0.001. \
                    Four tasks: the domain of the first half; whether both are the same; whether \
                    the sum of their numbers is odd; whether the second half has more words of a \
                    quarter of the vocabulary. For each 2,048 texts with labels, 300 steps of 16 \
                    (3,000 of the probe), Adam 0.001 (full) or 0.005 (all others); a linear head on the mean state in each way; \
                    accuracy on 1,000 texts. Seeds share one encoder among the ways. The paper has \
                    RoBERTa and GPT-3.",
            seeds: 5,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 2,
            "steps": steps(quick),
            "pretraining": [encoder::BATCH as f64, encoder::RATE],
            "layers": LAYERS,
            "rank": RANK,
            "texts": texts(quick),
            "batch": BATCH,
            "lr": RATES,
            "probe": PROBE,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |(key, name): &(&str, &str)| Condition {
            key: (*key).to_owned(),
            group: "four tasks".to_owned(),
            series: (*name).to_owned(),
            reference: (*key != "full").then(|| "full".to_owned()),
        };
        WAYS.iter().map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 7] = [
            Measure { key: "accuracy", title: "mean accuracy", digits: 3 },
            Measure { key: "share", title: "trained, % of the encoder", digits: 2 },
            Measure { key: "first", title: "domain of the first half", digits: 3 },
            Measure { key: "same", title: "same domain", digits: 3 },
            Measure { key: "odd", title: "odd sum", digits: 3 },
            Measure { key: "more", title: "more of a quarter", digits: 3 },
            Measure { key: "perplexity", title: "perplexity of masked words", digits: 2 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        let [first, own] = steps(quick);
        first + TUNED.len() as u64 * own
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let world = World::new(lab.seed)?;
        let [many, tests] = texts(lab.quick);
        let learned = Texts::new(&world, lab.seed.child("learn"), many)?;
        let test = Texts::new(&world, lab.seed.child("test"), tests)?;
        let mut metrics = BTreeMap::new();
        let mut sum = 0.0;
        for (task, name) in TUNED {
            let encoder = self.0.encoder(LAYERS, steps(lab.quick)[0], &world, lab)?;
            if condition == "full" && task == 0 {
                let found = perplexity(&encoder, &world, lab.seed.child("held out"), tests)?;
                metrics.insert("perplexity".to_owned(), found);
            }
            let model = Modular::new(encoder, lab.seed.child("modules").nth(task as u64))?;
            let mut tuned = Tuned::new(model, condition, task, lab)?;
            metrics.insert("share".to_owned(), tuned.share());
            tuned.learn(&learned, lab)?;
            let right = tuned.right(&test)?;
            sum += right;
            metrics.insert(name.to_owned(), right);
        }
        metrics.insert("accuracy".to_owned(), sum / TUNED.len() as f64);
        Ok(metrics)
    }

    fn thresholds(&self) -> Vec<Threshold> {
        fn points(v: &View, way: &str, other: &str) -> f64 {
            100.0 * (v.mean(way, "accuracy") - v.mean(other, "accuracy"))
        }
        vec![
            Threshold {
                text: "points between LoRA and full fine-tuning",
                statistic: |v| points(v, "lora", "full").abs(),
                bound: Bound::AtMost(2.0),
            },
            Threshold {
                text: "points that LoRA is above the linear probe",
                statistic: |v| points(v, "lora", "probe"),
                bound: Bound::AtLeast(5.0),
            },
            Threshold {
                text: "BitFit between them: points that it is above the linear probe",
                statistic: |v| points(v, "bitfit", "probe"),
                bound: Bound::AtLeast(0.0),
            },
            Threshold {
                text: "BitFit between them: points that it is above LoRA, of which one is noise",
                statistic: |v| points(v, "bitfit", "lora"),
                bound: Bound::AtMost(1.0),
            },
        ]
    }
}

/// A model that learns a task in one of the ways.
struct Tuned {
    model: Modular,
    head: Tensors,
    task: usize,
    /// Whether states change while it learns.
    moves: bool,
    lr: f64,
}

impl Tuned {
    fn new(mut model: Modular, way: &str, task: usize, lab: &Lab) -> Result<Self> {
        let module = match way {
            "full" | "probe" => None,
            "lora" => Some(json!({"type": "lora", "r": RANK, "alpha": 2 * RANK})),
            "bitfit" => Some(json!({"type": "bitfit"})),
            other => bail!("there is no way `{other}`"),
        };
        if let Some(module) = module {
            let config = lab.registry.modules.parse(&module)?;
            let targets = match way {
                "lora" => Targets::names(["query", "value"]),
                // All biases but that of the pooler, of which nothing is seen here.
                _ => Targets::pattern(r"encoder\..*(query|key|value|dense)|.*LayerNorm"),
            };
            model.attach(NAME, config, &targets)?;
            model.aggregate(Box::new(WeightedSum::default()))?;
            model.route(Box::new(Fixed::modules([NAME])), false)?;
        }
        model.train_only(&match way {
            "full" => Select::any(["base.embeddings.*", "base.encoder.*"]),
            "probe" => Select::none(),
            _ => Select::new("modules.*"),
        })?;
        let lr = if way == "full" { RATES[0] } else { RATES[1] };
        let head = network(&[WIDTH, classes(task)], lab.seed.child("head").nth(task as u64))?;
        Ok(Tuned { model, head, task, moves: way != "probe", lr })
    }

    /// The parameters that are trained beside the head, in % of those of the encoder.
    fn share(&self) -> f64 {
        let own = self.model.trainable().iter().map(|(_, t)| t.numel()).sum::<usize>();
        let all = self.model.backbone().params().iter().filter(|(n, _)| !n.starts_with("pooler"));
        100.0 * own as f64 / all.map(|(_, p)| p.tensor().numel()).sum::<usize>() as f64
    }

    fn learn(&mut self, texts: &Texts, lab: &Lab) -> Result<()> {
        let own: Tensors = self.model.trainable().into_iter().collect();
        let labels = texts.labels(self.task)?;
        let seed = lab.seed.child("batch").nth(self.task as u64);
        let steps = steps(lab.quick)[1];
        // A probe's steps cost next to nothing, so that it has as many as it may want.
        let (still, steps, tick): (_, _, &dyn Fn()) = match self.moves {
            true => (None, steps, lab.tick),
            false => (Some(self.still(&texts.ids)?), PROBE * steps, &|| ()),
        };
        train(&[("own", &own), ("head", &self.head)], steps, self.lr, tick, |n| {
            let rows = texts.some(BATCH, seed.nth(n))?;
            let states = match &still {
                Some(still) => still.index_select(0, &rows)?,
                None => {
                    let ids = texts.ids.index_select(0, &rows)?;
                    states(&self.model, &ids, &Context::train(seed, n))?
                }
            };
            Ok(output(&self.head, &states)?.cross_entropy(&labels.index_select(0, &rows)?)?)
        })
    }

    /// States of texts as the model is now.
    fn still(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(no_grad(|| states(&self.model, ids, &Context::eval()))?)
    }

    fn right(&self, texts: &Texts) -> Result<f64> {
        accuracy(&output(&self.head, &self.still(&texts.ids)?)?, texts.labels(self.task)?)
    }
}
