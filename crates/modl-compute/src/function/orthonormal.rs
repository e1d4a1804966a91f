//! Matrices whose rows are orthonormal, of parameters that are free.

use modl_core::{Error, Init, Kind, Result, Scope, Tensor, Tensors};
use serde::{Deserialize, Serialize};

/// The parameters' names, as PyTorch calls them in AdapterHub's files.
const FREE: &str = "projection.weight";
pub(crate) const ORIGINAL: &str = "projection.parametrizations.weight.original";
pub(crate) const BASE: &str = "projection.parametrizations.weight.0.base";

/// How a matrix R `[r, width]` with orthonormal rows is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Orthonormal {
    /// Rᵀ is the Q of the QR decomposition of a free matrix.
    #[default]
    Qr,
    /// Rᵀ = K Q with a random orthogonal K `[width, width]`, which is kept but not trained, and Q
    /// the product of r reflections that the lower triangle of a free matrix says. As PyTorch's
    /// `orthogonal` has it, and with it AdapterHub; for r below the width.
    Householder,
}

impl Orthonormal {
    /// Makes the parameters below `unit`.
    pub(super) fn build(
        self,
        scope: &mut Scope,
        unit: &str,
        [r, width]: [i64; 2],
    ) -> Result<Tensors> {
        if self == Orthonormal::Qr {
            let name = format!("{unit}.{FREE}");
            let free = scope.param(&name, &[r, width], Init::Kaiming)?;
            return Ok(Tensors::new().with(name, free));
        }
        if r >= width {
            let problem = format!("is {r}, wants less than the width, {width}");
            return Err(Error::invalid("reft.r, with reflections,", problem));
        }
        let (kind, device) = (scope.kind(), scope.device());
        let [original, base] = [ORIGINAL, BASE].map(|name| format!("{unit}.{name}"));
        let drawn =
            Init::Normal(1.0).tensor(&[width, width], scope.seed().child(&base), kind, device)?;
        let free = unit_columns(width, r, kind)?.t()?.neg()?.to_device(device)?;
        let free = scope.param_from(&original, &free)?;
        let kept = scope.buffer(&base, &drawn.qr()?.0)?;
        Ok(Tensors::new().with(original, free).with(base, kept))
    }

    /// R of the parameters below `unit`.
    pub(super) fn rows(self, phi: &Tensors, unit: &str) -> Result<Tensor> {
        let phi = |name: &str| phi.need(&format!("{unit}.{name}"));
        match self {
            Orthonormal::Qr => phi(FREE)?.t()?.qr()?.0.t(),
            Orthonormal::Householder => phi(BASE)?.matmul(&reflections(phi(ORIGINAL)?)?)?.t(),
        }
    }
}

/// The first r columns of the identity, `[width, r]`.
fn unit_columns(width: i64, r: i64, kind: Kind) -> Result<Tensor> {
    Tensor::eye(width, kind, modl_core::Device::Cpu)?.narrow(1, 0, r)
}

/// The first r columns of H₁ … H_r `[width, r]` with Hᵢ = I − 2 v vᵀ ⁄ vᵀv, where v is eᵢ and what
/// stands behind the diagonal in row i of `free` `[r, width]`; columns have the sign of the
/// diagonal, which is 1 or −1.
fn reflections(free: &Tensor) -> Result<Tensor> {
    let (r, width, kind) = (free.len_of(0), free.len_of(1), free.kind());
    let count = |n| Tensor::arange(n, free.device())?.to_kind(kind);
    let behind = count(width)?.unsqueeze(0)?.sub(&count(r)?.unsqueeze(1)?)?.clamp(0.0, 1.0)?;
    let unit = unit_columns(width, r, kind)?.to_device(free.device())?;
    let v = free.mul(&behind)?.t()?.add(&unit)?;
    let mut q = unit.clone();
    for i in (0..r).rev() {
        let v = v.narrow(1, i, 1)?;
        let twice = v.t()?.matmul(&q)?.div(&v.square()?.sum()?)?.mul_scalar(2.0)?;
        q = q.sub(&v.matmul(&twice)?)?;
    }
    // A sign and no number that is trained.
    q.mul(&free.detach()?.mul(&unit.t()?)?.sum_dims(&[1], false)?.sign()?)
}
