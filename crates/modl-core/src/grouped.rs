//! Modules on the rows or tokens that are theirs, each computed once.

use std::cell::OnceCell;

use crate::grouping::Grouping;
use crate::{
    Base, Branch, Context, Device, Error, Host, Module, Outputs, Result, Signal, Tensor, Tensors,
    Work, side_by_side, suits_side_by_side,
};

/// What is split among modules: rows, or the tokens of all rows.
struct Units<'a> {
    x: &'a Signal,
    /// So many of them have the context of one row.
    per_row: i64,
    /// From what f gives for the whole batch to what it gives for each unit.
    of_batch: &'a dyn Fn(Signal) -> Result<Signal>,
}

impl Outputs<'_> {
    /// Rows sent to their modules. Where each row has one module of weight 1 the parts are joined,
    /// and may differ in length; else they are weighed and added.
    pub(crate) fn by_rows(&self, rows: &[Vec<(usize, f64)>], base: Base) -> Result<Signal> {
        let alone = |row: &Vec<(usize, f64)>| match row.as_slice() {
            [] => base == Base::Kept,
            [(_, w)] => *w == 1.0,
            _ => false,
        };
        let all_alone = rows.iter().all(alone);
        let width = rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let mut index = Vec::with_capacity(rows.len() * width);
        let mut weight = Vec::with_capacity(rows.len() * width);
        for row in rows {
            let padding = std::iter::repeat_n(&(0, 0.0), width - row.len());
            for (j, w) in row.iter().chain(padding) {
                index.push(if *w == 0.0 { -1 } else { *j as i64 });
                weight.push(*w);
            }
        }
        let shape = [rows.len() as i64, width as i64];
        let index = Tensor::from_slice(&index, &shape, Device::Cpu)?;
        if all_alone {
            return self.joined(&Grouping::new(&index, self.routing().modules)?);
        }
        self.rows_by_choice(&index, &Tensor::from_slice(&weight, &shape, self.device())?, base)
    }

    /// Rows sent to the modules `index` `[batch, k]`, weighed and added.
    pub(crate) fn rows_by_choice(
        &self,
        index: &Tensor,
        weight: &Tensor,
        base: Base,
    ) -> Result<Signal> {
        let units = Units { x: self.input(), per_row: 1, of_batch: &Ok };
        self.grouped(&units, index, weight, base)
    }

    /// Tokens sent to their modules, at sites whose function takes each token by itself.
    pub(crate) fn by_tokens(&self, index: &Tensor, weight: &Tensor, base: Base) -> Result<Signal> {
        let x = self.input();
        let size = x.x.size();
        let &[batch, seq, _] = size.as_slice() else { return self.plain_sum(base) };
        let flatten = |t: &Tensor| t.reshape(&[batch * seq, t.len_of(-1)]);
        let fits = |t: &Tensor| t.dim() == 3 && t.len_of(0) == batch && t.len_of(1) == seq;
        if !x.with.iter().all(|(_, t)| fits(t)) {
            return self.plain_sum(base);
        }
        let flat =
            |s: Signal| Ok(Signal { x: flatten(&s.x)?, with: s.with.map(|_, t| flatten(t))? });
        let tokens = flat(x.clone())?;
        let k = index.len_of(-1);
        let units = Units { x: &tokens, per_row: seq, of_batch: &flat };
        let (index, weight) = (index.reshape(&[-1, k])?, weight.reshape(&[-1, k])?);
        let y = self.grouped(&units, &index, &weight, base)?;
        let unflatten = |t: &Tensor| t.reshape(&[batch, seq, t.len_of(-1)]);
        Ok(Signal { x: unflatten(&y.x)?, with: y.with.map(|_, t| unflatten(t))? })
    }

    fn device(&self) -> Device {
        self.input().x.device()
    }

    /// Each row by its one module, or by f where it has none.
    fn joined(&self, grouping: &Grouping) -> Result<Signal> {
        let (x, cx) = (self.input(), self.context());
        let run = |members: &[i64], module: Option<&dyn Module>| -> Result<Signal> {
            let call = |x: &Signal, cx: &Context| match module {
                Some(m) => m.forward(self.host(), x, cx),
                None => self.host().call(x, cx),
            };
            if members.len() as i64 == x.rows() {
                return call(x, cx); // All of them, in their order.
            }
            let index = Tensor::from_slice(members, &[members.len() as i64], self.device())?;
            call(&x.select_rows(&index)?, &cx.select_rows(members)?)
        };
        let mut members: Vec<Vec<i64>> = Vec::with_capacity(grouping.counts().len());
        let mut rest = grouping.slots();
        for n in grouping.counts() {
            let (own, others) = rest.split_at_checked(*n as usize).unwrap_or((rest, &[]));
            members.push(own.iter().map(|s| grouping.unit(*s)).collect());
            rest = others;
        }
        let last = grouping.last_places();
        let nobodys: Vec<i64> =
            (0..).zip(&last).filter(|(_, place)| place.is_none()).map(|(r, _)| r).collect();
        let mut parts = Vec::new();
        for (j, _, module) in self.active().modules() {
            let own = members.get_mut(j).map(std::mem::take).unwrap_or_default();
            if !own.is_empty() {
                let y = run(&own, Some(module))?;
                parts.push((own, y));
            }
        }
        if !nobodys.is_empty() || parts.is_empty() {
            let y = run(&nobodys, None)?;
            parts.push((nobodys, y));
        }
        match parts.as_slice() {
            [(_, one)] => Ok(one.clone()),
            _ => Signal::join(&parts, x.rows()),
        }
    }

    /// Each module on its units, by one gather, and what comes out weighed and added by one scatter.
    /// f is computed at most once, and only where a module or the base asks for it.
    fn grouped(
        &self,
        units: &Units,
        index: &Tensor,
        weight: &Tensor,
        base: Base,
    ) -> Result<Signal> {
        let keep = base == Base::Kept && !self.routing().normalised;
        let grouping = Grouping::new(index, self.routing().modules)?;
        let whole = OnceCell::new();
        let of_batch = || {
            lazily(&whole, || {
                let y = self.host().call(self.input(), self.context())?;
                (units.of_batch)(y)
            })
        };
        if grouping.is_empty() {
            return match base {
                Base::Kept => of_batch().cloned(),
                Base::Replaced => self.nothing(units.x),
            };
        }
        let order = grouping.units(self.device())?;
        let sorted = units.x.select_rows(&order)?;
        let (y, with) = match self.alone(&grouping, &sorted.x)? {
            Some(y) => (y, units.x.with.clone()),
            None => self.on_host(units, &grouping, &order, &sorted, keep, &of_batch)?,
        };
        let weights = grouping.weights(weight)?;
        let kind = self.host().kind(units.x);
        let sum = grouping.weighted_sum(&y, &weights.to_kind(kind)?)?;
        if keep {
            let none = match grouping.complete() {
                true => weight.clone(),
                false => {
                    weight.masked_fill(&index.to_device(weight.device())?.lt_scalar(0.0)?, 0.0)?
                }
            };
            let rest = none.sum_dims(&[-1], false)?.neg()?.add_scalar(1.0)?.to_kind(kind)?;
            let y = of_batch()?;
            return Ok(y.replace(sum.add(&y.x.mul(&over(&rest, y.x.dim())?)?)?));
        }
        Ok(Signal { x: sum, with })
    }

    /// The outputs of modules that stand alone, sorted as their units are, where that is quicker.
    fn alone(&self, grouping: &Grouping, sorted: &Tensor) -> Result<Option<Tensor>> {
        if !suits_side_by_side(grouping.counts(), self.device()) {
            return Ok(None);
        }
        let site = self.host().site();
        let mut branches = Vec::new();
        for (j, &rows) in grouping.counts().iter().enumerate().filter(|(_, rows)| **rows > 0) {
            let Some(module) = self.active().module(j).filter(|m| m.stands_alone()) else {
                return Ok(None);
            };
            let (names, phi): (Vec<String>, Vec<Tensor>) =
                module.phi().iter().map(|(name, t)| (name.to_owned(), t.clone())).unzip();
            let f = move |own: Vec<Tensor>| -> Result<Work> {
                let mut phi = Tensors::new();
                names.into_iter().zip(own).for_each(|(name, t)| phi.set(name, t));
                let module = module.with_phi(&phi)?;
                Ok(Box::new(move |x| {
                    let (theta, x) = (Tensors::new(), Signal::from(x));
                    let host = Host::new(site, &theta, &no_function);
                    Ok(module.forward(&host, &x, &Context::eval())?.x)
                }))
            };
            branches.push(Branch { rows, phi, f: Box::new(f) });
        }
        side_by_side(sorted, branches).map(Some)
    }

    /// The outputs of modules one after the other, sorted as their units are, and their companions
    /// unless f's are kept.
    fn on_host<'s>(
        &self,
        units: &Units,
        grouping: &Grouping,
        order: &Tensor,
        sorted: &Signal,
        keep: bool,
        of_batch: &dyn Fn() -> Result<&'s Signal>,
    ) -> Result<(Tensor, Tensors)> {
        let parts = grouping.split(sorted)?;
        // f of all units costs less than f of each part where it is wanted anyway, or where the
        // parts are more than all units.
        let share = keep || grouping.len() as i64 >= grouping.all_units();
        let pieces = OnceCell::new();
        let of_parts = || {
            lazily(&pieces, || {
                let y = of_batch()?;
                let mut pieces = grouping.split(&y.x.index_select(0, order)?.into())?;
                for (name, t) in y.with.iter() {
                    let own: Vec<Tensor> = match same(units.x.with.get(name), Some(t)) {
                        true => parts
                            .iter()
                            .map(|p| p.with.need(name).cloned())
                            .collect::<Result<_>>()?,
                        false => grouping.parts(&t.index_select(0, order)?)?,
                    };
                    for (piece, t) in pieces.iter_mut().zip(own) {
                        piece.with.set(name.to_owned(), t);
                    }
                }
                Ok(pieces)
            })
        };
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        let mut slots = grouping.slots();
        for (j, x) in parts.iter().enumerate().filter(|(_, x)| x.rows() > 0) {
            let (own, others) = slots.split_at_checked(x.rows() as usize).unwrap_or((slots, &[]));
            slots = others;
            let module = self.active().module(j).ok_or_else(|| {
                Error::invalid("routing", format!("module {j} is none of the bank's"))
            })?;
            let rows: Vec<i64> = own.iter().map(|s| grouping.unit(*s) / units.per_row).collect();
            let f = |theta: &Tensors, z: &Signal, cx: &Context| {
                if share && std::ptr::eq(z, x) && std::ptr::eq(theta, self.host().theta()) {
                    let known = of_parts()?.get(j).cloned();
                    return known.ok_or_else(|| Error::invalid("routing", "has no such part"));
                }
                self.host().call_with(theta, z, cx)
            };
            let host = self.host().around(self.host().theta(), &f);
            outputs.push(module.forward(&host, x, &self.context().select_rows(&rows)?)?);
            inputs.push(x);
        }
        let with = match keep {
            true => Tensors::new(),
            false => companions(units.x, &inputs, &outputs, grouping)?,
        };
        Ok((stacked(&outputs, |s| Ok(&s.x))?, with))
    }

    /// What comes out where modules stand for themselves and there is none.
    pub(crate) fn nothing(&self, x: &Signal) -> Result<Signal> {
        let site = self.host().site();
        if site.kind.token_wise() {
            let mut shape = x.x.size();
            if let Some(width) = shape.last_mut() {
                *width = site.output;
            }
            return Ok(x.replace(Tensor::zeros(&shape, self.host().kind(x), self.device())?));
        }
        let y = self.host().call(x, self.context())?;
        Ok(y.replace(y.x.zeros_like()?))
    }
}

