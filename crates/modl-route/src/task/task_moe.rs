//! Task-level mixture of experts: the experts of a row are chosen by its task, not by its tokens.
//!
//! ℓ = W eₜ with a learned embedding eₜ of the task and W `[m, width]`; p = softmax(ℓ), K = the k
//! largest; αⱼ = pⱼ ⁄ Σ_K p where `renormalise`, else αⱼ = pⱼ. Kudugunta, Huang, Bapna, Krikun, Lepikhin,
//! Luong, Firat 2021, arXiv 2110.03742; survey §4.2.3. By `label = "language"` it routes by the target
//! language, as the paper does in the decoder.
//!
//! All rows of a task use the same few modules, which can be taken out and used without the others:
//! [`SubNetwork`](super::SubNetwork).
//!
//! In training there is the loss `balance` = m · Σⱼ fⱼ Pⱼ over the rows of the batch (Switch: Fedus,
//! Zoph, Shazeer 2022, arXiv 2101.03961, eq. 4), which counts 0.01 unless a recipe says otherwise. Equal ℓ, which embeddings that are drawn do not give,
//! are ranked by the places of their modules.
//!
//! ```toml
//! router = { type = "task_moe", tasks = ["de", "fr", "sw"], label = "language", k = 2 }
//! ```

use modl_core::{
    Bank, Context, Error, Init, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::labels::{TaskLabels, look_up};
use crate::losses::balance;

/// The k most probable modules of each task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskMoe {
    /// The tasks.
    #[serde(flatten)]
    pub labels: TaskLabels,
    /// How many modules a task has. Default: 1.
    pub k: usize,
    /// Whether the weights of a task's modules are made to sum to 1. Default: where k > 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renormalise: Option<bool>,
    /// The width of the embeddings. Default: 16.
    pub width: i64,
    /// Standard deviation of the normal numbers with which eₜ and W start, above 0. Default: 0.3.
    pub init_std: f64,
}

impl Default for TaskMoe {
    fn default() -> Self {
        let labels = TaskLabels::default();
        TaskMoe { labels, k: 1, renormalise: None, width: 16, init_std: 0.3 }
    }
}

impl RouterConfig for TaskMoe {
    fn kind(&self) -> &'static str {
        "task_moe"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, _: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let wrong =
            |key: &str, problem: String| Err(Error::invalid(format!("task_moe.{key}"), problem));
        let tasks = self.labels.check("task_moe")?;
        if self.k == 0 || self.k > bank.len() {
            let problem = format!("is {}, there are {} modules to choose from", self.k, bank.len());
            return wrong("k", problem);
        }
        if self.width < 1 {
            return wrong("width", "is to be 1 or more".into());
        }
        if !(self.init_std > 0.0 && self.init_std.is_finite()) {
            return wrong("init_std", "is to be above 0: with 0 no task would ever choose".into());
        }
        let init = Init::Normal(self.init_std);
        let embedding = scope.param("embedding", &[tasks, self.width], init)?;
        let weight = scope.param("weight", &[bank.len() as i64, self.width], init)?;
        Ok(Box::new(TaskMoeRouter { config: self.clone(), embedding, weight }))
    }
}

#[derive(Debug, Clone)]
struct TaskMoeRouter {
    config: TaskMoe,
    /// e, `[tasks, width]`.
    embedding: Tensor,
    /// W, `[modules, width]`.
    weight: Tensor,
}

impl Router for TaskMoeRouter {
    fn kind(&self) -> &'static str {
        "task_moe"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("balance", 0.01)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let tasks = self.config.labels.of_rows(x.rows(), cx)?;
        // Scores of all tasks first: a task has the same ones, to the last bit, in every batch.
        let logits = self.embedding.linear(&self.weight, None)?; // [tasks, modules]
        logits.check_finite("scores of a `task_moe` router")?;
        let p = logits.softmax(-1)?;
        let order = Tensor::op("sort", &[&logits.detach()?], |t| {
            t[0].f_sort_stable(true, -1, true).map(|(_, index)| index)
        })?;
        let index = order.narrow(-1, 0, self.config.k as i64)?;
        let kept = p.gather(-1, &index)?; // [tasks, k]
        let normalised = self.config.renormalise.unwrap_or(self.config.k > 1);
        let weight = match normalised {
            true => kept.div(&kept.sum_dims(&[-1], true)?)?,
            false => kept,
        };
        let (index, weight) = (look_up(&index, &tasks)?, look_up(&weight, &tasks)?);
        let weights = Weights::Sparse { index: index.clone(), weight };
        let mut routing = Routing::new(weights, bank.len());
        if cx.train {
            let loss = balance(&look_up(&p, &tasks)?, &index, None)?;
            routing = routing.with_loss("balance", loss);
        }
        Ok(if normalised { routing.normalised() } else { routing })
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let mut grown = self.clone();
        let [old, width] = self.weight.size()[..] else { return Ok(Box::new(grown)) };
        let (kind, device) = (self.weight.kind(), self.weight.device());
        let (shape, seed) = ([modules as i64 - old, width], scope.seed().nth(modules as u64));
        let new = Init::Normal(self.config.init_std).tensor(&shape, seed, kind, device)?;
        grown.weight = scope.replace("weight", &Tensor::cat(&[self.weight.detach()?, new], 0)?)?;
        Ok(Box::new(grown))
    }
}
