//! Sluice networks: cross-stitch units between subspaces of the layers, and a mixture of layers.
//!
//! Each column's layer has G subspaces, equal parts of its channels. With W_t the layer's own map
//! and h_t,g the subspaces of W_t f_{θ⊕φ_t}(x_t):
//!
//! - h̃_t,g = Σ_s,k α_(t,g)(s,k) h_s,k, which subspaces of which tasks are shared;
//! - ĥ_t = Σ_l β_t,l h̃_t of layer l, at which depth task t is read: what comes out of the run;
//! - λ Σ_t Σ_{g<k} ‖W_t,g W_t,kᵀ‖²_F, which keeps subspaces from being the same twice.
//!
//! Cross-stitch units (α only between the same subspaces, β the last layer), hard parameter sharing
//! (α equal for all tasks) and supervision at a low layer (β that layer) are special values. In the
//! paper the layers themselves are trained and are G; here θ is frozen, and a column's own is W_t,
//! which starts as the identity, besides the modules within its layers that are routed by task (as
//! for [cross-stitch units](super::CrossStitch)). α and β learn faster than the rest:
//! `lr_scale = { "modules.sluice.*.alpha" = 100.0, "modules.sluice.*.beta" = 100.0 }`.
//!
//! Ruder, Bingel, Augenstein and Søgaard 2019, *Latent Multi-task Architecture Learning*, AAAI,
//! arXiv 1705.08142. Survey §3.3, function composition.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, Targets,
    Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::columns::{Columns, stitch};
use super::cross_stitch::mix;
use super::tasks::Tasks;

const ALPHA: &str = "alpha";
const BETA: &str = "beta";
const MAP: &str = "map";

/// Configuration of a sluice network at a run of `block` sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sluice {
    /// The tasks, whose columns they are; two at least. A row goes on with its task's.
    pub tasks: Vec<String>,
    /// The task of all rows where a pass names none; default: such a pass is an error.
    pub default_task: Option<String>,
    /// G, which has to divide the width; default 2, as in the paper.
    pub subspaces: i64,
    /// α between a subspace and itself at the start; default 0.9. The rest up to 1 is shared by the
    /// same subspace of the other tasks; between different subspaces α starts at 0.
    pub same: f64,
    /// λ, at least 0; default 0, which is no penalty.
    pub orthogonality: f64,
}

impl Default for Sluice {
    fn default() -> Self {
        Sluice {
            tasks: Vec::new(),
            default_task: None,
            subspaces: 2,
            same: 0.9,
            orthogonality: 0.0,
        }
    }
}

impl ModuleConfig for Sluice {
    fn kind(&self) -> &'static str {
        "sluice"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-block")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let tasks = Tasks::new("sluice", &self.tasks, 2, self.default_task.as_deref())?;
        let columns = Columns::new("a sluice network", tasks, at)?;
        let (g, width) = (self.subspaces, at.site.output);
        if g < 1 || width % g != 0 {
            let problem = format!("is {g}, wants a number that divides the width {width}");
            return Err(Error::invalid("sluice.subspaces", problem));
        }
        let lambda = self.orthogonality;
        if !(self.same.is_finite() && lambda.is_finite() && lambda >= 0.0) {
            let problem = format!("are {} and {lambda}, want a number and at least 0", self.same);
            return Err(Error::invalid("sluice.same and orthogonality", problem));
        }
        let n = columns.tasks().count();
        let alpha = stitch(n * g, self.same, |i, j| i % g == j % g, scope)?;
        // The pretrained network is read at its end.
        let beta = if columns.last() { Init::Ones } else { Init::Zeros };
        Ok(Box::new(Layer {
            subspaces: g,
            lambda,
            alpha: scope.param_from(ALPHA, &alpha)?,
            beta: scope.param(BETA, &[n], beta)?,
            map: scope.param(MAP, &[n, width, width], Init::Zeros)?,
            columns,
        }))
    }
}

/// The sluice behind one layer.
#[derive(Debug)]
struct Layer {
    columns: Columns,
    subspaces: i64,
    lambda: f64,
    /// `[columns · subspaces, columns · subspaces]`, the subspaces of the first column first.
    alpha: Tensor,
    /// `[columns]`: what this layer counts in the mixture.
    beta: Tensor,
    /// W − I of each column, `[columns, dim, dim]`.
    map: Tensor,
}

impl Layer {
    /// h̃ of h, both `[batch, columns, seq, dim]`.
    fn stitched(&self, h: &Tensor) -> Result<Tensor> {
        let kind = h.kind();
        let h = h.add(&h.matmul(&self.map.to_kind(kind)?.t()?)?)?;
        let (size, g) = (h.size(), self.subspaces);
        let &[batch, columns, seq, dim] = size.as_slice() else {
            return Err(Error::invalid("sluice", format!("columns are {size:?}")));
        };
        let parts = h.reshape(&[batch, columns, seq, g, dim / g])?.transpose(2, 3)?;
        let parts = parts.reshape(&[batch, columns * g, seq, dim / g])?;
        let mixed = mix(&self.alpha.to_kind(kind)?, &parts)?;
        mixed.reshape(&[batch, columns, g, seq, dim / g])?.transpose(2, 3)?.reshape(&size)
    }
}

impl Module for Layer {
    fn kind(&self) -> &'static str {
        "sluice"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let n = self.columns.tasks().count();
        // Behind the columns follow the mixtures of the layers before.
        let carried = self.columns.take(&x.x, 2)?;
        let h = self.columns.run(f, &carried.narrow(1, 0, n)?, x, cx)?;
        let h = self.stitched(&h)?;
        let share = h.mul(&self.beta.to_kind(h.kind())?.reshape(&[n, 1, 1])?)?;
        let mixture = match self.columns.first() {
            true => share,
            false => carried.narrow(1, n, n)?.add(&share)?,
        };
        Ok(x.replace(match self.columns.last() {
            true => self.columns.own(&mixture, cx)?,
            false => self.columns.lay(&Tensor::cat(&[h, mixture], 1)?)?,
        }))
    }

    fn penalty(&self, _: &Context) -> Result<Option<Tensor>> {
        if self.lambda == 0.0 {
            return Ok(None);
        }
        let (dim, g) = (self.map.len_of(1), self.subspaces);
        let identity = Tensor::eye(dim, self.map.kind(), self.map.device())?;
        let parts = self.map.add(&identity)?.reshape(&[-1, g, dim / g, dim])?;
        let mut sum = Tensor::zeros(&[], self.map.kind(), self.map.device())?;
        for a in 0..g {
            for b in a + 1..g {
                let both = parts.select(1, a)?.matmul(&parts.select(1, b)?.t()?)?;
                sum = sum.add(&both.square()?.sum()?)?;
            }
        }
        sum.mul_scalar(self.lambda).map(Some)
    }

    fn phi(&self) -> Tensors {
        let (alpha, beta) = (self.alpha.clone(), self.beta.clone());
        Tensors::new().with(ALPHA, alpha).with(BETA, beta).with(MAP, self.map.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Layer {
            columns: self.columns.clone(),
            subspaces: self.subspaces,
            lambda: self.lambda,
            alpha: phi.need(ALPHA)?.clone(),
            beta: phi.need(BETA)?.clone(),
            map: phi.need(MAP)?.clone(),
        }))
    }

    fn signature(&self) -> String {
        let names = self.columns.tasks().names();
        format!("sluice({names:?}, {} subspaces, {:?})", self.subspaces, self.map.size())
    }
}
