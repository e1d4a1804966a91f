//! Rotary position embedding: pairs of features of queries and keys turn by an angle that grows
//! with the position, so that their product depends on the distance alone (Su et al. 2021,
//! *RoFormer*, arXiv 2104.09864).
//!
//! Feature i and feature i + d⁄2 of a head of width d make a pair; at position p it turns by
//! p·θ^(−2i⁄d). Frequencies may be scaled for longer texts than those of pretraining: all by one
//! factor (`linear`; Chen et al. 2023, arXiv 2306.15595), or by wavelength (`llama3`, and `yarn`:
//! Peng et al. 2023, arXiv 2309.00071).

use modl_core::{Device, Error, Kind, Result, Tensor};
use serde_json::Value;

/// The settings of rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// How frequencies are scaled.
    pub scaling: RopeScaling,
}

/// How the frequencies of rotary positions are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    Default,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Those with long wavelengths divided by a factor, those with short ones as they are, and
    /// those between interpolated.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original ⁄ low` are long.
        low: f64,
        /// Wavelengths below `original ⁄ high` are short.
        high: f64,
        /// The length of pretraining's sequences.
        original: f64,
    },
    /// Between those divided by a factor and those as they are, in a straight line over the pairs
    /// from one that turns `fast` times in pretraining's sequences to one that turns `slow` times.
    Yarn {
        /// The factor.
        factor: f64,
        /// Turns from which on frequencies stay, 32.
        fast: f64,
        /// Turns up to which they are divided, 1.
        slow: f64,
        /// The length of pretraining's sequences.
        original: f64,
        /// Whether the line starts and ends at whole pairs.
        truncate: bool,
        /// What turned features are multiplied by.
        stretch: f64,
        /// `mscale_all_dim`, by which DeepSeek-V3 multiplies scores; 0 for not at all.
        all: f64,
    },
}

impl Default for Rope {
    fn default() -> Self {
        Rope { theta: 10_000.0, scaling: RopeScaling::Default }
    }
}

impl Rope {
    /// Reads `rope_parameters`, or the older `rope_theta` and `rope_scaling`; the base is `usual`
    /// where it is not given.
    ///
    /// # Errors
    /// Where the type is not supported, or a number is missing or not positive.
    pub(crate) fn read(config: &Value, usual: f64) -> Result<Self> {
        let given = |name: &str| config.get(name).filter(|v| !v.is_null());
        let table = given("rope_parameters").or_else(|| given("rope_scaling"));
        let field = |name: &str| table.and_then(|t| t.get(name)).filter(|v| !v.is_null());
        let positive = |name: &str, value: Option<&Value>| {
            let number = value.and_then(Value::as_f64).filter(|x| *x > 0.0 && x.is_finite());
            number.ok_or_else(|| Error::invalid(name, "of the rotary positions is to be positive"))
        };
        let theta = match field("rope_theta").or_else(|| given("rope_theta")) {
            None => usual,
            found => positive("rope_theta", found)?,
        };
        let number = |name: &str| positive(name, field(name));
        let kind = field("rope_type").or_else(|| field("type"));
        let scaling = match kind.map_or(Some("default"), Value::as_str) {
            Some("default") => RopeScaling::Default,
            Some("linear") => RopeScaling::Linear { factor: number("factor")? },
            Some("llama3") => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    return Err(Error::invalid(
                        "low_freq_factor",
                        "is to be below high_freq_factor",
                    ));
                }
                let original = number("original_max_position_embeddings")?;
                RopeScaling::Llama3 { factor: number("factor")?, low, high, original }
            }
            Some("yarn") => {
                let or = |name: &str, usual: f64| match field(name) {
                    None => Ok(usual),
                    found => positive(name, found),
                };
                let factor = number("factor")?;
                let given = |name: &str| field(name).and_then(Value::as_f64).unwrap_or(0.0);
                let (some, all) = (given("mscale"), given("mscale_all_dim"));
                let usual = match some != 0.0 && all != 0.0 {
                    true => spread(factor, some) / spread(factor, all),
                    false => spread(factor, 1.0),
                };
                let truncate = field("truncate").is_none_or(|v| v == true);
                RopeScaling::Yarn {
                    factor,
                    fast: or("beta_fast", 32.0)?,
                    slow: or("beta_slow", 1.0)?,
                    original: number("original_max_position_embeddings")?,
                    truncate,
                    stretch: or("attention_factor", usual)?,
                    all,
                }
            }
            _ => {
                return Err(Error::unsupported(
                    format!("rotary positions of type {}", kind.unwrap_or(&Value::Null)),
                    "`default`, `linear`, `llama3` and `yarn` are",
                ));
            }
        };
        if let Some(share) = field("partial_rotary_factor").filter(|v| v.as_f64() != Some(1.0)) {
            return Err(Error::unsupported(
                format!("`partial_rotary_factor` = {share}"),
                "only rotation of whole heads is",
            ));
        }
        Ok(Rope { theta, scaling })
    }

    /// The angle per position of each pair of a head of `width` features.
    pub(crate) fn frequencies(&self, width: i64) -> Vec<f64> {
        (0..width / 2)
            .map(|i| self.scale(self.theta.powf(-2.0 * i as f64 / width as f64), i, width))
            .collect()
    }

    /// What turned features are multiplied by.
    pub(crate) fn stretch(&self) -> f64 {
        if let RopeScaling::Yarn { stretch, .. } = self.scaling { stretch } else { 1.0 }
    }

    /// What DeepSeek-V3 multiplies scores by.
    pub(crate) fn sharpness(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { factor, all, .. } if all != 0.0 => spread(factor, all).powi(2),
            _ => 1.0,
        }
    }

    /// The frequency of pair `i` of a head of `width` features.
    fn scale(&self, frequency: f64, i: i64, width: i64) -> f64 {
        match self.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low, high, original } => {
                let turns = original * frequency / std::f64::consts::TAU;
                let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - share) * frequency / factor + share * frequency
            }
            RopeScaling::Yarn { factor, fast, slow, original, truncate, .. } => {
                let width = width as f64;
                let pair = |turns: f64| {
                    let length = original / (turns * std::f64::consts::TAU);
                    width * length.ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair(fast), pair(slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(width - 1.0));
                let length = if low == high { 0.001 } else { high - low };
                let share = ((i as f64 - low) / length).clamp(0.0, 1.0);
                share * frequency / factor + (1.0 - share) * frequency
            }
        }
    }
}

