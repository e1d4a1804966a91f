//! What the fuzz targets share: a folder of their own, and a tiny BERT.

use std::path::PathBuf;

use modl_core::{Device, Kind, Modular, Seed};
use modl_models::Bert;
use serde_json::json;

/// A folder that lasts as long as the process.
pub fn folder() -> &'static PathBuf {
    static FOLDER: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().expect("a temporary folder").keep())
}

/// Writes one input where a parser looks for it.
pub fn write(name: &str, data: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, data).expect("a temporary file");
    path
}

/// A BERT of two layers, 8 wide.
pub fn model() -> Modular {
    let config = json!({
        "model_type": "bert", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 16, "hidden_act": "gelu",
        "max_position_embeddings": 16, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0
    });
    let bert = Bert::untrained(config, Seed(0), Kind::Float, Device::Cpu).expect("a tiny BERT");
    Modular::new(bert, Seed(0)).expect("a tiny BERT")
}
