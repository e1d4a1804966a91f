//! The unified view: every method as h ← h + s·Δh at a place, and the two mixtures that follow
//! from it, MAM and UniPELT.
//!
//! He et al. 2022, *Towards a Unified View of Parameter-Efficient Transfer Learning*, arXiv
//! 2110.04366; Mao et al. 2022, *UniPELT*, arXiv 2110.07577. Survey §3.5.

use modl_core::{ModuleConfig, Targets};

use super::{Bottleneck, Gated, Part, Union};
use crate::low_rank::Lora;

/// One row of He et al.'s table 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// The method.
    pub method: &'static str,
    /// Δh as a function.
    pub change: &'static str,
    /// What Δh looks at: the sub-layer's input (parallel) or its output (sequential).
    pub insertion: &'static str,
    /// Which representation h is.
    pub representation: &'static str,
    /// How Δh is put onto h.
    pub composition: &'static str,
}

/// He et al.'s table 1, the mixtures' parts included.
pub const FORMS: [Form; 6] = [
    Form {
        method: "prefix tuning",
        change: "softmax(x W_q P_kᵀ) P_v",
        insertion: "parallel",
        representation: "head of attention",
        composition: "h ← (1 − λ) h + λ Δh",
    },
    Form {
        method: "adapter",
        change: "σ(h W_down) W_up",
        insertion: "sequential",
        representation: "attention, feed-forward layer",
        composition: "h ← h + Δh",
    },
    Form {
        method: "LoRA",
        change: "x W_down W_up",
        insertion: "parallel",
        representation: "query, value of attention",
        composition: "h ← h + s·Δh",
    },
    Form {
        method: "parallel adapter",
        change: "σ(h W_down) W_up",
        insertion: "parallel",
        representation: "attention, feed-forward layer",
        composition: "h ← h + Δh",
    },
    Form {
        method: "multi-head parallel adapter",
        change: "σ(h W_down) W_up",
        insertion: "parallel",
        representation: "head of attention",
        composition: "h ← h + Δh",
    },
    Form {
        method: "scaled parallel adapter",
        change: "σ(h W_down) W_up",
        insertion: "parallel",
        representation: "attention, feed-forward layer",
        composition: "h ← h + s·Δh",
    },
];

/// MAM, the mix-and-match adapter: a short prefix at every attention and scaled parallel adapters
/// beside the feed-forward layers. `prefix` is a method for `attention` sites.
pub fn mam(prefix: impl ModuleConfig + 'static) -> Union {
    Union::new([
        Part::new(Targets::pattern("all-attention"), prefix),
        Part::new(Bottleneck::parallel_sites(), Bottleneck::parallel()),
    ])
}

/// UniPELT: a prefix, LoRA on queries and values and bottleneck adapters, each behind a gate of its
/// own. `prefix` is a method for `attention` sites.
pub fn unipelt(prefix: impl ModuleConfig + 'static) -> Union {
    Union::new([
        Part::new(Targets::pattern("all-attention"), Gated::new(prefix)),
        Part::new(Targets::names(["query", "value"]), Gated::new(Lora::default())),
        Part::new(Bottleneck::pfeiffer_sites(), Gated::new(Bottleneck::pfeiffer())),
    ])
}
