//! Activation checkpointing: training in less memory for more computation.
//!
//! A pass keeps the hidden states between the segments of the backbone alone; what autograd would
//! keep within a segment is computed again when its gradients are due:
//!
//! x₀ = enter(inputs), xₙ₊₁ = segmentₙ(xₙ) without a graph, outputs = leave(x_N); then, from the
//! last segment to the first, gₙ = ∂⟨segmentₙ(xₙ), gₙ₊₁⟩ ⁄ ∂xₙ, and likewise for the parameters.
//!
//! Losses and notes of routers in a segment, and what a backbone says aside there, are further
//! outputs of it: they are leaves for what follows, and in the second computation their gradients
//! flow where that of xₙ₊₁ does.
//!
//! Dropout and the draws of routers are of (seed, path, step), so that the second computation is the
//! first one.
//!
//! Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174.

use std::cell::RefCell;
use std::fmt::Debug;
use std::rc::Rc;

use crate::context::Recorded;
use crate::{Context, Error, Layers, Modular, Result, ResultExt, Signal, Tensor, Tensors, no_grad};

/// A backbone that can be run piece by piece: what [`Backbone::forward`](crate::Backbone::forward) does is `enter`, each
/// `segment`, `leave`.
pub trait Segments: Debug {
    /// The number of segments.
    fn segments(&self) -> usize;

    /// From the inputs to the first hidden states, with all that segments read besides.
    fn enter(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Signal>;

    /// One segment: other hidden states of the same shape, with the same companions.
    fn segment(&self, n: usize, x: &Signal, layers: &Layers, cx: &Context) -> Result<Signal>;

    /// From the last hidden states to the outputs.
    fn leave(&self, x: &Signal, inputs: &Tensors, layers: &Layers, cx: &Context)
    -> Result<Tensors>;
}

/// What is kept of the forward passes of a step. Clones share it; give one to the passes with
/// [`Context::with_activation_checkpoints`].
#[derive(Debug, Clone, Default)]
pub struct ActivationCheckpoints(Rc<RefCell<Vec<Pass>>>);

#[derive(Debug)]
struct Pass {
    cx: Context,
    /// x₀ and what was recorded with it, in the graph of `enter`.
    entered: Vec<Tensor>,
    /// x₀, …, x_N, each a leaf of its own.
    states: Vec<Signal>,
    /// What was recorded in `enter` and in each segment, leaves, too.
    recorded: Vec<Vec<Tensor>>,
}

impl ActivationCheckpoints {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A pass that keeps the hidden states between segments.
    pub(crate) fn forward(
        &self,
        model: &Modular,
        inputs: &Tensors,
        cx: &Context,
    ) -> Result<Tensors> {
        // A segment that is computed again would not find what the first site decided.
        if matches!(model.router, Some((_, true))) {
            return Err(Error::unsupported(
                "activation checkpointing with one router for all sites",
                "give each site its own, or train without `activation_checkpointing`",
            ));
        }
        let layers = &model.layers;
        let segments = model.backbone().segments().ok_or_else(|| {
            Error::unsupported(
                "activation checkpointing on this backbone",
                "train without `activation_checkpointing`",
            )
        })?;
        if cx.cache().is_some() {
            let problem = "keeps nothing for a pass with a cache of seen tokens";
            return Err(Error::invalid("activation checkpointing", problem));
        }
        let before = cx.recorded();
        let entered = segments.enter(inputs, layers, cx)?;
        let mut whole = vec![entered.x.clone()];
        let mut recorded = vec![leaves(cx, before, |t| whole.push(t.clone()))?];
        let leaf = |x: Signal| -> Result<Signal> {
            let own = x.x.detach()?;
            own.set_requires_grad(true)?;
            Ok(x.replace(own))
        };
        let mut states = vec![leaf(entered.clone())?];
        for n in 0..segments.segments() {
            let Some(x) = states.last() else { break };
            let before = cx.recorded();
            let y = no_grad(|| segments.segment(n, x, layers, cx))?;
            states.push(leaf(y)?);
            recorded.push(leaves(cx, before, |_| ())?);
        }
        let last = states.last().unwrap_or(&entered);
        let outputs = segments.leave(last, inputs, layers, cx)?;
        self.0.borrow_mut().push(Pass { cx: cx.clone(), entered: whole, states, recorded });
        Ok(outputs)
    }

