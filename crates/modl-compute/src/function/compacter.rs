//! Compacter: a bottleneck adapter whose matrices are sums of Kronecker products.
//!
//! y = h + U σ(D h + b_D) + b_U at a sub-layer, or with LN(h + x) in place of the h in σ, as
//! AdapterHub's Compacter++ has it; where for both matrices
//!
//! W = Σᵢ Aᵢ ⊗ (Lᵢ Rᵢ), i = 1 … n, with Aᵢ `[n, n]`, Lᵢ `[in ⁄ n, rank]`, Rᵢ `[rank, out ⁄ n]`.
//!
//! The rule A is one for all layers of the module; L and R are each layer's own. W is never formed:
//! with x as `[n, in ⁄ n]`, x W = Σᵢ Aᵢᵀ (x Lᵢ) Rᵢ.
//!
//! Karimi Mahabadi et al. 2021, *Compacter: Efficient Low-Rank Hypercomplex Adapter Layers*, arXiv
//! 2106.04647. Survey §3.3, function composition. Names, shapes and defaults are AdapterHub's.

use modl_core::{
    Activation, Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope,
    Signal, SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Bottleneck;
use crate::dropout::Dropout;

const DOWN: &str = "adapter_down.0";
const UP: &str = "adapter_up";
const RULE: &str = "phm_rule";

/// Configuration of Compacter at sub-layer sites. Compacter stands at
/// [`Bottleneck::houlsby_sites`], Compacter++ at [`Bottleneck::pfeiffer_sites`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Compacter {
    /// The bottleneck has width ⌊width ⁄ this⌋; default 32. It has to be a multiple of `phm_dim`.
    pub reduction_factor: f64,
    /// σ; default GELU.
    pub non_linearity: Activation,
    /// The adapter works on LN(h + x) instead of h; default false.
    pub original_ln_before: bool,
    /// n, the number of Kronecker products; default 4. It has to divide the site's width, too.
    pub phm_dim: i64,
    /// The rank of Lᵢ Rᵢ, at least 1; default 1.
    pub phm_rank: i64,
    /// The standard deviation with which A starts; default 1e-4: nearly no change.
    pub phm_init_range: f64,
    /// In training, each element of what is added is dropped with this probability, in [0, 1);
    /// default 0.
    pub dropout: f64,
}

impl Default for Compacter {
    fn default() -> Self {
        Compacter {
            reduction_factor: 32.0,
            non_linearity: Activation::Gelu,
            original_ln_before: false,
            phm_dim: 4,
            phm_rank: 1,
            phm_init_range: 1e-4,
            dropout: 0.0,
        }
    }
}

impl Compacter {
    /// The width of the bottleneck beside `width`.
    fn bottleneck(&self, width: i64) -> Result<i64> {
        let n = self.phm_dim;
        if n < 1 || self.phm_rank < 1 {
            let problem = format!("phm_dim {n}, phm_rank {}: want at least 1", self.phm_rank);
            return Err(Error::invalid("compacter", problem));
        }
        if !(self.reduction_factor.is_finite() && self.reduction_factor > 0.0) {
            let problem = format!("is {}, wants a number above 0", self.reduction_factor);
            return Err(Error::invalid("compacter.reduction_factor", problem));
        }
        if !(self.phm_init_range.is_finite() && self.phm_init_range >= 0.0) {
            let problem = format!("is {}, wants a number from 0", self.phm_init_range);
            return Err(Error::invalid("compacter.phm_init_range", problem));
        }
        let b = (width as f64 / self.reduction_factor).floor() as i64;
        if b < 1 || width % n != 0 || b % n != 0 {
            return Err(Error::invalid(
                "compacter.phm_dim",
                format!(
                    "{n} does not divide both the width {width} and the bottleneck {b} = ⌊{width} \
                     ⁄ reduction_factor⌋; choose another phm_dim or reduction_factor"
                ),
            ));
        }
        Ok(b)
    }

