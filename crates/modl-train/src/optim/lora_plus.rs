//! LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B of a LoRA learns faster than its A.
//!
//! η_B = ratio · η_A. B begins at 0 and A does not, and wide models learn features efficiently only
//! where η_B ⁄ η_A grows with the width. Which parameter is which PEFT's names say.

fn has(name: &str, part: &str) -> bool {
    name.split('.').any(|p| p == part)
}

/// Whether `name` is the weight or the bias of a LoRA's B.
pub(crate) fn is_b(name: &str) -> bool {
    has(name, "lora_B")
}

/// Whether `name` is one of the two factors of a LoRA at an embedding.
pub(crate) fn is_of_embedding(name: &str) -> bool {
    has(name, "lora_embedding_A") || has(name, "lora_embedding_B")
}
