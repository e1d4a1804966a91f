//! Merging models tensor by tensor: piece by piece, within a bound of memory that is known before
//! the work starts.
//!
//! | file | what |
//! |---|---|
//! | `method.rs` | the seam: what a method is called, takes and does |
//! | `group.rs` | the tensors of all models that become one, in pieces |
//! | `gram.rs` | inner products of whole tensors |
//! | `largest.rs` | the k largest of many numbers, without sorting |
//! | `counting.rs` | the same by counting, over several tensors, too |
//! | `elements.rs` | numbers in memory or in a file |
//! | `adapted.rs` | adapters that are merged into tensors as these are read |
//! | `methods.rs` | names to methods |
//! | `source.rs` | a model on disk: where each tensor is |
//! | `vocabulary.rs` | embeddings in the order of another vocabulary |
//! | `plan.rs` | what a merge is going to do, and what it costs |
//! | `diagnose.rs` | how models get on with each other, and what the result keeps |
//! | `guard.rs` | one merge in a folder at a time, and room for it on the disk |
//! | `run.rs`, `shard.rs` | the engine: writes the result, and goes on where it was stopped |

mod adapted;
mod counting;
mod diagnose;
mod elements;
mod gram;
mod group;
mod guard;
mod largest;
mod method;
mod methods;
mod plan;
mod run;
mod shard;
mod source;
mod vocabulary;

pub use adapted::{AddedBias, AddedProduct};
pub use diagnose::{Diagnosis, TensorDiagnosis, diagnose};
pub use elements::{Adapted, Elements, Stored};
pub use gram::Gram;
pub(crate) use gram::inner;
pub use group::{Chunk, Group, Input, uniform};
pub use largest::{Largest, Ranked, Ties, largest, largest_over};
pub use method::{Base, Blend, MergeMethod, Of, Scalar, Setting, Settings, Spec, Statistics};
pub use methods::{MergeMethods, merge_group};
pub use plan::{Cost, Output, Plan, Shard};
pub use run::{Step, run};
pub(crate) use source::read_json;
pub use source::{Place, Source, identity};
pub use vocabulary::{Row, Vocabulary};
