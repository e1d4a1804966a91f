//! The scores of learned routers: ℓ = (W x̄ + b) ⁄ τ, one number for each module.
//!
//! x̄ is the mean of a row's real tokens, each token, or a feature of the row that the caller gives
//! ([`Input`]); W is `[modules, width]`. Scores and all that follows from them are computed in f32
//! (f64 where x or W is f64), also for an x in bf16: the exponentials of a softmax need it
//! (Switch Transformers: Fedus, Zoph, Shazeer 2022, arXiv 2101.03961, §2.4).

use modl_core::{Context, Error, Init, Kind, Result, Scope, Signal, Site, SiteKind, Tensor};
use serde::{Deserialize, Serialize};

/// What a learned router looks at.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Input {
    /// `mean`: the mean of x over the tokens of a row. Where the context has a feature `mask`
    /// `[batch, seq]` that fits, only over the real ones. One α for each row.
    #[default]
    Mean,
    /// `tokens`: each token of x. One α for each token.
    Tokens,
    /// `feature:NAME`: the feature of that name in the context, `[batch, width]`. One α for each
    /// row.
    Feature(String),
}

impl TryFrom<String> for Input {
    type Error = Error;

    fn try_from(s: String) -> Result<Self> {
        match s.as_str() {
            "mean" => Ok(Input::Mean),
            "tokens" => Ok(Input::Tokens),
            other => match other.strip_prefix("feature:") {
                Some(name) if !name.is_empty() => Ok(Input::Feature(name.to_owned())),
                _ => Err(Error::unknown("router input", other, ["mean", "tokens", "feature:NAME"])),
            },
        }
    }
}

impl From<Input> for String {
    fn from(input: Input) -> String {
        match input {
            Input::Mean => "mean".into(),
            Input::Tokens => "tokens".into(),
            Input::Feature(name) => format!("feature:{name}"),
        }
    }
}

impl Input {
    /// Checks that x at such a site has what is looked at.
    pub(crate) fn check(&self, site: &Site) -> Result<()> {
        let advice = "route by a feature of the row: input = \"feature:NAME\"";
        match (self, site.kind) {
            (Input::Mean | Input::Tokens, SiteKind::Embedding) => {
                Err(Error::unsupported("routing by token ids, which are no vectors", advice))
            }
            (Input::Tokens, SiteKind::Attention) => {
                Err(Error::unsupported("an α for each token of an attention", advice))
            }
            _ => Ok(()),
        }
    }

    /// x̄ and, where each token is looked at, the mask of the real ones.
    pub(crate) fn of(&self, x: &Signal, cx: &Context) -> Result<(Tensor, Option<Tensor>)> {
        Ok(match self {
            Input::Feature(name) => (cx.feature(name)?.clone(), None),
            Input::Tokens => (x.x.clone(), mask(&x.x, cx)?),
            Input::Mean => (mean(&x.x, cx)?, None),
        })
    }
}

/// The configuration of the scores, a part of every learned router's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scores {
    /// What is looked at. Default: `mean`.
    pub input: Input,
    /// The width of a feature. Default: the width of the site's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// τ: below 1 sharpens, above 1 flattens. Default: 1.
    pub temperature: f64,
    /// Standard deviation of the normal numbers with which W starts. Default: 0, so that all
    /// modules start alike.
    pub init_std: f64,
    /// Whether there is a b, which starts at 0. Default: true.
    pub bias: bool,
}

impl Default for Scores {
    fn default() -> Self {
        Scores { input: Input::Mean, width: None, temperature: 1.0, init_std: 0.0, bias: true }
    }
}

impl Scores {
    fn init(&self) -> Init {
        if self.init_std > 0.0 { Init::Normal(self.init_std) } else { Init::Zeros }
    }

    /// With a variance of `scale` ⁄ width for W at the start, unless `init_std` says another.
    pub(crate) fn starting(&self, scale: f64, site: &Site) -> Scores {
        let width = self.width.unwrap_or(site.input).max(1);
        let usual = (scale / width as f64).sqrt();
        let init_std = if self.init_std == 0.0 { usual } else { self.init_std };
        Scores { init_std, ..self.clone() }
    }

    /// Makes W and b for the router `method` of `site`.
    ///
    /// # Errors
    /// Where a setting is out of its range, or x at such a site has no vectors to look at.
    pub(crate) fn build(
        &self,
        method: &'static str,
        site: &Site,
        modules: usize,
        scope: &mut Scope,
    ) -> Result<Scorer> {
        let wrong =
            |key: &str, problem: &str| Err(Error::invalid(format!("{method}.{key}"), problem));
        let width = self.width.unwrap_or(site.input);
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return wrong("temperature", "is to be above 0");
        }
        if !(self.init_std >= 0.0 && self.init_std.is_finite()) {
            return wrong("init_std", "is to be 0 or above");
        }
        if width < 1 || (width != site.input && !matches!(self.input, Input::Feature(_))) {
            return wrong("width", "is to be the width of the feature; leave it out otherwise");
        }
        self.input.check(site)?;
        let modules = modules as i64;
        let weight = scope.param("weight", &[modules, width], self.init())?;
        let bias = self.bias.then(|| scope.param("bias", &[modules], Init::Zeros)).transpose()?;
        Ok(Scorer { config: self.clone(), method, weight, bias })
    }
}

