//! Greedy decoding: the most likely token, and again with it.

use modl_core::{Error, Result, Tensor, Tensors};

/// The continuation that an encoder–decoder finds most likely token by token: up to `limit` ids
/// after `start` for each row, `[batch, 1 + n]` i64 with `start` in front. A row that has met `end`
/// is filled with `start`, which is padding in T5.
///
/// `forward` is one pass of the model, with or without modules, which is run without the encoder
/// from the second on; `inputs` are the encoder's.
///
/// # Errors
/// Where the model refuses the inputs, or gives no `logits`.
pub fn greedy(
    forward: impl Fn(&Tensors) -> Result<Tensors>,
    inputs: &Tensors,
    [start, end]: [i64; 2],
    limit: usize,
) -> Result<Tensor> {
    let first = inputs.need("input_ids")?;
    let (rows, device) = (first.len_of(0), first.device());
    let row = |id: &Vec<i64>| Tensor::from_slice(id, &[rows, 1], device);
    let mut ids = row(&vec![start; rows as usize])?;
    let mut given = inputs.clone();
    let mut ended = vec![false; rows as usize];
    for _ in 0..limit {
        let outputs = forward(&given.clone().with("decoder_input_ids", ids.clone()))?;
        let logits = outputs.need("logits")?;
        let last = logits.select(1, logits.len_of(1) - 1)?;
        let mut next = last.argmax(-1)?.to_vec::<i64>()?;
        if next.len() != ended.len() {
            let problem = format!("are for {} rows, not {rows}", next.len());
            return Err(Error::invalid("logits", problem));
        }
        for (id, ended) in next.iter_mut().zip(&mut ended) {
            if *ended {
                *id = start;
            }
            *ended |= *id == end;
        }
        ids = Tensor::cat(&[ids, row(&next)?], 1)?;
        if ended.iter().all(|e| *e) {
            break;
        }
        // The encoder's part does not change: its states, and its mask where modules changed it.
        for name in ["encoder_last_hidden_state", "attention_mask"] {
            if let Some(t) = outputs.get(name) {
                given.set(name, t.clone());
            }
        }
    }
    Ok(ids)
}
