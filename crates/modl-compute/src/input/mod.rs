//! Input composition: f_θ([φ; x]). Survey §3.2.

mod p_tuning;
mod prefix_tuning;
mod prompt_tuning;
mod virtual_tokens;

use modl_core::{Catalog, ModuleConfig, Result};

pub(crate) use p_tuning::{ENCODER, encode};
pub use p_tuning::{PTuning, PromptEncoder};
pub use prefix_tuning::PrefixTuning;
pub(crate) use prefix_tuning::{PROJECTION, project};
pub(crate) use prompt_tuning::entrance;
pub use prompt_tuning::{PromptTuning, start_from_words};

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<PromptTuning>("Prompt tuning", "Lester et al. 2021, arXiv 2104.08691", "3.2")?;
    r.register::<PTuning>("P-tuning", "Liu et al. 2021, arXiv 2103.10385", "3.2")?;
    r.register::<PrefixTuning>(
        "Prefix tuning (plain, projected), P-tuning v2",
        "Li and Liang 2021, arXiv 2101.00190",
        "3.2",
    )
}
