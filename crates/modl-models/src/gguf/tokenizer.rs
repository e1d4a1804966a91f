//! The tokenizer in a GGUF file as a `tokenizer.json`: byte pairs over bytes, as GPT-2 has it.

use modl_core::{Error, Result};
use serde_json::{Value, json};

use super::Gguf;

/// The type of tokens that stand for themselves wherever they occur, such as `<|im_start|>`.
const CONTROL: i64 = 3;

/// What the tokenizers crate reads.
///
/// # Errors
/// Where the file has no tokenizer, or one of another kind.
pub(crate) fn description(file: &Gguf) -> Result<Value> {
    let need = |key: &str| file.need(&format!("tokenizer.ggml.{key}"));
    let find = |key: &str| file.metadata().get(&format!("tokenizer.ggml.{key}"));
    let refuse = |what: &str, value: &Value, advice: &str| {
        let what = format!("a tokenizer with {what} {value} in {}", file.path().display());
        Err(Error::unsupported(what, advice))
    };
    let beside = "open the `tokenizer.json` that the model came with";
    let model = need("model")?;
    if model != "gpt2" {
        return refuse("model", model, beside);
    }
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    let pre = find("pre").cloned().unwrap_or("gpt-2".into());
    let split = match pre.as_str() {
        Some("gpt-2" | "default") => bytes.clone(),
        Some("smollm") => json!({
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": true}, &bytes],
        }),
        _ => return refuse("pre", &pre, beside),
    };
    let list = |key: &str| match need(key)?.as_array() {
        Some(list) => Ok(list),
        None => Err(Error::file(file.path(), format!("has no list `tokenizer.ggml.{key}`"))),
    };
    let tokens = list("tokens")?;
    let types = find("token_type").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let mut vocabulary = serde_json::Map::new();
    let mut special = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let Some(text) = token.as_str() else { return refuse("a token", token, beside) };
        vocabulary.insert(text.to_owned(), json!(id));
        if types.get(id).and_then(Value::as_i64) == Some(CONTROL) {
            special.push(json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }));
        }
    }
    let bos = find("add_bos_token").filter(|v| **v == true).and_then(|_| find("bos_token_id"));
    let first = bos.and_then(Value::as_u64).and_then(|id| Some((id, tokens.get(id as usize)?)));
    let start = first.map(|(id, text)| {
        json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": text, "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text.as_str().unwrap_or_default(): {
                "id": text, "ids": [id], "tokens": [text],
            }},
        })
    });
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special,
        "normalizer": null,
        "pre_tokenizer": split,
        "post_processor": start,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": need("merges")?,
        },
    }))
}