    fn layer(&self, name: &str, input: i64, output: i64, scope: &mut Scope) -> Result<Tensors> {
        let (n, r) = (self.phm_dim, self.phm_rank);
        // Glorot's bound for each of the n matrices.
        let glorot =
            |rows: i64, columns: i64| Init::Uniform((6.0 / (rows + columns) as f64).sqrt());
        let (i, o) = (input / n, output / n);
        let mut scope = scope.sub(name);
        Ok(Tensors::new()
            .with(format!("{name}.W_left"), scope.param("W_left", &[n, i, r], glorot(i, r))?)
            .with(format!("{name}.W_right"), scope.param("W_right", &[n, r, o], glorot(r, o))?)
            .with(format!("{name}.b"), scope.param("b", &[output], Init::Zeros)?))
    }
}

impl ModuleConfig for Compacter {
    fn kind(&self) -> &'static str {
        "compacter"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Bottleneck::houlsby_sites()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if at.site.kind != SiteKind::Sublayer {
            return Err(Error::unsupported(
                format!("Compacter at a site of kind {:?}", at.site.kind),
                "attach it to sub-layers, for instance with Bottleneck::houlsby_sites",
            ));
        }
        let dropout = Dropout::new("compacter.dropout", self.dropout, scope)?;
        let (d, n) = (at.site.output, self.phm_dim);
        let b = self.bottleneck(d)?;
        let rule = scope.common().shared(RULE, &[n, n, n], Init::Normal(self.phm_init_range))?;
        let down = self.layer(DOWN, d, b, scope)?;
        let up = self.layer(UP, b, d, scope)?;
        let own = down.iter().chain(up.iter()).map(|(name, t)| (name.to_owned(), t.clone()));
        let phi = own.collect::<Tensors>().with(RULE, rule);
        let (non_linearity, behind_norm) = (self.non_linearity, self.original_ln_before);
        Ok(Box::new(CompacterAdapter { non_linearity, behind_norm, dropout, phi }))
    }
}

/// A Compacter at one site.
#[derive(Debug)]
struct CompacterAdapter {
    non_linearity: Activation,
    behind_norm: bool,
    dropout: Dropout,
    phi: Tensors,
}

impl CompacterAdapter {
    /// x W + b, `[…, in]` → `[…, out]`.
    fn layer(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let phi = |name: &str| self.phi.need(name)?.to_kind(x.kind());
        let (rule, bias) = (phi(RULE)?, phi(&format!("{name}.b"))?);
        let (left, right) = (phi(&format!("{name}.W_left"))?, phi(&format!("{name}.W_right"))?);
        let blocks = x.reshape(&[-1, left.len_of(0), left.len_of(1)])?; // [z, n, in ⁄ n]
        let thin = Tensor::einsum("zai,kir->zkar", &[&blocks, &left])?;
        let mixed = Tensor::einsum("zkar,kac->zkcr", &[&thin, &rule])?;
        let y = Tensor::einsum("zkcr,krj->zcj", &[&mixed, &right])?;
        let mut shape = x.size();
        if let Some(last) = shape.last_mut() {
            *last = bias.len_of(0);
        }
        y.reshape(&shape)?.add(&bias)
    }
}

impl Module for CompacterAdapter {
    fn kind(&self) -> &'static str {
        "compacter"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let h = f.call(x, cx)?;
        let seen = match self.behind_norm {
            true => f.stage("norm", &x.replace(h.x.clone()), cx)?.x,
            false => h.x.clone(),
        };
        let inner = self.non_linearity.apply(&self.layer(DOWN, &seen)?)?;
        let u = self.dropout.apply(&self.layer(UP, &inner)?, cx)?;
        Ok(h.replace(h.x.add(&u)?))
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        let (non_linearity, behind_norm) = (self.non_linearity, self.behind_norm);
        let dropout = self.dropout.clone();
        Ok(Box::new(CompacterAdapter { non_linearity, behind_norm, dropout, phi }))
    }

    fn signature(&self) -> String {
        let shapes: Vec<String> =
            self.phi.iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
        let norm = if self.behind_norm { ", behind the norm" } else { "" };
        format!("compacter({}; {:?}{norm})", shapes.join(", "), self.non_linearity)
    }
}
