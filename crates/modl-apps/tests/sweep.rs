//! `modl plan`, `modl sweep` and what `modl train` leaves to look at, on a tiny model.

#![allow(clippy::unwrap_used, clippy::panic)]

mod bench;

use std::fs;

use bench::{Bench, refuse, run, succeed};
use serde_json::Value;

/// The cells of the first row of a printed table that begins with `name`.
fn row<'a>(printed: &'a str, name: &str) -> Vec<&'a str> {
    let cells = |l: &'a str| l.split(['│', '┆']).map(str::trim).filter(|c| !c.is_empty());
    let line = printed.lines().find(|l| cells(l).next() == Some(name));
    cells(line.unwrap_or_else(|| panic!("no {name} in {printed}"))).collect()
}

#[test]
fn a_plan_says_what_will_be_trained_and_writes_nothing() {
    let b = Bench::new();
    let before = fs::read_dir(b.dir.path()).unwrap().count();
    let printed = succeed(&["plan", &b.arg("recipe.toml")]);
    assert_eq!(fs::read_dir(b.dir.path()).unwrap().count(), before);
    // Two layers of width 32, query and value: A [2, 32] and B [32, 2] each.
    let lora = (2 * 2 * (64 + 64)).to_string();
    assert_eq!(row(&printed, "modules.a"), ["modules.a", &lora, &lora, "0"]);
    assert_eq!(row(&printed, "base")[2..], ["0", "0"]);
    // One for all sites: weights and biases of two modules over 32 numbers, in the second phase.
    let routers = row(&printed, "routers");
    assert_eq!((routers[2], routers[3]), ("0", routers[1]));
    // What it says is what a run does.
    succeed(&["train", &b.arg("recipe.toml"), "--out", &b.arg("run")]);
    let events = fs::read_to_string(b.path("run/events.jsonl")).unwrap();
    let events = events.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    let started: Vec<Value> = events.filter(|e| e["event"] == "started").collect();
    let sum = |key: &str, phase: &str| -> u64 {
        let own = started.iter().filter(|e| e["name"].as_str().unwrap().starts_with(phase));
        own.map(|e| e[key].as_u64().unwrap()).sum()
    };
    for (phase, strategy) in [("fit", "per_task"), ("router", "routing")] {
        let cells = row(&printed, phase);
        assert_eq!(cells[1], strategy);
        let wanted = ["examples", "steps"].map(|key| sum(key, phase).to_string());
        assert_eq!(cells[2..4], wanted, "{phase}");
    }
    let trained = row(&printed, "together")[2].parse::<u64>().unwrap();
    // Heads are trained with each of the two modules.
    let heads = row(&printed, "heads.score")[2].parse::<u64>().unwrap();
    assert_eq!(trained + heads, sum("trained", "fit"));
    refuse(&["plan", &b.arg("recipe.toml"), "--set", "phases.0.lrr=1"], &["lrr", "lr"]);
}

#[test]
fn a_run_leaves_curves_to_look_at() {
    let b = Bench::new();
    let recipe = b.recipe("few.toml", "epochs = 2", "steps = 12\nstop = { every = 4 }");
    let printed = succeed(&["train", &recipe, "--out", &b.arg("run")]);
    assert!(printed.contains("report.html"), "{printed}");
    let page = fs::read_to_string(b.path("run/report.html")).unwrap();
    for part in ["fit/a", "fit/b", "router", "<svg", "spearman", "loss on watched examples"] {
        assert!(page.contains(part), "lacks {part}");
    }
    for training in ["fit/a", "fit/b", "router"] {
        let files = fs::read_dir(b.path("run/tensorboard").join(training)).unwrap().count();
        assert_eq!(files, 1, "{training}");
    }
}

