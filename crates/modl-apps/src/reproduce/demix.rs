//! DEMix layers (Gururangan et al. 2022, arXiv 2108.05036): an expert for each domain, mixed at test
//! time by the posterior of the domain, and taken out again.
//!
//! Data: four domains, each a Markov chain over 32 tokens, and a blend of which no text was seen in
//! training: each of its texts has transitions of its own, Σ w_d P_d with w uniform on the simplex. The
//! language model sees the token before; its embeddings and output are shared, a feed-forward expert
//! stands for each domain and is trained on it alone.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use modl_aggregate::{BayesianMixture, Prior, WeightedSum};
use modl_core::{Base, Device, Init, Kind, Modular, Registry, Seed, Targets, Tensor, Tensors};
use serde_json::{Value, json};

use super::chains::{DOMAINS, LENGTH, SHARPNESS, Text, WORDS, World};
use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use super::expert::{Expert, Linear};
use super::fit::{Examples, Fit, module, told};
use super::network::{After, Before, Network, SITE};
use crate::trials::{Measure, View};

const WIDTH: i64 = 32;
/// Texts of each domain in a step.
const BATCH: usize = 8;
const RATE: f64 = 3e-3;
/// How much of the prior each text changes, and texts for the cache: the paper's.
const UPDATE: f64 = 0.3;
const CACHE: usize = 100;
/// Texts that perplexities are of.
const TESTS: usize = 400;

/// Key and name.
const WAYS: [(&str, &str); 8] = [
    ("best", "best expert"),
    ("uniform", "mixture, uniform prior"),
    ("updating", "mixture, updating prior"),
    ("cached", "mixture, cached prior"),
    ("known", "known weights"),
    ("removal", "cached prior, one expert less"),
    ("parameters", "one, equal parameters"),
    ("operations", "one, equal operations"),
];

fn steps(quick: bool) -> u64 {
    if quick { 10 } else { 1000 }
}

/// The experiment.
#[derive(Debug)]
pub(super) struct Domains;

