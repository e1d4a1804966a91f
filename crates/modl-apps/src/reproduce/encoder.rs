//! A small BERT that is pre-trained as a masked language model, and label tasks on its kind of text:
//! 16 words whose halves are of one of four Markov chains each (`chains.rs`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use modl_core::{
    Backbone, Context, Device, Kind, Layers, Modular, Seed, Select, Tensor, Tensors, no_grad,
};
use modl_models::Bert;
use serde_json::json;

use super::chains::{DOMAINS, Halves, WORDS, World};
use super::experiment::Lab;
use super::fit::below;
use super::mlp::{copy, train};

pub(super) const WIDTH: i64 = 128;
const INNER: i64 = 256;
/// Words of half a text.
pub(super) const HALF: usize = 8;
/// One word of so many is masked.
const MASKED: usize = 4;
/// Steps of pre-training, texts in a step, and its rate: of a 3·10⁻⁴ and a 2·10⁻³ that were tried on another
/// seed, the first was slower and the second learned nothing.
pub(super) const STEPS: u64 = 5000;
pub(super) const BATCH: usize = 64;
pub(super) const RATE: f64 = 1e-3;

/// How many tasks there are.
pub(super) const TASKS: usize = 8;

/// The number of a task's classes.
pub(super) fn classes(task: usize) -> i64 {
    if task < 2 { DOMAINS as i64 } else { 2 }
}

/// What a task says of a text: the domain of its first half, that of its second, whether they are the
/// same, whether the sum of their numbers is odd; and of each quarter of the vocabulary, whether the
/// second half has more words of it than the first.
fn label(task: usize, text: &Halves) -> i64 {
    let [first, second] = text.domains;
    let of_quarter = |words: &[usize]| {
        words.iter().filter(|w| *w / (WORDS / 4) == task.saturating_sub(4)).count()
    };
    match task {
        0 => first as i64,
        1 => second as i64,
        2 => i64::from(first == second),
        3 => i64::from((first + second) % 2 == 1),
        _ => {
            let (first, second) = text.words.split_at(HALF.min(text.words.len()));
            i64::from(of_quarter(second) > of_quarter(first))
        }
    }
}

/// Texts as a model reads them, and what tasks say of them.
pub(super) struct Texts {
    /// `[n, 16]`.
    pub(super) ids: Tensor,
    labels: Vec<Tensor>,
}

impl Texts {
    /// `n` new texts.
    pub(super) fn new(world: &World, seed: Seed, n: usize) -> Result<Self> {
        let texts = world.halves(seed, n, HALF)?;
        let of = |task: usize| {
            let all: Vec<i64> = texts.iter().map(|t| label(task, t)).collect();
            Tensor::from_slice(&all, &[n as i64], Device::Cpu)
        };
        Ok(Texts { ids: ids(&texts)?, labels: (0..TASKS).map(of).collect::<Result<_, _>>()? })
    }

    /// What a task says of each.
    pub(super) fn labels(&self, task: usize) -> Result<&Tensor> {
        self.labels.get(task).ok_or_else(|| anyhow::anyhow!("there is no task {task}"))
    }

    /// The numbers of `n` of them by lot.
    pub(super) fn some(&self, n: usize, seed: Seed) -> Result<Tensor> {
        let rows = below(self.ids.len_of(0) as usize, n, seed)?;
        let rows: Vec<i64> = rows.into_iter().map(|r| r as i64).collect();
        Ok(Tensor::from_slice(&rows, &[n as i64], Device::Cpu)?)
    }
}

fn ids(texts: &[Halves]) -> modl_core::Result<Tensor> {
    let all: Vec<i64> = texts.iter().flat_map(|t| &t.words).map(|w| *w as i64).collect();
    Tensor::from_slice(&all, &[texts.len() as i64, 2 * HALF as i64], Device::Cpu)
}

/// Encoders that are pre-trained, one for each seed, so that conditions of one seed share it.
#[derive(Debug, Default)]
pub(super) struct Pretrained(Mutex<BTreeMap<u64, Arc<Mutex<Option<Tensors>>>>>);

impl Pretrained {
    /// An encoder of its own with what `steps` steps have taught.
    pub(super) fn encoder(
        &self,
        layers: usize,
        steps: u64,
        world: &World,
        lab: &Lab,
    ) -> Result<Bert> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = all.entry(lab.seed.0).or_default().clone();
        drop(all);
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let bert = untrained(layers, lab.seed.child("encoder"))?;
        if let Some(kept) = &*slot {
            (0..steps).for_each(|_| (lab.tick)());
            bert.params().load("the encoder", kept.iter(), &Select::all())?;
        } else {
            let own = bert.params().iter().filter(|(n, _)| !n.starts_with("pooler"));
            let own = own.map(|(n, p)| (n.to_owned(), p.tensor().clone())).collect();
            train(&[("encoder", &own)], steps, RATE, lab.tick, |step| {
                masked_loss(&bert, world, lab.seed.child("masked").nth(step), BATCH)
            })?;
            let all = bert.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().clone()));
            *slot = Some(copy(&all.collect())?);
        }
        Ok(bert)
    }
}

