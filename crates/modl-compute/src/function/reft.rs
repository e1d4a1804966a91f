//! ReFT: an intervention on hidden states in a low-rank subspace, at some positions.
//!
//! h ← h + Rᵀ(σ(Wh + b) − Rh) with R, W `[r, width]`, at the first or last positions of a
//! sequence:
//!
//! | | rows of R orthonormal | − Rh |
//! |---|---|---|
//! | LoReFT, the default | yes | yes |
//! | NoReFT | no | yes |
//! | DiReFT | no | no |
//!
//! Gradients flow through what makes the rows orthonormal. A token that is among the first and the
//! last positions gets the change of the last, as in AdapterHub.
//!
//! Wu et al. 2024, *ReFT: Representation Finetuning for Language Models*, arXiv 2404.03592. Survey
//! §3.3, function composition. Settings are AdapterHub's.

use modl_core::{
    Activation, Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope,
    Signal, SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Orthonormal;
use crate::dropout::Dropout;

/// Configuration of ReFT at whole layers. The default is [`Reft::loreft`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reft {
    /// The first so many tokens of each row are changed, padding not counted; default 3.
    pub prefix_positions: i64,
    /// The last so many tokens of each row are changed, padding not counted; default 0.
    pub suffix_positions: i64,
    /// r, the dimension of the subspace, at least 1; default 1.
    pub r: i64,
    /// The rows of R are orthonormal.
    pub orthogonality: bool,
    /// How they are made so.
    pub parametrization: Orthonormal,
    /// First and last positions share one R, W and b. Else each has its own.
    pub tied_weights: bool,
    /// Rh is subtracted.
    pub subtract_projection: bool,
    /// σ, none by default.
    pub non_linearity: Option<Activation>,
    /// In training, each element of the change is dropped with this probability, in [0, 1); default
    /// 0.05.
    pub dropout: f64,
}

impl Default for Reft {
    fn default() -> Self {
        Self::loreft()
    }
}

impl Reft {
    /// An orthonormal R; what lies in its subspace is replaced.
    pub fn loreft() -> Self {
        Reft {
            prefix_positions: 3,
            suffix_positions: 0,
            r: 1,
            orthogonality: true,
            parametrization: Orthonormal::Qr,
            tied_weights: false,
            subtract_projection: true,
            non_linearity: None,
            dropout: 0.05,
        }
    }

    /// Any R.
    pub fn noreft() -> Self {
        Reft { orthogonality: false, ..Self::loreft() }
    }

    /// Any R, and nothing subtracted: LoRA on hidden states.
    pub fn direft() -> Self {
        Reft { subtract_projection: false, ..Self::noreft() }
    }

    fn check(&self, width: i64) -> Result<()> {
        if self.r < 1 || (self.orthogonality && self.r > width) {
            let problem = format!("is {}, wants 1 to the width, {width}", self.r);
            return Err(Error::invalid("reft.r", problem));
        }
        let (first, last) = (self.prefix_positions, self.suffix_positions);
        if first < 0 || last < 0 || (first, last) == (0, 0) {
            let problem = format!("are {first} first and {last} last; want one at least");
            return Err(Error::invalid("reft positions", problem));
        }
        Ok(())
    }

    /// What makes the parameters of R; one that is free is called as that of a QR decomposition.
    fn rows(&self) -> Orthonormal {
        if self.orthogonality { self.parametrization } else { Orthonormal::Qr }
    }

    /// Which positions each unit changes: so many first and so many last ones.
    pub(crate) fn reach(&self) -> Vec<(i64, i64)> {
        let (first, last) = (self.prefix_positions, self.suffix_positions);
        if self.tied_weights {
            return vec![(first, last)];
        }
        [(first, 0), (0, last)].into_iter().filter(|reach| *reach != (0, 0)).collect()
    }
}

