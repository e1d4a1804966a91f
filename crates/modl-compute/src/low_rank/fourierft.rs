//! FourierFT: a change of the weight with few frequencies.
//!
//! W + s·Re F⁻¹(C), where F⁻¹ is the inverse discrete Fourier transform in two dimensions, and the
//! spectrum C `[out, in]` is 0 but for n coefficients at random positions, which are trained. The
//! positions follow from a seed by PyTorch's `randperm`, as in PEFT, whose files do not hold them.
//!
//! Gao et al. 2024, *Parameter-Efficient Fine-Tuning with Discrete Fourier Transform*, arXiv
//! 2405.03003. Survey §3.1, parameter composition. Names, defaults and rules are PEFT's.

use modl_core::{Attachment, Error, Init, Module, ModuleConfig, Result, Scope, Tensor, Tensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::permutation::permutation;
use super::weight_change::{added, linear_only, signature};
use crate::patterns::Patterns;
use crate::peft::Provenance;

/// The name of the parameter, as in PEFT's files.
const SPECTRUM: &str = "fourierft_spectrum";

/// Configuration of FourierFT at linear sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FourierFt {
    /// n, the number of coefficients, at least 1 and at most as many as the weight has elements;
    /// default 1000.
    pub n_frequency: i64,
    /// s; default 150.
    pub scaling: f64,
    /// The seed of the positions, the same at all sites; default 777.
    pub random_loc_seed: i64,
    /// n of their own for some sites.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub n_frequency_pattern: Patterns<i64>,
    /// Starts without an effect. With false, the default as in PEFT, the coefficients start from a
    /// standard normal, which changes the function.
    pub init_weights: bool,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl Default for FourierFt {
    fn default() -> Self {
        FourierFt {
            n_frequency: 1000,
            scaling: 150.0,
            random_loc_seed: 777,
            n_frequency_pattern: Patterns::default(),
            init_weights: false,
            peft: Provenance::default(),
        }
    }
}

impl ModuleConfig for FourierFt {
    fn kind(&self) -> &'static str {
        "fourierft"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        linear_only("FourierFT", at.site)?;
        let path = &at.site.path;
        let n = *self.n_frequency_pattern.find(path)?.unwrap_or(&self.n_frequency);
        let shape = [at.site.output, at.site.input];
        let elements = shape.iter().product();
        if !(1..=elements).contains(&n) {
            let problem = format!("is {n} at `{path}`, wants 1 to {elements}");
            return Err(Error::invalid("fourierft.n_frequency", problem));
        }
        if !self.scaling.is_finite() {
            let problem = format!("is {}, wants a number", self.scaling);
            return Err(Error::invalid("fourierft.scaling", problem));
        }
        let positions = permutation(elements, n, self.random_loc_seed as u64)?;
        let positions = Tensor::from_slice(&positions, &[n], scope.device())?;
        let init = if self.init_weights { Init::Zeros } else { Init::Normal(1.0) };
        let spectrum = scope.param(SPECTRUM, &[n], init)?;
        let (scaling, seed) = (self.scaling, self.random_loc_seed);
        Ok(Box::new(FourierLinear { spectrum, positions, shape, scaling, seed }))
    }
}

/// FourierFT at one site.
#[derive(Debug, Clone)]
struct FourierLinear {
    /// `[n]`.
    spectrum: Tensor,
    /// In the flat spectrum, `[n]` i64.
    positions: Tensor,
    shape: [i64; 2],
    scaling: f64,
    seed: i64,
}

impl FourierLinear {
    /// ΔW, `[out, in]`.
    fn change(&self) -> Result<Tensor> {
        let c = &self.spectrum;
        let empty = Tensor::zeros(&[self.shape.iter().product()], c.kind(), c.device())?;
        let dense = empty.index_add(0, &self.positions, c)?.reshape(&self.shape)?;
        let change = Tensor::op("ifft2", &[&dense], |t| {
            t[0].f_fft_ifft2(None::<&[i64]>, [-2, -1].as_slice(), "backward")?.f_real()
        })?;
        change.mul_scalar(self.scaling)
    }
}

impl Module for FourierLinear {
    fn kind(&self) -> &'static str {
        "fourierft"
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        added(theta, &self.change()?).map(Some)
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(SPECTRUM, self.spectrum.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(FourierLinear { spectrum: phi.need(SPECTRUM)?.clone(), ..self.clone() }))
    }

    fn signature(&self) -> String {
        let settings = format!("scaling {}, seed {}", self.scaling, self.seed);
        signature(self.kind(), &self.phi(), &settings)
    }
}
