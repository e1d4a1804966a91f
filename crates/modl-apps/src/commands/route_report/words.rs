//! The numbers of a report as tables and sentences.

use modl_route::RoutingStats;
use modl_route::stats::{Mittal, Sign};

use super::numbers::{Numbers, SiteNumbers, SplitNumbers};
use crate::report::Table;

pub(super) const PREFACE: &str = "Load counts choices, importance adds up weights, H is an entropy in \
    nats, I the mutual information of task and module in nats and of what is possible. The formulas, \
    and from where on a number counts as a sign of something wrong, are in docs/routers.md. Heat maps \
    show the mean share that a module has of the weights of a row or token.";

/// What a split is called.
pub(super) fn split(name: &str) -> &str {
    match name {
        "test" => "held out",
        "train" => "trained on",
        other => other,
    }
}

/// `encoder.layer.0.attention.self.query (+11)`: a site, and how many others choose the same.
pub(super) fn site(site: &SiteNumbers) -> String {
    let first = site.paths.first().map_or("", String::as_str);
    match site.paths.len() {
        0 | 1 => first.to_owned(),
        n => format!("{first} (+{})", n - 1),
    }
}

/// How evenly and how decidedly modules are used.
pub(super) fn uses(split: &SplitNumbers) -> Table {
    type Column = (&'static str, fn(&RoutingStats) -> f64);
    const COLUMNS: [Column; 8] = [
        ("active", |s| s.active_modules),
        ("CV² load", |s| s.load_cv2),
        ("CV² importance", |s| s.importance_cv2),
        ("MaxVio", |s| s.max_violation),
        ("H of mean", |s| s.entropy_of_mean),
        ("mean H", |s| s.mean_entropy),
        ("overflow", |s| s.overflow),
        ("unrouted", |s| s.unrouted),
    ];
    let head = ["site", "modules", "units"].into_iter().chain(COLUMNS.map(|(name, _)| name));
    let mut table = Table::new(head);
    for s in &split.sites {
        let mut row = vec![site(s), s.modules.len().to_string(), s.stats.units.to_string()];
        row.extend(COLUMNS.map(|(_, value)| format!("{:.3}", value(&s.stats))));
        table.row(row);
    }
    if split.sites.len() > 1 {
        let mut row = vec!["all: mean of sites".to_owned(), "-".to_owned(), "-".to_owned()];
        row.extend(COLUMNS.map(|(_, value)| mean(split, |s| Some(value(&s.stats)))));
        table.row(row);
    }
    table
}

/// How modules relate to tasks.
pub(super) fn rules(split: &SplitNumbers) -> Table {
    type Column = (&'static str, fn(&Mittal) -> f64);
    const COLUMNS: [Column; 6] = [
        ("collapse-average", |m| m.collapse_average),
        ("collapse-worst", |m| m.collapse_worst),
        ("specialisation", |m| m.specialisation),
        ("inverse I", |m| m.inverse_mutual_information),
        ("alignment", |m| m.alignment),
        ("adaptation", |m| m.adaptation),
    ];
    let head = ["site", "tasks", "I(task; module)", "I of most"];
    let mut table = Table::new(head.into_iter().chain(COLUMNS.map(|(name, _)| name)));
    let show = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.3}"));
    for s in &split.sites {
        let mut row = vec![site(s), s.tasks.len().to_string(), show(Some(s.mutual_information))];
        row.push(show(s.relative_information));
        row.extend(COLUMNS.map(|(_, value)| show(s.mittal.as_ref().map(value))));
        table.row(row);
    }
    if split.sites.len() > 1 {
        let mut row = vec!["all: mean of sites".to_owned(), "-".to_owned()];
        row.push(mean(split, |s| Some(s.mutual_information)));
        row.push(mean(split, |s| s.relative_information));
        row.extend(COLUMNS.map(|(_, value)| mean(split, |s| s.mittal.as_ref().map(value))));
        table.row(row);
    }
    table
}

/// The mean over all sites that have the number. Where sites choose the same, each counts.
fn mean(split: &SplitNumbers, value: impl Fn(&SiteNumbers) -> Option<f64>) -> String {
    let known = split.sites.iter().filter_map(|s| Some((s.paths.len() as f64, value(s)?)));
    let (n, sum) = known.fold((0.0, 0.0), |(n, sum), (k, v)| (n + k, sum + k * v));
    if n == 0.0 { "-".to_owned() } else { format!("{:.3}", sum / n) }
}

/// A line for each thing that looks wrong at each site, or one that says that nothing does.
pub(super) fn signs(numbers: &Numbers) -> Vec<String> {
    let all = numbers.splits.iter().flat_map(|of_split| {
        let signs = of_split.sites.iter().flat_map(|s| s.signs.iter().map(move |sign| (s, sign)));
        signs.map(|(s, sign)| line(of_split, s, sign))
    });
    or_nothing(all.collect())
}

/// The same with one line for each kind of thing: where it is first, and at how many other sites.
pub(super) fn signs_in_short(numbers: &Numbers) -> Vec<String> {
    let mut lines = Vec::new();
    for of_split in &numbers.splits {
        let mut kinds: Vec<(&SiteNumbers, &Sign, usize)> = Vec::new();
        for (s, sign) in of_split.sites.iter().flat_map(|s| s.signs.iter().map(move |g| (s, g))) {
            let same = |(_, known, _): &&mut (&SiteNumbers, &Sign, usize)| {
                std::mem::discriminant(*known) == std::mem::discriminant(sign)
            };
            match kinds.iter_mut().find(same) {
                Some((_, _, sites)) => *sites += s.paths.len(),
                None => kinds.push((s, sign, 0)),
            }
        }
        lines.extend(kinds.into_iter().map(|(s, sign, others)| match others {
            0 => line(of_split, s, sign),
            1 => format!("{} [likewise at 1 other site]", line(of_split, s, sign)),
            n => format!("{} [likewise at {n} other sites]", line(of_split, s, sign)),
        }));
    }
    or_nothing(lines)
}

fn line(of_split: &SplitNumbers, s: &SiteNumbers, sign: &Sign) -> String {
    format!("{}, {}: {}", split(&of_split.name), site(s), sentence(sign))
}

fn or_nothing(lines: Vec<String>) -> Vec<String> {
    match lines.is_empty() {
        true => vec!["nothing looks wrong by the thresholds in docs/routers.md".to_owned()],
        false => lines,
    }
}

fn sentence(sign: &Sign) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    match sign {
        Sign::Dead { modules } => {
            let (n, names) = (modules.len(), modules.join(", "));
            let are = if n == 1 { "is a module that is" } else { "are modules that are" };
            format!(
                "module collapse: {names} {are} hardly ever used; raise the weight of a balance loss, \
                 or take fewer modules"
            )
        }
        Sign::Dominant { module, share } => format!(
            "module collapse: {module} has {} of all weight; raise the weight of a balance loss",
            percent(*share)
        ),
        Sign::Undecided { entropy } => format!(
            "the router is undecided: each row or token gets all modules nearly alike (entropy {} of \
             the largest); lower its temperature, or train it longer",
            percent(*entropy)
        ),
        Sign::Indifferent { information } => format!(
            "the router is indifferent: which modules are used does not depend on the task \
             (information {} of what is possible); compare with a random router",
            percent(*information)
        ),
        Sign::Dropping { share } => {
            format!("full modules drop {} of all choices; raise their capacity", percent(*share))
        }
        Sign::Overfitted { gap } => format!(
            "the router overfits: it is surer of what it was trained on (the entropy held out is \
             higher by {} of the largest); train it on more data, or with noise or dropout",
            percent(*gap)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sign_says_what_it_is_and_what_to_do() {
        let m = |n: &str| n.to_owned();
        for (sign, parts) in [
            (Sign::Dead { modules: vec![m("a"), m("b")] }, ["collapse: a, b are", "balance"]),
            (Sign::Dead { modules: vec![m("a")] }, ["a is a module", "fewer"]),
            (Sign::Dominant { module: m("c"), share: 0.876 }, ["c has 87.6 %", "balance"]),
            (Sign::Undecided { entropy: 0.99 }, ["undecided", "99.0 %"]),
            (Sign::Indifferent { information: 0.0 }, ["indifferent", "random router"]),
            (Sign::Dropping { share: 0.25 }, ["drop 25.0 %", "capacity"]),
            (Sign::Overfitted { gap: 0.2 }, ["overfits", "20.0 %"]),
        ] {
            let said = sentence(&sign);
            assert!(parts.iter().all(|p| said.contains(p)), "{said}");
        }
    }
}
