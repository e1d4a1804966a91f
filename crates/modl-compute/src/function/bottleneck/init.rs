//! How bottleneck adapters start: AdapterHub's `init_weights`. Biases start at 0.

use modl_core::{Device, Init, Kind, Result, Scope, Tensor};
use serde::{Deserialize, Serialize};

/// How the two matrices of a bottleneck adapter start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BottleneckInit {
    /// Both normal with standard deviation 0.02, as BERT's own matrices: nearly no change.
    Bert,
    /// Down uniform in ±1⁄√width, up zero: no change at all (He et al. 2022). Under `ln_after` it
    /// is the norm's gain that is zero, for the norm would blow up the least of what it gets.
    MamAdapter,
    /// Both normal with standard deviation 0.01, cut at two of them (Houlsby et al. 2019).
    Houlsby,
}

impl BottleneckInit {
    /// Makes the projection to the bottleneck.
    pub(crate) fn down(self, scope: &mut Scope, name: &str, shape: &[i64]) -> Result<Tensor> {
        match self {
            BottleneckInit::Bert => scope.param(name, shape, Init::Normal(0.02)),
            BottleneckInit::MamAdapter => scope.param(name, shape, Init::Kaiming),
            BottleneckInit::Houlsby => cut_normal(scope, name, shape),
        }
    }

    /// The gain of the adapter's own norm.
    pub(crate) fn gain(self) -> Init {
        match self {
            BottleneckInit::MamAdapter => Init::Zeros,
            BottleneckInit::Bert | BottleneckInit::Houlsby => Init::Ones,
        }
    }

    /// Makes the projection from the bottleneck.
    pub(crate) fn up(self, scope: &mut Scope, name: &str, shape: &[i64]) -> Result<Tensor> {
        match self {
            BottleneckInit::MamAdapter => scope.param(name, shape, Init::Zeros),
            other => other.down(scope, name, shape),
        }
    }
}

/// Normal with standard deviation 0.01, drawn again where it is beyond two of them.
fn cut_normal(scope: &mut Scope, name: &str, shape: &[i64]) -> Result<Tensor> {
    const STD: f64 = 0.01;
    let seed = scope.seed().child(name);
    scope.param_drawn(name, shape, || {
        let n = shape.iter().product::<i64>().max(0);
        let mut kept: Vec<f64> = Vec::new();
        for round in 0.. {
            let drawn =
                Init::Normal(STD).tensor(&[n], seed.nth(round), Kind::Double, Device::Cpu)?;
            kept.extend(drawn.to_vec::<f64>()?.iter().filter(|z| z.abs() <= 2.0 * STD));
            if kept.len() as i64 >= n {
                break;
            }
        }
        kept.truncate(n as usize);
        Tensor::from_slice(&kept, shape, Device::Cpu)
    })
}
