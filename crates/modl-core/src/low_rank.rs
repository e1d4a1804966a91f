//! Low-rank modules as few matrix products, however many there are.

use crate::{Base, Device, LowRank, Outputs, Result, Signal, SiteKind, Tensor, Weights};

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
        let total: i64 = parts.iter().map(|(_, p)| p.down.len_of(0)).sum();
        if let Weights::Rows(rows) = &self.routing().weights
            && self.input().x.dim() == 3
            && total > 2 * widest(&parts, rows)
        {
            return self.low_rank_rows(&parts, rows).map(Some);
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
        let rank = parts.iter().map(|(_, p)| p.down.len_of(0)).max().unwrap_or(0);
        let each = rows.iter().map(Vec::len).max().unwrap_or(0);
        // All modules with the rank of the largest, and with zeros behind them one that is nobody's.
        let mut downs = Vec::with_capacity(parts.len() + 1);
        let mut ups = Vec::with_capacity(parts.len() + 1);
        for (_, p) in parts {
            let missing = rank - p.down.len_of(0);
            let (down, up) = (p.down.to_kind(kind)?, p.up.to_kind(kind)?.t()?);
            let fill = |t: Tensor| if missing > 0 { t.pad(&[0, 0, 0, missing]) } else { Ok(t) };
            downs.push(fill(down)?);
            ups.push(fill(up)?);
        }
        if let (Some(down), Some(up)) = (downs.first(), ups.first()) {
            let (down, up) = (down.zeros_like()?, up.zeros_like()?);
            downs.push(down);
            ups.push(up);
        }
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
        let of_rows = |all: &[Tensor]| {
            let width = all.first().map_or(0, |t| t.len_of(1));
            Tensor::stack(all, 0)?.index_select(0, &index)?.reshape(&[n, each * rank, width])
        };
        let alpha = Tensor::from_slice(&alpha, &[n, 1, each, 1], Device::Cpu)?.to_kind(kind)?;
        let alpha = alpha.to_device(device)?.expand(&[n, 1, each, rank])?;
        let alpha = alpha.reshape(&[n, 1, each * rank])?;
        let inner = self.input().x.bmm(&of_rows(&downs)?.t()?)?.mul(&alpha)?;
        let y = self.host().call(self.input(), self.context())?;
        Ok(y.replace(y.x.baddbmm(&inner, &of_rows(&ups)?, 1.0, 1.0)?))
    }
}

/// The largest sum of the ranks of one row's modules.
fn widest(parts: &[(usize, LowRank)], rows: &[Vec<(usize, f64)>]) -> i64 {
    let rank = parts.iter().map(|(_, p)| p.down.len_of(0)).max().unwrap_or(0);
    rank * rows.iter().map(Vec::len).max().unwrap_or(0) as i64
}

/// α `[…, n]` with dimensions of length 1 before the last, so that it weighs columns.
fn before_last(alpha: &Tensor, dims: usize) -> Result<Tensor> {
    (alpha.dim()..dims)
        .try_fold(alpha.clone(), |a, _| if a.dim() == 1 { Ok(a) } else { a.unsqueeze(-2) })
}
