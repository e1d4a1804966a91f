//! LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B of a LoRA learns faster than its A.
//!
//! η_B = ratio · η_A. B begins at 0 and A does not, and wide models learn features efficiently only
//! where η_B ⁄ η_A grows with the width. Which parameter is which PEFT's names say.

/// A factor of the learning rate for some parameters.
#[derive(Debug)]
pub(crate) struct Ratio {
    /// Where it stands in a [`crate::TrainConfig`].
    pub key: &'static str,
    pub ratio: f64,
    /// Whether it is for the parameter of a name.
    pub fits: fn(&str) -> bool,
}

/// The ratios that are given: of B, and of the factors at embeddings.
pub(crate) fn ratios(of_b: Option<f64>, of_embedding: Option<f64>) -> Vec<Ratio> {
    let b = of_b.map(|ratio| Ratio { key: "lora_plus_ratio", ratio, fits: is_b });
    let embedding = of_embedding.map(|ratio| Ratio {
        key: "lora_plus_embedding_ratio",
        ratio,
        fits: is_of_embedding,
    });
    b.into_iter().chain(embedding).collect()
}

fn has(name: &str, part: &str) -> bool {
    name.split('.').any(|p| p == part)
}

/// Whether `name` is the weight or the bias of a LoRA's B.
fn is_b(name: &str) -> bool {
    has(name, "lora_B")
}

/// Whether `name` is one of the two factors of a LoRA at an embedding.
fn is_of_embedding(name: &str) -> bool {
    has(name, "lora_embedding_A") || has(name, "lora_embedding_B")
}
