//! Low-rank modules where each token has few of many, without a copy of a token.
//!
//! What libtorch has for it is a gather, two batched products and a scatter, which move each token
//! twice for each of its modules and multiply matrices with 8 columns at a tenth of the machine's
//! speed. Here the products read tokens where they lie and add to y where it lies, and the backward
//! pass is one of its own: thin products again, for x, α, A and B. What goes to tokens is made by one
//! thread for each part of them, as in libtorch's operations before and after. Each gradient of a
//! module is made by one thread in the order of its tokens. Results do not depend on the number of
//! threads.
//!
//! It is taken wherever the processor computes in f32, f64 or bf16 and rows or tokens have modules of
//! their own. Measured once for ranks 8 to 64, widths 384 to 4,096, 1 to 1,024 tokens and 2 to 64 modules,
//! it was, beside batched products, in f32 up to three times as fast (few tokens, many modules, ranks of
//! 64) and at worst a fifth slower (16 rows of 32 tokens); in bf16 up to eight times as fast (64 rows of
//! one token) and mostly 1.2 to 2 times, at worst a fifth slower (64 modules of rank 64 in training), and
//! long rows are left to batched products. What it needs beside y is `rank` numbers for each choice.
//! Where x is of bf16, α and factors may be of f32, sums are, and what a module changes is rounded as it is
//! added to y. Other kinds and accelerators have the batched products.

use crate::ffi::{self, Slots};
use crate::grouping::Grouping;
use crate::low_rank::{largest, per_token};
use crate::{Device, Kind, LowRank, Outputs, Result, Signal, Tensor, Weights};

/// Rows of bf16 with so many tokens, and modules of more than such a rank, fill batched products, which are
/// faster there: 1.0 to 1.7 times.
const LONG_ROW: i64 = 128;
const SMALL_RANK: i64 = 8;

impl Outputs<'_> {
    /// y = f_θ(x) + Σ αⱼ·scaleⱼ·Bⱼ Aⱼ x over the modules of each row or token, where they are few of
    /// many and the processor computes.
    pub(crate) fn low_rank_slots(&self, parts: &[(usize, LowRank)]) -> Result<Option<Signal>> {
        let x = &self.input().x;
        let Some(computed) = ffi::of_sums(x.kind()) else {
            return Ok(None);
        };
        if x.device() != Device::Cpu || !matches!(x.dim(), 2 | 3) {
            return Ok(None);
        }
        let long = x.kind() == Kind::BFloat16 && x.dim() == 3 && x.len_of(1) >= LONG_ROW;
        let (index, weight) = match &self.routing().weights {
            Weights::Sparse { index, weight } => (index.clone(), weight.to_kind(computed)?),
            Weights::Rows(_) if long && largest(parts) > SMALL_RANK => return Ok(None),
            Weights::Rows(rows) => of_rows(rows, computed)?,
            _ => return Ok(None),
        };
        let grouping = Grouping::new(&per_token(&index, x)?, self.routing().modules)?;
        let y = self.host().call(self.input(), self.context())?;
        if grouping.is_empty() {
            return Ok(Some(y));
        }
        let mut first = vec![0];
        let mut end = 0;
        for (j, _) in parts {
            end += grouping.counts().get(*j).copied().unwrap_or(0);
            first.push(end);
        }
        let known = |t: &Tensor| [x.kind(), computed].contains(&t.kind());
        let whole = |t: &Tensor| match known(t) && t.0.is_contiguous() {
            true => Ok(t.clone()), // An operation for each of all factors would be felt.
            false => t.to_kind(computed)?.contiguous(),
        };
        let of = Slots {
            k: index.len_of(-1),
            slots: grouping.slots(),
            first,
            downs: parts.iter().map(|(_, p)| whole(&p.down)).collect::<Result<_>>()?,
            ups: parts.iter().map(|(_, p)| whole(&p.up)).collect::<Result<_>>()?,
            scales: parts.iter().map(|(_, p)| p.scale).collect(),
        };
        let tokens = x.reshape(&[-1, x.len_of(-1)])?.contiguous()?;
        let alpha = per_token(&weight, x)?.reshape(&[-1])?.contiguous()?;
        let Signal { x: y, with } = y;
        let sum = ffi::grouped_low_rank(y, &tokens, &alpha, &of)?;
        Ok(Some(Signal { x: sum, with }))
    }
}

/// The modules of each row as `[rows, k]` with −1 behind the last, and what they weigh.
fn of_rows(rows: &[Vec<(usize, f64)>], kind: Kind) -> Result<(Tensor, Tensor)> {
    let k = rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let mut index = Vec::with_capacity(rows.len() * k);
    let mut weight = Vec::with_capacity(rows.len() * k);
    for row in rows {
        let padding = std::iter::repeat_n(&(0, 0.0), k - row.len());
        for (j, w) in row.iter().chain(padding) {
            index.push(if *w == 0.0 { -1 } else { *j as i64 });
            weight.push(*w);
        }
    }
    let shape = [rows.len() as i64, k as i64];
    let index = Tensor::from_slice(&index, &shape, Device::Cpu)?;
    Ok((index, Tensor::from_slice(&weight, &shape, Device::Cpu)?.to_kind(kind)?))
}
