//! Merging adapters without their backbone: one low-rank change, scaling or prompt of several.
//!
//! | file | what |
//! |---|---|
//! | `change.rs` | what each adapter changes at a site |
//! | `way.rs` | names and conventions to ways of merging |
//! | `merge.rs` | changes of weights: their exact sum, methods over them, PEFT's methods over A and B |
//! | `truncate.rs` | the best product of a given rank, and what it loses |
//! | `report.rs` | how the changes stand to one another: cosines, sign conflicts, effective ranks |
//! | `others.rs` | scalings ((IA)³), prompts and prefixes, bottlenecks |
//!
//! Survey §5.1; PEFT's `add_weighted_adapter`, whose sums have cross terms (`linear`) or lose what
//! rsLoRA, DoRA and `lora_bias` add. Weights are nowhere divided by their sum unless a method says so.

mod change;
mod merge;
mod others;
mod report;
mod truncate;
mod way;

pub use change::{Change, Delta, SiteChanges};
pub use merge::{MergedSite, merge};
pub use others::{average, joined_prompts, product_of_scalings, scalings_around_one, weighted_sum};
pub use report::{SiteReport, effective_rank, report};
pub use truncate::{Truncated, truncate_product, truncate_whole};
pub use way::Way;
