//! What is shown of a merge of adapters.

use modl_aggregate::adapters::{Cosines, SiteReport};

use crate::report::Table;

/// One row for each site, and one for all.
pub(super) fn of_sites(found: &[SiteReport]) -> Table {
    let mut table = Table::new([
        "site",
        "rank",
        "effective",
        "norm",
        "energy kept",
        "lost",
        "from the sum",
        "signs differ",
    ]);
    for s in found {
        table.row([
            s.path.clone(),
            s.rank.to_string(),
            format!("{:.1}", s.effective_rank),
            format!("{:.4}", s.norm),
            percent(1.0 - s.lost * s.lost),
            percent(s.lost),
            percent(s.from_sum),
            percent(s.conflicts),
        ]);
    }
    let total = |f: &dyn Fn(&SiteReport) -> f64| found.iter().map(f).sum::<f64>();
    let norm = total(&|s| s.norm * s.norm).sqrt();
    // Of what was there before it was cut: ‖BA‖² = (1 − lost²) ‖M‖².
    let before = |s: &SiteReport| s.norm * s.norm / (1.0 - s.lost * s.lost).max(1e-12);
    let all = total(&before);
    let lost = total(&|s| before(s) * s.lost * s.lost);
    let lost = if all > 0.0 { lost / all } else { 0.0 };
    let mean = |sum: f64| if found.is_empty() { 0.0 } else { sum / found.len() as f64 };
    table.row([
        "all".to_owned(),
        String::new(),
        format!("{:.1}", mean(total(&|s| s.effective_rank))),
        format!("{norm:.4}"),
        percent(1.0 - lost),
        percent(lost.sqrt()),
        percent(mean(total(&|s| s.from_sum))),
        percent(mean(total(&|s| s.conflicts))),
    ]);
    table
}

/// The adapters, and the cosines between what they change.
pub(super) fn of_adapters(found: &[SiteReport], names: &[String], weights: &[f64]) -> Table {
    let Cosines { norms, cosines } = Cosines::of(found, names.len());
    let head = ["adapter", "weight", "norm"].map(str::to_owned).into_iter();
    let mut table = Table::new(head.chain(names.iter().map(|n| format!("cos {n}"))));
    let rows = names.iter().zip(weights).zip(norms.iter().zip(cosines.chunks(names.len())));
    for ((name, weight), (norm, row)) in rows {
        let own = [name.clone(), weight.to_string(), format!("{norm:.4}")];
        table.row(own.into_iter().chain(row.iter().map(|c| format!("{c:.3}"))));
    }
    table
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}
