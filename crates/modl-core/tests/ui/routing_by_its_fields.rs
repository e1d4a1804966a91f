//! A routing that is put together by hand, and would break with each field that is added.

use modl_core::{Routing, Tensors, Weights};

fn main() {
    let _ = Routing {
        weights: Weights::Fixed(vec![(0, 1.0)]),
        modules: 1,
        normalised: true,
        losses: Vec::new(),
        noted: Tensors::new(),
        heads: None,
    };
}
