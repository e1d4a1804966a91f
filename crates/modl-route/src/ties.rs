//! The k largest scores. Which of several modules with the same score is taken is decided by vⱼ·x̄ with fixed
//! random directions vⱼ: the same input goes to the same module, different inputs to different ones.

use modl_core::{Error, Init, Result, Seed, Tensor};

/// Checks that `method` can choose k of so many modules.
///
/// # Errors
/// With the key `method.k`.
pub(crate) fn check_k(method: &str, k: usize, modules: usize) -> Result<()> {
    if k == 0 || k > modules {
        let problem = format!("is {k}, there are {modules} modules to choose from");
        return Err(Error::invalid(format!("{method}.k"), problem));
    }
    Ok(())
}

/// v.
#[derive(Debug)]
pub(crate) struct Ties {
    /// `[modules, width]`.
    directions: Tensor,
}

impl Ties {
    /// For the router at `path` over modules that are scored by W `[modules, width]`.
    pub(crate) fn new(seed: u64, path: &str, weight: &Tensor) -> Result<Ties> {
        let (shape, kind, device) = (weight.size(), weight.kind(), weight.device());
        let directions = Init::Normal(1.0).tensor(&shape, Seed(seed).child(path), kind, device)?;
        Ok(Ties { directions })
    }

    /// The indices of the k largest scores, `[…, modules]` → `[…, k]`, the largest first, and among
    /// equal ones of the largest v·x̄, with x̄ `[…, width]`.
    pub(crate) fn largest(&self, scores: &Tensor, x: &Tensor, k: usize) -> Result<Tensor> {
        let (scores, k) = (scores.detach()?, k as i64);
        let among = (k + 1).min(scores.len_of(-1));
        let (value, index) = scores.topk(among, -1)?;
        let (above, below) = (value.narrow(-1, 0, among - 1)?, value.narrow(-1, 1, among - 1)?);
        // Mostly there is no tie, and v·x̄ would cost as much as the scores did.
        if above.greater(&below)?.all()?.item()? != 0.0 {
            return index.narrow(-1, 0, k);
        }
        let second = x.detach()?.linear(&self.directions.to_kind(x.kind())?, None)?;
        let (_, order) = second.sort(-1, true)?;
        // A stable sort by the scores leaves equal ones in the order of v·x̄.
        let ranked = scores.gather(-1, &order)?.argsort(-1, true)?;
        order.gather(-1, &ranked)?.narrow(-1, 0, k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modl_core::{Device, Kind};

    /// Whether others of the batch have ties does not matter.
    #[test]
    fn a_tie_elsewhere_changes_no_choice() {
        let draw = |shape: &[i64], seed: u64| {
            Init::Normal(1.0).tensor(shape, Seed(seed), Kind::Float, Device::Cpu).unwrap()
        };
        let (n, m, width) = (40, 6, 5);
        let ties = Ties::new(3, "router", &draw(&[m, width], 1)).unwrap();
        let x = draw(&[n, width], 2);
        // Rows in turn without ties, and with few different scores.
        let fine = draw(&[n / 2, 1, m], 3);
        let coarse = fine.clamp(-0.5, 0.5).unwrap();
        let scores = Tensor::cat(&[fine.clone(), coarse], 1).unwrap().reshape(&[n, m]).unwrap();
        for k in 1..=m as usize {
            let all = ties.largest(&scores, &x, k).unwrap();
            for row in 0..n {
                let one = |t: &Tensor| t.narrow(0, row, 1).unwrap();
                let alone = ties.largest(&one(&scores), &one(&x), k).unwrap();
                assert!(alone.bit_equal(&one(&all)).unwrap(), "row {row}, k = {k}");
            }
            // And the chosen scores are the largest ones.
            let chosen = scores.gather(-1, &all).unwrap();
            assert!(chosen.bit_equal(&scores.topk(k as i64, -1).unwrap().0).unwrap());
        }
    }
}
