//! `modl compare` as a user meets it, on a tiny model.

#![allow(clippy::unwrap_used)]

mod bench;

use std::fs;

use bench::{Bench, refuse, succeed};
use modl_core::checkpoint::Checkpoint;
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
    for part in [
        first,
        "soft",
        "uniform",
        "hash",
        "oracle",
        "dense-parameters",
        "dense-flops",
        "phase `router` is left out",
        "2 seeds",
    ] {
        assert!(printed.contains(part), "lacks `{part}`:\n{printed}");
    }
    // The tables are the means and the mean differences of what the runs' files hold.
    let mae = |router: &str| metric(&b, "one", router, "mae");
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    for router in ["soft", "uniform", "hash", "oracle", "dense-parameters", "dense-flops"] {
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
    for router in [first, "soft", "uniform", "hash", "oracle", "dense-parameters"] {
        assert_eq!(mae(router), metric(&b, "two", router, "mae"), "{router}");
    }
    assert!(b.path("one/report.html").is_file() && b.path("one/mae.svg").is_file());
}

/// The parameters of the module `dense` of a run, by their shapes, and its ranks.
fn dense(b: &Bench, folder: &str) -> (usize, Vec<i64>) {
    let file = b.path(folder).join("phases/1-fit/params.safetensors");
    let file = Checkpoint::open(file).unwrap();
    let (mut numbers, mut ranks) = (0, Vec::new());
    for name in file.names().iter().filter(|n| n.starts_with("modules.")) {
        assert!(name.starts_with("modules.dense."), "{name}");
        let shape = file.info(name).unwrap().0;
        numbers += shape.iter().product::<i64>() as usize;
        if name.ends_with("lora_A.weight") {
            ranks.push(shape[0]);
        }
    }
    (numbers, ranks)
}

#[test]
fn dense_controls_have_as_many_parameters_and_operations_as_the_modules() {
    let b = Bench::new();
    let third = "[modules.c]\ntype = \"lora\"\ntargets = [\"query\", \"value\"]\nr = 2\n\n[router]";
    let recipe = b.recipe("three.toml", "[router]", third);
    let go = |routers: &str, out: &str| {
        succeed(&[
            "compare",
            &recipe,
            "--routers",
            routers,
            "--seeds",
            "1",
            // What top_k's losses count is left to its papers.
            "--set",
            "data.tasks={ a = \"a.tsv\", b = \"b.tsv\", c = \"a.tsv\" }",
            "--out",
            &b.arg(out),
        ])
    };
    let config = fs::read_to_string(b.path("model/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let of = |key: &str| config[key].as_u64().unwrap() as usize;
    let (width, sites) = (of("hidden_size"), 2 * of("num_hidden_layers"));
    // A and B of rank r at query and value: r · 2 · width numbers, and twice as many operations.
    let lora = |r: usize| sites * r * 2 * width;
    let printed = go(r#"top_k{"k":2,"renormalise":true}"#, "two");
    let told = format!("with {} parameters; 3 modules have {}", 3 * lora(2), 3 * lora(2));
    assert!(printed.contains(&told), "lacks `{told}`:\n{printed}");
    assert!(printed.contains("2.00 modules run for a token"), "{printed}");
    let (numbers, ranks) = dense(&b, "two/dense-parameters/seed-0");
    assert_eq!((numbers, ranks), (3 * lora(2), vec![6; sites]));
    // Operations are twice the parameters of what runs: two modules of rank 2.
    let (numbers, ranks) = dense(&b, "two/dense-flops/seed-0");
    assert_eq!((2 * numbers, ranks), (2 * (2 * lora(2)), vec![4; sites]));
    // What runs all modules is as wide as all of them.
    let printed = go("soft", "all");
    assert!(printed.contains("no control `dense-flops`"), "{printed}");
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
}
