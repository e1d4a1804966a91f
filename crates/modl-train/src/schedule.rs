//! Learning-rate schedules: linear warm-up, then constant, linear or cosine decay.
//!
//! With W steps of warm-up among N, step t from 0 and u = (t − W) ⁄ (N − W):
//! (t+1)⁄W while t < W, then 1, or f + (1−f)(1−u), or f + (1−f)(1+cos πu)⁄2 (Loshchilov and Hutter
//! 2017, arXiv 1608.03983), where f is the share that is left at the end.

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Not at all.
    #[default]
    Constant,
    /// In a straight line.
    Linear,
    /// Along half a cosine.
    Cosine,
}

/// A length of warm-up: `100` steps, or the share `0.06` of all steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A share of all steps in [0, 1].
    Share(f64),
}

/// A learning-rate schedule in a recipe: `{ type = "cosine", warmup = 0.06 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// How the rate falls; constant where nothing is said.
    #[serde(rename = "type")]
    pub decay: Decay,
    /// How long the rate rises from near 0 at first; 0 steps where nothing is said.
    pub warmup: Warmup,
    /// The share of the rate that is left at the end, in [0, 1]; 0 where nothing is said.
    pub floor: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule { decay: Decay::Constant, warmup: Warmup::Steps(0), floor: 0.0 }
    }
}

impl Schedule {
    /// The factor of the learning rate at `step` (from 0) of `steps`.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        let warmup = match self.warmup {
            Warmup::Steps(n) => n,
            Warmup::Share(share) => (share * steps as f64).round() as u64,
        };
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let u = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
        let left = match self.decay {
            Decay::Constant => return 1.0,
            Decay::Linear => 1.0 - u,
            Decay::Cosine => (1.0 + (std::f64::consts::PI * u).cos()) / 2.0,
        };
        self.floor + (1.0 - self.floor) * left.max(0.0)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// Where a share is not in [0, 1].
    pub fn check(&self) -> Result<()> {
        let share = |what: &str, s: f64| {
            let fits = (0.0..=1.0).contains(&s);
            fits.then_some(()).ok_or_else(|| {
                Error::invalid(what, format!("is {s}; a share is from 0 to 1, steps are whole"))
            })
        };
        share("schedule.floor", self.floor)?;
        match self.warmup {
            Warmup::Share(s) => share("schedule.warmup", s),
            Warmup::Steps(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_then_decay_has_the_closed_values() {
        let s = Schedule { decay: Decay::Cosine, warmup: Warmup::Steps(4), floor: 0.1 };
        let at = |t| s.factor(t, 12);
        assert_eq!([at(0), at(1), at(3), at(4)], [0.25, 0.5, 1.0, 1.0]);
        assert!((at(8) - 0.55).abs() < 1e-12, "half-way: (1 + 0.1) / 2");
        assert!((at(12) - 0.1).abs() < 1e-12);
        let linear = Schedule { decay: Decay::Linear, warmup: Warmup::Share(0.5), floor: 0.0 };
        assert_eq!([1u64, 5, 9].map(|t| linear.factor(t, 10)), [0.4, 1.0, 1.0 - 0.8]);
        assert_eq!(Schedule::default().factor(7, 10), 1.0);
    }

    #[test]
    fn warm_up_is_a_count_or_a_share() {
        let read = |t: &str| serde_json::from_str::<Schedule>(t).map(|s| s.warmup);
        assert_eq!(read(r#"{"type":"linear","warmup":1}"#).unwrap(), Warmup::Steps(1));
        assert_eq!(read(r#"{"warmup":1.0}"#).unwrap(), Warmup::Share(1.0));
        assert!(Schedule { warmup: Warmup::Share(6.0), ..Schedule::default() }.check().is_err());
    }
}
