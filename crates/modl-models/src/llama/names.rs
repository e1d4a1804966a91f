//! The names and shapes of Llama's parameters.

use super::{HEAD, LlamaConfig};
use crate::folder::Shapes;

/// The name of a stored tensor in the class with or without a head, or `None` where it is not part
/// of it.
pub(super) fn canonical(stored: &str, headed: bool) -> Option<String> {
    // Files of old versions hold what follows from the settings.
    if stored.ends_with("rotary_emb.inv_freq") || (!headed && stored.starts_with(HEAD)) {
        return None;
    }
    Some(path(stored, headed))
}

/// A path in either class as one in the class with or without a head.
pub(super) fn path(given: &str, headed: bool) -> String {
    let bare = given.strip_prefix("model.").unwrap_or(given);
    let of_head = bare == HEAD || bare.starts_with("lm_head.");
    if headed && !of_head { format!("model.{bare}") } else { bare.to_owned() }
}

/// All parameters with their shapes; `own_head` where the head has a table of its own.
pub(super) fn shapes(settings: &LlamaConfig, headed: bool, own_head: bool) -> Shapes {
    let (width, inner) = (settings.hidden_size, settings.intermediate_size);
    let queries = settings.num_attention_heads * settings.head_width();
    let groups = settings.groups() * settings.head_width();
    let mut all = Shapes::new();
    let mut put = |name: &str, shape: Vec<i64>| all.insert(path(name, headed), shape);
    put("embed_tokens.weight", vec![settings.vocab_size, width]);
    put("norm.weight", vec![width]);
    if headed && own_head {
        put("lm_head.weight", vec![settings.vocab_size, width]);
    }
    for i in 0..settings.num_hidden_layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            put(&format!("layers.{i}.{norm}.weight"), vec![width]);
        }
        for (name, output, input, bias) in [
            ("self_attn.q_proj", queries, width, settings.attention_bias),
            ("self_attn.k_proj", groups, width, settings.attention_bias),
            ("self_attn.v_proj", groups, width, settings.attention_bias),
            ("self_attn.o_proj", width, queries, settings.attention_bias),
            ("mlp.gate_proj", inner, width, settings.mlp_bias),
            ("mlp.up_proj", inner, width, settings.mlp_bias),
            ("mlp.down_proj", width, inner, settings.mlp_bias),
        ] {
            put(&format!("layers.{i}.{name}.weight"), vec![output, input]);
            if bias {
                put(&format!("layers.{i}.{name}.bias"), vec![output]);
            }
        }
    }
    all
}