/// What a module that stands alone has for f.
fn no_function(_: &Tensors, _: &Signal, _: &Context) -> Result<Signal> {
    Err(Error::unsupported(
        "f_θ in a module that stands alone",
        "let `Module::stands_alone` say no, as it does by default",
    ))
}

/// The value in a cell, made on the first call.
fn lazily<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(known) = cell.get() {
        return Ok(known);
    }
    let made = make()?;
    Ok(cell.get_or_init(|| made))
}

/// Whether both are the same piece of memory.
fn same(a: Option<&Tensor>, b: Option<&Tensor>) -> bool {
    a.zip(b).is_some_and(|(a, b)| a.shares(b) && a.size() == b.size())
}

/// One tensor of each output below one another.
fn stacked<'s>(
    outputs: &'s [Signal],
    of: impl Fn(&'s Signal) -> Result<&'s Tensor>,
) -> Result<Tensor> {
    let all: Vec<Tensor> = outputs.iter().map(|s| of(s).cloned()).collect::<Result<_>>()?;
    let tail = |t: &Tensor| t.size().split_off(1);
    if let Some(first) = all.first()
        && let Some(other) = all.iter().find(|t| tail(t) != tail(first))
    {
        return Err(Error::unsupported(
            format!("adding up {first:?} and {other:?}, outputs of different lengths"),
            "give the modules the same length, or route each row to one module",
        ));
    }
    match all.as_slice() {
        [one] => Ok(one.clone()),
        _ => Tensor::cat(&all, 0),
    }
}

