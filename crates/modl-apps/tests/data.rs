//! Recipes on images and tables, run as a user runs them.
#![allow(clippy::unwrap_used, clippy::panic)]

mod modl;
mod place;

use std::fs;

use modl::{refuse, succeed};
use place::Place;
use serde_json::Value;

/// 40 images 2 × 2 of two classes: the brighter half is above or below.
fn images(b: &Place) {
    fs::create_dir(b.path("halves")).unwrap();
    let mut images = vec![0, 0, 8, 3, 0, 0, 0, 40, 0, 0, 0, 2, 0, 0, 0, 2];
    let mut labels = vec![0, 0, 8, 1, 0, 0, 0, 40];
    for i in 0..40u8 {
        let (dark, bright) = (i, 200 + i);
        images.extend(match i % 2 {
            0 => [bright, bright, dark, dark],
            _ => [dark, dark, bright, bright],
        });
        labels.push(i % 2);
    }
    fs::write(b.path("halves/train-images-idx3-ubyte"), images).unwrap();
    fs::write(b.path("halves/train-labels-idx1-ubyte"), labels).unwrap();
}

const RECIPE: &str = r#"
[backbone]
fresh = { type = "mlp", inputs = 4, hidden = [8] }

[data]
format = "idx"
tasks = { halves = "halves" }
test = 0.3
stream = { type = "permuted", tasks = 2, seed = 1 }

[head]
type = "classification"
heads = "per_task"

[[phases]]
name = "learn"
strategy = "naive"
train = ["base.*", "heads.*"]
steps = 60
batch_size = 8
lr = 0.02
"#;

#[test]
fn a_stream_of_images_is_learned_by_a_fresh_network_and_tested_again() {
    let b = Place::new();
    images(&b);
    fs::write(b.path("recipe.toml"), RECIPE).unwrap();
    let (recipe, out) = (b.arg("recipe.toml"), b.arg("run"));
    let table = succeed(&["train", &recipe, "--out", &out]);
    assert!(table.contains("permutation-0") && table.contains("permutation-1"), "{table}");
    let read =
        |file: &str| -> Value { serde_json::from_slice(&fs::read(b.path(file)).unwrap()).unwrap() };
    let matrix = read("run/phases/1-learn/accuracy_matrix.json");
    assert_eq!(matrix["tasks"], serde_json::json!(["permutation-0", "permutation-1"]));
    let metrics = read("run/metrics.json");
    for (j, task) in ["permutation-0", "permutation-1"].iter().enumerate() {
        // What is tested in the end is the last row of the matrix.
        assert_eq!(metrics[task]["accuracy"], matrix["rows"][1][j], "{task}");
    }
    assert_eq!(metrics["permutation-1"]["accuracy"], 1.0);
    let predictions = fs::read(b.path("run/predictions.json")).unwrap();
    succeed(&["eval", &out]);
    assert_eq!(fs::read(b.path("run/predictions.json")).unwrap(), predictions);
    let seen = succeed(&["inspect", &out]);
    assert!(seen.contains("fresh mlp"), "{seen}");
    // Another network and another stream.
    let other = b.arg("other");
    let set = ["--set", "backbone.fresh.hidden=[5, 6]", "--set", "data.stream.tasks=3"];
    let table = succeed(&[&["train", &recipe, "--out", &other][..], &set[..]].concat());
    assert!(table.contains("permutation-2"), "{table}");
    refuse(
        &["train", &recipe, "--out", &b.arg("no"), "--set", "backbone.fresh.hiden=[5]"],
        "hidden",
    );
    refuse(&["train", &recipe, "--out", &b.arg("no"), "--set", "data.tasks.halves=none"], "none");
}

#[test]
fn a_network_of_rows_refuses_rows_of_another_length() {
    let b = Place::new();
    let rows: String = (0..20).map(|i| format!("{},{i},0.5,1\n", i % 2)).collect();
    fs::write(b.path("a.csv"), format!("class,x,y,z\n{rows}")).unwrap();
    let csv = RECIPE
        .replace(
            "format = \"idx\"\ntasks = { halves = \"halves\" }",
            "format = \"csv\"\ntasks = { t = \"a.csv\" }",
        )
        .replace("inputs = 4", "inputs = 3")
        .replace("heads = \"per_task\"", "");
    fs::write(b.path("recipe.toml"), &csv).unwrap();
    succeed(&["train", &b.arg("recipe.toml"), "--out", &b.arg("run")]);
    fs::write(b.path("wrong.toml"), csv.replace("inputs = 3", "inputs = 5")).unwrap();
    refuse(&["train", &b.arg("wrong.toml"), "--out", &b.arg("wrong")], "5 for each row");
}

/// The examples of docs/data.md are those files.
#[test]
fn the_recipes_of_the_page_are_read() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = fs::read_to_string(root.join("docs/data.md")).unwrap();
    for name in ["permuted_mnist.toml", "split_fashion_mnist.toml", "genres.toml"] {
        assert!(page.contains(&format!("(../examples/recipes/{name})")), "{name}");
        let text = fs::read_to_string(root.join("examples/recipes").join(name)).unwrap();
        let methods = modl_train::Methods::new(modl_apps::builtin().unwrap()).unwrap();
        modl_train::Recipe::parse(&text, name, &methods).unwrap();
    }
}
