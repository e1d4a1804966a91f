//! Residual adapters: a 1 × 1 convolution beside or behind a convolution.
//!
//! | | y |
//! |---|---|
//! | parallel, the default | f_θ(x) + α ∗ x |
//! | series | h + BN(α ∗ h), h = f_θ(x) |
//!
//! α starts at 0, so that a fresh module changes nothing. Beside the convolution α is the same as
//! an addition to the centre of its kernel, and is computed and merged as that; stride, padding and
//! groups are f's own. Behind it, the batch norm with its gain, bias and running averages belongs to
//! the module: in training it normalises by the batch, and each step moves the averages once,
//! however often a forward pass was computed.
//!
//! Rebuffi et al. 2017, *Learning multiple visual domains with residual adapters*, arXiv 1705.08045
//! (series); 2018, *Efficient parametrization of multi-domain deep neural networks*, arXiv
//! 1803.10082 (parallel). Survey §3.3, function composition.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, ParamStore, Result, Scope,
    Signal, SiteKind, Step, Targets, Tensor, Tensors, no_grad,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

const ALPHA: &str = "alpha";
const GAIN: &str = "norm.weight";
const BIAS: &str = "norm.bias";
const MEAN: &str = "norm.running_mean";
const VAR: &str = "norm.running_var";

/// What forward passes of the present step have seen: in rows the sums of n·mean, n·variance and n.
const SEEN: &str = "norm.seen";

/// How far the running averages move towards a batch's, and what is added to a variance, as in
/// PyTorch.
const MOMENTUM: f64 = 0.1;
const EPS: f64 = 1e-5;

/// Where the 1 × 1 convolution stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResidualPlacement {
    /// Beside the convolution.
    #[default]
    Parallel,
    /// Behind it, with a batch norm.
    Series,
}

/// Configuration of residual adapters at `conv` sites.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResidualAdapter {
    /// Parallel, the default, or series.
    pub placement: ResidualPlacement,
}

impl ModuleConfig for ResidualAdapter {
    fn kind(&self) -> &'static str {
        "residual_adapter"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-conv")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        if site.kind != SiteKind::Conv {
            return Err(Error::unsupported(
                format!("a residual adapter at a site of kind {:?}", site.kind),
                "attach it to convolutions, `all-conv`",
            ));
        }
        let c = site.output;
        if self.placement == ResidualPlacement::Series {
            let phi = Tensors::new()
                .with(ALPHA, scope.param(ALPHA, &[c, c, 1, 1], Init::Zeros)?)
                .with(GAIN, scope.param(GAIN, &[c], Init::Ones)?)
                .with(BIAS, scope.param(BIAS, &[c], Init::Zeros)?);
            let (kind, device) = (scope.kind(), scope.device());
            return Ok(Box::new(Series {
                phi,
                mean: scope.buffer(MEAN, &Tensor::zeros(&[c], kind, device)?)?,
                var: scope.buffer(VAR, &Tensor::ones(&[c], kind, device)?)?,
                seen: scope.buffer(SEEN, &Tensor::zeros(&[3, c], kind, device)?)?,
            }));
        }
        let kernel = at.theta.need("weight")?.size();
        let [_, input, height, width] = kernel.as_slice() else {
            return Err(Error::invalid("residual_adapter", format!("the kernel is {kernel:?}")));
        };
        if height % 2 == 0 || width % 2 == 0 {
            return Err(Error::unsupported(
                format!("a parallel residual adapter beside a kernel of {height} × {width}"),
                "such a kernel has no centre; choose placement = \"series\"",
            ));
        }
        Ok(Box::new(Parallel { alpha: scope.param(ALPHA, &[c, *input, 1, 1], Init::Zeros)? }))
    }

    fn after_step(&self, params: &ParamStore, _: &Step) -> Result<()> {
        for (name, p) in params.iter() {
            let Some(site) = name.strip_suffix(SEEN) else { continue };
            let seen = p.tensor();
            let n = seen.select(0, 2)?;
            if n.largest()?.item()? == 0.0 {
                continue; // No row of this step came by.
            }
            for (row, of) in [(0, MEAN), (1, VAR)] {
                let batch = seen.select(0, row)?.div(&n)?;
                params.get(&format!("{site}{of}"))?.clone().lerp_in_place(&batch, MOMENTUM)?;
            }
            seen.clone().zero_in_place()?;
        }
        Ok(())
    }
}

/// α `[out, in ⁄ groups, 1, 1]` beside a convolution.
#[derive(Debug)]
struct Parallel {
    alpha: Tensor,
}

impl Module for Parallel {
    fn kind(&self) -> &'static str {
        "residual_adapter"
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        let (y, x) = (w.len_of(2) / 2, w.len_of(3) / 2);
        let centre = self.alpha.pad(&[x, x, y, y])?;
        // In the module's kind (f32), then rounded once.
        let sum = w.to_kind(centre.kind())?.add(&centre)?.to_kind(w.kind())?;
        Ok(Some(theta.clone().with("weight", sum)))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(ALPHA, self.alpha.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Parallel { alpha: phi.need(ALPHA)?.clone() }))
    }
}

/// α `[out, out, 1, 1]` and a batch norm behind a convolution.
#[derive(Debug)]
struct Series {
    phi: Tensors,
    /// Running averages, `[out]`.
    mean: Tensor,
    var: Tensor,
    /// `[3, out]`.
    seen: Tensor,
}

impl Series {
    /// The mean and the variance to normalise `x` `[batch, out, height, width]` by.
    fn moments(&self, x: &Tensor, cx: &Context) -> Result<(Tensor, Tensor)> {
        if !cx.train {
            return Ok((self.mean.clone(), self.var.clone()));
        }
        let mean = x.mean_dims(&[0, 2, 3], true)?;
        let var = x.sub(&mean)?.square()?.mean_dims(&[0, 2, 3], false)?;
        let mean = mean.reshape(&[-1])?;
        let n = (x.numel() as i64 / x.len_of(1).max(1)) as f64;
        no_grad(|| {
            // The running variance is the unbiased one.
            let unbiased = var.mul_scalar(n / (n - 1.0).max(1.0))?;
            let now = Tensor::stack(&[mean.clone(), unbiased, mean.ones_like()?], 0)?;
            self.seen.clone().add_in_place(&now.mul_scalar(n)?.to_kind(self.seen.kind())?)
        })?;
        Ok((mean, var))
    }
}

impl Module for Series {
    fn kind(&self) -> &'static str {
        "residual_adapter"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let h = f.call(x, cx)?;
        let phi = |name: &str| self.phi.need(name)?.to_kind(h.x.kind());
        let inner = h.x.conv2d(&phi(ALPHA)?, None, &[1, 1], &[0, 0], 1)?;
        let (mean, var) = self.moments(&inner, cx)?;
        let channels = |t: &Tensor| t.to_kind(h.x.kind())?.reshape(&[-1, 1, 1]);
        let unit = inner.sub(&channels(&mean)?)?.div(&channels(&var.add_scalar(EPS)?.sqrt()?)?)?;
        let normed = unit.mul(&channels(&phi(GAIN)?)?)?.add(&channels(&phi(BIAS)?)?)?;
        Ok(h.replace(h.x.add(&normed)?))
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    /// The running averages stay this module's.
    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        let (mean, var, seen) = (self.mean.clone(), self.var.clone(), self.seen.clone());
        Ok(Box::new(Series { phi, mean, var, seen }))
    }

    fn signature(&self) -> String {
        format!("residual_adapter(series, {:?})", self.mean.size())
    }
}
