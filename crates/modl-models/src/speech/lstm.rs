//! LSTM (Hochreiter & Schmidhuber 1997) as PyTorch has it: with gates i, f, g, o in the rows of the
//! weights, c' = σ(f)·c + σ(i)·tanh(g) and h' = σ(o)·tanh(c').

use modl_core::{ParamStore, Result, Tensor};

/// h and c, `[batch, width]`.
pub(super) type State = (Tensor, Tensor);

/// One layer, or one cell.
#[derive(Debug)]
pub(super) struct Lstm {
    from_input: Tensor,
    from_state: Tensor,
    input_bias: Tensor,
    state_bias: Tensor,
}

/// The names and shapes of a layer's parameters, which end in `end` (`_l0`).
pub(super) fn shapes(path: &str, end: &str, input: i64, width: i64) -> [(String, Vec<i64>); 4] {
    let name = |short: &str| format!("{path}.{short}{end}");
    [
        (name("weight_ih"), vec![4 * width, input]),
        (name("weight_hh"), vec![4 * width, width]),
        (name("bias_ih"), vec![4 * width]),
        (name("bias_hh"), vec![4 * width]),
    ]
}

impl Lstm {
    pub(super) fn new(params: &ParamStore, path: &str, end: &str) -> Result<Self> {
        let get = |short: &str| params.get(&format!("{path}.{short}{end}")).cloned();
        Ok(Lstm {
            from_input: get("weight_ih")?,
            from_state: get("weight_hh")?,
            input_bias: get("bias_ih")?,
            state_bias: get("bias_hh")?,
        })
    }

    /// Zeros for `rows` sequences.
    pub(super) fn start(&self, rows: i64) -> Result<State> {
        let shape = [rows, self.from_state.len_of(1)];
        let zeros = Tensor::zeros(&shape, self.from_state.kind(), self.from_state.device())?;
        Ok((zeros.clone(), zeros))
    }

    /// What the input `[…, in]` gives to the gates.
    fn gates(&self, x: &Tensor) -> Result<Tensor> {
        x.linear(&self.from_input, Some(&self.input_bias))
    }

    fn advance(&self, gates: &Tensor, (h, c): &State) -> Result<State> {
        let all = gates.add(&h.linear(&self.from_state, Some(&self.state_bias))?)?;
        let width = self.from_state.len_of(1);
        let gate = |n: i64| all.narrow(-1, n * width, width);
        let kept = gate(1)?.sigmoid()?.mul(c)?;
        let c = kept.add(&gate(0)?.sigmoid()?.mul(&gate(2)?.tanh()?)?)?;
        Ok((gate(3)?.sigmoid()?.mul(&c.tanh()?)?, c))
    }

    /// One step on `x` `[batch, in]`.
    pub(super) fn step(&self, x: &Tensor, state: &State) -> Result<State> {
        self.advance(&self.gates(x)?, state)
    }

    /// All steps on `x` `[batch, steps, in]`: h after each, `[batch, steps, width]`.
    pub(super) fn sequence(&self, x: &Tensor) -> Result<Tensor> {
        let (gates, mut state) = (self.gates(x)?, self.start(x.len_of(0))?);
        let mut all = Vec::new();
        for t in 0..x.len_of(1) {
            state = self.advance(&gates.select(1, t)?, &state)?;
            all.push(state.0.clone());
        }
        Tensor::stack(&all, 1)
    }
}
