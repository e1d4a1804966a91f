#![doc = include_str!("../README.md")]

mod attention;
mod bert;
mod decoder;
mod dropout;
mod folder;
mod generate;
mod gguf;
mod gpt2;
mod ids;
mod llama;
mod mask;
mod moe;
mod open;
mod pixels;
mod place;
mod pooling;
mod rope;
mod settings;
mod t5;
mod tokenizer;
mod vit;

pub use bert::{Bert, BertConfig};
pub use generate::{Choice, Generation, generate};
pub use gpt2::{Gpt2, Gpt2Config};
pub use llama::{Llama, LlamaConfig};
pub use moe::MixtureConfig;
pub use open::{LoadOptions, open};
pub use pixels::Pixels;
pub use pooling::mean_pool;
pub use rope::{Rope, RopeScaling};
pub use t5::{T5, T5Config, greedy};
pub use tokenizer::{Batch, Tokenizer};
pub use vit::{Vit, VitConfig};
