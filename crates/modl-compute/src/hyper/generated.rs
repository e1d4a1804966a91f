//! A generated module at one site: any module whose φ is made by a network, φ = G_η(z).

use std::sync::Arc;

use modl_core::{Context, Error, Host, LowRank, Module, Result, Signal, Tensor, Tensors};

use super::network::{Generator, Part};
use super::source::{Group, Source, groups, is_static};

/// What does not change when η does.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) kind: &'static str,
    pub(super) sources: Vec<Source>,
    pub(super) parts: Vec<Part>,
    pub(super) generator: Box<dyn Generator>,
}

/// A generated module. Rows of a batch with different z get modules of their own.
#[derive(Debug)]
pub(super) struct Generated {
    pub(super) plan: Arc<Plan>,
    /// A module of the kind that is generated; its φ is nobody's.
    pub(super) inner: Box<dyn Module>,
    /// η: embeddings and networks.
    pub(super) eta: Tensors,
}

impl Generated {
    fn groups(&self, cx: &Context) -> Result<Vec<Group>> {
        let Some((_, like)) = self.eta.iter().next() else {
            return Err(Error::invalid(self.plan.kind, "generates nothing"));
        };
        groups(&self.plan.sources, &self.eta, like, cx)
    }

    /// The module for one z.
    fn of(&self, z: &Tensor) -> Result<Box<dyn Module>> {
        let made = self.plan.generator.generate(&self.eta, z, &self.plan.parts)?;
        let mut phi = Tensors::new();
        for (part, t) in self.plan.parts.iter().zip(made) {
            let t = t.reshape(&part.shape)?;
            let t = if part.offset == 0.0 { t } else { t.add_scalar(part.offset)? };
            phi.set(part.name.clone(), t);
        }
        self.inner.with_phi(&phi)
    }

    /// The module where it is one for the whole batch.
    fn only(&self, cx: &Context) -> Result<Option<Box<dyn Module>>> {
        match self.groups(cx)?.as_slice() {
            [group] => self.of(&group.z).map(Some),
            _ => Ok(None),
        }
    }

    /// Runs `work` with the module of each group on that group's rows.
    fn each(
        &self,
        x: &Signal,
        cx: &Context,
        work: impl Fn(&dyn Module, &Signal, &Context) -> Result<Option<Signal>>,
    ) -> Result<Option<Signal>> {
        let groups = self.groups(cx)?;
        let told: usize = groups.iter().map(|g| g.rows.len()).sum();
        if !is_static(&self.plan.sources) && told as i64 != x.rows() {
            let problem = format!("speaks of {told} rows where the batch has {}", x.rows());
            return Err(Error::invalid("context", problem));
        }
        if let [group] = groups.as_slice() {
            return work(self.of(&group.z)?.as_ref(), x, cx);
        }
        let mut parts = Vec::with_capacity(groups.len());
        for Group { rows, z } in groups {
            let index = Tensor::from_slice(&rows, &[rows.len() as i64], x.x.device())?;
            let (x, cx) = (x.select_rows(&index)?, cx.select_rows(&rows)?);
            let Some(y) = work(self.of(&z)?.as_ref(), &x, &cx)? else { return Ok(None) };
            parts.push((rows, y));
        }
        Signal::join(&parts, x.rows()).map(Some)
    }
}

impl Module for Generated {
    fn kind(&self) -> &'static str {
        self.plan.kind
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = self.each(x, cx, |module, x, cx| module.forward(f, x, cx).map(Some))?;
        y.ok_or_else(|| Error::invalid(self.plan.kind, "there are no rows"))
    }

    fn delta(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        let delta = |module: &dyn Module, x: &Signal, cx: &Context| {
            Ok(module.delta(f, x, cx)?.map(Signal::from))
        };
        Ok(self.each(x, cx, delta)?.map(|y| y.x))
    }

    /// Only what does not depend on the context can be merged.
    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        if !is_static(&self.plan.sources) {
            return Ok(None);
        }
        match self.only(&Context::eval())? {
            Some(module) => module.compose(theta),
            None => Ok(None),
        }
    }

    fn low_rank(&self, cx: &Context) -> Option<LowRank> {
        self.only(cx).ok().flatten()?.low_rank(cx)
    }

    fn penalty(&self, cx: &Context) -> Result<Option<Tensor>> {
        if self.inner.penalty(cx)?.is_none() {
            return Ok(None);
        }
        let mut sum: Option<Tensor> = None;
        for group in self.groups(cx)? {
            let Some(own) = self.of(&group.z)?.penalty(cx)? else { continue };
            sum = Some(match sum {
                Some(sum) => sum.add(&own)?,
                None => own,
            });
        }
        Ok(sum)
    }

    /// η, which stands for φ.
    fn phi(&self) -> Tensors {
        self.eta.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Generated {
            plan: self.plan.clone(),
            inner: self.inner.with_phi(&self.inner.phi())?,
            eta: self.eta.map(|name, _| phi.need(name).cloned())?,
        }))
    }

    fn settled(&self, cx: &Context) -> Result<Option<Box<dyn Module>>> {
        match self.only(cx)? {
            Some(module) => Ok(Some(module)),
            None => Err(Error::invalid(
                "context",
                "the rows have different modules; give the context of one of them",
            )),
        }
    }

    fn signature(&self) -> String {
        let shapes: Vec<String> =
            self.eta.iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
        format!("{}({}; {})", self.plan.kind, self.inner.signature(), shapes.join(", "))
    }
}
