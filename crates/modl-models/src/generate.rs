//! Continuing token sequences with a decoder, one token after the other.
//!
//! The next token is the likeliest, or drawn from softmax(logits ⁄ temperature) after cutting to
//! the likeliest `top_k` tokens (Fan et al. 2018, arXiv 1805.04833) and to the fewest of them whose
//! probabilities sum to `top_p` (Holtzman et al. 2020, arXiv 1904.09751).

use modl_core::{Cache, Context, Device, Error, Modular, Result, Seed, Tensor, Tensors, no_grad};

/// How a sequence is continued.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The most tokens that are added to a row; default 64.
    pub max_tokens: usize,
    /// Ids that end a row and are left out of it; default none.
    pub stop: Vec<i64>,
    /// How the next token is chosen; default [`Choice::Likeliest`].
    pub choice: Choice,
    /// Whether tokens that have been seen are kept rather than computed again in every step; default
    /// yes. Both give the same up to rounding.
    pub cache: bool,
}

impl Default for Generation {
    fn default() -> Self {
        let choice = Choice::Likeliest;
        Generation { max_tokens: 64, stop: Vec::new(), choice, cache: true }
    }
}

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The one with the largest logit.
    Likeliest,
    /// A draw.
    Sample {
        /// What logits are divided by, positive.
        temperature: f64,
        /// Draw from that many of the likeliest tokens; from all where `None`.
        top_k: Option<usize>,
        /// Draw from the fewest tokens whose probabilities sum to it, in (0, 1].
        top_p: f64,
        /// Where draws come from.
        seed: Seed,
    },
}

impl Choice {
    /// # Errors
    /// Where a number is out of range.
    fn check(self) -> Result<()> {
        let Choice::Sample { temperature, top_k, top_p, .. } = self else { return Ok(()) };
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::invalid("temperature", format!("{temperature} is to be positive")));
        }
        if top_k == Some(0) {
            return Err(Error::invalid("top_k", "0 leaves no token"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::invalid("top_p", format!("{top_p} is to be in (0, 1]")));
        }
        Ok(())
    }

    /// The choice for `row` in `step` among `logits`.
    fn pick(self, logits: &[f64], step: usize, row: usize) -> i64 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        let logit = |i: &usize| logits.get(*i).copied().unwrap_or(f64::NEG_INFINITY);
        order.sort_by(|a, b| logit(b).total_cmp(&logit(a)));
        let first = order.first().map_or(0, |i| *i as i64);
        let Choice::Sample { temperature, top_k, top_p, seed } = self else { return first };
        order.truncate(top_k.unwrap_or(order.len()));
        let largest = order.first().map_or(0.0, logit);
        let weight = |i: &usize| ((logit(i) - largest) / temperature).exp();
        let all: f64 = order.iter().map(weight).sum();
        let mut sum = 0.0;
        let kept = order.iter().take_while(|i| {
            let before = sum;
            sum += weight(i);
            before < top_p * all
        });
        let kept: Vec<usize> = kept.copied().collect();
        let mut left =
            unit(seed.nth(step as u64).nth(row as u64)) * kept.iter().map(weight).sum::<f64>();
        for i in &kept {
            left -= weight(i);
            if left < 0.0 {
                return *i as i64;
            }
        }
        first
    }
}

/// A number in [0, 1) with 53 random bits.
fn unit(seed: Seed) -> f64 {
    (seed.0 >> 11) as f64 / (1u64 << 53) as f64
}

/// What each row of `inputs` is continued with. Rows may be padded on either side, with zeros in
/// `attention_mask`; positions count the tokens that are none.
///
/// # Errors
/// Where a setting is out of range, a row has no token, the model has no `logits`, or the sequence
/// becomes longer than the model allows.
pub fn generate(
    model: &Modular,
    inputs: &Tensors,
    cx: &Context,
    how: &Generation,
) -> Result<Vec<Vec<i64>>> {
    how.choice.check()?;
    let ids = inputs.need("input_ids")?.to_device(Device::Cpu)?;
    let mask = match inputs.get("attention_mask") {
        Some(mask) => mask.to_device(Device::Cpu)?.to_kind(ids.kind())?,
        None => ids.ones_like()?,
    };
    let rows = ids.len_of(0) as usize;
    let mut all = Given { ids: ids.clone(), mask: mask.clone(), positions: all_positions(&mask)? };
    let mut new = Given { ids, mask, positions: all.positions.clone() };
    let cache = how.cache.then(Cache::new);
    let cx = cache.iter().fold(cx.clone(), |cx, cache| cx.with_cache(cache.clone()));
    let mut texts = vec![Vec::new(); rows];
    let mut open = vec![true; rows];
    for step in 0..how.max_tokens {
        let (inputs, given) =
            if how.cache { (new.inputs(inputs), &new) } else { (all.inputs(inputs), &all) };
        let outputs = no_grad(|| model.forward(&inputs, &cx))?;
        let mask = outputs.get("attention_mask").unwrap_or(&given.mask);
        let logits = last(outputs.need("logits")?, mask, &open)?;
        let mut chosen = Vec::with_capacity(rows);
        for (row, (text, open)) in texts.iter_mut().zip(&mut open).enumerate() {
            let logits = logits.select(0, row as i64)?.to_vec::<f64>()?;
            let id = how.choice.pick(&logits, step, row);
            *open = *open && !how.stop.contains(&id);
            if *open {
                text.push(id);
            }
            chosen.push(id);
        }
        if !open.contains(&true) {
            break;
        }
        // Rows that have ended go on as padding.
        let shape = [rows as i64, 1];
        let flags: Vec<i64> = open.iter().map(|o| i64::from(*o)).collect();
        let seen = match &cache {
            // With what modules have put in.
            Some(cache) => cache.mask()?.unwrap_or(all.mask.clone()).to_device(Device::Cpu)?,
            None => all.mask.clone(),
        };
        new = Given {
            ids: Tensor::from_slice(&chosen, &shape, Device::Cpu)?,
            mask: Tensor::from_slice(&flags, &shape, Device::Cpu)?,
            positions: seen.to_kind(all.ids.kind())?.sum_dims(&[1], true)?,
        };
        all = all.then(&new)?;
    }
    Ok(texts)
}

