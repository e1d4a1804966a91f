//! mergekit's configuration files: read, checked, and made into a [`Plan`](crate::merge::Plan).
//!
//! | file | what |
//! |---|---|
//! | `config.rs` | the file as it is written |
//! | `settings.rs` | values by layer, by name and by model |
//! | `layers.rs` | which layer a tensor belongs to |
//! | `tokenizer.rs` | which tokens the result knows, and where their embeddings come from |
//! | `statistics.rs` | files of what else is known of the models |
//! | `chat_template.rs`, `templates/` | how a conversation becomes one text |
//! | `beside.rs` | what stands beside the tensors |
//! | `expand.rs`, `part.rs` | a configuration to the tensors of a plan |

mod beside;
mod chat_template;
mod config;
mod expand;
mod layers;
mod part;
mod settings;
mod statistics;
mod tokenizer;

pub use config::{InputModel, InputSlice, MergeConfig, Module, OutputSlice, read_documents};
pub use expand::{Adapt, Options, Uneven, plan};
