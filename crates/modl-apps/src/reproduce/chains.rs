//! Markov chains over tokens as domains of text, and blends of them.

use anyhow::Result;
use modl_core::{Device, Init, Kind, Seed};

use super::fit::{below, noise};

pub(super) const DOMAINS: usize = 4;
pub(super) const WORDS: usize = 32;
/// The standard deviation of the logits of transitions.
pub(super) const SHARPNESS: f64 = 2.0;
/// Tokens of a text.
pub(super) const LENGTH: usize = 64;

/// A text, and how much of each domain is in it.
pub(super) struct Text {
    pub(super) words: Vec<usize>,
    pub(super) weights: Vec<f64>,
}

/// A text of two parts of the same length.
pub(super) struct Halves {
    pub(super) words: Vec<usize>,
    /// The first half's and the second's.
    pub(super) domains: [usize; 2],
}

/// The domains' transitions.
pub(super) struct World {
    seed: Seed,
    pub(super) domains: Vec<Vec<Vec<f64>>>,
}

impl World {
    pub(super) fn new(seed: Seed) -> Result<Self> {
        let n = WORDS as i64;
        let one = |d: usize| -> Result<Vec<Vec<f64>>> {
            let logits = noise(SHARPNESS, &[n, n], seed.child("domain").nth(d as u64))?;
            let flat =
                logits.to_kind(Kind::Double)?.softmax(-1)?.reshape(&[-1])?.to_vec::<f64>()?;
            Ok(flat.chunks(WORDS).map(<[f64]>::to_vec).collect())
        };
        Ok(World { seed, domains: (0..DOMAINS).map(one).collect::<Result<_>>()? })
    }

    /// The same domains, from which other texts are drawn.
    pub(super) fn again(&self, seed: Seed) -> Self {
        World { seed, domains: self.domains.clone() }
    }

    /// A text whose transitions are the domains', weighed.
    fn text(&self, weights: Vec<f64>, lots: &[f64]) -> Text {
        let mut words: Vec<usize> = Vec::with_capacity(lots.len());
        for lot in lots {
            let next = match words.last() {
                None => (lot * WORDS as f64) as usize,
                Some(before) => {
                    let mut left = *lot;
                    let p = |w: usize| -> f64 {
                        let of = |d: &Vec<Vec<f64>>| d.get(*before).and_then(|r| r.get(w)).copied();
                        self.domains
                            .iter()
                            .zip(&weights)
                            .filter_map(|(d, s)| Some(s * of(d)?))
                            .sum()
                    };
                    let found = (0..WORDS).find(|w| {
                        left -= p(*w);
                        left < 0.0
                    });
                    found.unwrap_or(WORDS - 1)
                }
            };
            words.push(next.min(WORDS - 1));
        }
        Text { words, weights }
    }

    /// Texts of one domain.
    pub(super) fn domain(&self, d: usize, name: &str, n: usize) -> Result<Vec<Text>> {
        let lots = uniform(n * LENGTH, self.seed.child(name).nth(d as u64))?;
        let weights: Vec<f64> = (0..DOMAINS).map(|j| f64::from(u8::from(j == d))).collect();
        Ok(lots.chunks(LENGTH).map(|lots| self.text(weights.clone(), lots)).collect())
    }

    /// Texts of `2 half` words whose halves are of a domain by lot each, and start anew.
    pub(super) fn halves(&self, seed: Seed, n: usize, half: usize) -> Result<Vec<Halves>> {
        let lots = uniform(2 * n * half, seed.child("words"))?;
        let domains = below(DOMAINS, 2 * n, seed.child("domains"))?;
        let only = |d: usize| (0..DOMAINS).map(|j| f64::from(u8::from(j == d))).collect();
        let one = |(lots, d): (&[f64], &usize)| self.text(only(*d), lots).words;
        let parts: Vec<_> = lots.chunks(half).zip(&domains).map(one).collect();
        let text = |(words, domains): (&[Vec<usize>], &[usize])| {
            let domains = [domains.first().copied(), domains.last().copied()];
            Halves { words: words.concat(), domains: domains.map(Option::unwrap_or_default) }
        };
        Ok(parts.chunks(2).zip(domains.chunks(2)).map(text).collect())
    }

    /// Texts of the blend.
    pub(super) fn blend(&self, seed: Seed, n: usize) -> Result<Vec<Text>> {
        let lots = uniform(n * LENGTH, seed.child("words"))?;
        // −ln u divided by their sum are uniform on the simplex.
        let shares = uniform(n * DOMAINS, seed.child("weights"))?;
        let text = |(lots, shares): (&[f64], &[f64])| {
            let raw: Vec<f64> = shares.iter().map(|u| -(1.0 - u).ln()).collect();
            let total: f64 = raw.iter().sum();
            self.text(raw.iter().map(|w| w / total).collect(), lots)
        };
        Ok(lots.chunks(LENGTH).zip(shares.chunks(DOMAINS)).map(text).collect())
    }
}

/// Numbers in [0, 1).
fn uniform(n: usize, seed: Seed) -> Result<Vec<f64>> {
    let half = Init::Uniform(0.5).tensor(&[n as i64], seed, Kind::Double, Device::Cpu)?;
    Ok(half.to_vec::<f64>()?.into_iter().map(|u| (u + 0.5).clamp(0.0, 1.0 - 1e-12)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_follow_their_transitions_and_weights_are_shares() {
        let world = World::new(Seed(3)).unwrap();
        let texts = world.domain(2, "test", 2000).unwrap();
        let mut counts = vec![vec![0.0; WORDS]; WORDS];
        for text in &texts {
            assert_eq!((text.words.len(), &text.weights[..]), (LENGTH, &[0.0, 0.0, 1.0, 0.0][..]));
            for pair in text.words.windows(2) {
                counts[pair[0]][pair[1]] += 1.0;
            }
        }
        // χ² of each row with its 31 degrees: mean 31, standard deviation 7.9.
        let mut worst: f64 = 0.0;
        for (row, p) in counts.iter().zip(&world.domains[2]) {
            let n: f64 = row.iter().sum();
            let own: f64 = row.iter().zip(p).map(|(c, p)| (c - n * p).powi(2) / (n * p)).sum();
            worst = worst.max(own);
        }
        assert!(worst < 31.0 + 6.0 * 7.9, "{worst}");
        let blend = world.blend(Seed(4), 400).unwrap();
        assert!(blend.iter().all(|t| (t.weights.iter().sum::<f64>() - 1.0).abs() < 1e-12));
        // Uniform on the simplex: each share has mean 1⁄4 and variance 3⁄80.
        let first: f64 = blend.iter().map(|t| t.weights[0]).sum::<f64>() / 400.0;
        assert!((first - 0.25).abs() < 4.5 * (0.0375f64 / 400.0).sqrt(), "{first}");
    }
}
