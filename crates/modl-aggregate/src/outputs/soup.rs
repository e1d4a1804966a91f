//! AdapterSoup: which modules to average for texts of a domain that none was trained for.
//!
//! Every module comes with sentence embeddings of the texts that it was trained on. For new texts the
//! k modules whose texts are the most alike, by the mean cosine of all pairs, are averaged with equal
//! weights: the weights are for [`merge_low_rank`](crate::merge_low_rank), or for a router that names
//! modules under the aggregator `average`.
//!
//! Chronopoulou, Peters, Fraser, Dodge 2023, *AdapterSoup: Weight Averaging to Improve Generalization
//! of Pretrained Language Models*, arXiv 2302.07027, §3.2 (sentence similarity); survey §5.1.

use modl_core::{Error, Kind, Result, Tensor};

/// Modules and the mean direction of the texts that they were trained on.
#[derive(Debug, Default)]
pub struct AdapterSoup {
    /// `[dim]`, the mean of unit vectors.
    domains: Vec<(String, Vec<f64>)>,
}

impl AdapterSoup {
    /// Without modules.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a module with embeddings `[n, dim]` of some of its texts; the paper takes 100.
    ///
    /// # Errors
    /// Where the name is taken, there is no text, an embedding is 0 or no number, or as wide as no
    /// other.
    pub fn add(&mut self, module: impl Into<String>, texts: &Tensor) -> Result<()> {
        let name = module.into();
        if self.domains.iter().any(|(n, _)| *n == name) {
            return Err(Error::Duplicate { kind: "module", name });
        }
        let mean = mean_direction(texts)?;
        if let Some((other, known)) = self.domains.first()
            && known.len() != mean.len()
        {
            let problem =
                format!("of `{name}` are {} wide, of `{other}` {}", mean.len(), known.len());
            return Err(Error::invalid("embeddings", problem));
        }
        self.domains.push((name, mean));
        Ok(())
    }

    /// The modules and the mean cosine of their texts to new ones `[n, dim]`, the largest first; of
    /// equal ones that which was added first.
    ///
    /// # Errors
    /// As [`AdapterSoup::add`].
    pub fn similarities(&self, texts: &Tensor) -> Result<Vec<(String, f64)>> {
        let mean = mean_direction(texts)?;
        let mut all = Vec::with_capacity(self.domains.len());
        for (name, domain) in &self.domains {
            if domain.len() != mean.len() {
                let problem = format!("are {} wide, of `{name}` {}", mean.len(), domain.len());
                return Err(Error::invalid("embeddings", problem));
            }
            // The mean of all products is the product of the means.
            all.push((name.clone(), domain.iter().zip(&mean).map(|(a, b)| a * b).sum::<f64>()));
        }
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(all)
    }

    /// The `k` most alike modules with weights 1 ⁄ k.
    ///
    /// # Errors
    /// As [`AdapterSoup::add`]; where k is 0 or more than there are.
    pub fn select(&self, texts: &Tensor, k: usize) -> Result<Vec<(String, f64)>> {
        if k == 0 || k > self.domains.len() {
            let problem = format!("is {k} of {} modules", self.domains.len());
            return Err(Error::invalid("k", problem));
        }
        let best = self.similarities(texts)?.into_iter().take(k);
        Ok(best.map(|(name, _)| (name, 1.0 / k as f64)).collect())
    }
}

/// The mean of the unit vectors of embeddings `[n, dim]`.
fn mean_direction(texts: &Tensor) -> Result<Vec<f64>> {
    if texts.dim() != 2 || texts.len_of(0) == 0 {
        return Err(Error::invalid("embeddings", format!("{texts:?}, wanted are [texts, dim]")));
    }
    let texts = texts.detach()?.to_kind(Kind::Double)?;
    texts.check_finite("embeddings")?;
    let length = texts.square()?.sum_dims(&[1], true)?.sqrt()?;
    if length.to_vec::<f64>()?.contains(&0.0) {
        return Err(Error::invalid("embeddings", "one is 0 and so has no direction"));
    }
    texts.div(&length)?.mean_dims(&[0], false)?.to_vec()
}
