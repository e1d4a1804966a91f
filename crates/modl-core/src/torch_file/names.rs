//! Names for the tensors in nested dictionaries and lists: the keys on the way, with dots.

use super::Refusal;
use super::heap::{Heap, Value, View};

/// Containers in one another.
const MOST_LEVELS: usize = 32;

/// All names together are at most so many times as long as the pickle. Containers can be in
/// several others, so that there could be many more names than bytes.
const MOST_LENGTH: usize = 16;

/// The tensors below `root`, whose pickle has `len` bytes.
///
/// # Errors
/// Where a key on the way is neither a text nor a whole number, or containers are in one another
/// without an end.
pub(super) fn tensors<'h, 'a>(
    heap: &'h Heap<'a>,
    root: Value<'a>,
    len: usize,
) -> Result<Vec<(String, &'h View<'a>)>, Refusal> {
    let mut all = Vec::new();
    let mut left = len.saturating_mul(MOST_LENGTH);
    let mut todo = vec![(String::new(), root, 0)];
    while let Some((name, value, level)) = todo.pop() {
        if level > MOST_LEVELS {
            return Err("its containers are in one another without an end".into());
        }
        if let Value::Tensor(i) = value {
            all.extend(heap.view(i).map(|view| (name, view)));
            continue;
        }
        let rows = heap.row(value).iter().enumerate().map(|(i, v)| (Value::Int(i as i64), *v));
        for (key, inner) in heap.entries(value).iter().copied().chain(rows) {
            left = left.checked_sub(1).ok_or("it names its tensors too often")?;
            if !matches!(
                inner,
                Value::Tensor(_) | Value::Dict(_) | Value::List(_) | Value::Tuple(_)
            ) {
                continue;
            }
            let key = match key {
                Value::Text(text) => text.to_owned(),
                Value::Int(n) => n.to_string(),
                _ => return Err(Refusal::Foreign("it has a key that is no text".into())),
            };
            left = left.checked_sub(name.len() + key.len()).ok_or("its names are too long")?;
            let name = if level == 0 { key } else { format!("{name}.{key}") };
            todo.push((name, inner, level + 1));
        }
    }
    Ok(all)
}
