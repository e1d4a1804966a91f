//! Runs a [`Composition`] at each site.
//!
//! The router says which modules are active, each with the same weight, and the composition what
//! becomes of them; it has to name all that are active. Two equal fusions are one, as in AdapterHub.
//!
//! Where AdapterHub 1.3 does otherwise: its `Average` divides the weighted sum by the number of parts
//! once more; its fusion of a stack sees only what the last module of the stack adds, and here what
//! the whole stack changes; in a stack within another block it puts a second norm before the first
//! adapter behind the norm.

use std::collections::BTreeMap;

use modl_core::{
    Aggregator, AggregatorConfig, Context, Error, Host, Module, Order, Outputs, Result, Routing,
    Scope, Signal, Site, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Composition;
use crate::attention::Fused;
use crate::changes::Changes;
use crate::stack::in_order;

/// A composition of modules.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Compose {
    /// What is run. Default: the base function.
    pub composition: Composition,
}

impl AggregatorConfig for Compose {
    fn kind(&self) -> &'static str {
        "compose"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("compose", self)
    }

    fn build(&self, site: &Site, scope: &mut Scope) -> Result<Box<dyn Aggregator>> {
        self.composition.check()?;
        let mut fusions = BTreeMap::new();
        fusions_of(&self.composition, site, scope, &mut fusions)?;
        Ok(Box::new(Composed { composition: self.composition.clone(), fusions }))
    }
}

/// The fusions of a composition by name.
fn fusions_of(
    composition: &Composition,
    site: &Site,
    scope: &mut Scope,
    all: &mut BTreeMap<String, Fused>,
) -> Result<()> {
    if let Composition::Fuse(parts, config) = composition {
        let name = Composition::name_of(parts);
        match all.get(&name) {
            None => {
                let fused = config.at(site, &mut scope.sub(&name))?;
                all.insert(name, fused);
            }
            Some(known) if known.config() != config => {
                let problem = "is there twice, with different settings";
                return Err(Error::invalid(format!("fusion `{name}`"), problem));
            }
            Some(_) => {}
        }
    }
    composition.parts().iter().try_for_each(|part| fusions_of(part, site, scope, all))
}

#[derive(Debug)]
struct Composed {
    composition: Composition,
    fusions: BTreeMap<String, Fused>,
}

impl Aggregator for Composed {
    fn kind(&self) -> &'static str {
        "compose"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        h.active().per_alpha(h.input(), h.context(), |active, x, cx| {
            let modules: BTreeMap<&str, &dyn Module> =
                in_order("compose", active)?.into_iter().collect();
            let named = self.composition.modules();
            if let Some(name) = modules.keys().find(|name| !named.contains(name)) {
                return Err(Error::unsupported(
                    format!("a composition without the active module `{name}`"),
                    format!("it names {}; name all, or route to those alone", named.join(", ")),
                ));
            }
            let here = Here { modules: &modules, fusions: &self.fusions };
            here.run(&self.composition, h.host(), x, cx)
        })
    }

    fn penalty(&self, cx: &Context) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for fused in self.fusions.values() {
            let Some(own) = fused.penalty(cx)? else { continue };
            sum = Some(sum.map_or_else(|| Ok(own.clone()), |s| s.add(&own))?);
        }
        Ok(sum)
    }

    fn after_step(&self, done: u64, total: u64) -> Result<()> {
        self.fusions.values().try_for_each(|fused| fused.after_step(done, total))
    }
}

/// What stands at a site for some rows.
struct Here<'a> {
    modules: &'a BTreeMap<&'a str, &'a dyn Module>,
    fusions: &'a BTreeMap<String, Fused>,
}

