//! What a bottleneck adapter is added to, and by which factor, in AdapterHub's words.

use modl_core::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a sequential adapter's u is added to: AdapterHub's `residual_before_ln`. It makes a
/// difference under `original_ln_before` only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Value", try_from = "Value")]
pub enum Residual {
    /// h; in text `true`.
    BeforeLn,
    /// LN(h + x), the adapter's own input; in text `false`.
    AfterLn,
    /// h + x; in text `"post_add"`.
    PostAdd,
}

/// The factor s.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(into = "Value", try_from = "Value")]
pub enum Scaling {
    /// A number.
    Fixed(f64),
    /// One trainable number that starts at 1; in text `"learned"`.
    Learned,
    /// One trainable number for each channel, from 1; in text `"channel"`.
    Channel,
}

impl From<Residual> for Value {
    fn from(r: Residual) -> Value {
        match r {
            Residual::BeforeLn => true.into(),
            Residual::AfterLn => false.into(),
            Residual::PostAdd => "post_add".into(),
        }
    }
}

impl TryFrom<Value> for Residual {
    type Error = String;

    fn try_from(v: Value) -> Result<Self, String> {
        match (v.as_bool(), v.as_str()) {
            (Some(true), _) => Ok(Residual::BeforeLn),
            (Some(false), _) => Ok(Residual::AfterLn),
            (_, Some("post_add")) => Ok(Residual::PostAdd),
            _ => Err(format!("residual_before_ln is {v}, wants true, false or \"post_add\"")),
        }
    }
}

impl From<Scaling> for Value {
    fn from(s: Scaling) -> Value {
        match s {
            Scaling::Fixed(s) => s.into(),
            Scaling::Learned => "learned".into(),
            Scaling::Channel => "channel".into(),
        }
    }
}

impl TryFrom<Value> for Scaling {
    type Error = String;

    fn try_from(v: Value) -> Result<Self, String> {
        match (v.as_f64(), v.as_str()) {
            (Some(s), _) => Ok(Scaling::Fixed(s)),
            (_, Some("learned")) => Ok(Scaling::Learned),
            (_, Some("channel")) => Ok(Scaling::Channel),
            _ => Err(format!("scaling is {v}, wants a number, \"learned\" or \"channel\"")),
        }
    }
}
