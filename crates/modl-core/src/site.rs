//! Sites: named places in a backbone, the base function f_θ that stands there, and what flows
//! through it.
//!
//! The three compositions of the survey (§3) are three ways to call a [`Host`]:
//! - parameter composition calls f with other parameters: `host.call_with(&theta, x, cx)`;
//! - input composition calls f on more input: `host.call(&longer, cx)`;
//! - function composition works on what f returns: `g(host.call(x, cx))`.

use std::cell::RefCell;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Context, Error, Kind, Result, Tensor, Tensors};

/// What kind of function stands at a site, and so what θ and the companions of x are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SiteKind {
    /// y = x Wᵀ + b on `[…, in]`; θ = `weight` `[out, in]`, `bias` `[out]` where there is one.
    Linear,
    /// A convolution of `[batch, in, height, width]`; θ = `weight`
    /// `[out, in ⁄ groups, kernel, kernel]`, `bias` `[out]` where there is one. Stride, padding and
    /// groups are f's own.
    Conv,
    /// Rows of a table by ids `[batch, seq]`; θ = `weight` `[rows, dim]`.
    Embedding,
    /// A normalisation of `[…, dim]`; θ = `weight`, and `bias` where there is one.
    Norm,
    /// Batch normalisation of `[batch, channels, height, width]`; θ = `weight`, `bias`,
    /// `running_mean`, `running_var`, each `[channels]`.
    BatchNorm,
    /// From token vectors `[batch, seq, dim]` to the first hidden states: adds positions and
    /// normalises. Companions, also of the output: `mask` `[batch, seq]` and `positions`
    /// `[batch, seq]` i64, so that a module may lengthen the sequence or shift it.
    Tokens,
    /// Attention of queries x `[batch, heads, seq, head_dim]` over the companions `key` and
    /// `value` `[batch, groups, keys, head_dim]`, where each of the groups serves heads ⁄ groups
    /// heads, under `mask`, which is added to the scores and broadcasts to
    /// `[batch, heads, seq, keys]`; → `[batch, heads, seq, head_dim]`. Where positions are
    /// relative, keys put in front get their share from the backbone. The site's input is
    /// groups · head_dim wide, its output heads · head_dim.
    Attention,
    /// The scores of a mixture's experts: y = x Wᵀ, `[…, in]` → `[…, experts]`; θ = `weight`
    /// `[experts, in]`.
    Router,
    /// A mixture of feed-forward networks: x `[batch, seq, in]` → `[batch, seq, in]` by the
    /// experts that the companions name for each token, `experts` `[batch, seq, k]` i64, weighed by
    /// `gates` `[batch, seq, k]`. θ = `gate_up_proj` `[experts, 2 · inner, in]`, gate above up, and
    /// `down_proj` `[experts, in, inner]`; `wi` `[experts, inner, in]` and `wo` `[experts, in, inner]`
    /// where they are not gated. f also takes each of them as a sum that is not
    /// multiplied out: with [`STACK_DOWN`] after its name `[experts, r, cols]` and [`STACK_UP`]
    /// `[experts, rows, r]`, whose product is added to it.
    Experts,
    /// A sub-layer before its residual connection: x `[batch, seq, in]` → `[batch, seq, dim]`.
    /// Companion: `residual` `[batch, seq, dim]`, what will be added. Stage: `norm`, the
    /// normalisation of h + residual that follows.
    Sublayer,
    /// A whole layer of the residual stream `[batch, seq, dim]`; companion: `mask`.
    Block,
    /// A whole block of convolutions, `[batch, in, height, width]` →
    /// `[batch, out, height ⁄ stride, width ⁄ stride]`, with its residual connection where it has one.
    ConvBlock,
}

/// The end of the name in θ of the thin factors that f takes at [`SiteKind::Experts`].
pub const STACK_DOWN: &str = ".down";
/// The end of the name in θ of the other factors.
pub const STACK_UP: &str = ".up";

impl SiteKind {
    /// The kind of that name in recipes: `linear`, `batch-norm`.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "linear" => SiteKind::Linear,
            "conv" => SiteKind::Conv,
            "embedding" => SiteKind::Embedding,
            "norm" => SiteKind::Norm,
            "batch-norm" => SiteKind::BatchNorm,
            "tokens" => SiteKind::Tokens,
            "attention" => SiteKind::Attention,
            "router" => SiteKind::Router,
            "experts" => SiteKind::Experts,
            "sublayer" => SiteKind::Sublayer,
            "block" => SiteKind::Block,
            "conv-block" => SiteKind::ConvBlock,
            _ => return None,
        })
    }

    /// Whether f works on each vector along the last dimension by itself, so that tokens can be
    /// sent to different modules.
    pub fn token_wise(self) -> bool {
        use SiteKind::{Linear, Norm, Router, Sublayer};
        matches!(self, Linear | Norm | Router | Sublayer)
    }
}

