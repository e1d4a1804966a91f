//! What the experts of a mixture compute.
//!
//! Tokens are sorted by expert, so that each expert computes one product for all its tokens, and
//! what they say is added up token by token.

use modl_core::{
    Activation, Error, Grouping, Result, STACK_DOWN, STACK_UP, Seed, Tensor, Tensors, dropout,
};

pub(crate) const GATE_UP: &str = "gate_up_proj";
pub(crate) const DOWN: &str = "down_proj";
pub(crate) const WI: &str = "wi";
pub(crate) const WO: &str = "wo";

/// What an expert is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expert {
    /// down(σ(gate x) · up x).
    Gated(Activation),
    /// wo(dropout(σ(wi x))), with a seed for the dropout of all experts where there is one.
    Plain(Activation, Option<(f64, Seed)>),
}

impl Expert {
    /// The names of its first and its last matrix.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Expert::Gated(_) => (GATE_UP, DOWN),
            Expert::Plain(..) => (WI, WO),
        }
    }

    /// From the first matrix's outputs to the last one's inputs, for expert `n`.
    fn within(self, x: &Tensor, n: usize) -> Result<Tensor> {
        match self {
            Expert::Gated(act) => {
                let inner = x.len_of(-1) / 2;
                let parts = x.split(&[inner, inner], -1)?;
                let [gate, up] = parts.as_slice() else {
                    return Err(Error::invalid(GATE_UP, format!("gives {x:?}, of odd width")));
                };
                act.apply(gate)?.mul(up)
            }
            Expert::Plain(act, None) => act.apply(x),
            Expert::Plain(act, Some((p, seed))) => dropout(&act.apply(x)?, p, seed.nth(n as u64)),
        }
    }
}

/// Σₖ gateₖ · expertₖ(x) by the experts `index` `[batch, seq, k]` of each token x
/// `[batch, seq, dim]` with `gates` `[batch, seq, k]` → `[batch, seq, dim]`.
pub(crate) fn mix(
    theta: &Tensors,
    x: &Tensor,
    index: &Tensor,
    gates: &Tensor,
    expert: Expert,
) -> Result<Tensor> {
    let (first, last) = expert.names();
    let (first, last) = (Stack::of(theta, first)?, Stack::of(theta, last)?);
    let flat = x.reshape(&[-1, x.len_of(-1)])?;
    let grouping = Grouping::new(index, first.weights.len())?;
    if grouping.is_empty() {
        return x.zeros_like();
    }
    let sorted = flat.index_select(0, &grouping.units(x.device())?)?;
    let mut outputs = Vec::new();
    for (n, x) in grouping.parts(&sorted)?.iter().enumerate() {
        if x.len_of(0) > 0 {
            let inner = expert.within(&first.apply(n, x)?, n)?;
            outputs.push(last.apply(n, &inner)?);
        }
    }
    let sum = grouping.weighted_sum(&Tensor::cat(&outputs, 0)?, &grouping.weights(gates)?)?;
    sum.reshape(&x.size())
}

/// One matrix of each expert, with a sum of low rank where there is one.
struct Stack {
    weights: Vec<Tensor>,
    /// `[r, cols]` and `[rows, r]` of each expert.
    low_rank: Option<(Vec<Tensor>, Vec<Tensor>)>,
}

impl Stack {
    fn of(theta: &Tensors, name: &str) -> Result<Self> {
        let factor = |end| theta.get(&format!("{name}{end}")).map(|t| t.unbind(0)).transpose();
        let low_rank = factor(STACK_DOWN)?.zip(factor(STACK_UP)?);
        Ok(Stack { weights: theta.need(name)?.unbind(0)?, low_rank })
    }

    /// x Wᵀ of one expert.
    fn apply(&self, expert: usize, x: &Tensor) -> Result<Tensor> {
        let missing = || Error::invalid("experts", format!("there is no expert {expert}"));
        let y = x.linear(self.weights.get(expert).ok_or_else(missing)?, None)?;
        let Some((down, up)) = &self.low_rank else { return Ok(y) };
        let (down, up) = down.get(expert).zip(up.get(expert)).ok_or_else(missing)?;
        y.add_linear(&x.linear(down, None)?, up)
    }
}
