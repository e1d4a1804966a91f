//! The names and shapes of T5's parameters.

use super::{HEAD, SHARED, T5Config, TABLE, WORDS};
use crate::folder::Shapes;
use crate::moe::{WI, WO};

/// The name of a stored tensor in the bare model, or `None` where it is not part of it.
pub(super) fn canonical(stored: &str) -> Option<String> {
    // Early checkpoints have a table for cross-attention, which nothing reads.
    let unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
    (stored != unused).then(|| path(stored).to_owned())
}

/// A path without the name that classifiers of transformers give the model within them.
pub(super) fn path(path: &str) -> &str {
    path.strip_prefix("transformer.").unwrap_or(path)
}

/// All parameters with their shapes. `stored` says whether the checkpoint has a table of its own
/// for one that is usually the shared one.
pub(super) fn shapes(settings: &T5Config, gated: bool, stored: impl Fn(&str) -> bool) -> Shapes {
    let (width, heads, inner) = (settings.d_model, settings.heads_width(), settings.d_ff);
    let mut all = Shapes::new();
    let mut add = |path: &str, shape: &[i64]| {
        let weight = !path.ends_with(".bias") && !path.contains(".experts.");
        let name = if weight { format!("{path}.weight") } else { path.to_owned() };
        all.insert(name, shape.to_vec());
    };
    add(SHARED, &[settings.vocab_size, width]);
    for (stack, layers) in
        [("encoder", settings.num_layers), ("decoder", settings.decoder_layers())]
    {
        for i in 0..layers {
            let causal = stack == "decoder";
            let switch = settings.switch.as_ref().filter(|s| s.has(causal, i));
            let network = settings.network();
            let kinds: &[&str] = match causal {
                false => &["SelfAttention", network],
                true => &["SelfAttention", "EncDecAttention", network],
            };
            for (k, kind) in kinds.iter().enumerate() {
                let layer = format!("{stack}.block.{i}.layer.{k}");
                add(&format!("{layer}.layer_norm"), &[width]);
                let mut linear =
                    |name: &str, shape: &[i64]| add(&format!("{layer}.{kind}.{name}"), shape);
                if let (true, Some(switch)) = (*kind == network, switch) {
                    let experts = switch.experts;
                    linear("router.classifier", &[experts, width]);
                    if switch.router_bias {
                        linear("router.classifier.bias", &[experts]);
                    }
                    linear(&format!("experts.{WI}"), &[experts, inner, width]);
                    linear(&format!("experts.{WO}"), &[experts, width, inner]);
                } else if *kind == network {
                    let into: &[&str] = if gated { &["wi_0", "wi_1"] } else { &["wi"] };
                    into.iter().for_each(|name| linear(name, &[inner, width]));
                    linear("wo", &[width, inner]);
                } else {
                    ["q", "k", "v"].iter().for_each(|name| linear(name, &[heads, width]));
                    linear("o", &[width, heads]);
                }
            }
        }
        let buckets = settings.relative_attention_num_buckets;
        add(&format!("{stack}.block.0.{TABLE}"), &[buckets, settings.num_heads]);
        add(&format!("{stack}.final_layer_norm"), &[width]);
        let words = format!("{stack}.{WORDS}");
        if stored(&words) {
            add(&words, &[settings.vocab_size, width]);
        }
    }
    if stored(HEAD) {
        add(HEAD, &[settings.vocab_size, width]);
    }
    all
}
