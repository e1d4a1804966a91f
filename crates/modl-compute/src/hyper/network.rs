//! The networks that generate: chains of small layers whose parameters are found by name in η.

use std::fmt::Debug;

use modl_core::{Result, Tensor, Tensors};

/// One parameter of the module that is generated: φᵢ = cᵢ + what the network says.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) shape: Vec<i64>,
    /// cᵢ: where the module by itself would start from one value everywhere.
    pub(super) offset: f64,
    /// The root mean square of the start about that.
    pub(super) spread: f64,
}

impl Part {
    /// A parameter that starts as `start` where nobody generates it.
    pub(super) fn new(name: &str, start: &Tensor) -> Result<Self> {
        let (name, shape) = (name.to_owned(), start.size());
        let flat = start.detach()?.reshape(&[-1])?;
        let first = flat.narrow(0, 0, 1)?;
        let value = first.item()?;
        let mut constant = flat.sub(&first)?.abs()?.largest()?.item()? == 0.0;
        // One number alone may have been drawn; only 0 and 1 are sure to be meant.
        constant &= flat.numel() > 1 || value == 0.0 || value == 1.0;
        let offset = if constant { value } else { 0.0 };
        let spread = if constant { 0.0 } else { flat.square()?.mean()?.sqrt()?.item()? };
        Ok(Part { name, shape, offset, spread })
    }

    pub(super) fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// The shape for names: `16x8`.
    pub(super) fn size(&self) -> String {
        self.shape.iter().map(i64::to_string).collect::<Vec<_>>().join("x")
    }
}

/// G_η: from z `[1, width]` to all parameters.
pub(super) trait Generator: Debug + Send + Sync {
    /// What is added to each part's offset, in any shape of as many elements.
    fn generate(&self, eta: &Tensors, z: &Tensor, parts: &[Part]) -> Result<Vec<Tensor>>;
}

/// A layer of a network; the names are those in η.
#[derive(Debug, Clone)]
pub(super) enum Layer {
    /// W z + b.
    Linear { weight: String, bias: Option<String> },
    /// max(z, 0).
    Relu,
    /// Layer norm.
    Norm { weight: String, bias: String, eps: f64 },
}

impl Layer {
    pub(super) fn apply(&self, eta: &Tensors, z: &Tensor) -> Result<Tensor> {
        match self {
            Layer::Linear { weight, bias } => {
                let bias = bias.as_ref().map(|name| eta.need(name)).transpose()?;
                z.linear(eta.need(weight)?, bias)
            }
            Layer::Relu => z.relu(),
            Layer::Norm { weight, bias, eps } => {
                z.layer_norm(eta.need(weight)?, eta.need(bias)?, *eps)
            }
        }
    }
}

/// All layers one after another.
fn run(layers: &[Layer], eta: &Tensors, z: &Tensor) -> Result<Tensor> {
    layers.iter().try_fold(z.clone(), |z, layer| layer.apply(eta, &z))
}

/// φᵢ = cᵢ + headᵢ(trunk(z)).
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) trunk: Vec<Layer>,
    /// One for each part.
    pub(super) heads: Vec<Vec<Layer>>,
}

impl Generator for Chain {
    fn generate(&self, eta: &Tensors, z: &Tensor, _: &[Part]) -> Result<Vec<Tensor>> {
        let z = run(&self.trunk, eta, z)?;
        self.heads.iter().map(|head| run(head, eta, &z)).collect()
    }
}
