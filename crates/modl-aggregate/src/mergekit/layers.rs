//! Which layer a tensor belongs to, by its name.
//!
//! The first part of a name that is a number is the layer: `model.layers.3.mlp.up_proj.weight`,
//! `encoder.layer.3.output.dense.weight`, `transformer.h.3.attn.c_attn.weight`,
//! `decoder.block.3.layer.0.SelfAttention.q.weight`. What stands before it tells the parts of a model
//! apart that has several stacks.

use std::collections::BTreeMap;

use super::super::merge::Source;

/// A tensor's name, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layered<'a> {
    /// What stands before the layer's number, without the point: `model.layers`.
    pub(super) stack: &'a str,
    /// The layer.
    pub(super) layer: usize,
    /// What follows, without the point.
    pub(super) rest: &'a str,
}

/// The layer of a tensor; `None` for one that belongs to none, such as the embeddings.
pub(super) fn layered(name: &str) -> Option<Layered<'_>> {
    let mut start = 0;
    for part in name.split('.') {
        let end = start + part.len();
        if start > 0 && !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            let layer = part.parse().ok()?;
            let (stack, rest) = (name.get(..start - 1)?, name.get(end + 1..)?);
            return Some(Layered { stack, layer, rest });
        }
        start = end + 1;
    }
    None
}

/// The stacks of a model and how many layers each has.
pub(super) fn stacks(source: &Source) -> BTreeMap<&str, usize> {
    let mut all = BTreeMap::new();
    for found in source.tensors().keys().filter_map(|name| layered(name)) {
        let count = all.entry(found.stack).or_insert(0);
        *count = (*count).max(found.layer + 1);
    }
    all
}

/// Whether a tensor outside of the layers comes after them: the last norm, heads, poolers.
pub(super) fn comes_after(name: &str) -> bool {
    const LAST: [&str; 8] =
        ["lm_head", "head", "ln_f", "norm", "final", "pooler", "classifier", "score"];
    let embeds = name.contains("embed") || name.contains("wte") || name.contains("wpe");
    !embeds && name.split('.').any(|part| LAST.iter().any(|last| part.starts_with(last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_families_are_taken_apart() {
        let of = |name| layered(name).map(|l| (l.stack, l.layer, l.rest));
        assert_eq!(
            of("model.layers.12.mlp.up_proj.weight"),
            Some(("model.layers", 12, "mlp.up_proj.weight"))
        );
        assert_eq!(of("h.0.attn.c_attn.weight"), Some(("h", 0, "attn.c_attn.weight")));
        let t5 = "decoder.block.3.layer.0.SelfAttention.q.weight";
        assert_eq!(of(t5), Some(("decoder.block", 3, "layer.0.SelfAttention.q.weight")));
        assert_eq!(of("model.embed_tokens.weight"), None);
        assert!(comes_after("model.norm.weight") && comes_after("lm_head.weight"));
        assert!(!comes_after("embeddings.LayerNorm.weight") && !comes_after("wte.weight"));
    }
}