#[test]
fn a_sweep_is_a_table_of_all_combinations_and_goes_on() {
    let b = Bench::new();
    let recipe = b.recipe("few.toml", "epochs = 2", "steps = 4");
    let out = b.arg("sweep");
    let sweep = |grid: &[&str], seeds: &str| -> Vec<String> {
        let mut words = vec!["sweep", &recipe, "--out", &out, "--seeds", seeds];
        words.extend(["--set", "phases.1.batch_size=64"]);
        words.extend(grid.iter().flat_map(|g| ["--grid", *g]));
        words.into_iter().map(str::to_owned).collect()
    };
    let go = |words: &[String]| succeed(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let refused = |words: &[String], parts: &[&str]| {
        refuse(&words.iter().map(String::as_str).collect::<Vec<_>>(), parts);
        assert!(!b.path("sweep").exists());
    };
    refused(&sweep(&["phases.0.lr=1e-3", "modules.a.rr=2"], "1"), &["modules.a.rr=2", "rr"]);
    refused(&sweep(&["phases.0.lr=1e-3,high"], "1"), &["phases.0.lr=high"]);
    let grid = ["phases.0.lr=1e-3,1e-2", "modules.a.r=1,2"];
    let printed = go(&sweep(&grid, "2"));
    for part in ["phases.0.lr=1e-3 modules.a.r=1", "phases.0.lr=1e-2 modules.a.r=2", "best "] {
        assert!(printed.contains(part), "lacks {part}: {printed}");
    }
    let csv = fs::read_to_string(b.path("sweep/sweep.csv")).unwrap();
    let lines: Vec<Vec<&str>> = csv.lines().map(|l| l.split(',').collect()).collect();
    assert_eq!(lines.len(), 1 + 4 * 2);
    assert_eq!(lines[0][..3], ["phases.0.lr", "modules.a.r", "seed"]);
    assert_eq!(lines[8][..3], ["1e-2", "2", "1"]);
    // Each is what `modl train` makes of the same recipe.
    let alone = ["train", &recipe, "--out", &b.arg("alone"), "--set", "phases.0.lr=1e-2"];
    let more = ["--set", "modules.a.r=1", "--set", "seed=1", "--set", "phases.1.batch_size=64"];
    succeed(&[&alone[..], &more[..]].concat());
    let folder = "sweep/phases.0.lr-1e-2-modules.a.r-1/seed-1";
    for file in ["phases/2-router/params.safetensors", "metrics.json"] {
        let of = |run: &str| fs::read(b.path(run).join(file)).unwrap();
        assert!(of("alone") == of(folder), "{file}");
    }
    let metrics: Value =
        serde_json::from_slice(&fs::read(b.path("alone/metrics.json")).unwrap()).unwrap();
    let column = lines[0].iter().position(|c| *c == "mae").unwrap();
    assert_eq!(lines[6][..3], ["1e-2", "1", "1"]);
    assert_eq!(lines[6][column].parse::<f64>().unwrap(), metrics["all"]["mae"].as_f64().unwrap());
    // The means are those of the lines.
    let json: Value =
        serde_json::from_slice(&fs::read(b.path("sweep/sweep.json")).unwrap()).unwrap();
    let mean = json["combinations"][2]["metrics"]["mae"]["mean"].as_f64().unwrap();
    let by_hand: f64 = lines[5..7].iter().map(|l| l[column].parse::<f64>().unwrap()).sum();
    assert!((mean - by_hand / 2.0).abs() < 1e-12, "{mean} {by_hand}");
    // Another value adds its runs; the others are not made again.
    let log = |seed: u64| {
        b.path(&format!("sweep/phases.0.lr-1e-2-modules.a.r-2/seed-{seed}/events.jsonl"))
    };
    let before = [0, 1].map(|s| fs::read(log(s)).unwrap());
    go(&sweep(&["phases.0.lr=1e-3,1e-2", "modules.a.r=2,3"], "2"));
    assert!(before == [0, 1].map(|s| fs::read(log(s)).unwrap()));
    assert_eq!(fs::read_to_string(b.path("sweep/runs.jsonl")).unwrap().lines().count(), 12);
    assert_eq!(run(&["sweep", &recipe, "--out", &out]).status.code(), Some(2), "a grid is needed");
}
