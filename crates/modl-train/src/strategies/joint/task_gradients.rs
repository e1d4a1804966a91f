//! The gradients of several tasks' losses, and what is made of them.
//!
//! Parameters for which two or more tasks have a gradient are shared: these the methods balance.
//! The others are one task's own and do not enter any product.
//!
//! Shared gradients are kept as matrices `[T, m]` with a row for each task, some parameters side by
//! side: the Gram matrix is a product of each with itself, and any combination Σ cᵢ gᵢ is one pass
//! over them, whatever the number of tasks.

use modl_core::{Error, Kind, Result, Tensor, no_grad};

use super::Gram;

/// Numbers of each task that stand in one matrix. A larger parameter has one of its own.
const BLOCK: usize = 1 << 20;

/// Numbers whose products are added up in the gradients' own kind, before it goes on in f64.
const PIECE: i64 = 1 << 12;

/// Some shared parameters' gradients.
#[derive(Debug)]
struct Block {
    /// Which parameters.
    params: Vec<usize>,
    /// Their shapes.
    shapes: Vec<Vec<i64>>,
    /// `[T, m]`.
    rows: Tensor,
}

/// The gradients of T tasks for the same parameters.
#[derive(Debug)]
pub struct TaskGradients {
    tasks: usize,
    params: usize,
    blocks: Vec<Block>,
    /// Parameter, task and gradient.
    private: Vec<(usize, usize, Tensor)>,
}

impl TaskGradients {
    /// Of `grads[task][parameter]`, `None` where a task does not use a parameter.
    ///
    /// # Errors
    /// Where tasks differ in the number of parameters, or in a parameter's shape, kind or device.
    pub fn new(grads: Vec<Vec<Option<Tensor>>>) -> Result<Self> {
        let tasks = grads.len();
        let params = grads.first().map_or(0, Vec::len);
        if grads.iter().any(|own| own.len() != params) {
            let problem = format!("not all of the {tasks} tasks have {params} of them");
            return Err(Error::invalid("gradients of tasks", problem));
        }
        let mut by_param: Vec<Vec<Option<Tensor>>> = (0..params).map(|_| Vec::new()).collect();
        for own in grads {
            by_param.iter_mut().zip(own).for_each(|(all, grad)| all.push(grad));
        }
        let mut made = TaskGradients { tasks, params, blocks: Vec::new(), private: Vec::new() };
        let mut waiting: Vec<(usize, Vec<Tensor>)> = Vec::new();
        for (param, grads) in by_param.into_iter().enumerate() {
            let present = grads.iter().flatten().count();
            if present < 2 {
                let own = grads.into_iter().enumerate();
                made.private.extend(own.filter_map(|(task, g)| Some((param, task, g?))));
                continue;
            }
            let grads = whole(param, grads)?;
            let fits = waiting.first().is_none_or(|(_, first)| same(first, &grads));
            let numbers =
                waiting.iter().chain([&(param, grads.clone())]).map(numbers).sum::<usize>();
            if !fits || numbers > BLOCK {
                made.pack(std::mem::take(&mut waiting))?;
            }
            waiting.push((param, grads));
        }
        made.pack(waiting)?;
        Ok(made)
    }

    /// Puts some parameters' gradients side by side.
    fn pack(&mut self, all: Vec<(usize, Vec<Tensor>)>) -> Result<()> {
        if all.is_empty() {
            return Ok(());
        }
        let rows = no_grad(|| {
            let of_task = |task: usize| all.iter().filter_map(move |(_, g)| g.get(task));
            let parts = (0..self.tasks).flat_map(of_task).map(|g| g.reshape(&[-1]));
            let parts: Vec<Tensor> = parts.collect::<Result<_>>()?;
            Tensor::cat(&parts, 0)?.reshape(&[self.tasks as i64, -1])
        })?;
        let shape = |(_, g): &(usize, Vec<Tensor>)| g.first().map(Tensor::size).unwrap_or_default();
        let shapes = all.iter().map(shape).collect();
        let params = all.into_iter().map(|(param, _)| param).collect();
        self.blocks.push(Block { params, shapes, rows });
        Ok(())
    }

    /// T.
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    /// How many parameters two or more tasks have a gradient for.
    pub fn shared(&self) -> usize {
        self.blocks.iter().map(|b| b.params.len()).sum()
    }

    /// The products of the tasks' gradients for the shared parameters.
    ///
    /// # Errors
    /// Where one is not finite.
    pub fn gram(&self) -> Result<Gram> {
        let mut sums = vec![vec![0.0; self.tasks]; self.tasks];
        for block in &self.blocks {
            let own = no_grad(|| products(&block.rows))?.to_vec::<f64>()?;
            for (row, own) in sums.iter_mut().zip(own.chunks(self.tasks.max(1))) {
                row.iter_mut().zip(own).for_each(|(sum, v)| *sum += v);
            }
        }
        Gram::new(&sums)
    }

