//! Progressive networks: a column of layers for each task, which sees what the columns of earlier tasks
//! compute.
//!
//! At layer i column k computes, with f the activation that follows the layer,
//!
//! ```text
//! hᵢ⁽ᵏ⁾ = f(Wᵢ⁽ᵏ⁾ hᵢ₋₁⁽ᵏ⁾ + bᵢ⁽ᵏ⁾ + Σ_{j<k} Uᵢ⁽ᵏʲ⁾ σ(Vᵢ⁽ᵏʲ⁾ αᵢ⁽ᵏʲ⁾ hᵢ₋₁⁽ʲ⁾))
//! ```
//!
//! and at the first layer no sum, since all columns have the same input. σ is ReLU, α a learned number for
//! each lateral connection, which starts small so that a new column is not drowned by those that are
//! trained. A column depends on earlier ones alone: while it learns nothing of them changes, and their
//! outputs stay what they were bit for bit. Parameters grow with the square of the number of tasks.
//!
//! A module takes the place of a chain of linear layers, a multilayer perceptron's. Between them the
//! columns lie one after the other where a row has its one token, `[batch, columns, dim]`; behind the last
//! layer each row goes on with the column of its own task. What a task learns is its column and its head:
//!
//! ```toml
//! [modules.progressive]
//! type = "progressive"
//! tasks = ["first", "second"]
//! targets = ["linear"]
//!
//! [[phases]]
//! strategy = "naive"      # one task after the other; nothing more is to be done against forgetting
//! train = ["modules.progressive.*.{task}.*", "heads.*.{task}.*"]
//! ```
//!
//! Rusu et al. 2016, *Progressive Neural Networks*, arXiv 1606.04671, where one V reads all earlier columns
//! at once. Survey §3.3, function composition.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, SiteKind,
    Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tasks::Tasks;

/// Configuration of a progressive network at a chain of linear sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Progressive {
    /// The tasks in the order in which they are learned, a column each.
    pub tasks: Vec<String>,
    /// The task of all rows where a pass names none; default: such a pass is an error.
    pub default_task: Option<String>,
    /// The width of a lateral connection, the rows of V; default 32.
    pub width: i64,
    /// The largest |α| at the start, at least 0; default 0.1.
    pub alpha: f64,
}

impl Default for Progressive {
    fn default() -> Self {
        Progressive { tasks: Vec::new(), default_task: None, width: 32, alpha: 0.1 }
    }
}

impl ModuleConfig for Progressive {
    fn kind(&self) -> &'static str {
        "progressive"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let tasks = Tasks::new("progressive", &self.tasks, 1, self.default_task.as_deref())?;
        let (site, sites) = (at.site, at.sites);
        // In patterns of names a task's is to be its own.
        if let Some(name) =
            site.path.split('.').find(|part| tasks.names().iter().any(|t| t == part))
        {
            let problem = format!("`{name}` is a part of the name of the site `{}`", site.path);
            return Err(Error::invalid("progressive.tasks", problem));
        }
        if self.width < 1 || !(self.alpha.is_finite() && self.alpha >= 0.0) {
            let problem = format!("are {} and {}, want at least 1 and 0", self.width, self.alpha);
            return Err(Error::invalid("progressive.width and alpha", problem));
        }
        let chain = sites.windows(2).all(|w| matches!(w, [a, b] if a.output == b.input));
        if !chain || sites.iter().any(|s| s.kind != SiteKind::Linear) {
            let paths: Vec<&str> = sites.iter().map(|s| s.path.as_str()).collect();
            return Err(Error::unsupported(
                format!("a progressive network at {paths:?}"),
                "take all linear layers of a multilayer perceptron, each of which reads the one before",
            ));
        }
        let first = sites.first().is_some_and(|s| s.path == site.path);
        let last = sites.last().is_some_and(|s| s.path == site.path);
        let bias = at.theta.get("bias").is_some();
        let column = |(k, task): (usize, &String)| {
            let laterals = if first { 0 } else { k as i64 };
            self.column(laterals, bias, [site.input, site.output], &mut scope.sub(task))
        };
        let columns = tasks.names().iter().enumerate().map(column).collect::<Result<_>>()?;
        Ok(Box::new(Layer { tasks, first, last, columns }))
    }
}

impl Progressive {
    fn column(
        &self,
        laterals: i64,
        bias: bool,
        [input, output]: [i64; 2],
        scope: &mut Scope,
    ) -> Result<Column> {
        let start = Init::Uniform(1.0 / (input as f64).sqrt());
        let weight = scope.param(WEIGHT, &[output, input], Init::Kaiming)?;
        let bias = bias.then(|| scope.param(BIAS, &[output], start)).transpose()?;
        let lateral = match laterals {
            0 => None,
            n => Some(Lateral {
                alpha: scope.param(ALPHA, &[n], Init::Uniform(self.alpha))?,
                down: scope.param(DOWN, &[n, self.width, input], start)?,
                up: scope.param(
                    UP,
                    &[n, output, self.width],
                    Init::Uniform(1.0 / (self.width as f64).sqrt()),
                )?,
            }),
        };
        Ok(Column { weight, bias, lateral })
    }
}

