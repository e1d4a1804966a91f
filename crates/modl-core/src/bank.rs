//! The inventory of modules at a site, and the part of it that is active.

use std::collections::HashMap;

use crate::{
    Context, Error, Host, Kind, Level, Module, Outputs, Result, Routing, Signal, Tensor, Weights,
};

/// M = {f_φ1, …, f_φm}: the named modules at a site, in the order in which they were added.
#[derive(Debug, Default)]
pub struct Bank {
    names: Vec<String>,
    modules: Vec<Box<dyn Module>>,
    /// Where each name stands, so that a bank of thousands is as quick as one of two.
    places: HashMap<String, usize>,
}

impl Bank {
    /// No modules yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a module.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken.
    pub fn insert(&mut self, name: impl Into<String>, module: Box<dyn Module>) -> Result<()> {
        self.insert_at(self.len(), name, module)
    }

    /// Adds a module in front of the one at `j`.
    pub(crate) fn insert_at(
        &mut self,
        j: usize,
        name: impl Into<String>,
        module: Box<dyn Module>,
    ) -> Result<()> {
        let name = name.into();
        if self.places.contains_key(&name) {
            return Err(Error::Duplicate { kind: "module", name });
        }
        let j = j.min(self.len());
        self.places.values_mut().filter(|place| **place >= j).for_each(|place| *place += 1);
        self.places.insert(name.clone(), j);
        self.names.insert(j, name);
        self.modules.insert(j, module);
        Ok(())
    }

    /// Takes a module out.
    pub fn remove(&mut self, name: &str) -> Option<Box<dyn Module>> {
        let j = self.places.remove(name)?;
        self.names.remove(j);
        self.places.values_mut().filter(|place| **place > j).for_each(|place| *place -= 1);
        Some(self.modules.remove(j))
    }

    /// The names in order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The place of a module in α.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    pub fn position(&self, name: &str) -> Result<usize> {
        let at = self.places.get(name).copied();
        at.ok_or_else(|| Error::unknown("module", name, &self.names))
    }

    /// The module at a place in α.
    pub fn module(&self, j: usize) -> Option<&dyn Module> {
        self.modules.get(j).map(|m| m.as_ref())
    }

    /// The number of modules.
    pub fn len(&self) -> usize {
        self.modules.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// K = {j : αⱼ ≠ 0}.
    ///
    /// # Errors
    /// Where α does not fit this bank or the batch.
    pub fn select<'a>(&'a self, routing: &Routing, rows: i64) -> Result<Active<'a>> {
        routing.check(self.len(), rows)?;
        Ok(Active { bank: self, support: routing.support()?, routing: routing.clone() })
    }
}

/// The active modules with their α.
#[derive(Debug)]
pub struct Active<'a> {
    bank: &'a Bank,
    routing: Routing,
    support: Vec<usize>,
}

