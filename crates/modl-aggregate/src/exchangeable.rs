//! Which hidden units of a model can be exchanged, found by the names and shapes of its tensors, or read
//! from a file: what [`rebasin`](crate::rebasin) needs to know of an architecture.
//!
//! Found are the hidden units of feed-forward networks in transformers (BERT, Llama and its kin, GPT-2,
//! T5, CLIP, OPT, mixtures of experts), and those of a plain chain of linear layers. What stands in a
//! residual stream or in attention keeps its order.

use std::collections::BTreeMap;

use modl_core::{Error, Result};

use crate::rebasin::{Layer, Permutations};

/// The shapes of a model's tensors.
pub type Shapes = BTreeMap<String, Vec<i64>>;

/// Last parts of the names of layers that make hidden units, and of the one that reads them.
const FEED_FORWARD: &[(&[&str], &str)] = &[
    (&["gate_proj", "up_proj"], "down_proj"),
    (&["w1", "w3"], "w2"),
    (&["wi_0", "wi_1"], "wo"),
    (&["wi"], "wo"),
    (&["intermediate.dense"], "output.dense"),
    (&["fc1"], "fc2"),
    (&["lin1"], "lin2"),
    (&["dense_h_to_4h"], "dense_4h_to_h"),
    (&["c_fc"], "c_proj"),
];

/// The layers of a model whose units can be exchanged.
///
/// # Errors
/// Where none is known, or something that is not known stands at the units.
pub fn exchangeable(shapes: &Shapes) -> Result<Permutations> {
    if let Some(names) = chain(shapes) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        return Ok(Permutations::mlp(&names));
    }
    let mut layers = Vec::new();
    for name in shapes.keys() {
        for (makers, reader) in FEED_FORWARD {
            let Some(block) = makers.first().and_then(|m| block(name, m)) else { continue };
            let has = |layer: &str| shapes.contains_key(&format!("{block}{layer}.weight"));
            if makers.iter().all(|m| has(m)) && has(reader) {
                layers.push(feed_forward(shapes, block, makers, reader)?);
            }
        }
    }
    if layers.is_empty() {
        return Err(Error::unsupported(
            "finding exchangeable units in a model of these tensors",
            "say in a file which axes of which tensors go together (`--permutations`)",
        ));
    }
    Permutations::new(layers)
}

/// A file, YAML or JSON: for each layer of units its tensors, and the axis of each that they are on.
///
/// ```
/// let text = "hidden: {fc1.weight: 0, fc1.bias: 0, fc2.weight: 1}";
/// assert_eq!(modl_aggregate::exchangeable::read(text)?.layers().len(), 1);
/// # Ok::<(), modl_core::Error>(())
/// ```
///
/// # Errors
/// Where it is something else, or names a tensor twice in one layer.
pub fn read(text: &str) -> Result<Permutations> {
    let wrong = |e: serde_norway::Error| Error::invalid("permutations", e.to_string());
    let said: BTreeMap<String, BTreeMap<String, usize>> =
        serde_norway::from_str(text).map_err(wrong)?;
    if said.is_empty() {
        return Err(Error::invalid("permutations", "name no layer"));
    }
    let layer = |(name, axes): (String, BTreeMap<String, usize>)| Layer {
        name,
        axes: axes.into_iter().collect(),
    };
    Permutations::new(said.into_iter().map(layer).collect())
}

/// `model.layers.0.mlp.` of `model.layers.0.mlp.up_proj.weight`.
fn block<'a>(name: &'a str, maker: &str) -> Option<&'a str> {
    let block = name.strip_suffix(".weight")?.strip_suffix(maker)?;
    (block.is_empty() || block.ends_with('.')).then_some(block)
}

fn feed_forward(shapes: &Shapes, block: &str, makers: &[&str], reader: &str) -> Result<Layer> {
    let name = format!("{block}{reader}");
    let weight =
        |layer: &str| match shapes.get(&format!("{block}{layer}.weight")).map(Vec::as_slice) {
            Some([a, b]) => Ok([*a, *b]),
            other => Err(Error::invalid(
                format!("{block}{layer}.weight"),
                format!("is {other:?}, no matrix"),
            )),
        };
    let read = weight(reader)?;
    let mut axes = Vec::new();
    let mut units = 0;
    for maker in makers {
        let (made, bias) = (weight(maker)?, format!("{block}{maker}.bias"));
        let out = shapes.get(&bias).and_then(|b| b.first().copied());
        if made != [read[1], read[0]] {
            let problem = format!("{made:?} does not fit `{reader}` {read:?}");
            return Err(Error::invalid(format!("{block}{maker}.weight"), problem));
        }
        // GPT-2 keeps its weights as [in, out]; a bias tells which it is.
        let axis = match (*maker, made, out) {
            ("c_fc", [a, b], Some(n)) if a != b => usize::from(n == b),
            ("c_fc", ..) => {
                let what =
                    format!("`{block}{maker}`, whose shape does not say where its units are");
                return Err(Error::unsupported(what, "say in a file which axis they are on"));
            }
            _ => 0,
        };
        units = made[axis];
        axes.push((format!("{block}{maker}.weight"), axis));
        if out.is_some() {
            axes.push((bias, 0));
        }
        if makers.last() == Some(maker) {
            axes.push((format!("{name}.weight"), 1 - axis));
        }
    }
    // A norm or a scale at the hidden units would have to go with them.
    let own = |tensor: &str| {
        let ours = makers.iter().chain([&reader]).any(|l| {
            tensor
                .strip_prefix(block)
                .and_then(|t| t.strip_prefix(l))
                .is_some_and(|t| t.starts_with('.'))
        });
        ours && ["weight", "bias"].contains(&tensor.rsplit('.').next().unwrap_or_default())
    };
    let beside = |t: &str| {
        !block.is_empty() && t.strip_prefix(block).is_some_and(|t| t.split('.').count() == 2)
    };
    let stray = shapes.iter().find(|(t, s)| beside(t) && !own(t) && s.as_slice() == [units]);
    if let Some((tensor, _)) = stray {
        let what = format!("`{tensor}` at the hidden units of `{name}`");
        return Err(Error::unsupported(what, "say in a file which tensors go together"));
    }
    Ok(Layer { name, axes })
}

