//! Activation checkpointing: training in less memory for more computation.
//!
//! A pass keeps the hidden states between the segments of the backbone alone; what autograd would
//! keep within a segment is computed again when its gradients are due:
//!
//! x₀ = enter(inputs), xₙ₊₁ = segmentₙ(xₙ) without a graph, outputs = leave(x_N); then, from the
//! last segment to the first, gₙ = ∂⟨segmentₙ(xₙ), gₙ₊₁⟩ ⁄ ∂xₙ, and likewise for the parameters.
//!
//! Dropout is drawn from (seed, path, step), so that the second computation is the first one.
//!
//! Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174.

use std::cell::RefCell;
use std::fmt::Debug;
use std::rc::Rc;

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
    /// x₀ in the graph of `enter`.
    entered: Tensor,
    /// x₀, …, x_N, each a leaf of its own.
    states: Vec<Signal>,
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
        let entered = segments.enter(inputs, layers, cx)?;
        let leaf = |x: Signal| -> Result<Signal> {
            let own = x.x.detach()?;
            own.set_requires_grad(true)?;
            Ok(x.replace(own))
        };
        let mut states = vec![leaf(entered.clone())?];
        for n in 0..segments.segments() {
            let Some(x) = states.last() else { break };
            let y = no_grad(|| segments.segment(n, x, layers, cx))?;
            states.push(leaf(y)?);
        }
        if cx.has_losses() {
            return Err(Error::unsupported(
                "activation checkpointing with routers that have losses of their own",
                "train without `activation_checkpointing`",
            ));
        }
        let last = states.last().unwrap_or(&entered);
        let outputs = segments.leave(last, inputs, layers, cx)?;
        self.0.borrow_mut().push(Pass { cx: cx.clone(), entered: entered.x, states });
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
        let all: Vec<&Tensor> = inputs.iter().copied().chain(ends).collect();
        let mut sums = loss.gradients(&all, false)?;
        let ends = sums.split_off(inputs.len());
        for (pass, end) in passes.into_iter().zip(ends) {
            pass.backward(model, end, inputs, &mut sums)?;
        }
        Ok(sums)
    }
}

impl Pass {
    /// Adds to `sums` what comes through this pass, given the gradient of its last hidden states.
    fn backward(
        mut self,
        model: &Modular,
        end: Option<Tensor>,
        inputs: &[&Tensor],
        sums: &mut [Option<Tensor>],
    ) -> Result<()> {
        let (Some(segments), Some(mut g)) = (model.backbone().segments(), end) else {
            return Ok(());
        };
        self.states.pop();
        while let Some(x) = self.states.pop() {
            let n = self.states.len();
            let y = segments.segment(n, &x, &model.layers, &self.cx.again())?;
            let own = through(&y.x, &g, &[inputs, &[&x.x]].concat()).at(format!("segment {n}"))?;
            let Some(next) = add(sums, own)? else { return Ok(()) };
            g = next;
        }
        if self.entered.requires_grad() {
            add(sums, through(&self.entered, &g, inputs)?)?;
        }
        Ok(())
    }
}

/// d⟨y, g⟩/d(input) for each input.
fn through(y: &Tensor, g: &Tensor, inputs: &[&Tensor]) -> Result<Vec<Option<Tensor>>> {
    y.mul(g)?.sum()?.gradients(inputs, false)
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
