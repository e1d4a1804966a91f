//! Learning-rate schedules: linear warm-up, then a decay.
//!
//! With W steps of warm-up among N, step t from 0 and u = (t − W) ⁄ (N − W), the factor is (t+1)⁄W while
//! t < W, then f + (1−f)·d, where f is the share that is left at the end and d is
//!
//! | `type` | d |
//! |---|---|
//! | `constant` | the factor is 1 |
//! | `linear` | 1 − u |
//! | `polynomial` | (1 − u)ᵖ, p = `power` |
//! | `cosine` | (1 + cos πu) ⁄ 2 (Loshchilov and Hutter 2017, arXiv 1608.03983) |
//! | `inverse_sqrt` | √(W ⁄ t) (Vaswani et al. 2017, arXiv 1706.03762); without warm-up √(10⁴ ⁄ (10⁴ + t)), as transformers has it |
//! | `step` | γ^⌊(t − W) ⁄ `every`⌋, γ = `gamma` |

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
    /// As a power of what is left.
    Polynomial,
    /// Along half a cosine.
    Cosine,
    /// With the root of the number of steps.
    InverseSqrt,
    /// At once, each so many steps.
    Step,
}

/// The scale of `inverse_sqrt` without warm-up.
const TIMESCALE: f64 = 1e4;

/// A length, of a warm-up for instance: `100` steps, or the share `0.06` of all steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A share of all steps in [0, 1].
    Share(f64),
}

impl Warmup {
    fn of(self, steps: u64) -> u64 {
        match self {
            Warmup::Steps(n) => n,
            Warmup::Share(share) => (share * steps as f64).round() as u64,
        }
    }
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
    /// p of `polynomial`, above 0; 1 where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub power: Option<f64>,
    /// γ of `step`, in (0, 1]; 0.1 where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// After how many steps, or which share of all, the rate of `step` falls; to be said there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<Warmup>,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule {
            decay: Decay::Constant,
            warmup: Warmup::Steps(0),
            floor: 0.0,
            power: None,
            gamma: None,
            every: None,
        }
    }
}

impl Schedule {
    /// The factor of the learning rate at `step` (from 0) of `steps`.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        let warmup = self.warmup.of(steps);
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let since = (step - warmup) as f64;
        let u = since / steps.saturating_sub(warmup).max(1) as f64;
        let left = match self.decay {
            Decay::Constant => return 1.0,
            Decay::Linear => 1.0 - u,
            Decay::Polynomial => (1.0 - u).max(0.0).powf(self.power.unwrap_or(1.0)),
            Decay::Cosine => (1.0 + (std::f64::consts::PI * u).cos()) / 2.0,
            Decay::InverseSqrt => {
                let scale = if warmup > 0 { warmup as f64 } else { TIMESCALE };
                (scale / (since + scale)).sqrt()
            }
            Decay::Step => {
                let every = self.every.map_or(steps, |e| e.of(steps)).max(1) as f64;
                self.gamma.unwrap_or(0.1).powf((since / every).floor())
            }
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
        let length = |what: &str, length: &Warmup| match length {
            Warmup::Share(s) => share(what, *s),
            Warmup::Steps(_) => Ok(()),
        };
        length("schedule.warmup", &self.warmup)?;
        for (key, kind, said) in [
            ("power", Decay::Polynomial, self.power.is_some()),
            ("gamma", Decay::Step, self.gamma.is_some()),
            ("every", Decay::Step, self.every.is_some()),
        ] {
            if said && self.decay != kind {
                let problem = format!("is for another type than {:?}; leave it out", self.decay);
                return Err(Error::invalid(format!("schedule.{key}"), problem));
            }
        }
        if self.power.is_some_and(|p| !(p > 0.0 && p.is_finite())) {
            return Err(Error::invalid("schedule.power", "is to be a number above 0"));
        }
        if self.gamma.is_some_and(|g| !(g > 0.0 && g <= 1.0)) {
            return Err(Error::invalid("schedule.gamma", "is to be above 0 and at most 1"));
        }
        match (self.decay, &self.every) {
            (Decay::Step, None) => {
                let problem = "is to say after how many steps, or which share, the rate falls";
                Err(Error::invalid("schedule.every", problem))
            }
            (Decay::Step, Some(Warmup::Steps(0))) => {
                Err(Error::invalid("schedule.every", "is to be 1 step or more"))
            }
            (_, Some(every)) => length("schedule.every", every),
            (_, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_then_decay_has_the_closed_values() {
        let of = |decay, warmup, floor| Schedule { decay, warmup, floor, ..Schedule::default() };
        let s = of(Decay::Cosine, Warmup::Steps(4), 0.1);
        let at = |t| s.factor(t, 12);
        assert_eq!([at(0), at(1), at(3), at(4)], [0.25, 0.5, 1.0, 1.0]);
        assert!((at(8) - 0.55).abs() < 1e-12, "half-way: (1 + 0.1) / 2");
        assert!((at(12) - 0.1).abs() < 1e-12);
        let linear = of(Decay::Linear, Warmup::Share(0.5), 0.0);
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

    #[test]
    fn further_decays_have_the_values_of_their_formulas() {
        let read = |t: &str| {
            let s: Schedule = serde_json::from_str(t).unwrap();
            s.check().unwrap();
            s
        };
        let power = read(r#"{"type":"polynomial","power":2,"warmup":2,"floor":0.2}"#);
        let at = |s: &Schedule, t: u64| s.factor(t, 10);
        assert!((at(&power, 6) - (0.2 + 0.8 * 0.25)).abs() < 1e-12, "half-way: a quarter is left");
        let plain = read(r#"{"type":"polynomial"}"#);
        assert!((at(&plain, 3) - 0.7).abs() < 1e-12, "a straight line");
        let root = read(r#"{"type":"inverse_sqrt","warmup":4}"#);
        assert_eq!([at(&root, 3), at(&root, 4), at(&root, 9)], [1.0, 1.0, 2.0 / 3.0]);
        // get_inverse_sqrt_schedule of transformers: 1 ⁄ √((t + timescale − warmup) ⁄ timescale).
        let unwarmed = read(r#"{"type":"inverse_sqrt"}"#);
        assert!((unwarmed.factor(30_000, 100_000) - 0.5).abs() < 1e-12);
        let steps = read(r#"{"type":"step","gamma":0.5,"every":3,"warmup":1}"#);
        let found: Vec<f64> = (0..9).map(|t| at(&steps, t)).collect();
        assert_eq!(found, [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]);
        let thirds = read(r#"{"type":"step","every":0.3}"#);
        assert!((at(&thirds, 6) - 0.01).abs() < 1e-12);
        for (wrong, part) in [
            (r#"{"type":"step"}"#, "schedule.every"),
            (r#"{"type":"step","every":0}"#, "1 step"),
            (r#"{"type":"step","every":2.5}"#, "a share is from 0 to 1"),
            (r#"{"type":"cosine","power":2}"#, "leave it out"),
            (r#"{"type":"polynomial","power":0}"#, "above 0"),
            (r#"{"type":"step","every":5,"gamma":2}"#, "schedule.gamma"),
        ] {
            let s: Schedule = serde_json::from_str(wrong).unwrap();
            let e = s.check().unwrap_err().to_string();
            assert!(e.contains(part), "{wrong}: {e}");
        }
    }
}
