//! The names and shapes of Llama's parameters, and of what is built as it.

use serde_json::Value;

use super::LlamaConfig;
use crate::decoder::{HEAD, Naming};
use crate::folder::Shapes;
use crate::moe::{CHOICE_BIAS, DOWN, GATE_UP, RouterScores};

/// Whether a parameter is of one of the layers after the last, with which DeepSeek-V3 was trained to
/// predict tokens further ahead; transformers does not read them either.
pub(super) fn ahead(config: &Value, layers: usize) -> impl Fn(&str) -> bool + use<> {
    let given = ["num_nextn_predict_layers", "num_mtp_layers"].map(|name| config.get(name));
    let more = given.into_iter().flatten().find_map(Value::as_u64).unwrap_or(0);
    let more = if config.get("model_type").is_some_and(|t| t == "deepseek_v3") { more } else { 0 };
    let places = layers as u64..(layers as u64).saturating_add(more);
    move |name: &str| {
        let rest = name.strip_prefix("model.").unwrap_or(name).strip_prefix("layers.");
        let number = rest.and_then(|r| r.split('.').next()?.parse().ok());
        number.is_some_and(|n: u64| places.contains(&n))
    }
}

/// All parameters with their shapes.
pub(super) fn shapes(settings: &LlamaConfig, naming: Naming) -> Shapes {
    let width = settings.hidden_size;
    let mut all = Shapes::new();
    all.insert(naming.path("embed_tokens.weight"), vec![settings.vocab_size, width]);
    for n in 0..settings.num_hidden_layers {
        let mut add = |name: &str, shape: &[i64]| {
            all.insert(naming.path(&format!("layers.{n}.{name}")), shape.to_vec());
        };
        add("input_layernorm.weight", &[width]);
        add("post_attention_layernorm.weight", &[width]);
        attention(settings, &mut add);
        network(settings, n, &mut add);
    }
    all.insert(naming.path("norm.weight"), vec![width]);
    if naming.head && !settings.tie_word_embeddings {
        all.insert(format!("{HEAD}.weight"), vec![settings.vocab_size, width]);
    }
    all
}

/// The parameters of a layer's attention.
fn attention(settings: &LlamaConfig, add: &mut impl FnMut(&str, &[i64])) {
    let (width, biased) = (settings.hidden_size, settings.attention_bias);
    let heads = settings.num_attention_heads * settings.head_width();
    let groups = settings.groups() * settings.head_width();
    let (mut linear, norms) = match &settings.latent {
        Some(latent) => latent.shapes(settings),
        None => {
            let biased = biased || settings.qkv_bias;
            let of = |name, out| (name, out, width, biased);
            let linear = vec![of("q_proj", heads), of("k_proj", groups), of("v_proj", groups)];
            let norms = [("q_norm", heads), ("k_norm", groups)];
            (linear, norms.into_iter().filter(|_| settings.query_norm).collect())
        }
    };
    linear.push(("o_proj", width, settings.values_width(), biased));
    for (name, out, input, biased) in linear {
        add(&format!("self_attn.{name}.weight"), &[out, input]);
        if biased {
            add(&format!("self_attn.{name}.bias"), &[out]);
        }
    }
    for (name, width) in norms {
        add(&format!("self_attn.{name}.weight"), &[width]);
    }
}

/// The parameters of layer `n`'s feed-forward network or mixture.
fn network(settings: &LlamaConfig, n: usize, add: &mut impl FnMut(&str, &[i64])) {
    let width = settings.hidden_size;
    let mut gated = |path: &str, inner: i64, biased: bool| {
        for (name, shape) in [
            ("gate_proj", [inner, width]),
            ("up_proj", [inner, width]),
            ("down_proj", [width, inner]),
        ] {
            add(&format!("{path}.{name}.weight"), &shape);
            if biased {
                add(&format!("{path}.{name}.bias"), &[shape[0]]);
            }
        }
    };
    let Some(mixture) = settings.mixture_at(n) else {
        return gated("mlp", settings.intermediate_size, settings.mlp_bias);
    };
    if let Some(shared) = mixture.shared {
        let path = format!("mlp.{}", shared.name());
        gated(&path, shared.width, false);
        if shared.gated {
            add(&format!("{path}_gate.weight"), &[1, width]);
        }
    }
    let (experts, inner) = (mixture.experts, mixture.width);
    add("mlp.gate.weight", &[experts, width]);
    if matches!(mixture.scores, RouterScores::Sigmoid { .. }) {
        add(&format!("mlp.gate.{CHOICE_BIAS}"), &[experts]);
    }
    add(&format!("mlp.experts.{GATE_UP}"), &[experts, 2 * inner, width]);
    add(&format!("mlp.experts.{DOWN}"), &[experts, width, inner]);
}
