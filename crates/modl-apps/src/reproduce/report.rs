//! What came out: tables in the terminal, plots and a page in the folder.

use anyhow::Result;
use modl_core::checkpoint::write_whole;

use super::experiment::{Condition, Verdict};
use super::schedule::{Done, Plan};
use crate::report::{Bar, Page, Table, grouped_bars};
use crate::trials::{Columns, Measure, Results, interval_cell};

/// Seeds from which on the protocol takes an interval seriously.
const ENOUGH: usize = 5;

/// Prints the results, and writes `report.html` and a plot for each measure.
pub(super) fn write(plan: &Plan, done: &Done) -> Result<()> {
    let (about, measures) = (plan.experiment.about(), plan.experiment.measures());
    let results = Results::new(&done.runs);
    let rows: Vec<(String, String)> = done
        .conditions
        .iter()
        .map(|c| (c.key.clone(), format!("{}: {}", c.group, c.series)))
        .collect();
    let columns = Columns { head: about.name, rows: &rows, measures };
    let means = columns.means(&results)?;
    let reference =
        |key: &str| done.conditions.iter().find(|c| c.key == key).and_then(|c| c.reference.clone());
    let head = format!("less {}", references(&done.conditions));
    let differences = Columns { head: &head, ..columns }.differences(&results, reference)?;
    let thresholds = plan.experiment.thresholds();
    let verdicts: Vec<Verdict> =
        thresholds.iter().map(|t| t.judge(&results)).collect::<Result<_>>()?;
    let verdicts = judged(&verdicts, plan.quick);
    let remarks = remarks(plan, done, &results);

    println!("{}: {} ({})\n{}\n", about.name, about.title, about.citation, about.claim);
    println!("{}\n\n{}\n\n{}\n", means.text(), differences.text(), verdicts.text());
    println!("{remarks}");

    let mut page = Page::new(&format!("{}: {}", about.name, about.title));
    page.paragraph(&format!("{}: {}", about.citation, about.claim));
    page.paragraph(about.setup);
    page.paragraph(&remarks);
    page.heading("Thresholds, declared before the run");
    page.table(&verdicts);
    page.heading("Means");
    page.paragraph("In brackets the 95 % interval by the bootstrap over seeds.");
    page.table(&means);
    page.heading("Differences, paired by seed");
    page.table(&differences);
    page.heading("Plots");
    for measure in measures {
        let svg = plot(measure, &done.conditions, &results)?;
        page.figure(&svg, "Means over seeds; the lines are 95 % intervals by the bootstrap.");
        write_whole(plan.folder.join(format!("{}.svg", measure.key)), svg.as_bytes())?;
    }
    let path = plan.folder.join("report.html");
    write_whole(&path, page.html().as_bytes())?;
    println!("report: {}\n", path.display());
    Ok(())
}

/// What differences are to, by the names within groups.
fn references(conditions: &[Condition]) -> String {
    let referred = |c: &&Condition| conditions.iter().any(|d| d.reference.as_ref() == Some(&c.key));
    let mut names: Vec<&str> = Vec::new();
    for c in conditions.iter().filter(referred) {
        if !names.contains(&c.series.as_str()) {
            names.push(&c.series);
        }
    }
    names.join(", ")
}

fn judged(verdicts: &[Verdict], quick: bool) -> Table {
    let mut table = Table::new(["threshold", "declared", "measured", "verdict"]).left();
    for v in verdicts {
        let word = match v.held {
            _ if quick => "not judged: --quick",
            None => "not measured",
            Some(true) => "held",
            Some(false) => "FAILED",
        };
        let measured = interval_cell(v.measured, 3);
        table.row([v.text, v.bound.as_str(), measured.as_str(), word]);
    }
    table
}

fn remarks(plan: &Plan, done: &Done, results: &Results) -> String {
    let seeds = results.seeds().len();
    let cpu: f64 = done.runs.iter().map(|r| r.seconds).sum();
    let memory = done.runs.iter().filter_map(|r| r.peak_rss_mb).fold(f64::NAN, f64::max);
    let mut text = format!(
        "{seeds} seed{} of {} conditions; all runs together took {cpu:.0} s, {} at once; the \
         largest memory was {memory:.0} MB.",
        if seeds == 1 { "" } else { "s" },
        done.conditions.len(),
        plan.workers,
    );
    text += &match done.kept {
        0 => format!(" This time: {:.0} s.", done.seconds),
        n => format!(" {n} runs were there before; the others took {:.0} s.", done.seconds),
    };
    let mut commits: Vec<&str> =
        done.runs.iter().map(|r| r.commit.as_deref().unwrap_or("unknown")).collect();
    commits.sort_unstable();
    commits.dedup();
    text += &format!(" Source at {}.", commits.join(" and "));
    if commits.len() > 1 {
        text += " Runs of different sources are compared here; remove runs.jsonl to do all anew.";
    }
    if seeds < ENOUGH {
        text += &format!(" Intervals of fewer than {ENOUGH} seeds say little.");
    }
    text
}

fn plot(measure: &Measure, conditions: &[Condition], results: &Results) -> Result<String> {
    let distinct = |of: fn(&Condition) -> &String| {
        let mut all: Vec<String> = Vec::new();
        for c in conditions.iter().filter(|c| results.has(&c.key, measure.key)) {
            if !all.contains(of(c)) {
                all.push(of(c).clone());
            }
        }
        all
    };
    let (groups, series) = (distinct(|c| &c.group), distinct(|c| &c.series));
    let bar = |group: &String, series: &String| -> Result<Option<Bar>> {
        let at = conditions.iter().find(|c| &c.group == group && &c.series == series);
        let Some(c) = at.filter(|c| results.has(&c.key, measure.key)) else { return Ok(None) };
        let (value, ends) = results.mean(&c.key, measure.key)?;
        Ok(Some(Bar { value, ends }))
    };
    let values = groups
        .iter()
        .map(|g| series.iter().map(|s| bar(g, s)).collect::<Result<Vec<_>>>())
        .collect::<Result<Vec<_>>>()?;
    let lowest = values.iter().flatten().flatten().map(|b| b.value).fold(0.0, f64::min);
    grouped_bars(measure.title, measure.title, &groups, &series, &values, lowest)
}
