//! Cross-stitch units: networks of several tasks that mix their activations behind each layer.
//!
//! x̃_t = Σ_s α_ts x_s over the columns s of all tasks, one α for a layer, or one for each of its
//! channels. The columns are copies of the frozen network that differ in the modules within its
//! layers: attach one module for each task there, and route by task. α = I are independent
//! networks; equal α for all pairs is one network.
//!
//! ```toml
//! # Modules `a` and `b` at query and value, `stitch` at all-block.
//! [router]
//! type = "fixed"
//! skip_absent = true
//! table = { a = { a = 1.0, stitch = 1.0 }, b = { b = 1.0, stitch = 1.0 } }
//! ```
//!
//! α hardly moves at the learning rate of a network: Misra et al. train it 10² to 10³ times faster,
//! in a phase `lr_scale = { "modules.stitch.*.alpha" = 100.0 }`.
//!
//! Misra, Shrivastava, Gupta and Hebert 2016, *Cross-stitch Networks for Multi-task Learning*,
//! arXiv 1604.03539 (start 0.9 and 0.1). Survey §3.3, function composition.

use modl_core::{
    Attachment, Context, Error, Host, Module, ModuleConfig, Result, Scope, Signal, Targets, Tensor,
    Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::columns::{Columns, stitch};
use super::tasks::Tasks;

const ALPHA: &str = "alpha";

/// Configuration of cross-stitch units at a run of `block` sites, behind each of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CrossStitch {
    /// The tasks, whose columns they are; two at least. A row goes on with its task's.
    pub tasks: Vec<String>,
    /// The task of all rows where a pass names none; default: such a pass is an error.
    pub default_task: Option<String>,
    /// α_tt at the start; default 0.9. All other α of a row are equal, and the row sums to 1.
    pub same: f64,
    /// Whether each channel has an α of its own; default false.
    pub per_channel: bool,
}

impl Default for CrossStitch {
    fn default() -> Self {
        CrossStitch { tasks: Vec::new(), default_task: None, same: 0.9, per_channel: false }
    }
}

impl ModuleConfig for CrossStitch {
    fn kind(&self) -> &'static str {
        "cross_stitch"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-block")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let tasks = Tasks::new("cross_stitch", &self.tasks, 2, self.default_task.as_deref())?;
        let columns = Columns::new("cross-stitch units", tasks, at)?;
        if !self.same.is_finite() {
            let problem = format!("is {}, wants a number", self.same);
            return Err(Error::invalid("cross_stitch.same", problem));
        }
        let n = columns.tasks().count();
        let alpha = stitch(n, self.same, |_, _| true, scope)?;
        let alpha = match self.per_channel {
            true => alpha.unsqueeze(-1)?.expand(&[n, n, at.site.output])?,
            false => alpha,
        };
        Ok(Box::new(Unit { columns, alpha: scope.param_from(ALPHA, &alpha)? }))
    }
}

/// The unit behind one layer.
#[derive(Debug)]
struct Unit {
    columns: Columns,
    /// `[columns, columns]`, or `[columns, columns, dim]`.
    alpha: Tensor,
}

impl Module for Unit {
    fn kind(&self) -> &'static str {
        "cross_stitch"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let h = self.columns.run(f, &self.columns.take(&x.x, 1)?, x, cx)?;
        let mixed = mix(&self.alpha.to_kind(h.kind())?, &h)?;
        Ok(x.replace(match self.columns.last() {
            true => self.columns.own(&mixed, cx)?,
            false => self.columns.lay(&mixed)?,
        }))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(ALPHA, self.alpha.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let alpha = phi.need(ALPHA)?.clone();
        Ok(Box::new(Unit { columns: self.columns.clone(), alpha }))
    }

    fn signature(&self) -> String {
        format!("cross_stitch({:?}, {:?})", self.columns.tasks().names(), self.alpha.size())
    }
}

/// Σ_s α_ts h_s of h `[batch, columns, seq, dim]`.
pub(super) fn mix(alpha: &Tensor, h: &Tensor) -> Result<Tensor> {
    let size = h.size();
    if alpha.dim() == 2 {
        let flat = h.reshape(&[h.len_of(0), h.len_of(1), -1])?;
        // For a matrix that is the same for all rows libtorch chooses another way, with other last
        // bits, where it is trainable; so it is laid out for each row.
        let alpha = alpha.unsqueeze(0)?.expand(&[h.len_of(0), -1, -1])?;
        return alpha.matmul(&flat)?.reshape(&size);
    }
    let mut sum: Option<Tensor> = None;
    for s in 0..h.len_of(1) {
        // [columns, 1, dim] · [batch, 1, seq, dim]
        let weight = alpha.select(1, s)?.unsqueeze(1)?;
        let term = h.narrow(1, s, 1)?.mul(&weight)?;
        sum = Some(match sum {
            Some(sum) => sum.add(&term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| Error::invalid("cross_stitch", "has no columns"))
}
