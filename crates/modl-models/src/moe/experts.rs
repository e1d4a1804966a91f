//! What the experts of a mixture compute.
//!
//! Tokens are sorted by expert, so that each expert computes one product for all its tokens, experts
//! side by side where their loads are even; what they say is added up token by token. Where modules
//! stand within experts, one expert comes after the other.

use modl_core::{
    Activation, Branch, Device, Error, Grouping, Result, STACK_DOWN, STACK_UP, Seed, Tensor,
    Tensors, Work, dropout, side_by_side, suits_side_by_side,
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

/// One matrix of one expert and the rows that are to go through it.
pub(crate) struct Use<'a> {
    /// The number of the expert.
    pub(crate) expert: usize,
    /// Whether it is the expert's last matrix, and not its first.
    pub(crate) last: bool,
    pub(crate) matrix: &'a Matrix,
    /// `[n, in]`.
    pub(crate) x: &'a Tensor,
    /// Which token of the batch each of the n rows is of.
    pub(crate) tokens: &'a [i64],
}

/// What is computed in place of a matrix's product: `[n, out]`.
pub(crate) type Within<'a> = &'a dyn Fn(Use) -> Result<Tensor>;

/// Σₖ gateₖ · expertₖ(x) by the experts `index` `[batch, seq, k]` of each token x
/// `[batch, seq, dim]` with `gates` `[batch, seq, k]` → `[batch, seq, dim]`. Matrices are used as
/// `within` says, where anything does.
pub(crate) fn mix(
    theta: &Tensors,
    x: &Tensor,
    index: &Tensor,
    gates: &Tensor,
    expert: Expert,
    within: Option<Within>,
) -> Result<Tensor> {
    let (first, last) = expert.names();
    let (first, last) = (Stack::of(theta, first)?, Stack::of(theta, last)?);
    let flat = x.reshape(&[-1, x.len_of(-1)])?;
    let grouping = Grouping::new(index, first.weights.len())?;
    if grouping.is_empty() {
        return x.zeros_like();
    }
    let sorted = flat.index_select(0, &grouping.units(x.device())?)?;
    let y = if let Some(within) = within {
        let tokens = grouping.units(Device::Cpu)?;
        let parts = grouping.parts(&sorted)?.into_iter().zip(grouping.parts(&tokens)?).enumerate();
        let busy = parts.filter(|(_, (x, _))| x.len_of(0) > 0);
        let outputs = busy.map(|(n, (x, tokens))| {
            let tokens = &tokens.to_vec::<i64>()?;
            let (one, other) = (first.matrix(n)?, last.matrix(n)?);
            let own = Use { expert: n, last: false, matrix: &one, x: &x, tokens };
            let inner = expert.within(&within(own)?, n)?;
            within(Use { expert: n, last: true, matrix: &other, x: &inner, tokens })
        });
        Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)?
    } else if suits_side_by_side(grouping.counts(), x.device()) {
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
pub(crate) struct Matrix {
    weight: Tensor,
    low_rank: Option<(Tensor, Tensor)>,
}

impl Matrix {
    /// The sum, multiplied out.
    pub(crate) fn whole(&self) -> Result<Tensor> {
        match &self.low_rank {
            None => Ok(self.weight.clone()),
            Some((down, up)) => self.weight.add(&up.matmul(down)?),
        }
    }

    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
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
