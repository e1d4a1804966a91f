//! All products of the tasks' gradients: what the methods that balance them look at.

use std::collections::BTreeMap;

use modl_core::{Error, Result};

/// The products gᵢ·gⱼ of T gradients, `[T, T]` in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    tasks: usize,
    values: Vec<f64>,
}

impl Gram {
    /// A Gram matrix of its rows.
    ///
    /// # Errors
    /// Where it is not a square, or a product is not finite.
    pub fn new(rows: &[Vec<f64>]) -> Result<Self> {
        let tasks = rows.len();
        if rows.iter().any(|row| row.len() != tasks) {
            let problem = format!("wants {tasks} rows of {tasks} products each");
            return Err(Error::invalid("products of the tasks' gradients", problem));
        }
        if rows.iter().flatten().any(|v| !v.is_finite()) {
            let problem = "one is not finite; try a lower lr, a longer warm-up or a smaller clip";
            return Err(Error::invalid("products of the tasks' gradients", problem));
        }
        Ok(Gram { tasks, values: rows.concat() })
    }

    /// T.
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    /// gᵢ·gⱼ; 0 where there is no such task.
    pub fn get(&self, i: usize, j: usize) -> f64 {
        if j >= self.tasks {
            return 0.0;
        }
        self.values.get(i * self.tasks + j).copied().unwrap_or(0.0)
    }

    /// gᵢ·Σⱼ wⱼ gⱼ for each i.
    pub fn times(&self, w: &[f64]) -> Vec<f64> {
        (0..self.tasks).map(|i| (0..).zip(w).map(|(j, w)| w * self.get(i, j)).sum()).collect()
    }

    /// ‖Σⱼ wⱼ gⱼ‖.
    pub fn norm(&self, w: &[f64]) -> f64 {
        let square: f64 = self.times(w).iter().zip(w).map(|(a, b)| a * b).sum();
        square.max(0.0).sqrt()
    }

    /// The largest ‖gᵢ‖².
    pub fn largest(&self) -> f64 {
        (0..self.tasks).map(|i| self.get(i, i)).fold(0.0, f64::max)
    }

    /// The products of gradients that are multiplied by √`factor` each.
    pub fn scaled(&self, factor: f64) -> Gram {
        Gram { tasks: self.tasks, values: self.values.iter().map(|v| v * factor).collect() }
    }

    /// The cosine between the gradients of two tasks; `None` where one of them is 0.
    pub fn cosine(&self, i: usize, j: usize) -> Option<f64> {
        let norms = (self.get(i, i) * self.get(j, j)).max(0.0).sqrt();
        (norms > 0.0).then(|| self.get(i, j) / norms)
    }

    /// How far tasks contradict each other, by names for a log: `conflict.mean_cosine` over all pairs
    /// and `conflict.share`, that of pairs with a cosine below 0; with 8 tasks or fewer also
    /// `conflict.cosine.A.B` for each pair. Pairs with a gradient of 0 are left out; nothing where
    /// no pair is left.
    pub fn conflicts(&self, names: &[String]) -> BTreeMap<String, f64> {
        let mut noted = BTreeMap::new();
        let (mut sum, mut against, mut pairs) = (0.0, 0.0, 0.0);
        for (i, a) in names.iter().enumerate() {
            for (j, b) in names.iter().enumerate().skip(i + 1) {
                let Some(cosine) = self.cosine(i, j) else { continue };
                sum += cosine;
                against += if cosine < 0.0 { 1.0 } else { 0.0 };
                pairs += 1.0;
                if names.len() <= 8 {
                    noted.insert(format!("conflict.cosine.{a}.{b}"), cosine);
                }
            }
        }
        if pairs > 0.0 {
            noted.insert("conflict.mean_cosine".into(), sum / pairs);
            noted.insert("conflict.share".into(), against / pairs);
        }
        noted
    }
}
