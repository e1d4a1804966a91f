//! mergekit's configuration files: read, checked, and made into a [`Plan`](crate::merge::Plan).
//!
//! | file | what |
//! |---|---|
//! | `config.rs` | the file as it is written |
//! | `settings.rs` | values by layer, by name and by model |
//! | `layers.rs` | which layer a tensor belongs to |
//! | `expand.rs` | a configuration to the tensors of a plan |

mod config;
mod expand;
mod layers;
mod settings;

pub use config::{InputModel, InputSlice, MergeConfig, Module, OutputSlice, read_documents};
pub use expand::{Options, Uneven, plan};
