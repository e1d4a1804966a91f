//! Dropout of whole parts of a change: rows of ΔW, blocks of a rotation, the module itself.

use modl_core::{Context, Error, Init, Kind, Result, Scope, Tensor, dropout_mask};

/// A probability in [0, 1) and the place that draws.
#[derive(Debug, Clone)]
pub(super) struct PartDropout {
    p: f64,
    place: String,
}

impl PartDropout {
    /// `p` is called `what` in errors and `part` in the place, so that parts of one module are
    /// drawn by themselves.
    ///
    /// # Errors
    /// Where it is not a probability below 1.
    pub(super) fn new(what: &str, p: f64, part: &str, scope: &Scope) -> Result<Self> {
        if (0.0..1.0).contains(&p) {
            return Ok(PartDropout { p, place: format!("{}.{part}", scope.path()) });
        }
        Err(Error::invalid(what, format!("is {p}, wants a probability in [0, 1)")))
    }

    fn active(&self, cx: &Context) -> bool {
        cx.train && self.p > 0.0
    }

    /// 0 for each of `n` parts that is dropped, by itself with probability p, and 1 for the others,
    /// `[n]`; `None` where nothing is dropped at all.
    pub(super) fn kept(&self, n: i64, like: &Tensor, cx: &Context) -> Result<Option<Tensor>> {
        if !self.active(cx) {
            return Ok(None);
        }
        let seed = cx.draw(&self.place);
        let mask = dropout_mask(&[n], self.p, seed, Kind::Float, like.device())?;
        mask.gt_scalar(0.0)?.to_kind(like.kind()).map(Some)
    }

    /// Whether the whole is dropped, with probability p.
    pub(super) fn drops_all(&self, like: &Tensor, cx: &Context) -> Result<bool> {
        Ok(self.kept(1, like, cx)?.map(|kept| kept.item()).transpose()? == Some(0.0))
    }

    /// 1 for exactly ⌊p n⌋ of `n` blocks, chosen at random, and 0 for the others, in one random row
    /// of `rows`: `[rows, n, 1, 1]`; `None` where none is chosen.
    pub(super) fn chosen(
        &self,
        rows: i64,
        n: i64,
        like: &Tensor,
        cx: &Context,
    ) -> Result<Option<Tensor>> {
        let count = (self.p * n as f64) as i64;
        if !self.active(cx) || count == 0 {
            return Ok(None);
        }
        let some = |of: &str, n: i64, count: i64| {
            let seed = cx.draw(&self.place).child(of);
            let noise = Init::Uniform(1.0).tensor(&[n], seed, Kind::Double, like.device())?;
            let zeros = Tensor::zeros(&[n], like.kind(), like.device())?;
            let ones = Tensor::ones(&[count], like.kind(), like.device())?;
            zeros.index_add(0, &noise.topk(count, 0)?.1, &ones)
        };
        let row = some("row", rows, 1)?.reshape(&[rows, 1, 1, 1])?;
        row.mul(&some("blocks", n, count)?.reshape(&[1, n, 1, 1])?).map(Some)
    }
}
