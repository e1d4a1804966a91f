//! What is done where a loss or its gradients are not finite.

use modl_core::Error;
use serde::{Deserialize, Serialize};

/// What is done in a step whose loss or gradients are not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNan {
    /// Training stops with an error (`on_nan = "stop"`). A state of before is there.
    #[default]
    Stop,
    /// The step is left out, the optimiser does not see it (`on_nan = { skip = 10 }`: at most 10 times
    /// in a training; then it stops).
    Skip(u64),
}

impl OnNan {
    pub(crate) fn is_default(&self) -> bool {
        *self == OnNan::default()
    }
}

/// A step that cannot be made.
#[derive(Debug)]
pub(crate) struct Broken {
    what: &'static str,
    value: f64,
}

impl Broken {
    /// `None` where all is well.
    pub(crate) fn of(loss: f64, grad_norm: f64) -> Option<Self> {
        let all = [("loss", loss), ("norm of the gradients", grad_norm)];
        let broken = all.into_iter().find(|(_, value)| !value.is_finite());
        broken.map(|(what, value)| Broken { what, value })
    }

    pub(crate) fn skipped(&self, so_far: u64, most: u64) -> String {
        let Broken { what, value } = self;
        format!("the {what} is {value}; the step is left out ({so_far} of at most {most})")
    }

    /// `kept` says what has been saved.
    pub(crate) fn error(&self, kept: &str) -> Error {
        let advice = "try a lower lr, a longer warm-up, a smaller clip, or f32 instead of bf16; \
                      `on_nan = { skip = 10 }` leaves out up to 10 such steps";
        Error::invalid(self.what, format!("is {}; {kept}; {advice}", self.value))
    }
}
