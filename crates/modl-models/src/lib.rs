#![doc = include_str!("../README.md")]

mod attention;
mod bert;
mod decoder;
mod dropout;
mod folder;
mod gpt2;
mod ids;
mod llama;
mod mask;
mod open;
mod place;
mod pooling;
mod settings;
mod t5;
mod tokenizer;

pub use bert::{Bert, BertConfig};
pub use gpt2::{Gpt2, Gpt2Config};
pub use llama::{Llama, LlamaConfig, Rope};
pub use open::{LoadOptions, open};
pub use pooling::mean_pool;
pub use t5::{T5, T5Config, greedy};
pub use tokenizer::{Batch, Tokenizer};
