//! Low-rank modules as few matrix products, however many there are.

use crate::grouping::Grouping;
use crate::{Base, Device, Kind, LowRank, Outputs, Result, Signal, SiteKind, Tensor, Weights};

/// Slots that are computed together where tokens are sorted by module: large enough for a matrix
/// product, small enough that what is missing in a module's last block costs little.
const BLOCK: usize = 32;

impl Outputs<'_> {
    /// All low-rank modules as one: with A = [A₁; …; Aₖ] and B = [B₁ … Bₖ],
    /// y = f_θ(x) + ((x Aᵀ) ⊙ α) Bᵀ, where each column of x Aᵀ has its module's αⱼ·scaleⱼ.
    pub(crate) fn low_rank_sum(&self, base: Base) -> Result<Option<Signal>> {
        let kept = base == Base::Kept || self.routing().normalised;
        let mixed = matches!(self.routing().weights, Weights::Slots { .. });
        if !kept || mixed || self.host().site().kind != SiteKind::Linear {
            return Ok(None);
        }
        let found: Option<Vec<(usize, LowRank)>> = self
            .active()
            .modules()
            .map(|(j, _, m)| Some((j, m.low_rank(self.context())?)))
            .collect();
        let Some(parts) = found.filter(|p| !p.is_empty()) else { return Ok(None) };
        if let Some(y) = self.low_rank_slots(&parts)? {
            return Ok(Some(y));
        }
        let total: i64 = parts.iter().map(|(_, p)| p.down.len_of(0)).sum();
        if let Weights::Rows(rows) = &self.routing().weights
            && self.input().x.dim() == 3
            && total > 2 * widest(&parts, rows)
        {
            return self.low_rank_rows(&parts, rows).map(Some);
        }
        // From about four times the columns that a token needs, moving tokens is the cheaper way.
        if let Weights::Sparse { index, weight } = &self.routing().weights
            && matches!(self.input().x.dim(), 2 | 3)
            && total > 4 * largest(&parts) * index.len_of(-1)
        {
            return self.low_rank_blocks(&parts, index, weight).map(Some);
        }
        let (kind, device) = (self.input().x.kind(), self.input().x.device());
        let mut owner = Vec::new();
        let mut scale = Vec::new();
        for (j, p) in &parts {
            let rank = p.down.len_of(0) as usize;
            owner.extend(std::iter::repeat_n(*j as i64, rank));
            scale.extend(std::iter::repeat_n(p.scale, rank));
        }
        let n = [owner.len() as i64];
        let owner = Tensor::from_slice(&owner, &n, device)?;
        let scale =
            Tensor::from_slice(&scale, &n, Device::Cpu)?.to_kind(kind)?.to_device(device)?;
        let alpha = self.routing().dense(kind, device)?.index_select(-1, &owner)?.mul(&scale)?;
        let downs: Vec<Tensor> = parts.iter().map(|(_, p)| p.down.clone()).collect();
        let ups: Vec<Tensor> = parts.iter().map(|(_, p)| p.up.clone()).collect();
        let inner = self.input().x.linear(&Tensor::cat(&downs, 0)?.to_kind(kind)?, None)?;
        let inner = inner.mul(&before_last(&alpha, inner.dim())?)?;
        let y = self.host().call(self.input(), self.context())?;
        Ok(Some(y.replace(y.x.add_linear(&inner, &Tensor::cat(&ups, 1)?.to_kind(kind)?)?)))
    }

    /// Low-rank modules where each row has few of many: y[b] = f_θ(x)[b] + (x[b] A_bᵀ ⊙ α_b) B_bᵀ
    /// with the factors of row b alone, all rows in two batched products.
    fn low_rank_rows(
        &self,
        parts: &[(usize, LowRank)],
        rows: &[Vec<(usize, f64)>],
    ) -> Result<Signal> {
        let (kind, device) = (self.input().x.kind(), self.input().x.device());
        let rank = largest(parts);
        let each = rows.iter().map(Vec::len).max().unwrap_or(0);
        let (downs, ups) = factors(parts, kind)?;
        // Behind all modules one that is nobody's.
        let zero = |t: &Tensor| t.pad(&[0, 0, 0, 0, 0, 1]);
        let (downs, ups) = (zero(&downs)?, zero(&ups)?);
        let mut index = Vec::with_capacity(rows.len() * each);
        let mut alpha = Vec::with_capacity(rows.len() * each);
        for row in rows {
            for slot in 0..each {
                let found = row.get(slot).and_then(|(j, a)| {
                    let at = parts.iter().position(|(k, _)| k == j)?;
                    Some((at as i64, a * parts.get(at)?.1.scale))
                });
                let (at, weight) = found.unwrap_or((parts.len() as i64, 0.0));
                index.push(at);
                alpha.push(weight);
            }
        }
        let (n, each) = (rows.len() as i64, each as i64);
        let index = Tensor::from_slice(&index, &[n * each], device)?;
        let of_rows =
            |all: &Tensor| all.index_select(0, &index)?.reshape(&[n, each * rank, all.len_of(2)]);
        let alpha = Tensor::from_slice(&alpha, &[n, 1, each, 1], Device::Cpu)?.to_kind(kind)?;
        let alpha = alpha.to_device(device)?.expand(&[n, 1, each, rank])?;
        let alpha = alpha.reshape(&[n, 1, each * rank])?;
        let inner = self.input().x.bmm(&of_rows(&downs)?.t()?)?.mul(&alpha)?;
        let y = self.host().call(self.input(), self.context())?;
        Ok(y.replace(y.x.baddbmm(&inner, &of_rows(&ups)?, 1.0, 1.0)?))
    }

    /// Low-rank modules where each token has few of many: tokens sorted by module and cut into
    /// blocks, all blocks in two batched products, whatever the modules' loads.
    fn low_rank_blocks(
        &self,
        parts: &[(usize, LowRank)],
        index: &Tensor,
        weight: &Tensor,
    ) -> Result<Signal> {
        let x = &self.input().x;
        let (kind, device) = (x.kind(), x.device());
        let k = index.len_of(-1);
        let grouping = Grouping::new(&per_token(index, x)?, self.routing().modules)?;
        let y = self.host().call(self.input(), self.context())?;
        if grouping.is_empty() {
            return Ok(y);
        }
        let (owners, places) = grouping.blocks(BLOCK);
        let found = |j: &usize| parts.binary_search_by_key(j, |(i, _)| *i).ok();
        let owners: Vec<usize> = owners.iter().filter_map(found).collect();
        // What is missing in a block is its last token once more, with the weight 0 behind all
        // weights: whatever there is in that token stays with it.
        let none = grouping.all_units() * k;
        let (mut units, mut slots) = (Vec::new(), Vec::new());
        for slot in &places {
            slots.push(slot.unwrap_or(none));
            units.push(slot.map_or_else(|| units.last().copied().unwrap_or(0), |s| s / k));
        }
        let scales: Vec<f64> =
            owners.iter().filter_map(|at| parts.get(*at)).map(|(_, p)| p.scale).collect();
        let owners: Vec<i64> = owners.into_iter().map(|at| at as i64).collect();
        let at = |v: &[i64]| Tensor::from_slice(v, &[v.len() as i64], device);
        let (blocks, size) = (owners.len() as i64, BLOCK as i64);
        let (units, each) = (at(&units)?, owners.iter().copied().eq(0..parts.len() as i64));
        let owners = at(&owners)?;
        // Where loads are even and small, each module has its one block.
        let of_blocks = |t: &Tensor| if each { Ok(t.clone()) } else { t.index_select(0, &owners) };
        let weights = per_token(weight, x)?.reshape(&[-1])?.to_kind(kind)?.pad(&[0, 1])?;
        let scale = Tensor::from_slice(&scales, &[blocks, 1, 1], Device::Cpu)?.to_kind(kind)?;
        let alpha = weights.index_select(0, &at(&slots)?)?.reshape(&[blocks, size, 1])?;
        let alpha = alpha.mul(&scale.to_device(device)?)?;
        let (downs, ups) = factors(parts, kind)?;
        let tokens = x.reshape(&[-1, x.len_of(-1)])?.index_select(0, &units)?;
        let tokens = tokens.reshape(&[blocks, size, -1])?;
        let inner = tokens.bmm(&of_blocks(&downs)?.t()?)?.mul(&alpha)?;
        let change = inner.bmm(&of_blocks(&ups)?)?;
        let width = y.x.len_of(-1);
        let flat = y.x.reshape(&[-1, width])?;
        let sum = flat.index_add(0, &units, &change.reshape(&[-1, width])?)?;
        Ok(y.replace(sum.reshape(&y.x.size())?))
    }
}

