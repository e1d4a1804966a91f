//! How merged models get on with each other: a table in the terminal, a page with heat maps.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use modl_aggregate::merge::{Diagnosis, Plan, TensorDiagnosis, diagnose};
use modl_core::checkpoint::write_whole;

use crate::report::{Page, Table, heat_map};

/// Tensors that are shown, those with the most conflicts.
const SHOWN: usize = 12;

/// Compares the models and the result, prints what came out and writes the page.
pub(super) fn write(plan: &Plan, out: &Path, folder: &Path) -> Result<()> {
    let found = diagnose(plan, out)?;
    let models = models(&found);
    println!("{}", models.text());
    let mut page = Page::new(&format!("{} of {} models", plan.method, plan.sources.len()));
    page.paragraph(
        "Differences are from the base model, or from 0 where there is none. What is kept of a model is \
         the length of the result along its difference, over that difference's own.",
    );
    page.table(&models);
    compared(&mut page, &found)?;
    save(page, &plan.notes, folder)
}

/// What models, or adapters, and the result have to do with one another, as figures and a table.
pub(super) fn compared(page: &mut Page, found: &Diagnosis) -> Result<()> {
    let (cosines, tensors) = (found.whole(), tensors(found));
    let share = format!("{:.1} %", 100.0 * cosines.conflicts);
    println!("of the numbers that several have changed they disagree on the sign of {share}");
    let names: Vec<String> =
        found.models.iter().map(|m| short(m)).chain(["result".to_owned()]).collect();
    let values: Vec<Vec<f64>> = (0..names.len())
        .map(|i| (0..names.len()).map(|j| cosines.cosine(i, j)).collect())
        .collect();
    let svg = heat_map("cosine of the differences", &names, &names, &values)?;
    page.figure(&svg, "Negative cosines are white; the numbers say how far the changes disagree.");
    let (layers, norms, conflicts) = by_layer(found);
    let svg = heat_map("norm of the difference by layer", &layers, &names, &norms)?;
    page.figure(&svg, "All tensors of a layer together.");
    let svg = heat_map("disagreement on signs by layer", &layers, &["share".into()], &conflicts)?;
    page.figure(&svg, &format!("Of the numbers that several have changed; of all: {share}."));
    page.heading("Tensors with the most conflicts");
    page.table(&tensors);
    Ok(())
}

/// Says what was not merged, writes the page and says where.
pub(super) fn save(mut page: Page, notes: &[String], folder: &Path) -> Result<()> {
    if !notes.is_empty() {
        page.heading("What was not merged");
        notes.iter().for_each(|note| page.paragraph(note));
    }
    let path = folder.join("merge.html");
    write_whole(&path, page.html().as_bytes()).context("the report")?;
    println!("report: {}", path.display());
    Ok(())
}

/// The last part of a path.
fn short(model: &str) -> String {
    let name = Path::new(model).file_name().map(|n| n.to_string_lossy().into_owned());
    name.unwrap_or_else(|| model.to_owned())
}

/// What there is of each model in the result.
pub(super) fn models(found: &Diagnosis) -> Table {
    let whole = found.whole();
    let result = found.models.len();
    let mut table = Table::new(["model", "norm", "kept", "cosine to the result"]);
    for (i, model) in found.models.iter().enumerate() {
        table.row([
            short(model),
            format!("{:.4}", whole.norm(i)),
            format!("{:.2}", whole.kept(i)),
            format!("{:.3}", whole.cosine(i, result)),
        ]);
    }
    table.row([
        "result".to_owned(),
        format!("{:.4}", whole.norm(result)),
        String::new(),
        String::new(),
    ]);
    table
}

fn tensors(found: &Diagnosis) -> Table {
    let mut sorted: Vec<&TensorDiagnosis> = found.tensors.iter().collect();
    sorted.sort_by(|a, b| b.conflicts.total_cmp(&a.conflicts));
    let mut table = Table::new(["tensor", "conflicts", "norms", "effective ranks"]);
    for t in sorted.into_iter().take(SHOWN) {
        let norms: Vec<String> =
            (0..found.models.len()).map(|i| format!("{:.3}", t.norm(i))).collect();
        let ranks = t.ranks.iter().flatten().map(|r| format!("{r:.1}"));
        let ranks: Vec<String> = ranks.collect();
        let share = format!("{:.1} %", 100.0 * t.conflicts);
        table.row([t.name.clone(), share, norms.join(" "), ranks.join(" ")]);
    }
    table
}

/// Norms and conflicts of the tensors of each layer together; what belongs to none comes first.
fn by_layer(found: &Diagnosis) -> (Vec<String>, Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let mut layers: BTreeMap<Option<usize>, Vec<&TensorDiagnosis>> = BTreeMap::new();
    for t in &found.tensors {
        let layer = t.name.split('.').find_map(|part| part.parse().ok());
        layers.entry(layer).or_default().push(t);
    }
    let (mut names, mut norms, mut conflicts) = (Vec::new(), Vec::new(), Vec::new());
    for (layer, tensors) in layers {
        names.push(layer.map_or_else(|| "outside".to_owned(), |n| format!("layer {n}")));
        let norm = |i: usize| tensors.iter().map(|t| t.norm(i).powi(2)).sum::<f64>().sqrt();
        norms.push((0..=found.models.len()).map(norm).collect());
        let n: f64 = tensors.iter().map(|t| t.numbers as f64).sum();
        let sum: f64 = tensors.iter().map(|t| t.conflicts * t.numbers as f64).sum();
        conflicts.push(vec![sum / n.max(1.0)]);
    }
    (names, norms, conflicts)
}
