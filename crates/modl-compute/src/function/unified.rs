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

/// The width of the bottlenecks in [`mam`], b.
const MAM_BOTTLENECK: f64 = 512.0;

/// MAM, the mix-and-match adapter: a short prefix (of 30 tokens, as [`PrefixTuning`] has by default)
/// at every attention, and parallel adapters of width 512, scaled by 4, beside the feed-forward
/// layers. `prefix` stands at its usual targets, `width` is that of the hidden states.
///
/// [`PrefixTuning`]: crate::PrefixTuning
pub fn mam(prefix: impl ModuleConfig + 'static, width: i64) -> Union {
    // ⌊width ⁄ (width ⁄ 512)⌋ is 512: dividing by a power of two is exact.
    let reduction_factor = width as f64 / MAM_BOTTLENECK;
    Union::new([
        Part::new(prefix.usual_targets(), prefix),
        Part::new(
            Bottleneck::parallel_sites(),
            Bottleneck { reduction_factor, ..Bottleneck::parallel() },
        ),
    ])
}

/// UniPELT: a prefix, LoRA on queries and values and bottleneck adapters, each behind a gate of its
/// own. `prefix` stands at its usual targets; the authors' has 10 tokens.
pub fn unipelt(prefix: impl ModuleConfig + 'static) -> Union {
    Union::new([
        Part::new(prefix.usual_targets(), Gated::new(prefix)),
        Part::new(Targets::names(["query", "value"]), Gated::new(Lora::default())),
        Part::new(Bottleneck::pfeiffer_sites(), Gated::new(Bottleneck::pfeiffer())),
    ])
}