impl<'a> Active<'a> {
    /// The routing that made them active.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// Places in α, names and modules.
    pub fn modules(&self) -> impl Iterator<Item = (usize, &'a str, &'a dyn Module)> + '_ {
        let entry =
            |j: &usize| Some((*j, self.bank.names.get(*j)?.as_str(), self.bank.module(*j)?));
        self.support.iter().filter_map(entry)
    }

    /// The module at a place in α.
    pub(crate) fn module(&self, j: usize) -> Option<&'a dyn Module> {
        self.bank.module(j)
    }

    /// The number of active modules.
    pub fn len(&self) -> usize {
        self.support.len()
    }

    /// Whether none is active: only f_θ is left.
    pub fn is_empty(&self) -> bool {
        self.support.is_empty()
    }

    /// α of the active modules where it is the same for the whole batch: `[k]` in f64 for constants
    /// or the router's kind where gradients flow.
    ///
    /// # Errors
    /// Where rows or tokens have an α of their own.
    pub fn alpha(&self) -> Result<Tensor> {
        if self.routing.level() != Level::Static {
            return Err(Error::unsupported(
                "an α per row where one for all is wanted",
                "split the batch with Active::per_alpha",
            ));
        }
        let (kind, device) = match &self.routing.weights {
            Weights::Dense(w) => (w.kind(), w.device()),
            _ => (Kind::Double, crate::Device::Cpu),
        };
        let index: Vec<i64> = self.support.iter().map(|j| *j as i64).collect();
        let index = Tensor::from_slice(&index, &[index.len() as i64], device)?;
        self.routing.dense(kind, device)?.index_select(0, &index)
    }

    /// hⱼ = f'(x; θ, φⱼ), computed when the aggregator asks for it and in the way that it asks.
    pub fn compute<'b>(&'b self, f: &'b Host<'b>, x: &'b Signal, cx: &'b Context) -> Outputs<'b> {
        Outputs::new(self, f, x, cx)
    }

    /// The rows of `alpha` `[batch, m]` in groups of one α. Where gradients flow through α each row has
    /// its own: equal numbers may come of different inputs, whose gradients differ.
    fn alike(&self, alpha: &Tensor) -> Result<Vec<Vec<i64>>> {
        let rows = alpha.len_of(0);
        let heads = self.routing.heads.as_ref();
        if alpha.requires_grad() || heads.is_some_and(Tensor::requires_grad) {
            return Ok((0..rows).map(|r| vec![r]).collect());
        }
        let bits = |t: &Tensor| -> Result<Vec<Vec<u64>>> {
            let width = (t.numel() / rows.max(1) as usize).max(1);
            let all: Vec<u64> = t.to_vec::<f64>()?.into_iter().map(f64::to_bits).collect();
            Ok(all.chunks(width).map(<[u64]>::to_vec).collect())
        };
        let mut keys = bits(alpha)?;
        if let Some(heads) = heads.filter(|h| h.dim() == 3) {
            keys.iter_mut().zip(bits(heads)?).for_each(|(key, own)| key.extend(own));
        }
        let (mut places, mut groups) = (HashMap::new(), Vec::<Vec<i64>>::new());
        for (r, key) in (0..).zip(keys) {
            let place = *places.entry(key).or_insert(groups.len());
            match groups.get_mut(place) {
                Some(group) => group.push(r),
                None => groups.push(vec![r]),
            }
        }
        Ok(groups)
    }

    /// Runs `work` once for each different α: on the whole batch where it is static, else on the
    /// rows that share one.
    ///
    /// # Errors
    /// Where tokens have an α of their own: parameters are merged per example at most.
    pub fn per_alpha(
        &self,
        x: &Signal,
        cx: &Context,
        work: impl Fn(&Active, &Signal, &Context) -> Result<Signal>,
    ) -> Result<Signal> {
        let groups: Vec<(Vec<i64>, Weights)> = match &self.routing.weights {
            Weights::Fixed(_) => return work(self, x, cx),
            Weights::Dense(w) if w.dim() == 1 => return work(self, x, cx),
            Weights::Rows(rows) => {
                let mut members: Vec<Vec<i64>> = Vec::new();
                for (r, row) in (0..).zip(rows) {
                    // Rows with heads of their own are alone.
                    let alone = self.routing.heads.as_ref().is_some_and(|h| h.dim() == 3);
                    let alike = |m: &&mut Vec<i64>| !alone && rows.get(m[0] as usize) == Some(row);
                    match members.iter_mut().find(alike) {
                        Some(m) => m.push(r),
                        None => members.push(vec![r]),
                    }
                }
                let alpha = |m: &Vec<i64>| Weights::Fixed(rows[m[0] as usize].clone());
                members.into_iter().map(|m| (m.clone(), alpha(&m))).collect()
            }
            _ if self.routing.level() == Level::Token => {
                return Err(Error::unsupported(
                    "merging parameters for each token",
                    "route per example, or aggregate outputs",
                ));
            }
            _ => {
                let kind = match &self.routing.weights {
                    Weights::Dense(w) | Weights::Sparse { weight: w, .. } => w.kind(),
                    _ => Kind::Float,
                };
                let alpha = self.routing.dense(kind, x.x.device())?;
                let row = |m: Vec<i64>| {
                    let first = m.first().copied().unwrap_or_default();
                    Ok((m, Weights::Dense(alpha.select(0, first)?)))
                };
                self.alike(&alpha)?.into_iter().map(row).collect::<Result<_>>()?
            }
        };
        let nobody = groups.is_empty().then(|| (Vec::new(), Weights::Fixed(Vec::new())));
        let mut parts = Vec::with_capacity(groups.len());
        for (rows, weights) in groups.into_iter().chain(nobody) {
            let index = Tensor::from_slice(&rows, &[rows.len() as i64], x.x.device())?;
            let routing = match rows.first() {
                Some(row) => self.routing.with_row(weights, *row)?,
                None => self.routing.with_weights(weights),
            };
            let active = self.bank.select(&routing, rows.len() as i64)?;
            let y = work(&active, &x.select_rows(&index)?, &cx.select_rows(&rows)?)?;
            parts.push((rows, y));
        }
        Signal::join(&parts, x.rows())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, LowRank};

    /// Rows of one α go together, in whatever order they come, unless gradients flow through α.
    #[test]
    fn rows_of_one_alpha_are_computed_together() {
        let zero = Tensor::zeros(&[1, 1], Kind::Float, Device::Cpu).unwrap();
        let thin = LowRank { down: zero.clone(), up: zero, scale: 1.0 };
        let mut bank = Bank::new();
        for name in ["a", "b"] {
            bank.insert(name, Box::new(thin.clone())).unwrap();
        }
        let numbers = [0.5f32, 0.5, 0.1, 0.9, 0.5, 0.5, 0.1, 0.9];
        let alpha = Tensor::from_slice(&numbers, &[4, 2], Device::Cpu).unwrap();
        let learned = alpha.copy().unwrap();
        learned.set_requires_grad(true).unwrap();
        let x =
            Signal::from(Tensor::from_slice(&[1f32, 2., 3., 4.], &[4, 1], Device::Cpu).unwrap());
        for (alpha, expected) in [
            (alpha, vec![vec![1., 3.], vec![2., 4.]]),
            (learned, vec![vec![1.], vec![2.], vec![3.], vec![4.]]),
        ] {
            let routing = Routing::new(Weights::Dense(alpha), 2);
            let active = bank.select(&routing, 4).unwrap();
            let calls = std::cell::RefCell::new(Vec::<Vec<f32>>::new());
            let y = active.per_alpha(&x, &Context::eval(), |own, x, _| {
                calls.borrow_mut().push(x.x.to_vec::<f32>()?);
                let first = own.alpha()?.select(0, 0)?;
                Ok(x.replace(x.x.mul(&first)?))
            });
            let y = y.unwrap().x.to_vec::<f32>().unwrap();
            for (y, wanted) in y.iter().zip([0.5f32, 0.2, 1.5, 0.4]) {
                assert!((y - wanted).abs() < 1e-6);
            }
            assert_eq!(calls.into_inner(), expected);
        }
    }

    #[test]
    fn places_follow_the_names_when_a_module_goes() {
        let zero = Tensor::zeros(&[1, 1], Kind::Float, Device::Cpu).unwrap();
        let thin = LowRank { down: zero.clone(), up: zero, scale: 1.0 };
        let mut bank = Bank::new();
        for name in ["a", "b", "c", "d"] {
            bank.insert(name, Box::new(thin.clone())).unwrap();
        }
        assert!(bank.insert("b", Box::new(thin.clone())).is_err());
        assert!(bank.remove("b").is_some() && bank.remove("b").is_none());
        bank.insert("e", Box::new(thin.clone())).unwrap();
        bank.insert("b", Box::new(thin)).unwrap();
        assert_eq!(bank.names(), ["a", "c", "d", "e", "b"]);
        for (place, name) in bank.names().iter().enumerate() {
            assert_eq!(bank.position(name).unwrap(), place);
        }
        assert!(bank.position("x").is_err());
    }
}