    /// Σᵢ cᵢ gᵢ for each parameter, with the factors `shared` for the shared ones and `private` for
    /// the others; `None` for parameters that no task uses. With equal factors c it is c · (g₁ + g₂ +
    /// …), added up in the order of tasks.
    ///
    /// # Errors
    /// Where there is not a factor for each task.
    pub fn combine(&self, shared: &[f64], private: &[f64]) -> Result<Vec<Option<Tensor>>> {
        if shared.len() != self.tasks || private.len() != self.tasks {
            let problem = format!("{} and {}, wanted {}", shared.len(), private.len(), self.tasks);
            return Err(Error::invalid("factors of the tasks' gradients", problem));
        }
        let mut combined: Vec<Option<Tensor>> = vec![None; self.params];
        no_grad(|| {
            for block in &self.blocks {
                let sum = combination(&block.rows, shared)?;
                let lengths: Vec<i64> = block.shapes.iter().map(|s| s.iter().product()).collect();
                let parts = sum.split(&lengths, 0)?.into_iter();
                for ((param, shape), part) in block.params.iter().zip(&block.shapes).zip(parts) {
                    if let Some(slot) = combined.get_mut(*param) {
                        *slot = Some(part.reshape(shape)?);
                    }
                }
            }
            for (param, task, grad) in &self.private {
                let factor = private.get(*task).copied().unwrap_or(1.0);
                if let Some(slot) = combined.get_mut(*param) {
                    *slot =
                        Some(if factor == 1.0 { grad.clone() } else { grad.mul_scalar(factor)? });
                }
            }
            Ok(combined)
        })
    }
}

/// All products of rows `[T, m]`, `[T, T]` f64. f32 adds up at most [`PIECE`] numbers.
fn products(rows: &Tensor) -> Result<Tensor> {
    let (tasks, m) = (rows.len_of(0), rows.len_of(1));
    let pieces = m / PIECE;
    let even = rows.narrow(1, 0, pieces * PIECE)?.reshape(&[tasks, pieces, PIECE])?;
    let even = even.transpose(0, 1)?; // [pieces, T, PIECE]
    let rest = rows.narrow(1, pieces * PIECE, m - pieces * PIECE)?;
    let even = even.bmm(&even.t()?)?.to_kind(Kind::Double)?.sum_dims(&[0], false)?;
    even.add(&rest.matmul(&rest.t()?)?.to_kind(Kind::Double)?)
}

/// Σᵢ cᵢ · rowᵢ.
fn combination(rows: &Tensor, factors: &[f64]) -> Result<Tensor> {
    let Some(first) = factors.first() else { return rows.reshape(&[-1]) };
    if factors.iter().all(|c| c == first) {
        let mut sum = rows.select(0, 0)?.copy()?;
        for row in 1..rows.len_of(0) {
            sum.add_in_place(&rows.select(0, row)?)?;
        }
        return if *first == 1.0 { Ok(sum) } else { sum.mul_scalar(*first) };
    }
    let factors = Tensor::from_slice(factors, &[1, factors.len() as i64], rows.device())?;
    factors.to_kind(rows.kind())?.matmul(rows)?.squeeze(0)
}

/// A shared parameter's gradients, with zeros for tasks that do not use it.
fn whole(param: usize, grads: Vec<Option<Tensor>>) -> Result<Vec<Tensor>> {
    let Some(like) = grads.iter().flatten().next().cloned() else { return Ok(Vec::new()) };
    let fits = |g: &Tensor| {
        g.size() == like.size() && g.kind() == like.kind() && g.device() == like.device()
    };
    if let Some(other) = grads.iter().flatten().find(|g| !fits(g)) {
        let problem = format!("are {like:?} of one task and {other:?} of another");
        return Err(Error::invalid(format!("gradients of parameter {param}"), problem));
    }
    if !matches!(like.kind(), Kind::Float | Kind::Double) {
        let problem = format!("are {like:?}, wanted are f32 or f64");
        return Err(Error::invalid(format!("gradients of parameter {param}"), problem));
    }
    grads.into_iter().map(|g| g.map_or_else(|| like.zeros_like(), Ok)).collect()
}

/// Whether two parameters' gradients can stand in one matrix.
fn same(a: &[Tensor], b: &[Tensor]) -> bool {
    let place = |all: &[Tensor]| all.first().map(|t| (t.kind(), t.device()));
    place(a) == place(b)
}

fn numbers((_, grads): &(usize, Vec<Tensor>)) -> usize {
    grads.first().map_or(0, Tensor::numel)
}
