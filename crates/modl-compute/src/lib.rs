#![doc = include_str!("../README.md")]

mod absent;
mod adapter_folder;
pub mod adapterhub;
mod dropout;
pub mod function;
pub mod hyper;
pub mod input;
pub mod low_rank;
mod patterns;
pub mod peft;
pub mod sparse;

use modl_core::{Registry, Result};

pub use function::{
    AdapterDrop, Bottleneck, BottleneckInit, Compacter, ConditionalNorm, Coupling, CrossStitch,
    FeedForward, Film, Gated, Ia3, Ia3Init, Invertible, InvertibleBlock, Nested, Orthonormal, Part,
    Progressive, Reft, Residual, ResidualAdapter, ResidualPlacement, Scaling, Sluice, TaskHeads,
    Union,
};
pub use hyper::{
    Condition, Cpg, HyperFormer, HyperFormerPlusPlus, HyperLora, HyperNetwork, HyperX, MadG,
};
pub use input::{KnnLm, PTuning, PrefixTuning, PromptTuning, Retrieval};
pub use low_rank::{
    AdaLora, AdapterHubDora, Boft, Dora, FourierFt, Intrinsic, Loha, Lokr, LokrInit, Lora,
    LoraInit, Oft, Vera,
};
pub use patterns::Patterns;
pub use sparse::{
    BitFit, DiffPruning, EdgePopup, FishMask, Form, Full, HardConcrete, LnTuning, LotteryTicket,
    LtSft, PackNet, Piggyback, SupSup, TrainableTokens,
};

/// Adds the modules of this crate.
///
/// # Errors
/// Where a name is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.modules;
    low_rank::register(r)?;
    sparse::register(r)?;
    input::register(r)?;
    function::register(r)?;
    hyper::register(r)
}