fn untrained(layers: usize, seed: Seed) -> Result<Bert> {
    let config = json!({
        "model_type": "bert",
        // The last one is the mask.
        "vocab_size": WORDS + 1,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": 2 * HALF,
        "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    });
    Ok(Bert::untrained(config, seed, Kind::Float, Device::Cpu)?)
}

/// −ln p of masked words of new texts, by the similarity of states to the words' vectors.
fn masked_loss(bert: &Bert, world: &World, seed: Seed, n: usize) -> Result<Tensor> {
    let mut texts = world.halves(seed, n, HALF)?;
    let lots = below(MASKED, n * 2 * HALF / MASKED, seed.child("masks"))?;
    let places: Vec<i64> =
        lots.iter().enumerate().map(|(i, lot)| (i * MASKED + lot) as i64).collect();
    let mut words = Vec::with_capacity(places.len());
    let whole = texts.iter_mut().flat_map(|t| t.words.iter_mut());
    for (at, word) in whole.enumerate() {
        if lots.get(at / MASKED) == Some(&(at % MASKED)) {
            words.push(std::mem::replace(word, WORDS) as i64);
        }
    }
    let inputs = Tensors::new().with("input_ids", ids(&texts)?);
    let none = Layers::none(bert.sites().len());
    let outputs = bert.forward(&inputs, &none, &Context::train(seed, 0))?;
    let states = outputs.need("last_hidden_state")?.reshape(&[-1, WIDTH])?;
    let row = |t: &[i64]| Tensor::from_slice(t, &[t.len() as i64], Device::Cpu);
    let states = states.index_select(0, &row(&places)?)?;
    let table = bert.params().get("embeddings.word_embeddings.weight")?;
    Ok(states.linear(table, None)?.cross_entropy(&row(&words)?)?)
}

/// exp of the mean of −ln p of the masked words of `n` new texts.
pub(super) fn perplexity(bert: &Bert, world: &World, seed: Seed, n: usize) -> Result<f64> {
    Ok(no_grad(|| masked_loss(bert, world, seed, n))?.item()?.exp())
}

/// The mean of the last states of each text, `[n, 128]`.
pub(super) fn states(model: &Modular, ids: &Tensor, cx: &Context) -> modl_core::Result<Tensor> {
    let outputs = model.forward(&Tensors::new().with("input_ids", ids.clone()), cx)?;
    outputs.need("last_hidden_state")?.mean_dims(&[1], false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_about_halves() {
        let halves = |domains, first: [usize; HALF], second: [usize; HALF]| Halves {
            words: [first, second].concat(),
            domains,
        };
        // Three words of the first quarter, then one; none of the second, then seven.
        let text = halves([1, 2], [0, 7, 3, 31, 31, 31, 31, 31], [8, 9, 10, 11, 12, 13, 15, 0]);
        let all: Vec<i64> = (0..TASKS).map(|t| label(t, &text)).collect();
        assert_eq!(all, [1, 2, 0, 1, 0, 1, 0, 0]);
        let text = halves([3, 3], [0; HALF], [0; HALF]);
        let all: Vec<i64> = (0..TASKS).map(|t| label(t, &text)).collect();
        assert_eq!(all, [3, 3, 1, 0, 0, 0, 0, 0], "as many are not more");
    }

    #[test]
    fn halves_follow_the_transitions_of_their_domains() {
        let world = World::new(Seed(3)).unwrap();
        let texts = world.halves(Seed(4), 2000, HALF).unwrap();
        let likely = |words: &[usize], d: usize| -> f64 {
            words.windows(2).map(|p| world.domains[d][p[0]][p[1]].ln()).sum()
        };
        let mut right = 0;
        for text in &texts {
            assert_eq!(text.words.len(), 2 * HALF);
            for (words, domain) in text.words.chunks(HALF).zip(text.domains) {
                let best = (0..DOMAINS)
                    .max_by(|a, b| likely(words, *a).total_cmp(&likely(words, *b)))
                    .unwrap();
                right += usize::from(best == domain);
            }
        }
        assert!(right > 3800, "the domain is in the words: {right} of 4000");
    }
}
