//! Tensors over libtorch on which every operation is fallible.
//!
//! [`Tensor`] wraps [`tch::Tensor`], whose ordinary methods and operators panic; here each
//! operation returns a [`Result`] whose error names the operation and the operands' shapes.
//! What is not wrapped is one call away: [`Tensor::op`] runs any `f_*` function of `tch` with
//! the same error report. The operations themselves are in `tensor_ops.rs`.

use tch::TchError;

use crate::{Error, Result};

/// Where tensors live: `Device::Cpu`, `Device::Cuda(0)`.
pub use tch::Device;
/// Element types: `Kind::Float`, `Kind::BFloat16`, `Kind::Int64`.
pub use tch::Kind;
/// Rust's numbers that a tensor's elements can be: `f32`, `i64`.
pub use tch::kind::Element;

/// Whether the elements of that kind are floats, which libtorch computes with.
pub fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}

/// Runs `f` without recording gradients.
pub fn no_grad<T>(f: impl FnOnce() -> T) -> T {
    tch::no_grad(f)
}

/// Runs `f` with gradients recorded, also inside [`no_grad`].
pub fn with_grad<T>(f: impl FnOnce() -> T) -> T {
    tch::with_grad(f)
}

/// An n-dimensional array of libtorch. `clone` is cheap: it shares storage and gradient history;
/// [`Tensor::copy`] makes new storage.
pub struct Tensor(pub(crate) tch::Tensor);

impl Clone for Tensor {
    fn clone(&self) -> Self {
        Tensor(self.0.shallow_clone())
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&describe(&[&self.0]))
    }
}

impl From<tch::Tensor> for Tensor {
    fn from(t: tch::Tensor) -> Self {
        Tensor(t)
    }
}

impl AsRef<tch::Tensor> for Tensor {
    fn as_ref(&self) -> &tch::Tensor {
        &self.0
    }
}

/// `f32[16, 128, 384]` for each operand.
fn describe(tensors: &[&tch::Tensor]) -> String {
    let one = |t: &&tch::Tensor| {
        if !t.defined() {
            return "undefined".to_owned();
        }
        let kind = t.f_kind().map(kind_name).unwrap_or("?");
        format!("{kind}{:?}", t.size())
    };
    tensors.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// `f32`, `bf16`, `i64`: the short name of an element type.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "f32",
        Kind::Double => "f64",
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        Kind::Int64 => "i64",
        Kind::Int => "i32",
        Kind::Int16 => "i16",
        Kind::Int8 => "i8",
        Kind::Uint8 => "u8",
        Kind::Bool => "bool",
        _ => "other",
    }
}

pub(crate) fn op_error(op: &'static str, operands: &[&tch::Tensor], e: TchError) -> Error {
    let message = match &e {
        // The rest of libtorch's text is a C++ backtrace.
        TchError::Torch(text) => text.lines().next().unwrap_or_default().to_owned(),
        other => other.to_string(),
    };
    Error::Op { op, shapes: describe(operands), message }
}

impl Tensor {
    /// Runs a fallible function of `tch` and, where it fails, says on what.
    ///
    /// ```
    /// # use modl_core::{Tensor, Device};
    /// let x = Tensor::from_slice(&[1f32, 4.0], &[2], Device::Cpu)?;
    /// let y = Tensor::op("rsqrt", &[&x], |t| t[0].f_rsqrt())?;
    /// assert_eq!(y.to_vec::<f32>()?, [1.0, 0.5]);
    /// # Ok::<(), modl_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Op`] with the operation's name and the operands' shapes.
    pub fn op(
        name: &'static str,
        operands: &[&Tensor],
        f: impl FnOnce(&[&tch::Tensor]) -> Result<tch::Tensor, TchError>,
    ) -> Result<Tensor> {
        let inner: Vec<&tch::Tensor> = operands.iter().map(|t| &t.0).collect();
        f(&inner).map(Tensor).map_err(|e| op_error(name, &inner, e))
    }

