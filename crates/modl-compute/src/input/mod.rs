//! Input composition: f_θ([φ; x]). Survey §3.2.

mod datastore;
mod knn_lm;
mod lstm;
mod p_tuning;
mod prefix_tuning;
mod prompt_tuning;
mod retrieval;
mod virtual_tokens;

use modl_core::{Catalog, ModuleConfig, Result};

pub use datastore::{Datastore, Neighbours, Search};
pub use knn_lm::{KnnLm, neighbour_probabilities};
pub(crate) use p_tuning::{EMBEDDING, encode};
pub use p_tuning::{PTuning, PromptEncoder};
pub use prefix_tuning::PrefixTuning;
pub(crate) use prefix_tuning::{PROJECTION, prefixed, project};
pub(crate) use prompt_tuning::entrance;
pub use prompt_tuning::{PromptTuning, start_from_vocabulary, start_from_words};
pub use retrieval::Retrieval;

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<PromptTuning>("Prompt tuning", "Lester et al. 2021, arXiv 2104.08691", "3.2")?;
    r.register::<PTuning>("P-tuning (MLP, LSTM)", "Liu et al. 2021, arXiv 2103.10385", "3.2")?;
    r.register::<PrefixTuning>(
        "Prefix tuning (plain, projected), P-tuning v2",
        "Li and Liang 2021, arXiv 2101.00190",
        "3.2",
    )?;
    r.register::<Retrieval>(
        "Retrieval augmentation",
        "Lewis et al. 2020, arXiv 2005.11401",
        "3.2",
    )?;
    r.register::<KnnLm>("kNN-LM", "Khandelwal et al. 2020, arXiv 1911.00172", "3.2")
}