/// The companions of the sum: those of x where modules hand them on as they are; else each unit has
/// those of its last module, and zeros where it has none.
fn companions(
    x: &Signal,
    inputs: &[&Signal],
    outputs: &[Signal],
    grouping: &Grouping,
) -> Result<Tensors> {
    let Some(first) = outputs.first() else { return Ok(x.with.clone()) };
    first.with.map(|name, _| {
        let handed_on = |(x, y): (&&Signal, &Signal)| same(x.with.get(name), y.with.get(name));
        if inputs.iter().zip(outputs).all(handed_on) {
            return x.with.need(name).cloned();
        }
        let all = stacked(outputs, |s| s.with.need(name))?;
        let last = grouping.last_places();
        let places: Vec<i64> = last.iter().filter_map(|p| *p).collect();
        let pick = |v: &[i64]| Tensor::from_slice(v, &[v.len() as i64], all.device());
        let picked = all.index_select(0, &pick(&places)?)?;
        if places.len() == last.len() {
            return Ok(picked);
        }
        let here: Vec<i64> =
            (0..).zip(&last).filter(|(_, p)| p.is_some()).map(|(unit, _)| unit).collect();
        let mut shape = all.size();
        if let Some(n) = shape.first_mut() {
            *n = grouping.all_units();
        }
        Tensor::zeros(&shape, all.kind(), all.device())?.index_copy(0, &pick(&here)?, &picked)
    })
}

/// α with as many trailing dimensions of length 1 as it takes to weigh a tensor of `dims`.
pub(crate) fn over(alpha: &Tensor, dims: usize) -> Result<Tensor> {
    (alpha.dim()..dims)
        .try_fold(alpha.clone(), |a, _| if a.dim() == 0 { Ok(a) } else { a.unsqueeze(-1) })
}