impl Experiment for Domains {
    fn about(&self) -> About {
        About {
            name: "demix",
            title: "Mixtures of domain experts on a blend of domains",
            citation: "Gururangan et al. 2022, arXiv 2108.05036",
            section: "5.2.1",
            claim: "On texts of a domain that is a mixture of known ones, weighing domain experts by \
                    their posterior is better than the best expert; an expert can be taken out, which \
                    costs its own domain and no other.",
            setup: "Four Markov chains over 32 tokens, rows softmax of N(0, 2²); texts of 64 tokens. \
                    Blend: each text has transitions Σ w P, w uniform on the simplex. A language model \
                    of the token before, width 32, with a feed-forward expert of 32 hidden units for \
                    each domain; 1,000 steps of 8 texts of each domain, Adam 0.003. Perplexity on 400 \
                    texts; updating prior 0.3, cache from 100 texts of the domain. Controls: the true \
                    weights of each text, one network with as many parameters, one with as many \
                    operations.",
            seeds: 10,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
            "steps": steps(quick),
            "data": [DOMAINS, WORDS, LENGTH, TESTS, CACHE],
            "sharpness": SHARPNESS,
            "width": WIDTH,
            "batch": BATCH,
            "lr": RATE,
            "update": UPDATE,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |(key, name): &(&str, &str)| Condition {
            key: (*key).to_owned(),
            group: "four domains".to_owned(),
            series: (*name).to_owned(),
            reference: (!["best", "removal"].contains(key)).then(|| "best".to_owned()),
        };
        WAYS.iter().map(condition).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 4] = [
            Measure { key: "blend", title: "perplexity of the blend", digits: 3 },
            Measure { key: "domains", title: "mean perplexity of the domains", digits: 3 },
            Measure { key: "own", title: "least rise of an own domain, %", digits: 2 },
            Measure { key: "others", title: "largest rise of another domain, %", digits: 2 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        steps(quick)
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let world = World::new(lab.seed)?;
        let experts = match condition {
            "parameters" => Experts::One(DOMAINS as i64),
            "operations" => Experts::One(1),
            _ => Experts::Each,
        };
        let model = train(&world, experts, lab)?;
        let modules = if experts == Experts::Each { DOMAINS } else { 1 };
        let tables: Vec<Table> = (0..modules).map(|j| table(&model, j)).collect::<Result<_>>()?;
        let all: Vec<&Table> = tables.iter().collect();
        let blend = world.blend(lab.seed.child("blend"), TESTS)?;
        let domains: Vec<Vec<Text>> =
            (0..DOMAINS).map(|d| world.domain(d, "test", TESTS)).collect::<Result<_>>()?;
        let dev = |d: usize| world.domain(d, "cache", CACHE);
        let mean = |of: &dyn Fn(usize, &[Text]) -> Result<f64>| -> Result<f64> {
            let each = domains.iter().enumerate().map(|(d, texts)| of(d, texts));
            Ok(each.collect::<Result<Vec<f64>>>()?.iter().sum::<f64>() / DOMAINS as f64)
        };
        let (blend, domains) = match condition {
            "best" | "parameters" | "operations" => {
                (best(&all, &blend), mean(&|_, texts| Ok(best(&all, texts)))?)
            }
            "uniform" | "updating" => {
                let start = || match condition {
                    "uniform" => Prior::Uniform,
                    _ => Prior::Updating(UPDATE),
                };
                (mixed(&all, start(), &blend)?, mean(&|_, texts| mixed(&all, start(), texts))?)
            }
            "cached" => {
                let dev_blend = world.blend(lab.seed.child("blend cache"), CACHE)?;
                (
                    mixed(&all, prior(&all, &dev_blend)?, &blend)?,
                    mean(&|d, texts| mixed(&all, prior(&all, &dev(d)?)?, texts))?,
                )
            }
            "known" => (known(&all, &blend), mean(&|_, texts| Ok(known(&all, texts)))?),
            "removal" => {
                let whole: Vec<f64> = domains
                    .iter()
                    .enumerate()
                    .map(|(d, texts)| mixed(&all, prior(&all, &dev(d)?)?, texts))
                    .collect::<Result<_>>()?;
                let (mut own, mut others) = (f64::INFINITY, f64::NEG_INFINITY);
                for gone in 0..DOMAINS {
                    // The other experts are as they were: none has seen this domain.
                    let left = all.iter().enumerate().filter(|(j, _)| *j != gone);
                    let left: Vec<&Table> = left.map(|(_, t)| *t).collect();
                    for (d, (texts, before)) in domains.iter().zip(&whole).enumerate() {
                        let now = mixed(&left, prior(&left, &dev(d)?)?, texts)?;
                        let rise = 100.0 * (now / before - 1.0);
                        match d == gone {
                            true => own = own.min(rise),
                            false => others = others.max(rise),
                        }
                    }
                }
                return Ok(BTreeMap::from([("own".into(), own), ("others".into(), others)]));
            }
            other => bail!("there is no way `{other}`"),
        };
        Ok(BTreeMap::from([("blend".to_owned(), blend), ("domains".to_owned(), domains)]))
    }

    fn thresholds(&self) -> Vec<Threshold> {
        vec![
            Threshold {
                text: "blend: perplexity with the cached prior, of that of the best expert",
                statistic: |v: &View| v.mean("cached", "blend") / v.mean("best", "blend"),
                bound: Bound::AtMost(0.97),
            },
            Threshold {
                text: "one expert less: largest rise of another domain's perplexity, %",
                statistic: |v: &View| v.mean("removal", "others"),
                bound: Bound::AtMost(2.0),
            },
            Threshold {
                text: "one expert less: least rise of its own domain's perplexity, %",
                statistic: |v: &View| v.mean("removal", "own"),
                bound: Bound::AtLeast(10.0),
            },
        ]
    }
}

/// ln p of each word after each word.
struct Table(Vec<Vec<f64>>);

impl Table {
    fn log_p(&self, before: usize, word: usize) -> f64 {
        self.0.get(before).and_then(|row| row.get(word)).copied().unwrap_or(f64::NEG_INFINITY)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Experts {
    Each,
    /// One, with the parameters of so many.
    One(i64),
}

/// A language model with experts, trained on all domains.
fn train(world: &World, experts: Experts, lab: &Lab) -> Result<Modular> {
    let network = Network::new(WIDTH, WIDTH, lab.seed.child("network"), |scope| {
        let words = scope.param("words", &[WORDS as i64, WIDTH], Init::Normal(1.0))?;
        let last = Linear::new(scope, "last", WORDS as i64, WIDTH)?;
        let before: Before = Box::new(move |inputs| words.index_select(0, inputs.need("x")?));
        let after: After = Box::new(move |y| last.of(y));
        Ok((before, after))
    })?;
    let mut model = Modular::new(network, lab.seed.child("modules"))?;
    let expert = Expert { width: WIDTH };
    let (names, expert, router) = match experts {
        Experts::Each => (DOMAINS, expert, json!({"type": "fixed"})),
        Experts::One(times) => {
            let size = times * expert.parameters(WIDTH, WIDTH);
            let one = json!({"type": "fixed", "modules": [module(0)]});
            (1, Expert::of_size(size, WIDTH, WIDTH), one)
        }
    };
    for j in 0..names {
        model.attach(&module(j), Box::new(expert), &Targets::names([SITE]))?;
    }
    model.route(lab.registry.routers.parse(&router)?, false)?;
    model.aggregate(Box::new(WeightedSum { base: Base::Replaced }))?;
    let fit = Fit {
        steps: steps(lab.quick),
        lr: &|_| RATE,
        seed: lab.seed.child("fit"),
        weights: &[],
        more: &|_| Ok(None),
        tick: lab.tick,
    };
    fit.run(&model, &|seed| examples(world, experts, seed), surprise)?;
    Ok(model)
}

/// Pairs of tokens of some texts of all domains.
fn examples(world: &World, experts: Experts, seed: Seed) -> Result<Examples> {
    let (mut x, mut target, mut origin) = (Vec::new(), Vec::new(), Vec::new());
    let fresh = world.again(seed);
    for d in 0..DOMAINS {
        for text in fresh.domain(d, "learn", BATCH)? {
            for (before, word) in text.words.iter().zip(text.words.iter().skip(1)) {
                x.push(*before as i64);
                target.push(*word as i64);
                origin.push(d);
            }
        }
    }
    let row = |t: &[i64]| Tensor::from_slice(t, &[t.len() as i64], Device::Cpu);
    let tasks = if experts == Experts::Each { told(&origin) } else { None };
    Ok(Examples {
        inputs: Tensors::new().with("x", row(&x)?),
        target: row(&target)?,
        origin,
        tasks,
    })
}

/// −ln p of each row's word.
fn surprise(logits: &Tensor, words: &Tensor) -> modl_core::Result<Tensor> {
    logits.log_softmax(-1)?.gather(1, &words.unsqueeze(1)?)?.squeeze(1)?.neg()
}

/// What expert number `j` says after each word.
fn table(model: &Modular, j: usize) -> Result<Table> {
    let words: Vec<i64> = (0..WORDS as i64).collect();
    let x = Tensor::from_slice(&words, &[WORDS as i64], Device::Cpu)?;
    let tasks = told(&vec![j; WORDS]).context("tasks")?;
    let examples = Examples {
        inputs: Tensors::new().with("x", x.clone()),
        target: x,
        origin: vec![j; WORDS],
        tasks: Some(tasks),
    };
    let (logits, _) = examples.predict(model)?;
    let flat = logits.to_kind(Kind::Double)?.log_softmax(-1)?.reshape(&[-1])?.to_vec::<f64>()?;
    Ok(Table(flat.chunks(WORDS).map(<[f64]>::to_vec).collect()))
}

/// exp of the mean of −ln p that `log_p` gives of each text's words after the first.
fn perplexity(texts: &[Text], mut log_p: impl FnMut(&Text, usize, usize) -> f64) -> f64 {
    let (mut sum, mut n) = (0.0, 0);
    for text in texts {
        for (before, word) in text.words.iter().zip(text.words.iter().skip(1)) {
            sum -= log_p(text, *before, *word);
            n += 1;
        }
    }
    (sum / f64::from(n)).exp()
}

/// The least perplexity of one expert.
fn best(experts: &[&Table], texts: &[Text]) -> f64 {
    let one = |e: &&Table| perplexity(texts, |_, before, word| e.log_p(before, word));
    experts.iter().map(one).fold(f64::INFINITY, f64::min)
}

/// The perplexity of experts that are weighed by what is in each text.
fn known(experts: &[&Table], texts: &[Text]) -> f64 {
    perplexity(texts, |text, before, word| {
        let p = |(e, w): (&&Table, &f64)| w * e.log_p(before, word).exp();
        experts.iter().zip(&text.weights).map(p).sum::<f64>().ln()
    })
}

/// The perplexity of the mixture.
fn mixed(experts: &[&Table], prior: Prior, texts: &[Text]) -> Result<f64> {
    let mut mixture = BayesianMixture::new(experts.len(), prior)?;
    let (mut sum, mut n) = (0.0, 0);
    for text in texts {
        sum -= read(&mut mixture, experts, text)?;
        n += text.words.len() - 1;
    }
    Ok((sum / n as f64).exp())
}

/// The prior that some texts leave.
fn prior(experts: &[&Table], texts: &[Text]) -> Result<Prior> {
    let mut mixture = BayesianMixture::new(experts.len(), Prior::Updating(UPDATE))?;
    for text in texts {
        read(&mut mixture, experts, text)?;
    }
    Ok(mixture.cache())
}

/// ln p of a text's words after the first.
fn read(mixture: &mut BayesianMixture, experts: &[&Table], text: &Text) -> Result<f64> {
    let mut sum = 0.0;
    for (before, word) in text.words.iter().zip(text.words.iter().skip(1)) {
        let each: Vec<f64> = experts.iter().map(|e| e.log_p(*before, *word)).collect();
        sum += mixture.observe(&each)?;
    }
    mixture.end_of_text();
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_experts_that_are_the_truth_known_weights_are_best_and_a_mixture_is_next() {
        let world = World::new(Seed(3)).unwrap();
        let tables: Vec<Table> = world
            .domains
            .iter()
            .map(|d| Table(d.iter().map(|r| r.iter().map(|p| p.ln()).collect()).collect()))
            .collect();
        let all: Vec<&Table> = tables.iter().collect();
        let blend = world.blend(Seed(4), 400).unwrap();
        let (truth, mixed) = (known(&all, &blend), mixed(&all, Prior::Uniform, &blend).unwrap());
        assert!(truth < mixed && mixed < best(&all, &blend), "{truth} {mixed}");
    }
}
