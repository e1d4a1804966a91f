//! The heart of modl: modular deep learning as four choices behind small traits.
//!
//! A *site* is a named place in a backbone. At a site stands a *bank* of modules
//! ([`Module`]: computation), a [`Router`] says which of them are active for this input
//! (routing), and an [`Aggregator`] makes one result of them (aggregation). Algorithm 1 of the
//! survey *Modular Deep Learning* (Pfeiffer, Ruder, Vulić, Ponti; arXiv 2302.11529) is
//! [`ModularLayer::forward`]; everything else here serves it:
//!
//! | file | what |
//! |---|---|
//! | `layer.rs` | Algorithm 1: route → (compute → aggregate, or aggregate → compute) |
//! | `site.rs` | sites, the base function at a site, what flows through it |
//! | `module.rs`, `router.rs`, `aggregator.rs` | the three traits |
//! | `routing.rs` | the one type for α: static, per example, per token; hard, soft, sparse |
//! | `bank.rs`, `dispatch.rs`, `grouped.rs`, `low_rank.rs` | the inventory, and the fast ways to run it |
//! | `model.rs`, `attach.rs`, `model_routing.rs`, `merge.rs`, `backbone.rs`, `targets.rs` | a backbone with modules attached at sites |
//! | `activation_checkpointing.rs` | training that keeps less and computes more |
//! | `cache.rs` | what a decoder keeps of the tokens that it has seen |
//! | `tensor.rs`, `linear.rs`, `random.rs` | fallible tensors over libtorch; seeds, initialisation, dropout |
//! | `params.rs`, `scope.rs`, `checkpoint.rs`, `shards.rs`, `torch_file/`, `module_file.rs` | named parameters and files |
//! | `folder_lock.rs` | folders that one process writes at a time |
//! | `assignment.rs` | who gets what, at the least cost |
//! | `registry.rs` | names to constructors, for recipes and the command line |
//! | `testing/` | the contract that every module, router and aggregator passes |
//!
//! The three traits, what they talk about and the [`Registry`] are the stable seam for crates of
//! third parties: within one 0.x nothing of it is taken away, and what is new has a default. The
//! crate's README says what else is promised and what is not.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod activation;
mod activation_checkpointing;
mod aggregator;
mod assignment;
mod attach;
mod backbone;
mod bank;
mod cache;
pub mod checkpoint;
mod context;
mod cross_entropy;
mod dispatch;
mod error;
mod ffi;
mod folder_lock;
mod grouped;
mod grouped_low_rank;
mod grouping;
mod json;
mod layer;
mod linear;
mod low_rank;
mod machine;
mod merge;
mod model;
mod model_routing;
mod module;
mod module_file;
mod nearest;
mod of_rows;
mod params;
mod random;
mod registry;
mod residents;
mod router;
mod routing;
mod scope;
pub mod shards;
mod side_by_side;
mod site;
mod steps;
mod targets;
mod tensor;
mod tensor_in_place;
mod tensor_ops;
mod tensor_parts;
mod tensors;
#[cfg(feature = "testing")]
pub mod testing;
mod torch_file;
mod undecided;
mod whole_file;

pub use activation::Activation;
pub use activation_checkpointing::{ActivationCheckpoints, Segments};
pub use aggregator::{Aggregator, AggregatorConfig, Order};
pub use assignment::assignment;
pub use backbone::{Backbone, FreshBackbone, Layers, OwnLoss};
pub use bank::{Active, Bank};
pub use cache::Cache;
pub use context::{Context, Trace};
pub use dispatch::{Base, Outputs};
pub use error::{Error, Mismatch, Result, ResultExt};
pub use folder_lock::FolderLock;
pub use grouping::Grouping;
pub use json::parse_json;
pub use layer::ModularLayer;
pub use machine::{cuda_devices, has_bf16, keep_freed_memory, set_threads, threads};
pub use model::Modular;
pub use module::{Attachment, LowRank, Module, ModuleConfig, Step};
pub use module_file::ModuleHeader;
pub use nearest::nearest;
pub use params::{Param, ParamStore, Select};
pub use random::{Init, Seed, dropout, dropout_mask};
pub use registry::{Catalog, Entry, Registry, from_json, to_json};
pub use residents::Residents;
pub use router::{Outcome, Router, RouterConfig, Shared};
pub use routing::{ASSIGNED, Level, Routing, Weights};
pub use scope::Scope;
pub use side_by_side::{Branch, Work, on_threads, side_by_side, suits_side_by_side};
pub use site::{Host, HostFn, STACK_DOWN, STACK_UP, Signal, Site, SiteKind};
pub use steps::AdamWStep;
pub use targets::{Names, Targets};
pub use tensor::{Device, Element, Kind, Tensor, is_float, no_grad, with_grad};
pub use tensors::Tensors;
