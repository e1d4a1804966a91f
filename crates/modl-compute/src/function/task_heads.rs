//! Hard parameter sharing: one trunk for all tasks, and a head for each.
//!
//! y = W_t f_θ(x) + b_t for a row of task t: the head of its task behind a site that all tasks
//! share, most often the last one. It is the control for every claim about sharing less: with
//! everything below shared, whatever else is attached there, and nothing shared above.
//!
//! The opposite control, networks of their own, needs no method of its own: attach
//! [`Full`](crate::Full) once for each task at all sites and route by task.
//!
//! Caruana 1997, *Multitask Learning*; Ruder 2017, *An Overview of Multi-Task Learning in Deep
//! Neural Networks*, arXiv 1706.05098. Survey §3.3, function composition.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, SiteKind,
    Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tasks::Tasks;

const WEIGHT: &str = "weight";
const BIAS: &str = "bias";

/// Configuration of task heads at `linear`, `norm`, `sublayer` or `block` sites. The task of each
/// row is in the context.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskHeads {
    /// The tasks; one at least.
    pub tasks: Vec<String>,
    /// The task of all rows where a pass names none; default: such a pass is an error.
    pub default_task: Option<String>,
    /// The width of the heads' output. Default: that of the site, and then heads start as the
    /// identity; else W starts uniform in ±1⁄√width and b at 0.
    pub outputs: Option<i64>,
}

impl ModuleConfig for TaskHeads {
    fn kind(&self) -> &'static str {
        "task_heads"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    /// A head of the network, where it has one.
    fn usual_targets(&self) -> Targets {
        Targets::pattern(r"(.*\.)?(classifier|score|head|pooler\.dense)")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        use SiteKind::{Block, Linear, Norm, Sublayer};
        let site = at.site;
        if !matches!(site.kind, Linear | Norm | Sublayer | Block) {
            return Err(Error::unsupported(
                format!("task heads at a site of kind {:?}", site.kind),
                "attach them where vectors come out: a linear site, a norm or a block",
            ));
        }
        let tasks = Tasks::new("task_heads", &self.tasks, 1, self.default_task.as_deref())?;
        let (width, outputs) = (site.output, self.outputs.unwrap_or(site.output));
        if outputs < 1 {
            let problem = format!("is {outputs}, wants at least 1");
            return Err(Error::invalid("task_heads.outputs", problem));
        }
        let mut phi = Tensors::new();
        for task in tasks.names() {
            let mut head = scope.sub(task);
            let weight = match self.outputs {
                Some(_) => head.param(WEIGHT, &[outputs, width], Init::Kaiming)?,
                None => {
                    head.param_from(WEIGHT, &Tensor::eye(width, head.kind(), head.device())?)?
                }
            };
            phi.set(format!("{task}.{WEIGHT}"), weight);
            phi.set(format!("{task}.{BIAS}"), head.param(BIAS, &[outputs], Init::Zeros)?);
        }
        Ok(Box::new(Heads { tasks, phi }))
    }
}

/// The heads at one site: `TASK.weight` `[outputs, width]` and `TASK.bias` `[outputs]`. A head that
/// no row of a batch uses has no gradient.
#[derive(Debug)]
struct Heads {
    tasks: Tasks,
    phi: Tensors,
}

impl Module for Heads {
    fn kind(&self) -> &'static str {
        "task_heads"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let h = f.call(x, cx)?;
        let (kind, device) = (h.x.kind(), h.x.device());
        let tasks = self.tasks.of_rows(h.rows(), cx)?;
        let mut parts = Vec::new();
        for (t, task) in (0..).zip(self.tasks.names()) {
            let own: Vec<i64> =
                (0..).zip(&tasks).filter(|(_, of)| **of == t).map(|(row, _)| row).collect();
            if own.is_empty() {
                continue;
            }
            let phi = |name: &str| self.phi.need(&format!("{task}.{name}"))?.to_kind(kind);
            let rows =
                h.x.index_select(0, &Tensor::from_slice(&own, &[own.len() as i64], device)?)?;
            let y = rows.linear(&phi(WEIGHT)?, Some(&phi(BIAS)?))?;
            parts.push((own, Signal::from(y)));
        }
        if parts.is_empty() {
            return Ok(h); // No rows.
        }
        Ok(h.replace(Signal::join(&parts, h.rows())?.x))
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        Ok(Box::new(Heads { tasks: self.tasks.clone(), phi }))
    }
}
