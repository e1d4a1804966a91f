//! The results as a table in the terminal and as a page with plots.

use std::path::{Path, PathBuf};

use anyhow::Result;
use modl_core::checkpoint::write_whole;

use super::data::{Corpus, DOMAINS};
use super::methods::Method;
use super::results::{Results, Score};
use super::setting::Setting;
use crate::report::{Bar, Page, Table, grouped_bars, heat_map};

/// What was written.
pub(crate) struct Written {
    /// For the terminal.
    pub(crate) text: String,
    /// The page.
    pub(crate) path: PathBuf,
}

fn accuracy(s: &Score) -> f64 {
    100.0 * s.accuracy
}

fn spearman(s: &Score) -> f64 {
    s.spearman
}

/// `81.3 ±0.9`, or `81.3` where there is one seed.
fn show(values: &[f64], digits: usize) -> Result<String> {
    let (mean, half) = Results::summary(values)?;
    Ok(match half {
        Some(half) => format!("{mean:.digits$} ±{half:.digits$}"),
        None => format!("{mean:.digits$}"),
    })
}

pub(crate) fn write(
    out: &Path,
    setting: &Setting,
    corpus: &Corpus,
    results: &Results,
) -> Result<Written> {
    let (quality, cost) = (quality(results)?, cost(results));
    let mut page = Page::new("modl demo: sentiment in four domains on a frozen MiniLM");
    page.paragraph(&setting.summary(corpus, results.seeds() as u64));
    page.paragraph(
        "Accuracy is that of the sign of the sentiment, in percent, on held-out texts that are not \
         neutral; Spearman's ρ is with the intensity on all held-out texts. ± is half of the 95 % \
         interval (Student's t) over seeds, each with its own split, start and order. The difference \
         is that of the mean accuracy to one LoRA for all, paired by seed.",
    );
    page.table(&quality);
    page.figure(&bars(results)?, "Accuracy by domain and method. The axis does not start at 0.");
    for (method, title) in [
        (Method::SoftRouter, "Soft router: mean weight of each module"),
        (Method::Top1Router, "Top-1 router: mean weight of each module"),
    ] {
        if let Some(map) = results.routing(method) {
            let names = DOMAINS.map(str::to_owned);
            let svg = heat_map(title, &names, &names, &map)?;
            page.figure(
                &svg,
                "Rows: the domain of the text, which the router is not told. Columns: the module.",
            );
            write_whole(out.join(format!("routing-{}.svg", method.name())), svg.as_bytes())?;
        }
    }
    page.heading("What it cost");
    page.paragraph(
        "Parameters and files beside the backbone (22.7 million) and the common head (385). Seconds \
         are those of training, of all modules that a method builds on.",
    );
    page.table(&cost);
    page.heading("The methods");
    for m in Method::ALL {
        page.paragraph(&format!("{}: {}", m.title(), m.description()));
    }
    let path = out.join("report.html");
    write_whole(&path, page.html().as_bytes())?;
    write_whole(out.join("accuracy.svg"), bars(results)?.as_bytes())?;
    Ok(Written { text: format!("{}\n\n{}", quality.text(), cost.text()), path })
}

fn quality(results: &Results) -> Result<Table> {
    let head = ["accuracy, %"].into_iter().chain(DOMAINS).chain(["mean", "difference", "Spearman"]);
    let mut table = Table::new(head);
    let shared = results.metric(Method::OneForAll, None, accuracy);
    for m in Method::ALL {
        let mut row = vec![m.title().to_owned()];
        for d in DOMAINS {
            row.push(show(&results.metric(m, Some(d), accuracy), 1)?);
        }
        let mean = results.metric(m, None, accuracy);
        let difference: Vec<f64> = mean.iter().zip(&shared).map(|(a, b)| a - b).collect();
        row.push(show(&mean, 1)?);
        row.push(if m == Method::OneForAll { "-".to_owned() } else { show(&difference, 1)? });
        row.push(show(&results.metric(m, None, spearman), 3)?);
        table.row(row);
    }
    Ok(table)
}

fn cost(results: &Results) -> Table {
    let mut table = Table::new(["cost", "parameters", "kB on disk", "s of training"]);
    for m in Method::ALL {
        let (parameters, bytes, seconds) = results.cost(m);
        table.row([
            m.title().to_owned(),
            parameters.to_string(),
            format!("{:.0}", bytes as f64 / 1000.0),
            format!("{seconds:.0}"),
        ]);
    }
    table
}

fn bars(results: &Results) -> Result<String> {
    let bar = |domain: Option<&str>, m: Method| -> Result<Option<Bar>> {
        let (value, half) = Results::summary(&results.metric(m, domain, accuracy))?;
        Ok(Some(Bar { value, ends: half.map(|h| (value - h, value + h)) }))
    };
    let groups: Vec<Option<&str>> = DOMAINS.into_iter().map(Some).chain([None]).collect();
    let group = |d: &Option<&str>| Method::ALL.into_iter().map(|m| bar(*d, m)).collect();
    let values: Vec<Vec<Option<Bar>>> = groups.iter().map(group).collect::<Result<_>>()?;
    let names: Vec<String> = groups.iter().map(|d| d.unwrap_or("mean").to_owned()).collect();
    let series = Method::ALL.map(|m| m.title().to_owned());
    let lowest = values.iter().flatten().flatten().map(|b| b.value).fold(100.0, f64::min);
    let floor = ((lowest - 8.0) / 10.0).floor() * 10.0;
    grouped_bars("Accuracy on held-out texts", "%", &names, &series, &values, floor)
}