/// A named place in a backbone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Site {
    /// The name, as transformers has it: `encoder.layer.3.attention.self.query`.
    pub path: String,
    /// The kind of function.
    pub kind: SiteKind,
    /// Width of the input.
    pub input: i64,
    /// Width of the output.
    pub output: i64,
    /// Position among the backbone's sites.
    pub index: usize,
}

impl Site {
    /// Whether it stands within another: `mlp.experts.expert_0.wi` does within `mlp.experts`.
    pub fn is_within(&self, other: &Site) -> bool {
        self.path.strip_prefix(&other.path).is_some_and(|rest| rest.starts_with('.'))
    }

    /// The number of the layer that the site is in: the first part of the path that is a number.
    pub fn layer(&self) -> Option<i64> {
        self.path.split('.').find_map(|part| part.parse().ok())
    }
}

/// What flows into or out of a site: one main tensor and its named companions. The first
/// dimension of each is the batch.
#[derive(Debug, Clone)]
pub struct Signal {
    /// The main tensor.
    pub x: Tensor,
    /// The companions, for instance `mask`; [`SiteKind`] says which a site has.
    pub with: Tensors,
}

impl From<Tensor> for Signal {
    fn from(x: Tensor) -> Self {
        Signal { x, with: Tensors::new() }
    }
}

impl Signal {
    /// The same companions with another main tensor.
    pub fn replace(&self, x: Tensor) -> Signal {
        Signal { x, with: self.with.clone() }
    }

    /// The number of rows in the batch.
    pub fn rows(&self) -> i64 {
        self.x.len_of(0)
    }

    /// The rows at `index` `[n]` i64.
    pub fn select_rows(&self, index: &Tensor) -> Result<Signal> {
        let x = self.x.index_select(0, index)?;
        Ok(Signal { x, with: self.with.map(|_, t| t.index_select(0, index))? })
    }

    /// One batch of `rows` rows from parts of it. Where parts are of different lengths, shorter
    /// ones are padded with zeros at the end: zeros in a `mask` mean that nobody looks there.
    ///
    /// # Errors
    /// Where the parts have different companions.
    pub fn join(parts: &[(Vec<i64>, Signal)], rows: i64) -> Result<Signal> {
        let Some((_, first)) = parts.first() else {
            return Err(Error::invalid("join", "there are no parts"));
        };
        let xs: Vec<(&[i64], &Tensor)> = parts.iter().map(|(i, s)| (i.as_slice(), &s.x)).collect();
        let with = first.with.map(|name, _| {
            let ts: Result<Vec<_>> =
                parts.iter().map(|(i, s)| Ok((i.as_slice(), s.with.need(name)?))).collect();
            join_rows(&ts?, rows)
        })?;
        Ok(Signal { x: join_rows(&xs, rows)?, with })
    }
}

fn join_rows(parts: &[(&[i64], &Tensor)], rows: i64) -> Result<Tensor> {
    let dims = parts.iter().map(|(_, t)| t.dim()).max().unwrap_or(0);
    let longest: Vec<i64> = (0..dims)
        .map(|d| parts.iter().map(|(_, t)| t.len_of(d as i64)).max().unwrap_or(0))
        .collect();
    let mut order = Vec::with_capacity(rows as usize);
    let mut padded = Vec::with_capacity(parts.len());
    for (index, t) in parts {
        order.extend_from_slice(index);
        let by: Vec<i64> =
            (1..dims).rev().flat_map(|d| [0, longest[d] - t.len_of(d as i64)]).collect();
        padded.push(if by.iter().all(|n| *n == 0) { (*t).clone() } else { t.pad(&by)? });
    }
    let mut position = vec![-1i64; rows as usize];
    for (at, row) in order.iter().enumerate() {
        match usize::try_from(*row).ok().and_then(|r| position.get_mut(r)) {
            Some(p) if *p < 0 => *p = at as i64,
            _ => return Err(Error::invalid("join", format!("row {row} is out of range or twice"))),
        }
    }
    if position.contains(&-1) {
        return Err(Error::invalid("join", "the parts do not make up all rows"));
    }
    let all = Tensor::cat(&padded, 0)?;
    let index = Tensor::from_slice(&position, &[rows], all.device())?;
    all.index_select(0, &index)
}