/// By how much scores of longer texts are to be larger: 0.1 · m · ln(factor) + 1.
fn spread(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

/// The turn of every token of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    /// `[batch, 1, seq, width]`.
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    /// At `positions` `[batch, seq]` by `frequencies` `[width ⁄ 2]`, with results `stretch` times as
    /// long.
    pub(crate) fn new(
        positions: &Tensor,
        frequencies: &Tensor,
        stretch: f64,
        kind: Kind,
    ) -> Result<Self> {
        let angle = positions.to_kind(frequencies.kind())?.unsqueeze(-1)?.mul(frequencies)?;
        let angle = Tensor::cat(&[angle.clone(), angle], -1)?.unsqueeze(1)?;
        let cos = Tensor::op("cos", &[&angle], |t| t[0].f_cos())?;
        let sin = Tensor::op("sin", &[&angle], |t| t[0].f_sin())?;
        let of = |t: Tensor| {
            if stretch == 1.0 { t.to_kind(kind) } else { t.mul_scalar(stretch)?.to_kind(kind) }
        };
        Ok(Rotation { cos: of(cos)?, sin: of(sin)? })
    }

    /// x `[batch, heads, seq, width]`, turned.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let half = x.len_of(-1) / 2;
        let across = Tensor::cat(&[x.narrow(-1, half, half)?.neg()?, x.narrow(-1, 0, half)?], -1)?;
        x.mul(&self.cos)?.addcmul(&across, &self.sin)
    }
}

/// The frequencies as a tensor, in f32 at least: bf16 cannot tell positions apart.
pub(crate) fn table(rope: &Rope, width: i64, kind: Kind, device: Device) -> Result<Tensor> {
    let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    Tensor::from_slice(&rope.frequencies(width), &[width / 2], Device::Cpu)?
        .to_kind(wide)?
        .to_device(device)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Against transformers 5.24's `inv_freq` for heads of width 32.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let llama3 = json!({
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        });
        let linear = json!({"type": "linear", "factor": 4.0});
        let yarn = json!({
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32,
            "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        });
        let untruncated = json!({
            "rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, "truncate": false,
            "original_max_position_embeddings": 2048,
        });
        let stretch = |config: &Value| {
            Rope::read(&json!({ "rope_parameters": config }), 1e4).unwrap().stretch()
        };
        assert!((stretch(&yarn) - 1.0).abs() < 1e-12);
        assert!((stretch(&untruncated) - 1.138629436111989).abs() < 1e-12);
        for (config, places, wanted) in [
            (
                json!({ "rope_parameters": llama3 }),
                [0, 1, 7, 8, 9, 15],
                [1.0, 0.4403666, 0.003211446, 0.000524846, 7.784655e-05, 5.677088e-07],
            ),
            (
                json!({"rope_theta": 10000.0, "rope_scaling": linear}),
                [0, 1, 7, 8, 9, 15],
                [0.25, 0.1405853, 0.004445699, 0.0025, 0.001405853, 4.445699e-05],
            ),
            (
                json!({ "rope_parameters": yarn }),
                [0, 1, 7, 8, 9, 15],
                [1.0, 0.5623413, 0.012829017, 0.0058214283, 0.0024903687, 4.445698e-6],
            ),
            (
                json!({ "rope_parameters": untruncated }),
                [0, 1, 7, 8, 9, 15],
                [1.0, 0.4403666, 0.00083462737, 0.00035355336, 0.00015569311, 1.1354176e-6],
            ),
        ] {
            let found = Rope::read(&config, 10_000.0).unwrap().frequencies(32);
            assert_eq!(found.len(), 16);
            for (place, wanted) in places.iter().zip(wanted) {
                assert!((found[*place] / wanted - 1.0).abs() < 1e-6, "{place}: {found:?}");
            }
        }
        assert_eq!(Rope::read(&json!({}), 10_000.0).unwrap(), Rope::default());
    }
}