/// W and b with what they are applied to.
#[derive(Debug, Clone)]
pub(crate) struct Scorer {
    config: Scores,
    method: &'static str,
    /// `[modules, width]`.
    pub(crate) weight: Tensor,
    /// `[modules]`.
    bias: Option<Tensor>,
}

impl Scorer {
    /// With rows for new modules: drawn as the first ones were, with bias 0. What was learned about
    /// the first modules stays.
    pub(crate) fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Scorer> {
        let mut grown = self.clone();
        let [old, width] = self.weight.size()[..] else { return Ok(grown) };
        let new = modules as i64 - old;
        let seed = scope.seed().nth(modules as u64);
        let (kind, device) = (self.weight.kind(), self.weight.device());
        let rows = self.config.init().tensor(&[new, width], seed, kind, device)?;
        grown.weight = scope.replace("weight", &Tensor::cat(&[self.weight.detach()?, rows], 0)?)?;
        if let Some(bias) = &self.bias {
            let zeros = Tensor::zeros(&[new], kind, device)?;
            grown.bias = Some(scope.replace("bias", &Tensor::cat(&[bias.detach()?, zeros], 0)?)?);
        }
        Ok(grown)
    }
}

/// What is routed, with its scores.
pub(crate) struct Scored {
    /// x̄, `[batch, width]` or `[batch, seq, width]`.
    pub(crate) x: Tensor,
    /// ℓ, `[batch, modules]` or `[batch, seq, modules]`.
    pub(crate) logits: Tensor,
    /// 1 for what is real and 0 for padding, `[batch, seq]`; `None` where all is real.
    pub(crate) mask: Option<Tensor>,
}

impl Scorer {
    /// ℓ for each row or token.
    ///
    /// # Errors
    /// Where a feature is missing or of another width, or a score is NaN or infinite.
    pub(crate) fn scores(&self, x: &Signal, cx: &Context) -> Result<Scored> {
        let (x, mask) = self.seen(x, cx)?;
        self.score(x, mask)
    }

    /// What is looked at, x̄ in f32 or f64, and the mask of what is real in it.
    ///
    /// # Errors
    /// Where a feature is missing or of another width.
    pub(crate) fn seen(&self, x: &Signal, cx: &Context) -> Result<(Tensor, Option<Tensor>)> {
        let (x, mask) = self.config.input.of(x, cx)?;
        let (found, wanted) = (x.len_of(-1), self.weight.len_of(-1));
        if found != wanted {
            let problem = format!(
                "the router was made for vectors of width {wanted}, these are {x:?}; set `width`"
            );
            return Err(Error::invalid(format!("{}.width", self.method), problem));
        }
        let kind = match (x.kind(), self.weight.kind()) {
            (Kind::Double, _) | (_, Kind::Double) => Kind::Double,
            _ => Kind::Float,
        };
        Ok((x.to_kind(kind)?, mask))
    }

    /// ℓ of what [`Scorer::seen`] has given.
    ///
    /// # Errors
    /// Where a score is NaN or infinite.
    pub(crate) fn score(&self, x: Tensor, mask: Option<Tensor>) -> Result<Scored> {
        let kind = x.kind();
        let bias = self.bias.as_ref().map(|b| b.to_kind(kind)).transpose()?;
        let logits = x.linear(&self.weight.to_kind(kind)?, bias.as_ref())?;
        let logits = logits.mul_scalar(1.0 / self.config.temperature)?;
        logits.check_finite(&format!("scores of a `{}` router", self.method))?;
        Ok(Scored { x, logits, mask })
    }
}

/// The mask of real tokens `[batch, seq]`, if it is there and fits x `[batch, seq, dim]`.
pub(crate) fn mask(x: &Tensor, cx: &Context) -> Result<Option<Tensor>> {
    match (cx.find("mask"), x.size().as_slice()) {
        (Some(m), [rows, len, _]) if m.size() == [*rows, *len] => Ok(Some(m.clone())),
        _ => Ok(None),
    }
}

/// The mean over the real tokens of each row, `[batch, dim]`, in f32 or f64.
fn mean(x: &Tensor, cx: &Context) -> Result<Tensor> {
    let tokens = match x.size().as_slice() {
        [_, _] => return Ok(x.clone()),
        [_, _, _] => x.clone(),
        // Heads side by side, as they were before attention split them.
        &[rows, heads, len, dim] => x.transpose(1, 2)?.reshape(&[rows, len, heads * dim])?,
        _ => {
            let problem = format!("the mean wants [batch, seq, dim], x is {x:?}; use a feature");
            return Err(Error::invalid("router input", problem));
        }
    };
    let kind = if tokens.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let real = mask(&tokens, cx)?;
    let tokens = tokens.to_kind(kind)?;
    match real {
        None => tokens.mean_dims(&[1], false),
        Some(m) => {
            let m = m.to_kind(kind)?.unsqueeze(-1)?;
            let count = m.sum_dims(&[1], false)?.clamp(1.0, f64::INFINITY)?;
            tokens.mul(&m)?.sum_dims(&[1], false)?.div(&count)
        }
    }
}