impl Here<'_> {
    fn run(&self, c: &Composition, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        match c {
            Composition::Module(name) => match self.modules.get(name.as_str()) {
                Some(module) => module.forward(f, x, cx),
                None => f.call(x, cx),
            },
            Composition::Stack(parts) => self.stack(parts, f, f.theta(), x, cx),
            Composition::Average(parts, weights) => {
                let all = self.each(parts, f, x, cx)?;
                mean(&all, weights.as_deref())
            }
            Composition::Fuse(parts, _) => {
                let name = Composition::name_of(parts);
                let here = |c: &&Composition| {
                    c.modules().iter().any(|name| self.modules.contains_key(name))
                };
                let parts: Vec<&Composition> = parts.iter().filter(here).collect();
                let fused = self
                    .fusions
                    .get(&name)
                    .ok_or_else(|| Error::unknown("fusion", &name, self.fusions.keys()))?;
                f.sharing(x, || {
                    let base = f.call(x, cx)?;
                    let all = parts.iter().map(|part| self.run(part, f, x, cx));
                    let all = all.collect::<Result<Vec<_>>>()?;
                    same_size(&all, &base)?;
                    fused.fuse(&Changes::between(base, &all)?, f, x, cx)
                })
            }
            Composition::Split(parts, splits) => self.split(parts, splits, f, x, cx),
            Composition::BatchSplit(parts, sizes) => self.batch_split(parts, sizes, f, x, cx),
            Composition::Parallel(parts) => {
                let (rows, n) = (x.rows(), parts.len() as i64);
                if rows % n.max(1) != 0 {
                    let problem = format!(
                        "has {rows} rows for {n} parallel parts; repeat it with Composition::repeat"
                    );
                    return Err(Error::invalid("batch", problem));
                }
                self.batch_split(parts, &vec![rows / n.max(1); parts.len()], f, x, cx)
            }
        }
    }

    fn each(
        &self,
        parts: &[Composition],
        f: &Host,
        x: &Signal,
        cx: &Context,
    ) -> Result<Vec<Signal>> {
        f.sharing(x, || parts.iter().map(|part| self.run(part, f, x, cx)).collect())
    }

    /// The last part with the ones before it as its base function.
    fn stack(
        &self,
        parts: &[Composition],
        f: &Host,
        theta: &Tensors,
        x: &Signal,
        cx: &Context,
    ) -> Result<Signal> {
        let Some((last, before)) = parts.split_last() else { return f.call_with(theta, x, cx) };
        let base = |theta: &Tensors, x: &Signal, cx: &Context| self.stack(before, f, theta, x, cx);
        self.run(last, &f.around(theta, &base), x, cx)
    }

    fn split(
        &self,
        parts: &[Composition],
        splits: &[i64],
        f: &Host,
        x: &Signal,
        cx: &Context,
    ) -> Result<Signal> {
        let (site, seq) = (f.site(), x.x.len_of(1));
        if !site.kind.token_wise() || x.x.dim() != 3 {
            return Err(Error::unsupported(
                format!("splitting the tokens at a site of kind {:?}", site.kind),
                "choose sites that take each token by itself: linear layers, sub-layers",
            ));
        }
        if splits.iter().sum::<i64>() != seq {
            let problem = format!("{splits:?} do not make up the {seq} tokens of a row");
            return Err(Error::invalid("composition.split.splits", problem));
        }
        let mut from = 0;
        let mut all = Vec::with_capacity(parts.len());
        for (part, length) in parts.iter().zip(splits) {
            let own = |t: &Tensor| match t.dim() >= 2 && t.len_of(1) == seq {
                true => t.narrow(1, from, *length),
                false => Ok(t.clone()),
            };
            let tokens = Signal { x: own(&x.x)?, with: x.with.map(|_, t| own(t))? };
            all.push(self.run(part, f, &tokens, cx)?.x);
            from += length;
        }
        Ok(x.replace(Tensor::cat(&all, 1)?))
    }

    fn batch_split(
        &self,
        parts: &[Composition],
        sizes: &[i64],
        f: &Host,
        x: &Signal,
        cx: &Context,
    ) -> Result<Signal> {
        let rows = x.rows();
        if sizes.iter().sum::<i64>() != rows {
            let problem = format!("{sizes:?} do not make up the {rows} rows of the batch");
            return Err(Error::invalid("composition.batch_split.batch_sizes", problem));
        }
        let mut from = 0;
        let mut all = Vec::with_capacity(parts.len());
        for (part, size) in parts.iter().zip(sizes).filter(|(_, size)| **size > 0) {
            let own: Vec<i64> = (from..from + size).collect();
            let index = Tensor::from_slice(&own, &[*size], x.x.device())?;
            let y = self.run(part, f, &x.select_rows(&index)?, &cx.select_rows(&own)?)?;
            all.push((own, y));
            from += size;
        }
        if all.is_empty() { f.call(x, cx) } else { Signal::join(&all, rows) }
    }
}

/// Σ wⱼ hⱼ ⁄ Σ wⱼ.
fn mean(all: &[Signal], weights: Option<&[f64]>) -> Result<Signal> {
    let nothing = || Error::invalid("composition.average", "has no parts");
    let first = all.first().ok_or_else(nothing)?;
    same_size(all, first)?;
    let total = weights.map_or(all.len() as f64, |w| w.iter().sum());
    let mut sum: Option<Tensor> = None;
    for (j, h) in all.iter().enumerate() {
        let w = weights.and_then(|w| w.get(j)).copied().unwrap_or(1.0) / total;
        let term = h.x.mul_scalar(w)?;
        sum = Some(sum.map_or_else(|| Ok(term.clone()), |s| s.add(&term))?);
    }
    Ok(first.replace(sum.ok_or_else(nothing)?))
}

fn same_size(all: &[Signal], like: &Signal) -> Result<()> {
    match all.iter().find(|h| h.x.size() != like.x.size()) {
        None => Ok(()),
        Some(h) => Err(Error::unsupported(
            format!("combining outputs of {:?} and {:?}", h.x.size(), like.x.size()),
            "give the parts the same length, or split the batch among them",
        )),
    }
}