    /// d(loss)/d(input) as [`Tensor::gradients`] has it, through all passes that were kept, which
    /// are forgotten.
    ///
    /// # Errors
    /// Where a segment fails that did not fail before.
    pub fn gradients(
        &self,
        model: &Modular,
        loss: &Tensor,
        inputs: &[&Tensor],
    ) -> Result<Vec<Option<Tensor>>> {
        let passes = self.0.take();
        let ends: Vec<&Tensor> =
            passes.iter().filter_map(|p| p.states.last()).map(|s| &s.x).collect();
        let recorded = passes.iter().flat_map(|p| p.recorded.iter().flatten());
        let all: Vec<&Tensor> = inputs.iter().copied().chain(ends).chain(recorded).collect();
        let mut sums = loss.gradients(&all, false)?;
        let mut of_recorded = sums.split_off(inputs.len() + passes.len()).into_iter();
        let ends = sums.split_off(inputs.len());
        for (pass, end) in passes.into_iter().zip(ends) {
            let of = |own: &Vec<Tensor>| of_recorded.by_ref().take(own.len()).collect();
            let recorded = pass.recorded.iter().map(of).collect();
            pass.backward(model, end, recorded, inputs, &mut sums)?;
        }
        Ok(sums)
    }
}

impl Pass {
    /// Adds to `sums` what comes through this pass, given the gradients of its last hidden states and
    /// of what was recorded.
    fn backward(
        mut self,
        model: &Modular,
        end: Option<Tensor>,
        mut recorded: Vec<Vec<Option<Tensor>>>,
        inputs: &[&Tensor],
        sums: &mut [Option<Tensor>],
    ) -> Result<()> {
        let (Some(segments), mut g) = (model.backbone().segments(), end) else {
            return Ok(());
        };
        self.states.pop();
        while let Some(x) = self.states.pop() {
            let n = self.states.len();
            let of_recorded = recorded.pop().unwrap_or_default();
            if g.is_none() && of_recorded.iter().all(Option::is_none) {
                continue;
            }
            let cx = self.cx.again();
            let y = segments.segment(n, &x, &model.layers, &cx)?;
            let mut outputs = vec![y.x];
            cx.change_recorded(Recorded::default(), |t| {
                outputs.push(t.clone());
                Ok(t.clone())
            })?;
            if outputs.len() != 1 + of_recorded.len() {
                let problem = "routers said something else when it was computed again";
                return Err(Error::invalid(format!("segment {n}"), problem));
            }
            let gradients = std::iter::once(g).chain(of_recorded);
            let inputs = [inputs, &[&x.x]].concat();
            g = match through(outputs.iter().zip(gradients), &inputs).at(format!("segment {n}"))? {
                Some(own) => add(sums, own)?,
                None => None,
            };
        }
        let gradients = std::iter::once(g).chain(recorded.pop().unwrap_or_default());
        if let Some(own) = through(self.entered.iter().zip(gradients), inputs)? {
            add(sums, own)?;
        }
        Ok(())
    }
}

/// What was recorded after `before`, which become leaves of their own; `each` sees them as they were.
fn leaves(cx: &Context, before: Recorded, mut each: impl FnMut(&Tensor)) -> Result<Vec<Tensor>> {
    let mut own = Vec::new();
    cx.change_recorded(before, |t| {
        each(t);
        let t = t.detach()?;
        t.set_requires_grad(true)?;
        own.push(t.clone());
        Ok(t)
    })?;
    Ok(own)
}

/// d(Σ ⟨y, g⟩)/d(input) for each input, over the y that are in a graph and have a g; `None` where
/// there is none.
fn through<'y>(
    outputs: impl Iterator<Item = (&'y Tensor, Option<Tensor>)>,
    inputs: &[&Tensor],
) -> Result<Option<Vec<Option<Tensor>>>> {
    let mut sum: Option<Tensor> = None;
    for (y, g) in outputs.filter(|(y, _)| y.requires_grad()) {
        let Some(g) = g else { continue };
        let own = y.mul(&g)?.sum()?;
        sum = Some(match sum {
            Some(s) => s.add(&own.to_kind(s.kind())?)?,
            None => own,
        });
    }
    sum.map(|s| s.gradients(inputs, false)).transpose()
}

/// Adds gradients to those of the same inputs, and gives the one that is left over.
fn add(sums: &mut [Option<Tensor>], own: Vec<Option<Tensor>>) -> Result<Option<Tensor>> {
    let mut own = own.into_iter();
    for (sum, one) in sums.iter_mut().zip(&mut own) {
        *sum = match (sum.take(), one) {
            (Some(a), Some(b)) => Some(a.add(&b)?),
            (a, b) => a.or(b),
        };
    }
    Ok(own.next().flatten())
}
