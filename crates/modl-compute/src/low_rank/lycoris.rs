//! What LoHa and LoKr share, as in LyCORIS: rank and scale for each site, dropout of rows and of
//! the module, and the shape of the weight.
//!
//! Yeh et al. 2024, *Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
//! Evaluation*, arXiv 2309.14859. Survey §3.1.

use modl_core::{Attachment, Context, Error, Result, Scope, SiteKind, Tensor};

use super::part_dropout::PartDropout;
use crate::patterns::Patterns;

/// The settings of one of them, before the site is known.
pub(super) struct Lycoris<'a> {
    pub(super) kind: &'static str,
    pub(super) r: i64,
    pub(super) alpha: f64,
    pub(super) rank_pattern: &'a Patterns<i64>,
    pub(super) alpha_pattern: &'a Patterns<f64>,
    pub(super) rank_dropout: f64,
    pub(super) module_dropout: f64,
}

impl Lycoris<'_> {
    /// # Errors
    /// Where the rank is not positive, α is not a number, a pattern is not a regular expression or
    /// a probability is none.
    pub(super) fn at(&self, path: &str, scope: &Scope) -> Result<Settings> {
        let named = |field: &str| format!("{}.{field}", self.kind);
        let r = *self.rank_pattern.find(path)?.unwrap_or(&self.r);
        let alpha = *self.alpha_pattern.find(path)?.unwrap_or(&self.alpha);
        if r < 1 {
            let problem = format!("is {r} at `{path}`, wants at least 1");
            return Err(Error::invalid(named("r"), problem));
        }
        if !alpha.is_finite() {
            let problem = format!("is {alpha} at `{path}`, wants a number");
            return Err(Error::invalid(named("alpha"), problem));
        }
        let dropout = |field: &str, p| PartDropout::new(&named(field), p, field, scope);
        Ok(Settings {
            r,
            scale: alpha / r as f64,
            rows: dropout("rank_dropout", self.rank_dropout)?,
            whole: dropout("module_dropout", self.module_dropout)?,
        })
    }
}

/// The settings at one site.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) r: i64,
    /// α⁄r.
    pub(super) scale: f64,
    rows: PartDropout,
    whole: PartDropout,
}

impl Settings {
    /// Whether training leaves the module out this time.
    pub(super) fn left_out(&self, like: &Tensor, cx: &Context) -> Result<bool> {
        self.whole.drops_all(like, cx)
    }

    /// A factor for each of `n` rows of ΔW, that is for each output, `[n]`: 0 where it is dropped,
    /// else 1, or with `rescale` what keeps the mean at 1; `None` where nothing is dropped.
    pub(super) fn row_factors(
        &self,
        n: i64,
        rescale: bool,
        like: &Tensor,
        cx: &Context,
    ) -> Result<Option<Tensor>> {
        let Some(kept) = self.rows.kept(n, like, cx)? else { return Ok(None) };
        if !rescale {
            return Ok(Some(kept));
        }
        // At least one row's share: where all are dropped, zeros stay zeros.
        let share = kept.mean()?.clamp(1.0 / n as f64, 1.0)?;
        kept.div(&share).map(Some)
    }
}

/// The shape of a weight `[out, in]` or `[out, in ⁄ groups, height, width]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct WeightShape {
    pub(super) output: i64,
    pub(super) input: i64,
    /// 1 × 1 for linear sites.
    pub(super) kernel: [i64; 2],
}

impl WeightShape {
    /// # Errors
    /// Where the site is neither linear nor a convolution.
    pub(super) fn at(method: &str, at: &Attachment) -> Result<Self> {
        let fits = matches!(at.site.kind, SiteKind::Linear | SiteKind::Conv);
        match at.theta.need("weight")?.size()[..] {
            [output, input] if fits => Ok(WeightShape { output, input, kernel: [1, 1] }),
            [output, input, h, w] if fits => Ok(WeightShape { output, input, kernel: [h, w] }),
            _ => Err(Error::unsupported(
                format!("{method} at a site of kind {:?}", at.site.kind),
                "attach it to linear sites or to convolutions",
            )),
        }
    }

    /// The number of the kernel's elements.
    pub(super) fn taps(self) -> i64 {
        self.kernel.iter().product()
    }
}

/// A kernel from its core and two factors: core `[r, r, h, w]`, out `[r, o]`, input `[r, i]` →
/// `[o, i, h, w]`. Proposition 3 of FedPara, arXiv 2108.06098.
pub(super) fn tucker(core: &Tensor, out: &Tensor, input: &Tensor) -> Result<Tensor> {
    Tensor::einsum("ijkl,ip,jq->pqkl", &[core, out, input])
}