impl ModuleConfig for Reft {
    fn kind(&self) -> &'static str {
        "reft"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-block")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        if site.kind != SiteKind::Block {
            return Err(Error::unsupported(
                format!("ReFT at a site of kind {:?}", site.kind),
                "attach it to whole layers, `all-block`",
            ));
        }
        self.check(site.output)?;
        let dropout = Dropout::new("reft.dropout", self.dropout, scope)?;
        let mut phi = Tensors::new();
        for unit in 0..self.reach().len() {
            let unit = format!("units.{unit}");
            let params = [
                ("learned_source.weight", vec![self.r, site.output], Init::Kaiming),
                ("learned_source.bias", vec![self.r], Init::Zeros),
            ];
            for (name, shape, init) in params {
                let name = format!("{unit}.{name}");
                let t = scope.param(&name, &shape, init)?;
                phi.set(name, t);
            }
            let rows = self.rows().build(scope, &unit, [self.r, site.output])?;
            rows.iter().for_each(|(name, t)| phi.set(name.to_owned(), t.clone()));
        }
        Ok(Box::new(Intervention { config: self.clone(), dropout, phi }))
    }
}

/// ReFT at one layer.
#[derive(Debug)]
struct Intervention {
    config: Reft,
    dropout: Dropout,
    phi: Tensors,
}

impl Intervention {
    /// Rᵀ(σ(Wh + b) − Rh), `[batch, seq, width]`.
    fn change(&self, unit: usize, h: &Tensor) -> Result<Tensor> {
        let unit = format!("units.{unit}");
        let phi = |name: &str| self.phi.need(&format!("{unit}.{name}"));
        let (w, b) = (phi("learned_source.weight")?, phi("learned_source.bias")?);
        let r = match self.config.orthogonality {
            true => self.config.parametrization.rows(&self.phi, &unit)?,
            false => phi("projection.weight")?.clone(),
        };
        let (r, kind) = (r.to_kind(h.kind())?, h.kind());
        let source = h.linear(&w.to_kind(kind)?, Some(&b.to_kind(kind)?))?;
        let source = match self.config.non_linearity {
            Some(sigma) => sigma.apply(&source)?,
            None => source,
        };
        let inner = if self.config.subtract_projection {
            source.sub(&h.linear(&r, None)?)?
        } else {
            source
        };
        inner.matmul(&r)
    }
}

/// 1 at the `first` first and the `last` last positions that `mask` `[batch, seq]` shows, else 0.
fn positions(mask: &Tensor, first: i64, last: i64) -> Result<Tensor> {
    // Counted in f32: bf16 cannot tell 300 from 301.
    let real = mask.to_kind(modl_core::Kind::Float)?;
    let rank = real.cumsum(1)?; // 1, 2, … over real tokens
    let from_end = real.sum_dims(&[1], true)?.sub(&rank)?; // …, 1, 0
    let chosen = rank.lt_scalar(first as f64 + 0.5)?;
    let chosen = chosen.logical_or(&from_end.lt_scalar(last as f64 - 0.5)?)?;
    chosen.to_kind(real.kind())?.mul(&real)
}

impl Module for Intervention {
    fn kind(&self) -> &'static str {
        "reft"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let h = f.call(x, cx)?;
        let mut y = h.x.clone();
        for (unit, (first, last)) in self.config.reach().into_iter().enumerate() {
            let at = positions(h.with.need("mask")?, first, last)?;
            let change = self.dropout.apply(&self.change(unit, &h.x)?, cx)?;
            let changed = h.x.add(&change)?.sub(&y)?;
            y = y.addcmul(&changed, &at.to_kind(y.kind())?.unsqueeze(-1)?)?;
        }
        Ok(h.replace(y))
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        let (config, dropout) = (self.config.clone(), self.dropout.clone());
        Ok(Box::new(Intervention { config, dropout, phi }))
    }

    fn signature(&self) -> String {
        // Dropout does not matter to what trained parameters mean.
        format!("{:?}", Reft { dropout: 0.0, ..self.config.clone() })
    }
}