const WEIGHT: &str = "weight";
const BIAS: &str = "bias";
const ALPHA: &str = "alpha";
const DOWN: &str = "down";
const UP: &str = "up";

/// All columns at one layer.
#[derive(Debug)]
struct Layer {
    tasks: Tasks,
    first: bool,
    last: bool,
    columns: Vec<Column>,
}

/// One column at one layer.
#[derive(Debug)]
struct Column {
    /// W, `[out, in]`.
    weight: Tensor,
    bias: Option<Tensor>,
    lateral: Option<Lateral>,
}

/// The connections from all n earlier columns.
#[derive(Debug)]
struct Lateral {
    /// `[n]`
    alpha: Tensor,
    /// V, `[n, width, in]`.
    down: Tensor,
    /// U, `[n, out, width]`.
    up: Tensor,
}

impl Lateral {
    /// Σⱼ Uⱼ σ(Vⱼ αⱼ hⱼ) of h `[n, batch, in]`: `[batch, out]`.
    fn of(&self, h: &Tensor) -> Result<Tensor> {
        let kind = h.kind();
        let scaled = h.mul(&self.alpha.to_kind(kind)?.reshape(&[-1, 1, 1])?)?;
        let inner = scaled.matmul(&self.down.to_kind(kind)?.t()?)?.relu()?;
        inner.matmul(&self.up.to_kind(kind)?.t()?)?.sum_dims(&[0], false)
    }
}

impl Layer {
    /// What each of the first `count` columns reads, `[batch, in]`.
    fn take(&self, x: &Tensor, count: i64) -> Result<Vec<Tensor>> {
        let there = if self.first { 1 } else { count };
        if x.dim() != 3 || x.len_of(1) != there {
            let size = x.size();
            let problem = format!("is {size:?}, wants [batch, {there}, dim]: rows of one token");
            return Err(Error::invalid("the input of a progressive network", problem));
        }
        (0..count).map(|k| x.select(1, if self.first { 0 } else { k })).collect()
    }
}

impl Module for Layer {
    fn kind(&self) -> &'static str {
        "progressive"
    }

    fn forward(&self, _: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let rows = x.rows();
        let tasks = self.tasks.of_rows(rows, cx)?;
        // Nobody needs what comes after the last task of the batch.
        let count = tasks.iter().max().map_or(0, |k| k + 1);
        let h = self.take(&x.x, count)?;
        let mut all = Vec::with_capacity(h.len());
        for (k, (column, own)) in self.columns.iter().zip(&h).enumerate() {
            let kind = own.kind();
            let bias = column.bias.as_ref().map(|b| b.to_kind(kind)).transpose()?;
            let y = own.linear(&column.weight.to_kind(kind)?, bias.as_ref())?;
            all.push(match (&column.lateral, h.get(..k)) {
                (Some(lateral), Some(earlier)) => {
                    y.add(&lateral.of(&Tensor::stack(earlier, 0)?)?)?
                }
                _ => y,
            });
        }
        let all = Tensor::stack(&all, 1)?; // [batch, columns, out]
        if !self.last {
            return Ok(x.replace(all));
        }
        let at: Vec<i64> = (0..).zip(tasks).map(|(row, k): (i64, _)| row * count + k).collect();
        let at = Tensor::from_slice(&at, &[rows], all.device())?;
        let flat = all.reshape(&[rows * count, all.len_of(2)])?;
        Ok(x.replace(flat.index_select(0, &at)?.unsqueeze(1)?))
    }

    fn phi(&self) -> Tensors {
        let mut phi = Tensors::new();
        for (task, column) in self.tasks.names().iter().zip(&self.columns) {
            let mut set = |name: &str, t: &Tensor| phi.set(format!("{task}.{name}"), t.clone());
            set(WEIGHT, &column.weight);
            if let Some(bias) = &column.bias {
                set(BIAS, bias);
            }
            if let Some(Lateral { alpha, down, up }) = &column.lateral {
                set(ALPHA, alpha);
                set(DOWN, down);
                set(UP, up);
            }
        }
        phi
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let column = |(task, column): (&String, &Column)| {
            let get = |name: &str| phi.need(&format!("{task}.{name}")).cloned();
            let lateral = |_: &Lateral| -> Result<Lateral> {
                Ok(Lateral { alpha: get(ALPHA)?, down: get(DOWN)?, up: get(UP)? })
            };
            Ok(Column {
                weight: get(WEIGHT)?,
                bias: column.bias.as_ref().map(|_| get(BIAS)).transpose()?,
                lateral: column.lateral.as_ref().map(lateral).transpose()?,
            })
        };
        let columns = self.tasks.names().iter().zip(&self.columns).map(column);
        Ok(Box::new(Layer {
            tasks: self.tasks.clone(),
            first: self.first,
            last: self.last,
            columns: columns.collect::<Result<_>>()?,
        }))
    }

    fn signature(&self) -> String {
        let shapes = self.phi();
        let shapes: Vec<String> =
            shapes.iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
        format!("progressive({:?}, {})", self.tasks.names(), shapes.join(", "))
    }
}
