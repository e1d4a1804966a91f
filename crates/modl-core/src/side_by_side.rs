//! Independent parts of a computation side by side, forward and backward.
//!
//! The modules of one layer mostly work on few rows each: products of 64 rows, which do not fill
//! several threads, so that libtorch computes them one after the other with half of the machine
//! asleep. Here each of libtorch's threads takes the next part, largest first, and computes it alone;
//! in the backward pass likewise, each part by its own graph. Nothing is copied or padded for it, and
//! the sum of the work stays what it was.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;

use crate::{Device, Error, Result, Tensor, ffi, no_grad, threads};

/// What a branch computes from its rows.
pub type Work<'a> = Box<dyn FnOnce(Tensor) -> Result<Tensor> + Send + 'a>;

/// One part of a computation: y = f(x; φ) on some rows of x.
pub struct Branch<'a> {
    /// The number of its rows of x, which lie in one piece behind those of the branches before it.
    pub rows: i64,
    /// φ: whatever else gradients flow to.
    pub phi: Vec<Tensor>,
    /// Makes f from a φ that is this branch's own (the same values). It is called on the caller's
    /// thread, and f on any. Where φ or x has gradients, f must use no other tensor that has.
    pub f: Box<dyn FnOnce(Vec<Tensor>) -> Result<Work<'a>> + 'a>,
}

impl std::fmt::Debug for Branch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Branch").field("rows", &self.rows).field("phi", &self.phi).finish()
    }
}

/// Whether branches of so many rows are done sooner side by side than one after the other, each
/// with all threads: where none of them has much more than a thread's share of all rows.
pub fn suits_side_by_side(rows: &[i64], device: Device) -> bool {
    let (threads, total) = (i64::from(threads()), rows.iter().sum::<i64>());
    let largest = rows.iter().copied().max().unwrap_or(0);
    device == Device::Cpu && threads > 1 && 100 * largest * threads <= 115 * total
}

/// [f₁(x₁; φ₁); f₂(x₂; φ₂); …] for x = [x₁; x₂; …] along the first dimension, on the CPU. The
/// gradients of x and of each φ are those of the same computation one after the other; gradients of
/// gradients there are none.
///
/// # Errors
/// The first branch's that failed; where the branches' rows are not those of x, or what they give
/// has another number of rows or does not fit together.
pub fn side_by_side(x: &Tensor, branches: Vec<Branch>) -> Result<Tensor> {
    let rows: Vec<i64> = branches.iter().map(|b| b.rows).collect();
    let recorded = ffi::grad_enabled()
        && (x.requires_grad() || branches.iter().flat_map(|b| &b.phi).any(Tensor::requires_grad));
    let leaf = |t: Tensor, of: &Tensor| -> Result<Tensor> {
        t.set_requires_grad(recorded && of.requires_grad())?;
        Ok(t)
    };
    let (mut xs, mut params, mut owns) = (Vec::new(), Vec::new(), Vec::new());
    let mut tasks = Vec::with_capacity(branches.len());
    for (branch, part) in branches.into_iter().zip(x.detach()?.split(&rows, 0)?) {
        let part = leaf(part, x)?;
        let phi: Vec<Tensor> =
            branch.phi.iter().map(|t| leaf(t.detach()?, t)).collect::<Result<_>>()?;
        tasks.push((branch.rows, (branch.f)(phi.clone())?, part.clone()));
        xs.push(part);
        params.push(branch.phi);
        owns.push(phi);
    }
    let mut order: Vec<_> = tasks.into_iter().enumerate().collect();
    order.sort_by_key(|(_, (rows, ..))| std::cmp::Reverse(*rows));
    let mut results = on_threads(order, |(i, (_, f, x))| Ok((i, f(x))))?;
    results.sort_unstable_by_key(|(i, _)| *i);
    let mut ys = Vec::with_capacity(rows.len());
    for ((_, y), rows) in results.into_iter().zip(&rows) {
        let y = y?;
        if y.dim() == 0 || y.len_of(0) != *rows {
            let problem = format!("a branch with {rows} rows gives {y:?}");
            return Err(Error::invalid("side_by_side", problem));
        }
        ys.push(y);
    }
    let y = no_grad(|| {
        let ys: Vec<Tensor> = ys.iter().map(Tensor::detach).collect::<Result<_>>()?;
        Tensor::cat(&ys, 0)
    })?;
    if recorded {
        ffi::join(&y, x, &ffi::Joined { xs, ys, rows, params, owns })?;
    }
    Ok(y)
}

/// f of each item on libtorch's threads, each of which takes the next and computes alone, so that the
/// results have the same bits for any number of threads.
///
/// # Errors
/// The first item's that failed.
pub fn on_threads<I: Send, T: Send>(
    items: Vec<I>,
    f: impl Fn(I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let results: Vec<Mutex<Option<std::thread::Result<Result<T>>>>> =
        items.iter().map(|_| Mutex::new(None)).collect();
    // A single item would have all threads; beside another one, if an empty one, it has its own.
    ffi::on_threads(items.len().max(2), &|i| {
        if let (Some(item), Some(result)) = (items.get(i).and_then(taken), results.get(i)) {
            // A panic must not pass through C++; it goes on where this function was called.
            let y = catch_unwind(AssertUnwindSafe(|| f(item)));
            *result.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(y);
        }
    })?;
    let result = |cell: &_| match taken(cell) {
        Some(Ok(y)) => y,
        Some(Err(panic)) => resume_unwind(panic),
        None => Err(Error::invalid("on_threads", "an item was left out")),
    };
    results.iter().map(result).collect()
}

fn taken<T>(cell: &Mutex<Option<T>>) -> Option<T> {
    cell.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
}