/// Tokens `[rows, seq]` with their mask and positions.
struct Given {
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
}

impl Given {
    /// The same inputs with these tokens.
    fn inputs(&self, others: &Tensors) -> Tensors {
        others
            .clone()
            .with("input_ids", self.ids.clone())
            .with("attention_mask", self.mask.clone())
            .with("position_ids", self.positions.clone())
    }

    /// These tokens and then others.
    fn then(&self, new: &Given) -> Result<Given> {
        let join = |a: &Tensor, b: &Tensor| Tensor::cat(&[a.clone(), b.clone()], 1);
        let (ids, mask) = (join(&self.ids, &new.ids)?, join(&self.mask, &new.mask)?);
        Ok(Given { ids, positions: all_positions(&mask)?, mask })
    }
}

/// The number of tokens before each, padding left out.
fn all_positions(mask: &Tensor) -> Result<Tensor> {
    mask.cumsum(1)?.shift(-1)?.clamp(0.0, f64::INFINITY)?.to_kind(mask.kind())
}

/// The logits `[rows, vocabulary]` of the last token of each row.
fn last(logits: &Tensor, mask: &Tensor, open: &[bool]) -> Result<Tensor> {
    let seq = mask.len_of(1) as usize;
    let mask = mask.to_vec::<f64>()?;
    let mut index = Vec::with_capacity(open.len());
    for (row, (mask, open)) in mask.chunks(seq.max(1)).zip(open).enumerate() {
        let place = mask.iter().rposition(|m| *m != 0.0);
        if place.is_none() && *open {
            return Err(Error::invalid("attention_mask", format!("row {row} has no token")));
        }
        index.push((row * seq + place.unwrap_or(0)) as i64);
    }
    let index = Tensor::from_slice(&index, &[index.len() as i64], logits.device())?;
    logits.reshape(&[-1, logits.len_of(-1)])?.index_select(0, &index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(temperature: f64, top_k: Option<usize>, top_p: f64, seed: u64) -> Choice {
        Choice::Sample { temperature, top_k, top_p, seed: Seed(seed) }
    }

    /// The share of each token among many draws.
    fn shares(logits: &[f64], temperature: f64, top_k: Option<usize>, top_p: f64) -> Vec<f64> {
        let draws = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for n in 0..draws {
            let i = sample(temperature, top_k, top_p, 7).pick(logits, n, n % 3);
            counts[i as usize] += 1.0 / f64::from(draws as u32);
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities_that_are_left() {
        // Probabilities 0.1, 0.4, 0.2, 0.3; four standard errors of a share are below 0.014.
        let logits: Vec<f64> = [0.1f64, 0.4, 0.2, 0.3].iter().map(|p| p.ln()).collect();
        for (temperature, top_k, top_p, wanted) in [
            (1.0, None, 1.0, [0.1, 0.4, 0.2, 0.3]),
            (0.5, None, 1.0, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
            (1.0, Some(2), 1.0, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]),
            (1.0, None, 0.75, [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]),
            (1.0, Some(3), 0.4, [0.0, 1.0, 0.0, 0.0]),
        ] {
            let found = shares(&logits, temperature, top_k, top_p);
            for (f, w) in found.iter().zip(wanted) {
                assert!((f - w).abs() < 0.014 && (w > 0.0 || *f == 0.0), "{found:?} {wanted:?}");
            }
        }
        assert_eq!(Choice::Likeliest.pick(&logits, 0, 0), 1);
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for (choice, name) in [
            (sample(0.0, None, 1.0, 0), "temperature"),
            (sample(f64::NAN, None, 1.0, 0), "temperature"),
            (sample(1.0, Some(0), 1.0, 0), "top_k"),
            (sample(1.0, None, 0.0, 0), "top_p"),
            (sample(1.0, None, 1.1, 0), "top_p"),
        ] {
            assert!(choice.check().unwrap_err().to_string().contains(name));
        }
    }
}
