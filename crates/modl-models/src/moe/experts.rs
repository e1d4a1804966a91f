//! What the experts of a mixture compute.
//!
//! Tokens are sorted by expert, so that each expert computes one product for all its tokens, and
//! what they say is added up token by token.

use modl_core::{Activation, Error, Result, STACK_DOWN, STACK_UP, Seed, Tensor, Tensors, dropout};

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
    let (width, k) = (x.len_of(-1), index.len_of(-1));
    let flat = x.reshape(&[-1, width])?;
    let tokens = flat.len_of(0);
    let index = index.reshape(&[-1])?;
    let order = index.argsort(0, false)?;
    let counts = count(&index.to_vec::<i64>()?, first.weights.len())?;
    let token = Tensor::arange(tokens, x.device())?.unsqueeze(1)?.expand(&[tokens, k])?;
    let token = token.reshape(&[-1])?.index_select(0, &order)?;
    let gates = gates.reshape(&[-1, 1])?.index_select(0, &order)?.to_kind(x.kind())?;
    let sorted = flat.index_select(0, &token)?;
    let mut outputs = Vec::new();
    for (n, x) in sorted.split(&counts, 0)?.iter().enumerate() {
        if x.len_of(0) > 0 {
            let inner = expert.within(&first.apply(n, x)?, n)?;
            outputs.push(last.apply(n, &inner)?);
        }
    }
    let weighed = Tensor::cat(&outputs, 0)?.mul(&gates)?;
    flat.zeros_like()?.index_add(0, &token, &weighed)?.reshape(&x.size())
}

/// How many tokens each of `experts` has.
fn count(index: &[i64], experts: usize) -> Result<Vec<i64>> {
    let mut counts = vec![0; experts];
    for e in index {
        match usize::try_from(*e).ok().and_then(|e| counts.get_mut(e)) {
            Some(n) => *n += 1,
            None => {
                let problem = format!("{e} is none of {experts}");
                return Err(Error::invalid("experts", problem));
            }
        }
    }
    Ok(counts)
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
