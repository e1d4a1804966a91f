//! Running the active modules: the plain way, and the fast ways that give the same.

use crate::grouped::over;
use crate::{
    Active, Context, Error, Host, Module, Result, Routing, Signal, SiteKind, Tensor, Weights,
};

/// What α weighs against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// y = f_θ(x) + Σ αⱼ (hⱼ − f_θ(x)): modules are changes to a pretrained function. Without any
    /// active module y is f_θ(x). The two agree where α sums to 1.
    #[default]
    Kept,
    /// y = Σ αⱼ hⱼ: modules stand for themselves, as the experts of a mixture do.
    Replaced,
}

/// The outputs hⱼ of the active modules, computed on demand.
#[derive(Debug)]
pub struct Outputs<'a> {
    active: &'a Active<'a>,
    f: &'a Host<'a>,
    x: &'a Signal,
    cx: &'a Context,
}

impl<'a> Outputs<'a> {
    pub(crate) fn new(
        active: &'a Active<'a>,
        f: &'a Host<'a>,
        x: &'a Signal,
        cx: &'a Context,
    ) -> Self {
        Outputs { active, f, x, cx }
    }

    /// The active modules.
    pub fn active(&self) -> &Active<'a> {
        self.active
    }

    /// The base function.
    pub fn host(&self) -> &Host<'a> {
        self.f
    }

    /// The input.
    pub fn input(&self) -> &Signal {
        self.x
    }

    /// What else the forward pass knows.
    pub fn context(&self) -> &Context {
        self.cx
    }

    /// hⱼ of every active module on the whole batch, for aggregators that look at the outputs
    /// (attention) before they weigh them. f_θ(x) is computed at most once.
    pub fn each(&self) -> Result<Vec<(usize, Signal)>> {
        self.f.sharing(self.x, || {
            let run = |(j, _, m): (usize, &str, &dyn Module)| {
                Ok((j, m.forward(self.f, self.x, self.cx)?))
            };
            self.active.modules().map(run).collect()
        })
    }

    /// Σ αⱼ hⱼ against `base`, by the fastest way that fits. The ways agree with
    /// [`Outputs::plain_sum`] up to rounding.
    pub fn weighted_sum(&self, base: Base) -> Result<Signal> {
        self.check_level()?;
        if self.active.is_empty() {
            return self.plain_sum(base);
        }
        if let Weights::Fixed(all) = &self.routing().weights
            && let [(_, 1.0)] = all.as_slice()
            && let Some((_, _, module)) = self.active.modules().next()
        {
            return module.forward(self.f, self.x, self.cx);
        }
        if let Some(y) = self.low_rank_sum(base)? {
            return Ok(y);
        }
        match &self.routing().weights {
            Weights::Rows(rows) => self.by_rows(rows, base),
            Weights::Sparse { index, weight } if index.dim() == 2 => {
                self.rows_by_choice(index, weight, base)
            }
            Weights::Sparse { index, weight } if self.f.site().kind.token_wise() => {
                self.by_tokens(index, weight, base)
            }
            _ => self.plain_sum(base),
        }
    }

    /// Σ αⱼ hⱼ against `base` as the formula says it: every module on everything.
    pub fn plain_sum(&self, base: Base) -> Result<Signal> {
        self.check_level()?;
        if let Weights::Slots { dispatch, combine } = &self.routing().weights {
            return self.by_slots(dispatch, combine, base);
        }
        self.f.sharing(self.x, || self.plain_terms(base))
    }

    fn plain_terms(&self, base: Base) -> Result<Signal> {
        let alpha = self.routing().dense(self.f.kind(self.x), self.x.x.device())?;
        let with_base = base == Base::Kept && !self.routing().normalised;
        let mut sum: Option<Signal> = None;
        for (j, h) in self.each()? {
            let term = h.x.mul(&over(&alpha.select(-1, j as i64)?, h.x.dim())?)?;
            sum = Some(match sum {
                None => h.replace(term),
                Some(s) => same_companions(&s, &h)?.replace(s.x.add(&term)?),
            });
        }
        let Some(sum) = sum else {
            return match base {
                Base::Kept => self.f.call(self.x, self.cx),
                Base::Replaced => self.nothing(self.x),
            };
        };
        if !with_base {
            return Ok(sum);
        }
        let y = self.f.call(self.x, self.cx)?;
        let rest = alpha.sum_dims(&[-1], false)?.neg()?.add_scalar(1.0)?;
        Ok(sum.replace(sum.x.add(&y.x.mul(&over(&rest, y.x.dim())?)?)?))
    }

    pub(crate) fn routing(&self) -> &Routing {
        self.active.routing()
    }

    /// An α for each token, which one router for many sites may have made at another one, fits
    /// where x has these tokens.
    fn check_level(&self) -> Result<()> {
        let tokens = match &self.routing().weights {
            Weights::Dense(w) if w.dim() == 3 => w.len_of(1),
            Weights::Sparse { index, .. } if index.dim() == 3 => index.len_of(1),
            Weights::Slots { dispatch, .. } => dispatch.len_of(1),
            _ => return Ok(()),
        };
        let x = &self.x.x;
        let dims = if self.f.site().kind == SiteKind::Embedding { 2 } else { 3 };
        if x.dim() == dims && x.len_of(1) == tokens {
            return Ok(());
        }
        Err(Error::unsupported(
            format!("an α for each of {tokens} tokens where x is {x:?}"),
            "route per example, or leave this site out of the targets",
        ))
    }

    /// Every module on its slots, which are mixtures of a row's tokens.
    fn by_slots(&self, dispatch: &Tensor, combine: &Tensor, base: Base) -> Result<Signal> {
        let site = self.f.site();
        if !site.kind.token_wise() {
            return Err(Error::unsupported(
                format!("mixing tokens at a site of kind {:?}", site.kind),
                "choose sites that take each token by itself: linear layers, sub-layers",
            ));
        }
        let (kind, &[_, seq, _, _]) = (self.f.kind(self.x), dispatch.size().as_slice()) else {
            return Err(Error::invalid("slots", format!("are filled by {dispatch:?}")));
        };
        if let Some((name, t)) =
            self.x.with.iter().find(|(_, t)| t.dim() != 3 || t.len_of(1) != seq)
        {
            let problem =
                format!("`{name}` {t:?} is no vector for each token, which could be mixed");
            return Err(Error::invalid("slots", problem));
        }
        let mut sum: Option<Tensor> = None;
        for (j, _, module) in self.active.modules() {
            let fill = dispatch.select(2, j as i64)?.transpose(1, 2)?; // [batch, slots, seq]
            let mixed = |t: &Tensor| fill.to_kind(t.kind())?.bmm(t);
            let x = Signal { x: mixed(&self.x.x)?, with: self.x.with.map(|_, t| mixed(t))? };
            let h = module.forward(self.f, &x, self.cx)?;
            let y = combine.select(2, j as i64)?.to_kind(kind)?.bmm(&h.x)?; // [batch, seq, dim]
            sum = Some(sum.map_or(Ok(y.clone()), |s| s.add(&y))?);
        }
        let keep = base == Base::Kept && !self.routing().normalised;
        match sum {
            Some(sum) if !keep => Ok(sum.into()),
            sum => {
                let y = self.f.call(self.x, self.cx)?;
                let left = match base {
                    Base::Kept => {
                        let alpha = self.routing().dense(kind, y.x.device())?;
                        let rest = alpha.sum_dims(&[-1], true)?.neg()?.add_scalar(1.0)?;
                        y.x.mul(&rest)?
                    }
                    Base::Replaced => y.x.zeros_like()?,
                };
                Ok(y.replace(sum.map_or(Ok(left.clone()), |s| s.add(&left))?))
            }
        }
    }
}

fn same_companions<'s>(a: &Signal, b: &'s Signal) -> Result<&'s Signal> {
    let same = a.with.len() == b.with.len()
        && a.with.iter().zip(b.with.iter()).all(|((n, s), (m, t))| n == m && s.size() == t.size());
    if same {
        Ok(b)
    } else {
        Err(Error::unsupported(
            "adding up module outputs of different lengths",
            "give the modules the same length, or route each row to one module",
        ))
    }
}
