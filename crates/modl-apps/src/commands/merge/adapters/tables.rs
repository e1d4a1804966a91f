//! What is shown of a merge of adapters.

use std::collections::BTreeMap;

use modl_aggregate::adapters::{SiteChanges, SiteReport, Way};
use modl_aggregate::merge::Diagnosis;

use super::super::plan::any_layer;
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
            s.compared.name.clone(),
            s.rank.to_string(),
            format!("{:.1}", s.effective_rank),
            format!("{:.4}", s.norm()),
            percent(1.0 - s.lost * s.lost),
            percent(s.lost),
            percent(s.from_sum),
            percent(s.compared.conflicts),
        ]);
    }
    let total = |f: &dyn Fn(&SiteReport) -> f64| found.iter().map(f).sum::<f64>();
    let norm = total(&|s| s.norm().powi(2)).sqrt();
    // Of what was there before it was cut: ‖BA‖² = (1 − lost²) ‖M‖².
    let before = |s: &SiteReport| s.norm().powi(2) / (1.0 - s.lost * s.lost).max(1e-12);
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
        percent(mean(total(&|s| s.compared.conflicts))),
    ]);
    table
}

/// The adapters, and the cosines between what they change.
pub(super) fn of_adapters(found: &Diagnosis, weights: &[f64]) -> Table {
    let (whole, names) = (found.whole(), &found.models);
    let head = ["adapter", "weight", "norm"].map(str::to_owned).into_iter();
    let mut table = Table::new(head.chain(names.iter().map(|n| format!("cos {n}"))));
    for (i, (name, weight)) in names.iter().zip(weights).enumerate() {
        let own = [name.clone(), weight.to_string(), format!("{:.4}", whole.norm(i))];
        let cosines = (0..names.len()).map(|j| format!("{:.3}", whole.cosine(i, j)));
        table.row(own.into_iter().chain(cosines));
    }
    table
}

/// Sites that are alike but for the layer, in one row.
pub(super) fn of_plan(sites: &[SiteChanges], names: &[String], way: &Way) -> Table {
    let mut rows: BTreeMap<(String, String, i64), (usize, [i64; 2])> = BTreeMap::new();
    for site in sites {
        let stand = site.present().map(|(j, c)| {
            format!("{} {}", names.get(j).map_or("?", String::as_str), c.weight.rank())
        });
        let rank = way.rank_of(site);
        let shape = site.present().next().map_or([0, 0], |(_, c)| c.weight.shape());
        let key = (any_layer(&site.path), stand.collect::<Vec<_>>().join(", "), rank);
        rows.entry(key).or_insert((0, shape)).0 += 1;
    }
    let head = ["site", "count", "shape", "adapters and their ranks", "rank at most"];
    let mut table = Table::new(head).left();
    for ((path, stand, rank), (count, shape)) in rows {
        table.row([path, count.to_string(), format!("{shape:?}"), stand, rank.to_string()]);
    }
    table
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}
