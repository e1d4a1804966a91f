//! Parameter aggregation: φ̄ = g(α, {φⱼ}), where φ are the parameters of whole models (survey §5.1).
//!
//! Each file holds a method: what it does, its formula, its paper, its settings. A method is added
//! with a file and one line in `all`.

mod arcee_fusion;
mod breadcrumbs;
mod combination;
mod dare;
mod della;
mod fisher;
mod karcher;
mod linear;
mod magnitude_prune;
mod model_stock;
mod multislerp;
mod near_swap;
mod nuslerp;
mod passthrough;
mod ram;
mod reg_mean;
mod sce;
mod slerp;
mod sparsity;
mod task_arithmetic;
mod task_vectors;
mod ties;

pub use arcee_fusion::ArceeFusion;
pub use breadcrumbs::Breadcrumbs;
pub use dare::Dare;
pub use della::Della;
pub use fisher::Fisher;
pub use karcher::Karcher;
pub use linear::Linear;
pub use magnitude_prune::MagnitudePrune;
pub use model_stock::ModelStock;
pub use multislerp::MultiSlerp;
pub use near_swap::NearSwap;
pub use nuslerp::NuSlerp;
pub use passthrough::Passthrough;
pub use ram::{Ram, RamPlus};
pub use reg_mean::RegMean;
pub use sce::Sce;
pub use slerp::Slerp;
pub use task_arithmetic::TaskArithmetic;
pub use ties::Ties;

use crate::merge::MergeMethod;

/// The methods of this crate.
pub(crate) fn all() -> Vec<Box<dyn MergeMethod>> {
    vec![
        Box::new(Linear),
        Box::new(Fisher),
        Box::new(RegMean),
        Box::new(TaskArithmetic),
        Box::new(MagnitudePrune),
        Box::new(Ties),
        Box::new(Dare { ties: false }),
        Box::new(Dare { ties: true }),
        Box::new(Breadcrumbs { ties: false }),
        Box::new(Breadcrumbs { ties: true }),
        Box::new(Della { ties: true }),
        Box::new(Della { ties: false }),
        Box::new(ModelStock),
        Box::new(Slerp),
        Box::new(NuSlerp),
        Box::new(MultiSlerp),
        Box::new(Karcher),
        Box::new(Sce),
        Box::new(NearSwap),
        Box::new(ArceeFusion),
        Box::new(Ram),
        Box::new(RamPlus),
        Box::new(Passthrough),
    ]
}
