//! Sentences of four domains with their sentiment (Hutto and Gilbert 2014).

use std::path::Path;

use anyhow::{Context as _, Result};
use modl_core::Seed;
use modl_models::Tokenizer;
use modl_train::{Dataset, Example, held_out, read_tsv};

use super::setting::Setting;

/// The domains, in the order of every table.
pub(crate) const DOMAINS: [&str; 4] = ["tweets", "amazon", "movies", "nyt"];

/// Targets are the mean judgement of people, from −4 to 4.
const RANGE: f32 = 4.0;

/// All texts as token ids, by domain.
#[derive(Debug)]
pub(crate) struct Corpus {
    examples: Vec<Vec<Example>>,
}

impl Corpus {
    pub(crate) fn open(assets: &Path) -> Result<Self> {
        let hint =
            || format!("{}: model or data are missing; run `cargo xtask assets`", assets.display());
        let tokenizer = Tokenizer::open(assets.join("all-MiniLM-L6-v2")).with_context(hint)?;
        let domain = |domain: &&str| -> Result<Vec<Example>> {
            let path = assets.join("sentiment").join(format!("{domain}.tsv"));
            let rows = read_tsv(path).with_context(hint)?;
            let example = |row: modl_train::Row| {
                Ok(Example {
                    ids: tokenizer.encode_one(&row.text)?.into(),
                    id: row.id,
                    task: domain.to_string(),
                    target: row.score / RANGE,
                })
            };
            rows.into_iter().map(example).collect()
        };
        Ok(Corpus { examples: DOMAINS.iter().map(domain).collect::<Result<_>>()? })
    }

    /// The number of texts.
    pub(crate) fn len(&self) -> usize {
        self.examples.iter().map(Vec::len).sum()
    }

    /// Texts for training and held-out ones of all domains. Sentences of one review or editorial
    /// are never on both sides.
    pub(crate) fn split(&self, seed: u64, setting: &Setting) -> Result<(Dataset, Dataset)> {
        let (train_size, test_size) = setting.size.texts();
        let (mut train, mut test) = (Vec::new(), Vec::new());
        for domain in &self.examples {
            // A seeded order, of which the first ones are taken.
            let mut order: Vec<(u64, &Example)> =
                domain.iter().map(|e| (Seed(seed).child(&key(e, &e.id)).0, e)).collect();
            order.sort_by_key(|(rank, _)| *rank);
            let (mut a, mut b) = (0, 0);
            for (_, e) in order {
                let out = held_out(&key(e, document(&e.id)), seed, setting.held_out);
                let (side, count, limit) = if out {
                    (&mut test, &mut b, test_size)
                } else {
                    (&mut train, &mut a, train_size)
                };
                if *count < limit {
                    *count += 1;
                    side.push(cut(e, setting.max_len)?);
                }
            }
        }
        Ok((Dataset::new(train)?, Dataset::new(test)?))
    }
}

fn key(e: &Example, id: &str) -> String {
    format!("{}/{id}", e.task)
}

/// Ids of sentences are `DOCUMENT_SENTENCE`; tweets and film snippets stand alone.
fn document(id: &str) -> &str {
    id.split_once('_').map_or(id, |(document, _)| document)
}

/// A text of at most `max_len` tokens; the last is the separator that ends every text.
fn cut(e: &Example, max_len: usize) -> Result<Example> {
    let mut ids = e.ids.to_vec()?;
    if ids.len() > max_len
        && let Some(last) = ids.last().copied()
    {
        ids.truncate(max_len - 1);
        ids.push(last);
    }
    Ok(Example { ids: ids.into(), ..e.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Precision;
    use crate::demo::setting::Size;

    fn corpus() -> Corpus {
        let example = |task: &str, d: usize, s: usize| Example {
            id: format!("{d}_{s}"),
            task: task.into(),
            ids: vec![101, 7, 102].into(),
            target: 0.0,
        };
        let domain = |task: &&str| {
            (0..200)
                .flat_map(|d| (0..4).map(move |s| (d, s)))
                .map(|(d, s)| example(task, d, s))
                .collect()
        };
        Corpus { examples: DOMAINS.iter().map(domain).collect() }
    }

    #[test]
    fn no_document_is_on_both_sides_and_sizes_hold() {
        let setting = Setting::new(Size::Quick, Precision::F32, "cpu");
        let (train, test) = corpus().split(5, &setting).unwrap();
        let documents = |d: &Dataset| -> std::collections::BTreeSet<String> {
            d.examples().iter().map(|e| key(e, document(&e.id))).collect()
        };
        assert!(documents(&train).is_disjoint(&documents(&test)));
        assert_eq!(train.len(), 4 * 400);
        assert!(test.tasks().values().all(|n| *n <= 200 && *n > 100), "{:?}", test.tasks());
    }

    #[test]
    fn another_seed_is_another_split_and_the_same_seed_the_same() {
        let setting = Setting::new(Size::Quick, Precision::F32, "cpu");
        let ids = |seed| {
            let (train, _) = corpus().split(seed, &setting).unwrap();
            train.examples().iter().map(|e| e.id.clone()).collect::<Vec<_>>()
        };
        assert_eq!(ids(1), ids(1));
        assert_ne!(ids(1), ids(2));
    }

    #[test]
    fn a_long_text_keeps_its_end() {
        let e = Example { id: "1".into(), task: "t".into(), ids: (0..100).collect(), target: 0.0 };
        let ids = cut(&e, 10).unwrap().ids.to_vec().unwrap();
        assert_eq!((ids.len(), ids[8], ids[9]), (10, 8, 99));
    }
}
