//! The names and shapes of GPT-2's parameters.

use super::{Gpt2Config, HEAD};
use crate::folder::Shapes;

/// The name of a stored tensor in the class with or without a head, or `None` where it is not part
/// of it.
pub(super) fn canonical(stored: &str, headed: bool) -> Option<String> {
    // Old files hold the causal mask.
    let mask = stored.ends_with(".attn.bias") || stored.ends_with(".attn.masked_bias");
    if mask || (!headed && stored.starts_with(HEAD)) {
        return None;
    }
    Some(path(stored, headed))
}

/// A path in either class as one in the class with or without a head.
pub(super) fn path(given: &str, headed: bool) -> String {
    let bare = given.strip_prefix("transformer.").unwrap_or(given);
    let of_head = bare == HEAD || bare.starts_with("lm_head.");
    if headed && !of_head { format!("transformer.{bare}") } else { bare.to_owned() }
}

/// All parameters with their shapes; `own_head` where the head has a table of its own.
pub(super) fn shapes(settings: &Gpt2Config, headed: bool, own_head: bool) -> Shapes {
    let (width, inner) = (settings.n_embd, settings.inner_width());
    let mut all = Shapes::new();
    let mut put = |name: &str, shape: Vec<i64>| all.insert(path(name, headed), shape);
    put("wte.weight", vec![settings.vocab_size, width]);
    put("wpe.weight", vec![settings.n_positions, width]);
    if headed && own_head {
        put("lm_head.weight", vec![settings.vocab_size, width]);
    }
    let mut pair = |name: &str, weight: Vec<i64>| {
        put(&format!("{name}.bias"), weight.last().copied().into_iter().collect());
        put(&format!("{name}.weight"), weight);
    };
    pair("ln_f", vec![width]);
    for i in 0..settings.n_layer {
        for norm in ["ln_1", "ln_2"] {
            pair(&format!("h.{i}.{norm}"), vec![width]);
        }
        for (name, input, output) in [
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ] {
            pair(&format!("h.{i}.{name}"), vec![input, output]);
        }
    }
    all
}
