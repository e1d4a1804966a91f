//! `modl eval` with other routing or fewer modules, and texts that are cut, run as a user runs them.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bench;

use std::fs;

use bench::{Bench, RECIPE, modl, refuse, succeed, text};
use serde_json::Value;

/// What was said of each example, in order.
fn said(b: &Bench, folder: &str) -> Vec<f64> {
    let file = b.path(folder).join("predictions.json");
    let all: Vec<Value> = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    all.iter().map(|p| p["prediction"].as_f64().unwrap()).collect()
}

/// A run whose modules have learned something.
fn trained(b: &Bench) -> String {
    let learned = RECIPE.replace("epochs = 2", "steps = 6").replace("epochs = 1", "steps = 6");
    fs::write(b.path("recipe.toml"), learned.replace("lr = 1e-2", "lr = 0.3")).unwrap();
    succeed(&["train", &b.arg("recipe.toml"), "--out", &b.arg("run")]);
    b.arg("run")
}

#[test]
fn a_run_is_tested_as_it_was_before_and_with_other_routing_and_fewer_modules() {
    let b = Bench::new();
    let run = trained(&b);
    let plain = said(&b, "run");
    let mut numbers = 0;
    let mut with = |options: &[&str]| -> Vec<f64> {
        numbers += 1;
        let out = format!("out-{numbers}");
        let printed = succeed(&[&["eval", &run, "--out", &b.arg(&out)][..], options].concat());
        assert!(printed.contains("spearman") && b.path(&out).join("metrics.json").exists());
        said(&b, &out)
    };
    // What is asked for is what the run does anyway.
    assert_eq!(with(&[]), plain);
    assert_eq!(with(&["--phase", "router"]), plain);
    assert_eq!(with(&["--drop-layers", "0"]), plain);
    assert_eq!(with(&["--aggregator", "{ type = \"weighted_sum\" }"]), plain);
    // Each module alone; rows of a task by its own module are those of one of the two.
    let only = |name: &str| format!("{{ type = \"fixed\", modules = [\"{name}\"] }}");
    let (a, of_b) = (with(&["--router", &only("a")]), with(&["--router", &only("b")]));
    let by_task = with(&["--router", "{ type = \"fixed\" }"]);
    assert!(a != plain && a != of_b && plain != of_b);
    let file = fs::read(b.path("run/predictions.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&file).unwrap();
    for (i, row) in rows.iter().enumerate() {
        let own = if row["task"] == "a" { a[i] } else { of_b[i] };
        assert!((by_task[i] - own).abs() < 1e-5, "{i}");
    }
    // Without the modules of the lower layer, and of both: nothing is left that routing could tell apart.
    let (one, both) = (with(&["--drop-layers", "1"]), with(&["--drop-layers", "2"]));
    assert!(one != plain && both != plain && one != both);
    assert_eq!(with(&["--drop-layers", "99"]), both);
    let bare = with(&["--drop-layers", "2", "--router", &only("a")]);
    assert_eq!(bare.len(), both.len());
    assert!(bare.iter().zip(&both).all(|(x, y)| (x - y).abs() < 1e-5));
    // Before the router was trained.
    assert!(with(&["--phase", "fit"]) != plain);
    // The run itself is as it was.
    assert_eq!(fs::read(b.path("run/predictions.json")).unwrap(), file);
    succeed(&["eval", &run, "--drop-layers", "1"]);
    assert_eq!(said(&b, "run"), plain);
}

#[test]
fn options_that_cannot_be_are_refused_in_words() {
    let b = Bench::new();
    let run = trained(&b);
    let no =
        |options: &[&str], parts: &[&str]| refuse(&[&["eval", &run][..], options].concat(), parts);
    no(&["--phase", "routr"], &["phase", "routr", "did you mean `router`"]);
    no(&["--router", "{ type = \"sof\" }"], &["sof", "did you mean `soft`"]);
    no(&["--router", "{ type = "], &["--"]);
    no(&["--router", "{ type = \"fixed\", modules = [\"c\"] }"], &["c"]);
    no(&["--aggregator", "{ type = \"weighted_sums\" }"], &["did you mean `weighted_sum`"]);
    no(&["--aggregator", "{ type = \"stack\", no = 1 }"], &["no"]);
    refuse(&["eval", &b.arg("nothing")], &["is this the folder of a run?"]);
    for wrong in ["x", "1.5", ""] {
        let out = modl().args(["eval", &run, "--drop-layers", wrong]).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{wrong}");
        assert!(text(&out.stderr).contains("--drop-layers"), "{}", text(&out.stderr));
    }
    no(&["--drop-layers=-1"], &["first is -1"]);
}

/// Texts of five words of which three are read are texts of three words.
#[test]
fn texts_are_cut_to_max_tokens() {
    let b = Bench::new();
    for task in ["a", "b"] {
        let file = b.path(&format!("{task}.tsv"));
        let lines = fs::read_to_string(&file).unwrap();
        let longer: String = lines.lines().map(|line| format!("{line} film very\n")).collect();
        fs::write(b.path(&format!("{task}-long.tsv")), longer).unwrap();
    }
    let recipe = RECIPE.replace("epochs = 2", "steps = 3").replace("epochs = 1", "steps = 3");
    fs::write(b.path("recipe.toml"), recipe).unwrap();
    let (recipe, long) =
        (b.arg("recipe.toml"), "data.tasks={ a = \"a-long.tsv\", b = \"b-long.tsv\" }");
    let result = |out: &str, set: &[&str]| {
        let mut args = vec!["train", &recipe, "--out"];
        let folder = b.arg(out);
        args.push(&folder);
        set.iter().for_each(|one| args.extend(["--set", one]));
        succeed(&args);
        fs::read(b.path(out).join("phases/2-router/params.safetensors")).unwrap()
    };
    let short = result("short", &[]);
    assert!(result("cut", &[long, "data.max_tokens=3"]) == short);
    assert!(result("long", &[long]) != short);
    assert!(result("some", &["data.max_tokens=128"]) == short);
    // Of a file or of memory: the same.
    assert!(result("stored", &["data.in_memory=0"]) == short);
    for (set, part) in [
        ("data.max_tokens=2", "`max_tokens` is to be 3 at least"),
        ("data.max_tokens=0", "`max_tokens` is to be 3 at least"),
        ("data.max_tokens=-5", "max_tokens"),
        ("data.max_tokens=\"all\"", "max_tokens"),
        ("data.in_memory=-1", "in_memory"),
        ("data.in_memory=0.5", "in_memory"),
    ] {
        refuse(&["train", &recipe, "--out", &b.arg("no"), "--set", set], &[part]);
    }
}
