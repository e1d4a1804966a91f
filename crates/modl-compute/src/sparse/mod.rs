//! Parameter composition by sparse changes: masks over θ and deltas under a mask, θ + m ⊙ δ or
//! m ⊙ θ. Survey §3.1.

mod bitfit;
mod diff_pruning;
mod difference;
mod edge_popup;
mod fish_mask;
mod full;
mod hard_concrete;
mod ln_tuning;
mod lottery_ticket;
mod lt_sft;
mod masked;
mod pack_net;
mod piggyback;
mod straight_through;
mod sup_sup;
mod top_k;
mod trainable_tokens;

use modl_core::{Catalog, ModuleConfig, Result};

pub use bitfit::BitFit;
pub use diff_pruning::DiffPruning;
pub use difference::{Difference, attach_difference};
pub use edge_popup::EdgePopup;
pub use fish_mask::{FishMask, choose_fish_mask, fisher};
pub use full::{Form, Full};
pub use hard_concrete::HardConcrete;
pub use ln_tuning::LnTuning;
pub use lottery_ticket::LotteryTicket;
pub use lt_sft::LtSft;
pub use pack_net::{PackNet, pack_next};
pub use piggyback::Piggyback;
pub use straight_through::Weights;
pub use sup_sup::{SupSup, TaskSearch, infer_task, infer_task_by};
pub use top_k::{top_k, top_k_across};
pub(crate) use trainable_tokens::ROWS;
pub use trainable_tokens::TrainableTokens;

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<Full>(
        "Full fine-tuning of a site",
        "Ilharco et al. 2023, arXiv 2212.04089",
        "3.1",
    )?;
    r.register::<BitFit>("BitFit", "Ben Zaken et al. 2022, arXiv 2106.10199", "3.1")?;
    r.register::<LnTuning>("Layer-norm tuning", "Zhao et al. 2024, arXiv 2312.11420", "3.1")?;
    r.register::<TrainableTokens>("Trainable tokens", "PEFT 0.21, `TrainableTokensConfig`", "3.1")?;
    r.register::<LotteryTicket>(
        "Magnitude pruning, lottery ticket",
        "Frankle and Carbin 2019, arXiv 1803.03635",
        "3.1",
    )?;
    r.register::<LtSft>(
        "Lottery-ticket sparse fine-tuning (LT-SFT)",
        "Ansell et al. 2022, arXiv 2110.07560",
        "3.1",
    )?;
    r.register::<DiffPruning>("Diff pruning", "Guo et al. 2021, arXiv 2012.07463", "3.1")?;
    r.register::<FishMask>("FISH mask", "Sung et al. 2021, arXiv 2111.09839", "3.1")?;
    r.register::<Piggyback>("Piggyback supermask", "Mallya et al. 2018, arXiv 1801.06519", "3.1")?;
    r.register::<EdgePopup>("Edge-popup", "Ramanujan et al. 2020, arXiv 1911.13299", "3.1")?;
    r.register::<SupSup>(
        "Supermasks in superposition (SupSup)",
        "Wortsman et al. 2020, arXiv 2006.14769",
        "3.1",
    )?;
    r.register::<PackNet>("PackNet", "Mallya and Lazebnik 2018, arXiv 1711.05769", "3.1")
}
