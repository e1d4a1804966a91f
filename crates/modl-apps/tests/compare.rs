//! `modl compare` as a user meets it, on a tiny model.

#![allow(clippy::unwrap_used)]

mod bench;

use std::fs;

use bench::{Bench, RECIPE, refuse, succeed};
use serde_json::Value;

/// The metric of each run of a router, by seed.
fn metric(b: &Bench, folder: &str, router: &str, name: &str) -> Vec<f64> {
    let lines = fs::read_to_string(b.path(folder).join("runs.jsonl")).unwrap();
    let runs = lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    let mut own: Vec<(u64, f64)> = runs
        .filter(|r| r["condition"] == router)
        .map(|r| (r["seed"].as_u64().unwrap(), r["metrics"][name].as_f64().unwrap()))
        .collect();
    own.sort_by_key(|(seed, _)| *seed);
    own.into_iter().map(|(_, v)| v).collect()
}

/// The first number in a row's cell `column` of the table that starts with `head`.
fn cell(printed: &str, head: &str, row: &str, column: usize) -> f64 {
    let table = printed.lines().skip_while(|l| !l.contains(head));
    let line = table.skip(1).find(|l| l.contains(row)).unwrap();
    let cell = line.split(['│', '┆']).nth(column + 2).unwrap();
    cell.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn routers_and_controls_are_compared_by_seed() {
    let b = Bench::new();
    let recipe = b.recipe("few.toml", "epochs = 2", "steps = 6");
    let weights = "phases.1.loss_weights={ balance = 0.01, z = 0.0 }";
    let command = |out: &str| -> Vec<String> {
        let words = [
            "compare",
            &recipe,
            "--routers",
            r#"top_k{"k":1,"renormalise":false},soft"#,
            "--seeds",
            "2",
            "--set",
            weights,
            "--out",
            &b.arg(out),
        ];
        words.map(str::to_owned).to_vec()
    };
    let go = |out: &str| {
        let words = command(out);
        succeed(&words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let printed = go("one");
    let first = r#"top_k{"k":1,"renormalise":false}"#;
    for part in [first, "soft", "uniform", "oracle", "phase `router` is left out", "2 seeds"] {
        assert!(printed.contains(part), "lacks `{part}`:\n{printed}");
    }
    // The tables are the means and the mean differences of what the runs' files hold.
    let mae = |router: &str| metric(&b, "one", router, "mae");
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    for router in ["soft", "uniform", "oracle"] {
        let (own, from) = (mae(router), mae(first));
        assert_eq!((own.len(), from.len()), (2, 2));
        assert!((cell(&printed, "held out", router, 2) - mean(&own)).abs() < 6e-5, "{printed}");
        let difference = own.iter().zip(&from).map(|(a, b)| a - b).sum::<f64>() / 2.0;
        let shown = cell(&printed, "less top_k", router, 2);
        assert!((shown - difference).abs() < 6e-5, "{router}: {shown} {difference}\n{printed}");
    }
    assert_ne!(mae("soft"), mae("uniform"));
    // A run's folder is one that the other commands understand, with the metrics of the table.
    let folder = b.arg("one/soft/seed-1");
    let eval = succeed(&["eval", &folder]);
    assert!(eval.contains(&format!("{:.4}", mae("soft")[1])), "{eval}");
    // Again: nothing is trained anew, and in another folder the numbers are the same.
    let lines = fs::read_to_string(b.path("one/runs.jsonl")).unwrap();
    assert_eq!(go("one").split("held out").nth(1), printed.split("held out").nth(1));
    assert_eq!(fs::read_to_string(b.path("one/runs.jsonl")).unwrap(), lines);
    go("two");
    for router in [first, "soft", "uniform", "oracle"] {
        assert_eq!(mae(router), metric(&b, "two", router, "mae"), "{router}");
    }
    assert!(b.path("one/report.html").is_file() && b.path("one/mae.svg").is_file());
}

#[test]
fn what_cannot_be_compared_is_refused_in_words() {
    let b = Bench::new();
    let (recipe, out) = (b.arg("recipe.toml"), b.arg("out"));
    let ask = |routers: &str, parts: &[&str]| {
        let words = ["compare", &recipe, "--routers", routers, "--out", &out];
        refuse(&words, parts);
    };
    ask("sofft", &["router sofft", "did you mean `soft`"]);
    ask("soft,soft", &["are the same"]);
    ask(r#"top_k{"kk":2}"#, &["top_k", "kk"]);
    ask(r#"top_k{"k":"#, &["--routers", "settings of `top_k`"]);
    // A router's loss has no weight in this recipe.
    ask("top_k", &["loss_weights.balance", "router top_k, seed 0"]);
    assert!(!RECIPE.contains("loss_weights"));
}