    /// A tensor of `shape` from numbers in row-major order.
    pub fn from_slice<T: Element>(data: &[T], shape: &[i64], device: Device) -> Result<Self> {
        let flat = tch::Tensor::f_from_slice(data).map_err(|e| op_error("from_slice", &[], e))?;
        Tensor(flat).reshape(shape)?.to_device(device)
    }

    /// A tensor from the little-endian bytes of its elements.
    pub fn from_bytes(bytes: &[u8], shape: &[i64], kind: Kind) -> Result<Self> {
        tch::Tensor::f_from_data_size(bytes, shape, kind)
            .map(Tensor)
            .map_err(|e| op_error("from_bytes", &[], e))
    }

    /// The elements in row-major order as little-endian bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let t = self.detach()?.to_device(Device::Cpu)?.contiguous()?;
        let n = t.numel();
        let mut bytes = vec![0u8; n * t.kind().elt_size_in_bytes()];
        t.0.f_copy_data_u8(&mut bytes, n).map_err(|e| op_error("to_bytes", &[&t.0], e))?;
        Ok(bytes)
    }

    /// Overwrites the elements in place with those of `src`, whatever its kind.
    pub fn copy_from(&mut self, src: &Tensor) -> Result<()> {
        self.0.f_copy_(&src.0).map_err(|e| op_error("copy_from", &[&self.0, &src.0], e))
    }

    /// The elements in row-major order, converted to `T`.
    pub fn to_vec<T: Element + Copy + Default>(&self) -> Result<Vec<T>> {
        let t = self.detach()?.to_device(Device::Cpu)?.to_kind(T::KIND)?.contiguous()?;
        let mut out = vec![T::default(); t.numel()];
        let n = out.len();
        t.0.f_copy_data(&mut out, n).map_err(|e| op_error("to_vec", &[&t.0], e))?;
        Ok(out)
    }

    /// The only element as `f64`.
    ///
    /// # Errors
    /// Where there is not exactly one element.
    pub fn item(&self) -> Result<f64> {
        match self.to_vec::<f64>()?.as_slice() {
            [x] => Ok(*x),
            all => Err(Error::invalid(
                "item",
                format!("wants exactly one element, there are {}", all.len()),
            )),
        }
    }

    /// Zeros of `shape`.
    pub fn zeros(shape: &[i64], kind: Kind, device: Device) -> Result<Self> {
        tch::Tensor::f_zeros(shape, (kind, device))
            .map(Tensor)
            .map_err(|e| op_error("zeros", &[], e))
    }

    /// Ones of `shape`.
    pub fn ones(shape: &[i64], kind: Kind, device: Device) -> Result<Self> {
        tch::Tensor::f_ones(shape, (kind, device)).map(Tensor).map_err(|e| op_error("ones", &[], e))
    }

    /// `value` everywhere.
    ///
    /// # Errors
    /// Where `kind` cannot hold `value`.
    pub fn full(shape: &[i64], value: f64, kind: Kind, device: Device) -> Result<Self> {
        // Refused here, because tch panics after a refusal of libtorch's.
        if kind == Kind::Float && value.is_finite() && value.abs() > f64::from(f32::MAX) {
            return Err(Error::invalid("full", format!("{value} is beyond numbers of 32 bits")));
        }
        tch::Tensor::f_full(shape, value, (kind, device))
            .map(Tensor)
            .map_err(|e| op_error("full", &[], e))
    }

    /// The identity matrix `[n, n]`.
    pub fn eye(n: i64, kind: Kind, device: Device) -> Result<Self> {
        tch::Tensor::f_eye(n, (kind, device)).map(Tensor).map_err(|e| op_error("eye", &[], e))
    }

    /// `0, 1, …, end − 1` as `i64`.
    pub fn arange(end: i64, device: Device) -> Result<Self> {
        tch::Tensor::f_arange(end, (Kind::Int64, device))
            .map(Tensor)
            .map_err(|e| op_error("arange", &[], e))
    }

    /// The shape.
    pub fn size(&self) -> Vec<i64> {
        self.0.size()
    }

    /// The number of dimensions.
    pub fn dim(&self) -> usize {
        self.0.dim()
    }

    /// The size along one dimension; negative ones count from the end. 0 where there is no such
    /// dimension.
    pub fn len_of(&self, dim: i64) -> i64 {
        let size = self.0.size();
        let at = if dim < 0 { dim + size.len() as i64 } else { dim };
        usize::try_from(at).ok().and_then(|i| size.get(i).copied()).unwrap_or(0)
    }

    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.0.numel()
    }

    /// The element type.
    pub fn kind(&self) -> Kind {
        self.0.kind()
    }

    /// Where the tensor lives.
    pub fn device(&self) -> Device {
        self.0.device()
    }

    /// Whether gradients flow to it.
    pub fn requires_grad(&self) -> bool {
        self.0.requires_grad()
    }

    /// Turns the recording of gradients for this leaf on or off.
    pub fn set_requires_grad(&self, on: bool) -> Result<()> {
        self.0
            .f_set_requires_grad(on)
            .map(drop)
            .map_err(|e| op_error("set_requires_grad", &[&self.0], e))
    }

    /// d(self)/d(input) for each of `inputs`, `None` for those that self does not depend on.
    ///
    /// Nothing is accumulated anywhere: an input that was not used has no gradient at all, so an
    /// optimiser skips it, which a gradient of zeros would not bring about. With `create_graph`
    /// the results can be differentiated again.
    ///
    /// # Errors
    /// Where nothing was recorded for self.
    pub fn gradients(&self, inputs: &[&Tensor], create_graph: bool) -> Result<Vec<Option<Tensor>>> {
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        // libtorch may end the process instead of saying so.
        if !self.requires_grad() {
            let problem =
                "was computed without recording of gradients: nothing that is trained is in it";
            return Err(Error::invalid("gradients", problem));
        }
        let leaves: Vec<&tch::Tensor> = inputs.iter().map(|t| &t.0).collect();
        let grads = tch::Tensor::f_run_backward(&[&self.0], &leaves, create_graph, create_graph)
            .map_err(|e| op_error("gradients", &[&self.0], e))?;
        Ok(grads.into_iter().map(|g| g.defined().then_some(Tensor(g))).collect())
    }

    /// A copy with storage of its own, still in the graph.
    pub fn copy(&self) -> Result<Tensor> {
        // The binding of ATen's `clone` wants an output tensor; `+ 0` would turn −0 into 0.
        Self::op("copy", &[self], |t| t[0].f_to_dtype(t[0].kind(), false, true))
    }

    /// Whether shape, kind and every bit are the same (NaN differs from itself).
    pub fn bit_equal(&self, other: &Tensor) -> Result<bool> {
        Ok(self.size() == other.size()
            && self.kind() == other.kind()
            && self.to_bytes()? == other.to_bytes()?)
    }

    /// The largest |self − other|; infinite where the shapes differ.
    pub fn max_abs_diff(&self, other: &Tensor) -> Result<f64> {
        if self.size() != other.size() {
            return Ok(f64::INFINITY);
        }
        let (a, b) = (self.to_vec::<f64>()?, other.to_vec::<f64>()?);
        Ok(a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max))
    }

    /// Checks that every element is a number.
    ///
    /// # Errors
    /// [`Error::Invalid`] of `what` where one is NaN or infinite.
    pub fn check_finite(&self, what: &str) -> Result<()> {
        if self.detach()?.is_finite()?.all()?.item()? == 0.0 {
            return Err(Error::invalid(what, "are not all finite numbers"));
        }
        Ok(())
    }

    /// Whether |self − other| ≤ `abs` + `rel`·|other| everywhere; false where the shapes differ or
    /// a number is NaN.
    pub fn all_close(&self, other: &Tensor, abs: f64, rel: f64) -> Result<bool> {
        if self.size() != other.size() {
            return Ok(false);
        }
        let (a, b) = (self.to_vec::<f64>()?, other.to_vec::<f64>()?);
        Ok(a.iter().zip(&b).all(|(x, y)| (x - y).abs() <= abs + rel * y.abs()))
    }
}
