//! Llama out of a GGUF file: its settings, the names of its tensors, and the order of the rows of
//! queries and keys.

use std::path::Path;

use modl_core::checkpoint::TensorFile;
use modl_core::{Device, Error, Kind, Result, Tensor};
use serde_json::{Map, Value, json};

use crate::folder::Weights;
use crate::gguf::Gguf;

/// Names in a layer, there and here.
const LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The name of the words' table and of the output layer.
const WORDS: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";

/// The name that transformers has for a tensor; its own where there is none, so that an error names
/// it.
fn canonical(stored: &str) -> String {
    let other = match stored {
        WORDS => Some("model.embed_tokens.weight".to_owned()),
        OUTPUT => Some("lm_head.weight".to_owned()),
        "output_norm.weight" => Some("model.norm.weight".to_owned()),
        _ => in_layer(stored),
    };
    other.unwrap_or_else(|| stored.to_owned())
}

fn in_layer(stored: &str) -> Option<String> {
    let (n, rest) = stored.strip_prefix("blk.")?.split_once('.')?;
    let (name, kind) = rest.rsplit_once('.')?;
    let (_, here) = LAYER.iter().find(|(there, _)| *there == name)?;
    Some(format!("model.layers.{n}.{here}.{kind}"))
}

/// The settings as `config.json` would have them.
///
/// # Errors
/// By key where one is missing.
pub(super) fn config(file: &Gguf) -> Result<Value> {
    let need = |key: &str| file.need(&format!("llama.{key}"));
    let find = |key: &str| file.metadata().get(&format!("llama.{key}")).filter(|v| !v.is_null());
    let (words, _) = file.info(WORDS)?;
    let has = |name: &str| file.info(name).is_ok();
    let mut rope = Map::new();
    rope.insert("rope_type".into(), find("rope.scaling.type").cloned().unwrap_or("default".into()));
    for (there, here) in [("rope.freq_base", "rope_theta"), ("rope.scaling.factor", "factor")] {
        rope.extend(find(there).map(|v| (here.to_owned(), v.clone())));
    }
    if rope.get("rope_type").is_some_and(|v| v == "none") {
        rope.insert("rope_type".into(), "default".into());
    }
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": words.first(),
        "hidden_size": need("embedding_length")?,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": need("attention.head_count")?,
        "num_key_value_heads": find("attention.head_count_kv"),
        "max_position_embeddings": find("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon")?,
        "attention_bias": has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_up.bias"),
        "tie_word_embeddings": !has(OUTPUT),
        "rope_parameters": rope,
    });
    if let Some(width) = find("attention.key_length").or_else(|| find("rope.dimension_count")) {
        config["head_dim"] = width.clone();
    }
    for (key, here) in [("bos", "bos_token_id"), ("eos", "eos_token_id")] {
        if let Some(id) = file.metadata().get(&format!("tokenizer.ggml.{key}_token_id")) {
            config[here] = id.clone();
        }
    }
    Ok(config)
}

/// The tensors of a file with `heads` heads and `groups` groups that share keys and values.
pub(super) fn weights(file: Gguf, heads: i64, groups: i64) -> Result<Weights> {
    let path = file.path().to_owned();
    Weights::of(&path, vec![Box::new(Turned { file, heads, groups })], |n| Some(canonical(n)))
}

/// A file whose queries and keys are in the order of transformers: llama.cpp turns neighbouring
/// features, transformers those that are half a head apart.
#[derive(Debug)]
struct Turned {
    file: Gguf,
    heads: i64,
    groups: i64,
}

impl TensorFile for Turned {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn names(&self) -> Vec<String> {
        self.file.names()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        self.file.info(name)
    }

    fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        let t = self.file.tensor(name, device)?;
        let parts = match name.rsplit('.').nth(1) {
            Some("attn_q") => self.heads,
            Some("attn_k") => self.groups,
            _ => return Ok(t),
        };
        let rows = t.len_of(0);
        if parts < 1 || rows % (2 * parts) != 0 {
            let problem = format!("`{name}` has {rows} rows for {parts} heads");
            return Err(Error::file(self.file.path(), problem));
        }
        let size = t.size();
        let pairs = t.reshape(&[parts, rows / parts / 2, 2, -1])?;
        pairs.transpose(1, 2)?.contiguous()?.reshape(&size)
    }
}
