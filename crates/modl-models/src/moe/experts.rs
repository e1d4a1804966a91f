//! What the experts of a mixture compute.
//!
//! Tokens are sorted by expert, so that each expert computes one product for all its tokens, experts
//! side by side where their loads are even; what they say is added up token by token.

use modl_core::{
    Activation, Branch, Error, Grouping, Result, STACK_DOWN, STACK_UP, Seed, Tensor, Tensors, Work,
    dropout, side_by_side, suits_side_by_side,
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
    let y = if suits_side_by_side(grouping.counts(), x.device()) {
        let busy = grouping.counts().iter().enumerate().filter(|(_, rows)| **rows > 0);
        let branches = busy.map(|(n, &rows)| {
            let (first, last) = (first.matrix(n)?, last.matrix(n)?);
            let split = first.phi().len();
            let phi: Vec<Tensor> = first.phi().into_iter().chain(last.phi()).collect();
            let f = move |own: Vec<Tensor>| -> Result<Work> {
                let (first, last) = own.split_at_checked(split).unwrap_or((&own, &[]));
                let (first, last) = (Matrix::with(first)?, Matrix::with(last)?);
                Ok(Box::new(move |x| last.apply(&expert.within(&first.apply(&x)?, n)?)))
            };
            Ok(Branch { rows, phi, f: Box::new(f) })
        });
        side_by_side(&sorted, branches.collect::<Result<_>>()?)?
    } else {
        let parts = grouping.parts(&sorted)?;
        let busy = parts.iter().enumerate().filter(|(_, x)| x.len_of(0) > 0);
        let outputs = busy.map(|(n, x)| {
            let inner = expert.within(&first.matrix(n)?.apply(x)?, n)?;
            last.matrix(n)?.apply(&inner)
        });
        Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)?
    };
    grouping.weighted_sum(&y, &grouping.weights(gates)?)?.reshape(&x.size())
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

    /// That of one expert.
    fn matrix(&self, expert: usize) -> Result<Matrix> {
        let of = |all: &[Tensor]| {
            let missing = || Error::invalid("experts", format!("there is no expert {expert}"));
            all.get(expert).cloned().ok_or_else(missing)
        };
        let low_rank = match &self.low_rank {
            Some((downs, ups)) => Some((of(downs)?, of(ups)?)),
            None => None,
        };
        Ok(Matrix { weight: of(&self.weights)?, low_rank })
    }
}

/// x ↦ x Wᵀ, or x (W + up down)ᵀ.
struct Matrix {
    weight: Tensor,
    low_rank: Option<(Tensor, Tensor)>,
}

impl Matrix {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.linear(&self.weight, None)?;
        let Some((down, up)) = &self.low_rank else { return Ok(y) };
        y.add_linear(&x.linear(down, None)?, up)
    }

    fn phi(&self) -> Vec<Tensor> {
        let low_rank = self.low_rank.iter().flat_map(|(down, up)| [down, up]);
        [&self.weight].into_iter().chain(low_rank).cloned().collect()
    }

    fn with(phi: &[Tensor]) -> Result<Self> {
        match phi {
            [weight] => Ok(Matrix { weight: weight.clone(), low_rank: None }),
            [weight, down, up] => {
                Ok(Matrix { weight: weight.clone(), low_rank: Some((down.clone(), up.clone())) })
            }
            _ => Err(Error::invalid("experts", format!("one of {} parts", phi.len()))),
        }
    }
}