/// A function of θ and x. The context is that of the rows of x: where a batch is split among
/// modules, sites within f route by it.
pub type HostFn<'a> = dyn Fn(&Tensors, &Signal, &Context) -> Result<Signal> + 'a;

/// The base function f_θ at a site, as a module sees it during one forward pass.
pub struct Host<'a> {
    site: &'a Site,
    theta: &'a Tensors,
    f: &'a HostFn<'a>,
    stages: &'a [(&'a str, &'a HostFn<'a>)],
    /// f_θ(x) for the signal at this address, once it is known, so that modules that share x share
    /// the work.
    memo: RefCell<Option<(*const Signal, Option<Signal>)>>,
}

impl fmt::Debug for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("site", &self.site.path).field("theta", self.theta).finish()
    }
}

impl<'a> Host<'a> {
    /// f at `site` with its frozen parameters.
    pub fn new(site: &'a Site, theta: &'a Tensors, f: &'a HostFn<'a>) -> Self {
        Host { site, theta, f, stages: &[], memo: RefCell::new(None) }
    }

    /// Adds named stages, for instance the `norm` that follows a sub-layer.
    pub fn with_stages(self, stages: &'a [(&'a str, &'a HostFn<'a>)]) -> Self {
        Host { stages, ..self }
    }

    /// This host with another function in the place of f, such as f with a module on it.
    pub fn around<'b>(&self, theta: &'b Tensors, f: &'b HostFn<'b>) -> Host<'b>
    where
        'a: 'b,
    {
        Host { site: self.site, theta, f, stages: self.stages, memo: RefCell::new(None) }
    }

    /// The site.
    pub fn site(&self) -> &'a Site {
        self.site
    }

    /// θ, the site's own parameters.
    pub fn theta(&self) -> &'a Tensors {
        self.theta
    }

    /// f_θ(x).
    pub fn call(&self, x: &Signal, cx: &Context) -> Result<Signal> {
        let shared = self.shares(x);
        if shared && let Some((_, Some(y))) = &*self.memo.borrow() {
            return Ok(y.clone());
        }
        let y = (self.f)(self.theta, x, cx)?;
        if shared {
            self.memo.replace(Some((std::ptr::from_ref(x), Some(y.clone()))));
        }
        Ok(y)
    }

    fn shares(&self, x: &Signal) -> bool {
        matches!(&*self.memo.borrow(), Some((at, _)) if std::ptr::eq(*at, x))
    }

    /// f with other parameters, for instance θ ⊕ φ.
    pub fn call_with(&self, theta: &Tensors, x: &Signal, cx: &Context) -> Result<Signal> {
        (self.f)(theta, x, cx)
    }

    /// A named stage of the site under θ.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the stages that there are.
    pub fn stage(&self, name: &str, x: &Signal, cx: &Context) -> Result<Signal> {
        match self.stages.iter().find(|(n, _)| *n == name) {
            Some((_, f)) => f(self.theta, x, cx),
            None => {
                Err(Error::unknown("stage of the site", name, self.stages.iter().map(|(n, _)| *n)))
            }
        }
    }

    /// Runs `work` while `call(x)` on this very `x` is computed at most once, and not at all where
    /// nobody asks.
    pub fn sharing<T>(&self, x: &Signal, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.shares(x) {
            return work();
        }
        let before = self.memo.replace(Some((std::ptr::from_ref(x), None)));
        let result = work();
        self.memo.replace(before);
        result
    }

    /// The kind of θ, or of x where there is no θ.
    pub fn kind(&self, x: &Signal) -> Kind {
        self.theta.iter().next().map_or_else(|| x.x.kind(), |(_, t)| t.kind())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    fn rows(values: &[f32], rows: i64) -> Tensor {
        Tensor::from_slice(values, &[rows, values.len() as i64 / rows], Device::Cpu).unwrap()
    }

    #[test]
    fn parts_of_different_length_join_with_zeros_at_the_end() {
        let long = Signal::from(rows(&[1., 2., 3.], 1));
        let short = Signal::from(rows(&[4., 5., 6., 7.], 2));
        let all = Signal::join(&[(vec![1], long), (vec![2, 0], short)], 3).unwrap();
        assert_eq!(all.x.to_vec::<f32>().unwrap(), [6., 7., 0., 1., 2., 3., 4., 5., 0.]);
    }

    #[test]
    fn a_row_twice_or_missing_is_refused() {
        let one = || Signal::from(rows(&[1., 2.], 1));
        assert!(Signal::join(&[(vec![0], one()), (vec![0], one())], 2).is_err());
        assert!(Signal::join(&[(vec![1], one())], 2).is_err());
    }
}
