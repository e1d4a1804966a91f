#![doc = include_str!("../README.md")]

mod attention;
mod bert;
mod dropout;
mod folder;
mod ids;
mod mask;
mod open;
mod place;
mod pooling;
mod settings;
mod t5;
mod tokenizer;

pub use bert::{Bert, BertConfig};
pub use open::{LoadOptions, open};
pub use pooling::mean_pool;
pub use t5::{T5, T5Config, greedy};
pub use tokenizer::{Batch, Tokenizer};
