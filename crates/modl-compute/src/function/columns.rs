//! Columns: a copy of the network for each task, side by side, that exchange what they compute.
//!
//! A module at a run of blocks sees f_θ as a function that takes any rows. It gives each block the
//! rows of all columns in one batch, in a context in which a row's task is its column's: modules
//! within the block that are routed by task are what the copies differ in, f_{θ⊕φ_t}. Between
//! blocks the columns are laid one after the other along the sequence, `[batch, columns · seq,
//! dim]`, so that the batch keeps its rows; behind the last block each row goes on with the column
//! of its own task.

use modl_core::{Attachment, Context, Error, Host, Result, Signal, SiteKind, Tensor};

use super::tasks::Tasks;

/// The columns at one block.
#[derive(Debug, Clone)]
pub(super) struct Columns {
    tasks: Tasks,
    first: bool,
    last: bool,
}

impl Columns {
    /// `method` is for errors.
    ///
    /// # Errors
    /// Where the site is not a block, or blocks are left out between those that a module takes.
    pub(super) fn new(method: &str, tasks: Tasks, at: &Attachment) -> Result<Self> {
        let site = at.site;
        let place = |path: &str| {
            let (stack, number) = path.rsplit_once('.')?;
            Some((stack.to_owned(), number.parse::<i64>().ok()?))
        };
        let (Some((stack, number)), SiteKind::Block) = (place(&site.path), site.kind) else {
            return Err(Error::unsupported(
                format!("{method} at a site of kind {:?}", site.kind),
                "attach it to a run of layers, `all-block`",
            ));
        };
        // An encoder and a decoder are stacks of their own.
        let own = at.sites.iter().filter_map(|s| place(&s.path)).filter(|(s, _)| *s == stack);
        let numbers: Vec<i64> = own.map(|(_, n)| n).collect();
        if numbers.windows(2).any(|w| w[0] + 1 != w[1]) {
            return Err(Error::unsupported(
                format!("{method} at the layers {numbers:?} of `{stack}`"),
                "columns run through every layer between; take all of them",
            ));
        }
        let (first, last) = (numbers.first() == Some(&number), numbers.last() == Some(&number));
        Ok(Columns { tasks, first, last })
    }

    pub(super) fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Whether no block comes before in the run.
    pub(super) fn first(&self) -> bool {
        self.first
    }

    /// Whether no block follows in the run.
    pub(super) fn last(&self) -> bool {
        self.last
    }

    /// What comes in as `[batch, parts · columns, seq, dim]`: at the first block x once for each
    /// column, at later ones what [`Columns::lay`] made of `parts` times the columns.
    pub(super) fn take(&self, x: &Tensor, parts: i64) -> Result<Tensor> {
        let columns = self.tasks.count();
        let &[batch, len, dim] = x.size().as_slice() else {
            let problem = format!("is {:?}, wants [batch, seq, dim]", x.size());
            return Err(Error::invalid("the input of a block with columns", problem));
        };
        if self.first {
            return x.unsqueeze(1)?.expand(&[batch, columns, len, dim]);
        }
        let n = parts * columns;
        if len % n != 0 {
            let problem = format!(
                "is {len} long, not {n} times a sequence; rows with columns and rows without \
                 cannot be in one batch"
            );
            return Err(Error::invalid("the input of a block with columns", problem));
        }
        x.reshape(&[batch, n, len / n, dim])
    }

    /// f of every column: h `[batch, columns, seq, dim]` → the same shape.
    pub(super) fn run(&self, f: &Host, h: &Tensor, x: &Signal, cx: &Context) -> Result<Tensor> {
        if cx.cache().is_some() {
            return Err(Error::unsupported(
                "columns with a cache of seen tokens",
                "generate without one",
            ));
        }
        let (rows, columns) = (x.rows(), self.tasks.count());
        let index: Vec<i64> = (0..rows * columns).map(|r| r / columns).collect();
        let at = Tensor::from_slice(&index, &[rows * columns], h.device())?;
        let names = self.tasks.names().iter().cycle().take(index.len());
        let cx = cx.select_rows(&index)?.with_tasks(names);
        let size = h.size();
        let flat: Vec<i64> =
            [rows * columns].into_iter().chain(size.iter().skip(2).copied()).collect();
        let with = x.with.map(|_, t| t.index_select(0, &at))?;
        f.call(&Signal { x: h.reshape(&flat)?, with }, &cx)?.x.reshape(&size)
    }

    /// `[batch, n, seq, dim]` as `[batch, n · seq, dim]`, for the next block.
    pub(super) fn lay(&self, h: &Tensor) -> Result<Tensor> {
        h.reshape(&[h.len_of(0), -1, h.len_of(3)])
    }

    /// Each row's own column of h `[batch, columns, seq, dim]`: `[batch, seq, dim]`.
    pub(super) fn own(&self, h: &Tensor, cx: &Context) -> Result<Tensor> {
        let (rows, columns) = (h.len_of(0), self.tasks.count());
        let tasks = self.tasks.of_rows(rows, cx)?;
        let at: Vec<i64> = (0..).zip(tasks).map(|(row, t): (i64, _)| row * columns + t).collect();
        let at = Tensor::from_slice(&at, &[rows], h.device())?;
        h.reshape(&[rows * columns, h.len_of(2), h.len_of(3)])?.index_select(0, &at)
    }
}

/// A matrix `[n, n]` with `same` on the diagonal, whose rows sum to 1 over the entries that
/// `mixes(i, j)` takes: the start of α.
pub(super) fn stitch(
    n: i64,
    same: f64,
    mixes: impl Fn(i64, i64) -> bool,
    scope: &modl_core::Scope,
) -> Result<Tensor> {
    let mut values = Vec::with_capacity((n * n) as usize);
    for i in 0..n {
        let others = (0..n).filter(|j| *j != i && mixes(i, *j)).count();
        for j in 0..n {
            values.push(match (i == j, mixes(i, j)) {
                (true, _) => same,
                (_, true) => (1.0 - same) / others as f64,
                _ => 0.0,
            });
        }
    }
    Tensor::from_slice(&values, &[n, n], scope.device())
}