/// Choices `[…, k]` of rows or tokens for each token of x, `[tokens, k]`: one choice for all tokens of
/// a row is one for each of them.
pub(crate) fn per_token(choices: &Tensor, x: &Tensor) -> Result<Tensor> {
    let k = choices.len_of(-1);
    match (choices.dim(), x.dim()) {
        (2, 3) => {
            let size = [x.len_of(0), x.len_of(1), k];
            choices.unsqueeze(1)?.expand(&size)?.reshape(&[-1, k])
        }
        _ => choices.reshape(&[-1, k]),
    }
}

/// The largest rank.
pub(crate) fn largest(parts: &[(usize, LowRank)]) -> i64 {
    parts.iter().map(|(_, p)| p.down.len_of(0)).max().unwrap_or(0)
}

/// The largest sum of the ranks of one row's modules.
fn widest(parts: &[(usize, LowRank)], rows: &[Vec<(usize, f64)>]) -> i64 {
    largest(parts) * rows.iter().map(Vec::len).max().unwrap_or(0) as i64
}

/// All A `[modules, rank, in]` and Bᵀ `[modules, rank, out]`, with zeros up to the largest rank.
fn factors(parts: &[(usize, LowRank)], kind: Kind) -> Result<(Tensor, Tensor)> {
    let rank = largest(parts);
    let downs = parts.iter().map(|(_, p)| match rank - p.down.len_of(0) {
        0 => Ok(p.down.clone()),
        missing => p.down.pad(&[0, 0, 0, missing]),
    });
    let ups = parts.iter().map(|(_, p)| match rank - p.up.len_of(1) {
        0 => Ok(p.up.clone()),
        missing => p.up.pad(&[0, missing]),
    });
    let downs = Tensor::stack(&downs.collect::<Result<Vec<_>>>()?, 0)?.to_kind(kind)?;
    // Turned round all at once: one by one, that takes longer than the products.
    let ups = Tensor::stack(&ups.collect::<Result<Vec<_>>>()?, 0)?.to_kind(kind)?;
    Ok((downs, ups.t()?.contiguous()?))
}

/// α `[…, n]` with dimensions of length 1 before the last, so that it weighs columns.
fn before_last(alpha: &Tensor, dims: usize) -> Result<Tensor> {
    (alpha.dim()..dims)
        .try_fold(alpha.clone(), |a, _| if a.dim() == 1 { Ok(a) } else { a.unsqueeze(-2) })
}
