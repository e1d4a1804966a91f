//! Running the active modules: the plain way, and the fast ways that give the same.

use crate::{
    Active, Context, Device, Error, Host, Module, Result, Routing, Signal, SiteKind, Tensor,
    Tensors, Weights,
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

/// One module with the rows or tokens that it gets and their weights `[n]`.
struct Group<'a> {
    module: &'a dyn Module,
    units: Vec<i64>,
    weight: Tensor,
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
        self.f.sharing(self.x, self.cx, || {
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
                self.scatter(self.x, &self.groups(index, weight)?, base, 1)
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
            let y = self.f.call(self.x, self.cx)?;
            return if base == Base::Kept { Ok(y) } else { Ok(y.replace(y.x.zeros_like()?)) };
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

    /// Rows sent to their modules. Where each row has one module of weight 1 the parts are joined,
    /// and may differ in length; else they are weighed and added.
    fn by_rows(&self, rows: &[Vec<(usize, f64)>], base: Base) -> Result<Signal> {
        let alone = |row: &Vec<(usize, f64)>| match row.as_slice() {
            [] => base == Base::Kept,
            [(_, w)] => *w == 1.0,
            _ => false,
        };
        if !rows.iter().all(alone) {
            let width = rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
            let mut index = Vec::with_capacity(rows.len() * width);
            let mut weight = Vec::with_capacity(rows.len() * width);
            for row in rows {
                let padding = std::iter::repeat_n(&(usize::MAX, 0.0), width - row.len());
                for (j, w) in row.iter().chain(padding) {
                    index.push(if *j == usize::MAX { -1 } else { *j as i64 });
                    weight.push(*w);
                }
            }
            let shape = [rows.len() as i64, width as i64];
            let index = Tensor::from_slice(&index, &shape, Device::Cpu)?;
            let weight = Tensor::from_slice(&weight, &shape, self.x.x.device())?;
            return self.scatter(self.x, &self.groups(&index, &weight)?, base, 1);
        }
        let mut parts = Vec::new();
        let mut run = |members: Vec<i64>, module: Option<&dyn Module>| -> Result<()> {
            if members.is_empty() {
                return Ok(());
            }
            let index = Tensor::from_slice(&members, &[members.len() as i64], self.x.x.device())?;
            let x = self.x.select_rows(&index)?;
            let y = match module {
                Some(m) => m.forward(self.f, &x, &self.cx.select_rows(&members)?)?,
                None => self.f.call(&x, &self.cx.select_rows(&members)?)?,
            };
            parts.push((members, y));
            Ok(())
        };
        let members = |wanted: Option<usize>| -> Vec<i64> {
            let is = |row: &Vec<(usize, f64)>| row.first().map(|(j, _)| *j) == wanted;
            (0..).zip(rows).filter(|(_, row)| is(row)).map(|(r, _)| r).collect()
        };
        for (j, _, module) in self.active.modules() {
            run(members(Some(j)), Some(module))?;
        }
        run(members(None), None)?;
        Signal::join(&parts, self.x.rows())
    }

    /// Tokens sent to their modules, at sites whose function takes each token by itself.
    fn by_tokens(&self, index: &Tensor, weight: &Tensor, base: Base) -> Result<Signal> {
        let size = self.x.x.size();
        let &[batch, seq, _] = size.as_slice() else { return self.plain_sum(base) };
        let flatten = |t: &Tensor| t.reshape(&[batch * seq, t.len_of(-1)]);
        let fits = |t: &Tensor| t.dim() == 3 && t.len_of(0) == batch && t.len_of(1) == seq;
        if !self.x.with.iter().all(|(_, t)| fits(t)) {
            return self.plain_sum(base);
        }
        let with = self.x.with.map(|_, t| flatten(t))?;
        let flat = Signal { x: flatten(&self.x.x)?, with };
        let k = index.len_of(-1);
        let groups = self.groups(&index.reshape(&[-1, k])?, &weight.reshape(&[-1, k])?)?;
        let y = self.scatter(&flat, &groups, base, seq)?;
        let unflatten = |t: &Tensor| t.reshape(&[batch, seq, t.len_of(-1)]);
        Ok(Signal { x: unflatten(&y.x)?, with: y.with.map(|_, t| unflatten(t))? })
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

    /// The units of each active module by `index` and `weight` `[units, k]`; −1 stands for none.
    fn groups(&self, index: &Tensor, weight: &Tensor) -> Result<Vec<Group<'_>>> {
        let k = index.len_of(-1).max(1);
        let chosen = index.to_vec::<i64>()?;
        let flat = weight.reshape(&[-1])?;
        let mut groups = Vec::new();
        for (j, _, module) in self.active.modules() {
            let slots: Vec<i64> =
                (0..).zip(&chosen).filter(|(_, c)| **c == j as i64).map(|(s, _)| s).collect();
            if slots.is_empty() {
                continue;
            }
            let at = Tensor::from_slice(&slots, &[slots.len() as i64], flat.device())?;
            let units = slots.iter().map(|s| s / k).collect();
            groups.push(Group { module, units, weight: flat.index_select(0, &at)? });
        }
        Ok(groups)
    }

    /// Runs each group on its units of x and adds up what comes out; `per_row` units make a row
    /// of the context.
    fn scatter(&self, x: &Signal, groups: &[Group], base: Base, per_row: i64) -> Result<Signal> {
        let keep = base == Base::Kept && !self.routing().normalised;
        let (kind, device) = (self.f.kind(x), x.x.device());
        let mut rest = Tensor::ones(&[x.rows()], kind, device)?;
        let mut sum = None;
        let mut with = Tensors::new();
        for g in groups {
            let index = Tensor::from_slice(&g.units, &[g.units.len() as i64], device)?;
            let rows: Vec<i64> = g.units.iter().map(|u| u / per_row).collect();
            let h =
                g.module.forward(self.f, &x.select_rows(&index)?, &self.cx.select_rows(&rows)?)?;
            let weight = g.weight.to_kind(kind)?;
            rest = rest.index_add(0, &index, &weight.neg()?)?;
            let term = h.x.mul(&over(&weight, h.x.dim())?)?;
            let room = |t: &Tensor| {
                let shape: Vec<i64> = [x.rows()].into_iter().chain(t.size().split_off(1)).collect();
                Tensor::zeros(&shape, t.kind(), device)
            };
            let before = sum.map_or_else(|| room(&h.x), Ok)?;
            sum = Some(before.index_add(0, &index, &term)?);
            for (name, t) in h.with.iter() {
                let before = with.get(name).cloned().map_or_else(|| room(t), Ok)?;
                with.set(name.to_owned(), before.index_copy(0, &index, t)?);
            }
        }
        match sum {
            Some(x) if !keep => Ok(Signal { x, with }),
            sum => {
                let rows: Vec<i64> = (0..x.rows()).map(|u| u / per_row).collect();
                let of_units = (per_row > 1).then(|| self.cx.select_rows(&rows)).transpose()?;
                let y = self.f.call(x, of_units.as_ref().unwrap_or(self.cx))?;
                let rest = over(&rest, y.x.dim())?;
                let kept = if keep { y.x.mul(&rest)? } else { y.x.zeros_like()? };
                Ok(y.replace(sum.map_or(Ok(kept.clone()), |s| s.add(&kept))?))
            }
        }
    }
}

/// α with as many trailing dimensions of length 1 as it takes to weigh a tensor of `dims`.
fn over(alpha: &Tensor, dims: usize) -> Result<Tensor> {
    (alpha.dim()..dims)
        .try_fold(alpha.clone(), |a, _| if a.dim() == 0 { Ok(a) } else { a.unsqueeze(-1) })
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