/// The layers of a plain network, one after the other, where all tensors are such layers' weights and
/// biases and each reads what the one before makes.
fn chain(shapes: &Shapes) -> Option<Vec<String>> {
    let mut layers: Vec<(Vec<Part>, &str, [i64; 2])> = Vec::new();
    for (name, shape) in shapes {
        match (name.strip_suffix(".weight"), shape.as_slice()) {
            (Some(layer), [out, inputs]) => layers.push((natural(layer), layer, [*out, *inputs])),
            (None, [n]) => {
                let weight = shapes.get(&format!("{}.weight", name.strip_suffix(".bias")?))?;
                if weight.first() != Some(n) {
                    return None;
                }
            }
            _ => return None,
        }
    }
    layers.sort();
    let fits = layers.windows(2).all(|w| matches!(w, [a, b] if a.2[0] == b.2[1]));
    (layers.len() > 1 && fits).then(|| layers.into_iter().map(|(_, n, _)| n.to_owned()).collect())
}

/// A piece of a name: digits count as a number.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Number(u64),
    Text(String),
}

fn natural(name: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let bytes = name.as_bytes();
    let mut start = 0;
    while start < bytes.len() {
        let digit = bytes.get(start).is_some_and(u8::is_ascii_digit);
        let alike = |b: &&u8| b.is_ascii_digit() == digit;
        let end = start + bytes.get(start..).unwrap_or_default().iter().take_while(alike).count();
        // Digits are ASCII, so that no letter is cut.
        let text = name.get(start..end).unwrap_or_default();
        parts.push(match text.parse() {
            Ok(n) if digit => Part::Number(n),
            _ => Part::Text(text.to_owned()),
        });
        start = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    fn shapes(all: &[(&str, &[i64])]) -> Shapes {
        all.iter().map(|(n, s)| ((*n).to_owned(), s.to_vec())).collect()
    }

    #[test]
    fn a_chain_of_layers_is_found_in_the_order_of_their_numbers() {
        let mut all = Vec::new();
        let names: Vec<String> = (0..11).map(|i| format!("net.{i}.weight")).collect();
        for (i, name) in names.iter().enumerate() {
            all.push((name.as_str(), [10 + i as i64 + 1, 10 + i as i64]));
        }
        let all: Vec<(&str, &[i64])> = all.iter().map(|(n, s)| (*n, s.as_slice())).collect();
        let found = exchangeable(&shapes(&all)).unwrap();
        let names: Vec<&str> = found.layers().iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names.len(), 10);
        assert!(found.layers()[9].axes.contains(&("net.10.weight".to_owned(), 1)));
    }

    #[test]
    fn gpt2s_axes_are_the_other_way_round_and_bert_has_biases() {
        let gpt2 = shapes(&[
            ("h.0.mlp.c_fc.weight", &[4, 16]),
            ("h.0.mlp.c_fc.bias", &[16]),
            ("h.0.mlp.c_proj.weight", &[16, 4]),
            ("h.0.mlp.c_proj.bias", &[4]),
            ("h.0.attn.c_proj.weight", &[4, 4]),
        ]);
        let found = exchangeable(&gpt2).unwrap();
        let axes = &found.layers()[0].axes;
        assert_eq!(found.layers().len(), 1);
        assert!(axes.contains(&("h.0.mlp.c_fc.weight".to_owned(), 1)), "{axes:?}");
        assert!(axes.contains(&("h.0.mlp.c_proj.weight".to_owned(), 0)), "{axes:?}");
        assert!(axes.contains(&("h.0.mlp.c_fc.bias".to_owned(), 0)) && axes.len() == 3, "{axes:?}");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let normed = shapes(&[
            ("l.0.mlp.fc1.weight", &[16, 4]),
            ("l.0.mlp.fc2.weight", &[4, 16]),
            ("l.0.mlp.norm.weight", &[16]),
        ]);
        let error = exchangeable(&normed).unwrap_err().to_string();
        assert!(error.contains("l.0.mlp.norm.weight"), "{error}");
        let other = shapes(&[("conv.weight", &[4, 4, 3, 3]), ("head.weight", &[2, 4])]);
        let error = exchangeable(&other).unwrap_err().to_string();
        assert!(error.contains("--permutations"), "{error}");
        assert!(read("hidden: {a.weight: x}").is_err() && read("{}").is_err());
    }
}
