//! `modl route-report`: what it says of a run, and of a recorded trace without the run.

#![allow(clippy::unwrap_used)]

mod bench;

use std::fs;

use bench::{Bench, RECIPE, refuse, run, succeed};
use modl_core::{Routing, Trace, Weights};
use modl_route::stats::{Recorder, RoutingTrace, Thresholds};
use serde_json::Value;

fn json(b: &Bench, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(b.path(name)).unwrap()).unwrap()
}

#[test]
fn a_run_is_reported_and_its_trace_says_the_same_without_the_model() {
    let b = Bench::new();
    // Each row goes to the module of its task: all numbers are known.
    let fixed = "type = \"fixed\"";
    let recipe = RECIPE.replace("type = \"soft\"\nscope = \"global\"\ninit_std = 0.1", fixed);
    let recipe = recipe.split("[[phases]]\nname = \"router\"").next().unwrap();
    assert!(recipe.contains(fixed));
    let short = "epochs = 1\nlog_routing_every = 2";
    fs::write(b.path("fixed.toml"), recipe.replace("epochs = 2", short)).unwrap();
    let out = b.arg("run");
    refuse(&["route-report", &out], &["origin.json", "modl train"]);
    succeed(&["train", &b.arg("fixed.toml"), "--out", &out]);
    let said = succeed(&["route-report", &out, "--limit", "25"]);
    for part in
        ["held out: 50 rows", "trained on: 50 rows", "(+3)", "alignment", "nothing looks wrong"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    let report = json(&b, "run/routing/report.json");
    let site = &report["splits"][0]["sites"][0];
    assert_eq!(site["paths"].as_array().unwrap().len(), 4);
    assert_eq!(site["modules"], serde_json::json!(["a", "b"]));
    let of = |key: &str| site["mittal"][key].as_f64().unwrap();
    assert_eq!((of("alignment"), of("collapse_worst"), of("collapse_average")), (0.0, 0.0, 0.0));
    assert!((of("mutual_information") - 2f64.ln()).abs() < 1e-12);
    assert_eq!(site["tasks"]["b"]["shares"], serde_json::json!([0.0, 1.0]));
    let page = fs::read_to_string(b.path("run/routing/report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("tasks and modules"));
    let plot = fs::read_to_string(b.path("run/routing/tasks-test.svg")).unwrap();
    assert!(plot.contains("held out: tasks and modules") && plot.contains("1.00"), "{plot}");
    // How it went in training, by the events of its steps.
    assert!(page.contains("In training") && page.contains("fit/a: entropies"), "no curves");
    assert!(b.path("run/routing/load-fit_a.svg").is_file());
    // By labels of a file instead of tasks: each example's own number, even or odd.
    let parity = |task: &str, i: usize| format!("{task}\t{i}\t{}\n", ["even", "odd"][i % 2]);
    let lines: String = (0..240).flat_map(|i| ["a", "b"].map(|task| parity(task, i))).collect();
    fs::write(b.path("parity.tsv"), lines).unwrap();
    let by = |labels: &str, out: &str| {
        let (out, labels) = (b.arg(out), labels.to_owned());
        vec!["route-report".into(), b.arg("run"), "--by".into(), labels, "--out".into(), out]
    };
    let words = by(&b.arg("parity.tsv"), "parity");
    let printed = succeed(&words.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(printed.contains("tasks are here: the label of"), "{printed}");
    let own = json(&b, "parity/report.json");
    let tasks = own["splits"][0]["sites"][0]["tasks"].as_object().unwrap();
    assert_eq!(tasks.keys().collect::<Vec<_>>(), ["even", "odd"]);
    let refused = |labels: &str, parts: &[&str]| {
        let words = by(labels, "refused");
        refuse(&words.iter().map(String::as_str).collect::<Vec<_>>(), parts);
    };
    refused("token-class", &["token by token"]);
    refused("no-such", &["no-such", "token-class"]);
    fs::write(b.path("few.tsv"), "a\t0\teven\n").unwrap();
    refused(&b.arg("few.tsv"), &["few.tsv", "has no label for example"]);
    fs::write(b.path("bad.tsv"), "a\t0\n").unwrap();
    refused(&b.arg("bad.tsv"), &["bad.tsv:1", "task, id and label"]);
    // The trace alone, where the run is no more.
    fs::rename(b.path("run/routing/trace.safetensors"), b.path("trace.safetensors")).unwrap();
    fs::remove_dir_all(b.path("run")).unwrap();
    let again = b.arg("again");
    let replayed =
        succeed(&["route-report", "--trace", &b.arg("trace.safetensors"), "--out", &again]);
    assert_eq!(replayed.split("report:").next(), said.split("report:").next());
    assert_eq!(json(&b, "again/report.json"), report);
    let dir = fs::read_dir(b.path("again")).unwrap();
    let names: Vec<String> = dir.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|n| !n.ends_with(".tmp")), "{names:?}");
}

#[test]
fn tokens_are_reported_by_their_class() {
    let b = Bench::new();
    let router = "type = \"soft\"\ninput = \"tokens\"\ninit_std = 0.1";
    let recipe = RECIPE.replace("type = \"soft\"\nscope = \"global\"\ninit_std = 0.1", router);
    assert!(recipe.contains(router));
    fs::write(b.path("tokens.toml"), recipe.replace("epochs = 2", "epochs = 1")).unwrap();
    succeed(&["train", &b.arg("tokens.toml"), "--out", &b.arg("run")]);
    let words = ["route-report", &b.arg("run"), "--by", "token-class", "--limit", "20"];
    let printed = succeed(&words);
    // Texts of three words of two tasks.
    assert!(
        printed.contains("held out: 120 rows") && printed.contains("class of token"),
        "{printed}"
    );
    let tasks = json(&b, "run/routing/report.json");
    let tasks = tasks["splits"][0]["sites"][0]["tasks"].as_object().unwrap();
    assert_eq!(tasks.keys().collect::<Vec<_>>(), ["word"]);
    assert_eq!(tasks["word"]["stats"]["units"], 120);
}

#[test]
fn collapse_overfitting_and_drops_are_said_in_words() {
    let b = Bench::new();
    let third = 1.0 / 3.0;
    let site = |name: &str, rows: Vec<Vec<(usize, f64)>>| {
        (name.to_owned(), Routing::new(Weights::Rows(rows), 3))
    };
    let (m0, m1) = (vec![(0, 1.0)], vec![(1, 1.0)]);
    let even = vec![(0, third), (1, third), (2, third)];
    let mut test = Recorder::default();
    let routings = vec![
        site("collapsed <site>", vec![m1.clone(), m1.clone()]),
        site("soft", vec![even.clone(), even]),
    ];
    test.add(&Trace::of(routings), &["x", "y"], None).unwrap();
    let mut train = Recorder::default();
    let routings = vec![site("soft", vec![m0, m1])];
    train.add(&Trace::of(routings), &["x", "y"], None).unwrap();
    let [mut test, mut train] = [test, train].map(Recorder::finish);
    (test.name, train.name) = ("test".into(), "train".into());
    let file = b.path("choices.safetensors");
    RoutingTrace { splits: vec![test, train] }.save(&file).unwrap();
    let said = succeed(&["route-report", "--trace", &b.arg("choices.safetensors")]);
    for part in [
        "held out, collapsed <site>: module collapse: 0, 2 are",
        "held out, collapsed <site>: module collapse: 1 has 100.0 %",
        "held out, soft: the router is undecided",
        "held out, collapsed <site>: the router is indifferent",
        "random router [likewise at 1 other site]",
        "held out, soft: the router overfits",
        "trained on, soft: module collapse: 2 is",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // Beside the trace, where no other place is named; names are text in pages and plots.
    let page = fs::read_to_string(b.path("report.html")).unwrap();
    assert!(page.contains("held out, soft: the router is indifferent"));
    assert!(page.contains("collapsed &lt;site&gt;") && !page.contains("<site>"));
    assert!(b.path("use-test.svg").is_file() && b.path("use-test-1-x.svg").is_file());
}

#[test]
fn what_cannot_be_reported_is_refused_with_the_next_step() {
    let b = Bench::new();
    let model = b.arg("model/model.safetensors");
    refuse(&["route-report", "--trace", &model], &["no routing trace", "modl route-report RUN"]);
    refuse(&["route-report", "--trace", &b.arg("none")], &["none"]);
    refuse(&["route-report", &b.arg("model")], &["folder of a run"]);
    for wrong in [vec!["route-report"], vec!["route-report", "RUN", "--trace", "FILE"]] {
        assert_eq!(run(&wrong).status.code(), Some(2), "{wrong:?}");
    }
    refuse(&["route-report", &b.arg("model"), "--limit", "0"], &["--limit"]);
}

#[test]
fn the_docs_name_the_thresholds() {
    let docs = fs::read_to_string("../../docs/routers.md").unwrap();
    let Value::Object(all) = serde_json::to_value(Thresholds::default()).unwrap() else {
        return assert!(docs.is_empty(), "thresholds are an object");
    };
    assert_eq!(all.len(), 6);
    for (name, value) in all {
        let row = format!("| `{name}` | {value} |");
        assert!(docs.contains(&row), "docs/routers.md lacks {row}");
    }
}
