//! What is known of each task, from a file.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_core::{Context, Device, Result};
use modl_train::{Dataset, Recipe};
use toy::methods;

const RECIPE: &str = r#"
[backbone]
path = "toy"

[data]
tasks = { en = "en.tsv", tr = "tr.tsv" }
test = 0.5
features = { typology = { table = "typology.tsv" } }

[head]
type = "regression"
"#;

fn load(folder: &Path, table: &str) -> Result<(Dataset, Dataset)> {
    for task in ["en", "tr"] {
        let text: String = (0..20).map(|i| format!("{i}\t0.5\t{task} {i}\n")).collect();
        std::fs::write(folder.join(format!("{task}.tsv")), text).unwrap();
    }
    std::fs::write(folder.join("typology.tsv"), table).unwrap();
    let recipe = Recipe::parse(RECIPE, folder.join("recipe.toml"), &methods())?;
    recipe.load_data(&|text| Ok(text.bytes().map(i64::from).collect()), 0)
}

const TABLE: &str = "# Two facts.\ntask\tverb_final\tcases\n\ntr\t1\t0.5\nen\t0\t-2\nde\t9\t9\n";

#[test]
fn each_row_has_the_numbers_of_its_task() {
    let dir = tempfile::tempdir().unwrap();
    let (train, test) = load(dir.path(), TABLE).unwrap();
    for data in [&train, &test] {
        let rows: Vec<usize> = (0..data.len()).rev().collect();
        let batch = data.batch(&rows, Device::Cpu).unwrap();
        let cx = batch.describe(Context::eval()).unwrap();
        let found = cx.feature("typology").unwrap().to_vec::<f32>().unwrap();
        assert_eq!(found.len(), 2 * rows.len());
        for (task, row) in batch.tasks.iter().zip(found.chunks(2)) {
            assert_eq!(row, if task == "en" { [0.0, -2.0] } else { [1.0, 0.5] });
        }
    }
    // A run is not resumed with other facts.
    let (other, _) = load(dir.path(), &TABLE.replace("0.5", "0.25")).unwrap();
    assert_ne!(train.fingerprint().unwrap(), other.fingerprint().unwrap());
    let (same, _) = load(dir.path(), &TABLE.replace("de\t9\t9\n", "")).unwrap();
    assert_eq!(train.fingerprint().unwrap(), same.fingerprint().unwrap());
}

#[test]
fn mistakes_in_the_table_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    for (table, words) in [
        (TABLE.replace("tr\t1", "ru\t1"), "unknown task `tr`"),
        (TABLE.replace("-2", "two"), "typology.tsv:5: `two` in `cases` is not a number"),
        (TABLE.replace("\t-2", ""), "typology.tsv:5: has 1 numbers for 2 columns"),
        (TABLE.replace("de\t", "en\t"), "typology.tsv:6: has the task `en` again"),
        ("# Nothing.\n".to_owned(), "has no columns"),
    ] {
        let e = load(dir.path(), &table).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
    let stream =
        RECIPE.replace("features", "stream = { type = \"rotated\", degrees = [0] }\nfeatures");
    let stream = stream.replace(", tr = \"tr.tsv\"", "");
    let e = Recipe::parse(&stream, "recipe.toml", &methods()).unwrap_err().to_string();
    assert!(e.contains("`table`") && e.starts_with("recipe.toml:"), "{e}");
}
