//! A module that stands for itself: a small network h = W₂ relu(W₁ x + b₁) + b₂ from the site's
//! input to its output, as the experts of a mixture are.

use modl_core::{
    Attachment, Context, Host, Init, Module, ModuleConfig, Result, Scope, Signal, Tensor, to_json,
};
use serde::Serialize;
use serde_json::Value;

/// An expert whose hidden layer is so wide.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Expert {
    pub(super) width: i64,
}

impl Expert {
    /// The number of its parameters between vectors of these widths.
    pub(super) fn parameters(self, input: i64, output: i64) -> i64 {
        (input + 1) * self.width + (self.width + 1) * output
    }

    /// The width whose number of parameters is nearest to `parameters`.
    pub(super) fn of_size(parameters: i64, input: i64, output: i64) -> Self {
        let width = (parameters - output) as f64 / (input + 1 + output) as f64;
        Expert { width: (width.round() as i64).max(1) }
    }
}

impl ModuleConfig for Expert {
    fn kind(&self) -> &'static str {
        "expert"
    }

    fn to_json(&self) -> Result<Value> {
        to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let (input, output) = (at.site.input, at.site.output);
        let first = Linear::new(scope, "first", self.width, input)?;
        Ok(Box::new(ExpertModule {
            first,
            second: Linear::new(scope, "second", output, self.width)?,
        }))
    }
}

#[derive(Debug)]
struct ExpertModule {
    first: Linear,
    second: Linear,
}

impl Module for ExpertModule {
    fn kind(&self) -> &'static str {
        "expert"
    }

    fn forward(&self, _: &Host, x: &Signal, _: &Context) -> Result<Signal> {
        Ok(x.replace(self.second.of(&self.first.of(&x.x)?.relu()?)?))
    }
}

/// W x + b, which starts as PyTorch's does: uniform in ±1⁄√(width of x).
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// From `input` to `output` numbers, under `name`.
    pub(super) fn new(scope: &mut Scope, name: &str, output: i64, input: i64) -> Result<Self> {
        let mut scope = scope.sub(name);
        let bound = 1.0 / (input as f64).sqrt();
        let weight = scope.param("weight", &[output, input], Init::Uniform(bound))?;
        Ok(Linear { weight, bias: scope.param("bias", &[output], Init::Uniform(bound))? })
    }

    /// W x + b for each row of x.
    pub(super) fn of(&self, x: &Tensor) -> Result<Tensor> {
        x.linear(&self.weight, Some(&self.bias))
    }
}
