//! Scaled dot-product attention: softmax(q kᵀ ⁄ √d + mask) v (Vaswani et al. 2017, arXiv
//! 1706.03762).

use modl_core::{Device, Error, HostFn, Kind, Result, ResultExt, Signal, Tensor, Tensors};

use crate::dropout::{Drop, dropout};
use crate::place::{Pass, Place};

/// Scores and probabilities of that many keys no longer stay in the cache.
const LONG: i64 = 256;

/// Queries `[batch, heads, seq, d]` over keys `[batch, groups, keys, d]` and values `[batch, groups,
/// keys, v]`, each group for heads ⁄ groups heads, with `mask`, which broadcasts to `[batch, heads,
/// seq, keys]`, added to the scores → `[batch, heads, seq, v]`. Scores are multiplied by `scale`, 1⁄√d as a rule. Dropout is
/// that of the probabilities.
pub(crate) fn attend(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    mask: Option<&Tensor>,
    scale: f64,
    drop: Drop,
) -> Result<Tensor> {
    let size = query.size();
    let &[batch, heads, seq, width] = size.as_slice() else {
        return Err(Error::invalid("query", format!("has shape {size:?}, not four")));
    };
    let (key, value) = (&for_heads(key, heads)?, &for_heads(value, heads)?);
    if drop.is_none() && fused_is_faster(query, key) {
        return Tensor::attention(query, key, value, mask, scale);
    }
    let keys = key.len_of(2);
    let n = batch * heads;
    let query = query.reshape(&[n, seq, width])?;
    let key = key.reshape(&[n, keys, width])?.t()?;
    let out = value.len_of(3);
    let value = value.reshape(&[n, keys, out])?;
    let scores = match mask {
        Some(mask) => {
            let queries = if mask.len_of(2) == 1 { 1 } else { seq };
            let mask = mask.expand(&[batch, heads, queries, keys])?.reshape(&[n, queries, keys])?;
            mask.baddbmm(&query, &key, 1.0, scale)?
        }
        None => query.mul_scalar(scale)?.bmm(&key)?,
    };
    let p = dropout(scores.softmax(-1)?, drop)?;
    p.bmm(&value)?.reshape(&[batch, heads, seq, out])
}

impl Place {
    /// [`attend`] at an attention site, through the modules that stand there.
    pub(crate) fn attend(
        &self,
        [query, key, value]: [Tensor; 3],
        mask: Option<&Tensor>,
        scale: f64,
        drop: Drop,
        pass: Pass,
    ) -> Result<Tensor> {
        if !self.modular(pass) {
            return attend(&query, &key, &value, mask, scale, drop).at(&self.site.path);
        }
        let mask = match mask {
            Some(mask) => mask.expand(&[query.len_of(0), -1, -1, -1])?,
            None => {
                let shape = [key.len_of(0), 1, 1, key.len_of(2)];
                Tensor::zeros(&shape, key.kind(), key.device())?
            }
        };
        let with = Tensors::new().with("key", key).with("value", value).with("mask", mask);
        let host: &HostFn = &|_, s, _| {
            let (key, value) = (s.with.need("key")?, s.with.need("value")?);
            attend(&s.x, key, value, s.with.get("mask"), scale, drop).map(Signal::from)
        };
        Ok(self.run(&Signal { x: query, with }, pass, host)?.x)
    }
}

/// x `[batch, seq, heads · d]` as `[batch, heads, seq, d]`.
pub(crate) fn split(x: &Tensor, heads: i64) -> Result<Tensor> {
    let (batch, seq) = (x.len_of(0), x.len_of(1));
    x.reshape(&[batch, seq, heads, x.len_of(-1) / heads.max(1)])?.transpose(1, 2)
}

/// Keys or values `[batch, groups, keys, d]` repeated for all heads.
fn for_heads(t: &Tensor, heads: i64) -> Result<Tensor> {
    let size = t.size();
    match *size.as_slice() {
        [_, groups, ..] if groups == heads => Ok(t.clone()),
        [batch, groups, keys, width] if groups > 0 && heads % groups == 0 => t
            .unsqueeze(2)?
            .expand(&[batch, groups, heads / groups, keys, width])?
            .reshape(&[batch, heads, keys, width]),
        _ => Err(Error::invalid("key", format!("has shape {size:?} for {heads} heads"))),
    }
}

/// Whether libtorch's fused kernel beats the products. On the CPU it never does in bf16, where its
/// backward pass is five times as slow; in f32 only from [`LONG`] keys on, where the scores no
/// longer stay in the cache.
fn fused_is_faster(query: &Tensor, key: &Tensor) -> bool {
    let wide = matches!(query.kind(), Kind::Float | Kind::Double);
    query.device() != Device::Cpu || (wide && key.len_of(2) >= LONG)
}
