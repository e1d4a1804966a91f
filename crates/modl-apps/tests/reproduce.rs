//! `modl reproduce` as a user meets it, with few steps.

#![allow(clippy::unwrap_used)]

mod bench;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bench::{refuse, run, succeed, text};
use serde_json::Value;

/// The runs of a file: metrics by condition and seed.
fn runs(file: &Path) -> BTreeMap<(String, u64), Value> {
    let lines = fs::read_to_string(file).unwrap();
    let read = |line: &str| {
        let run: Value = serde_json::from_str(line).unwrap();
        let key = (run["condition"].as_str().unwrap().to_owned(), run["seed"].as_u64().unwrap());
        assert!(
            run["seconds"].as_f64().unwrap() > 0.0 && run["peak_rss_mb"].as_f64().unwrap() > 1.0
        );
        assert_eq!(run["config"].as_str().unwrap().len(), 16);
        (key, run["metrics"].clone())
    };
    let found: BTreeMap<_, _> = lines.lines().map(read).collect();
    assert_eq!(found.len(), lines.lines().count(), "a run is there twice");
    found
}

fn reproduce(name: &str, seeds: &str, out: &Path) -> String {
    let out = out.display().to_string();
    succeed(&["reproduce", name, "--quick", "--seeds", seeds, "--out", &out])
}

#[test]
fn an_experiment_is_kept_goes_on_and_gives_the_same_numbers_again() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let printed = reproduce("mittal", "2", &first);
    for part in ["known rule", "soft router", "alignment", "not judged", "≤ 0.8", "2 seeds"] {
        assert!(printed.contains(part), "lacks `{part}`:\n{printed}");
    }
    let file = first.join("mittal/runs.jsonl");
    let whole = runs(&file);
    assert_eq!(whole.len(), 2 * 11);
    // The known rule is one-to-one by construction.
    assert_eq!(whole[&("known-16".to_owned(), 0)]["alignment"], 0.0);
    assert_ne!(whole[&("soft-16".to_owned(), 0)]["l1"], whole[&("soft-16".to_owned(), 1)]["l1"]);
    let page = fs::read_to_string(first.join("mittal/report.html")).unwrap();
    assert!(page.contains("declared before the run") && page.contains("<svg"));
    assert!(first.join("mittal/l1.svg").is_file());

    // Stopped in the middle of a line: what is whole is kept, the rest is done, the numbers are those
    // of a run that was never stopped.
    let lines = fs::read_to_string(&file).unwrap();
    let cut = lines.lines().take(5).map(str::len).sum::<usize>() + 5 + 30;
    fs::create_dir_all(second.join("mittal")).unwrap();
    fs::write(second.join("mittal/runs.jsonl"), &lines[..cut]).unwrap();
    let printed = reproduce("mittal", "2", &second);
    assert!(printed.contains("5 runs were there before"), "{printed}");
    assert_eq!(runs(&second.join("mittal/runs.jsonl")), whole);
    // A third seed is added to the two.
    let printed = reproduce("mittal", "3", &second);
    assert!(printed.contains("22 runs were there before"), "{printed}");
}

#[test]
fn experiments_give_what_is_exact_about_their_conditions() {
    let dir = tempfile::tempdir().unwrap();
    let printed = reproduce("polytropon", "1", dir.path());
    for part in ["Polytropon", "private", "HyperLoRA", "≥ 0.8", "not judged"] {
        assert!(printed.contains(part), "lacks `{part}`:\n{printed}");
    }
    let all = runs(&dir.path().join("polytropon/runs.jsonl"));
    assert_eq!(all.len(), 11);
    let of = |way: &str, metric: &str| all[&(way.to_owned(), 0)][metric].as_f64();
    // Four LoRAs of rank 2 or one of rank 8 at 32 × 32, a Z of 24 × 4, a LoRA of rank 8 for each of
    // 24 tasks; of HyperLoRA the heads, the projector and the embeddings.
    for (way, parameters) in [
        ("average-known", 512.0),
        ("average-learned", 512.0 + 96.0),
        ("sum-random", 512.0),
        ("shared", 512.0),
        ("thin", 128.0),
        ("private", 24.0 * 512.0),
        ("hyper", 512.0 + 20.0 + 96.0),
    ] {
        assert_eq!(of(way, "parameters"), Some(parameters), "{way}");
    }
    for ((way, _), metrics) in &all {
        assert!(of(way, "held_out").unwrap() > 0.0 && of(way, "seen").unwrap() > 0.0);
        // Only where skills are learned is there something to recover.
        let learned = way.ends_with("-learned") || way.ends_with("-plain");
        assert_eq!(metrics.get("recovery").is_some(), learned, "{way}");
    }

    reproduce("balance", "1", dir.path());
    let all = runs(&dir.path().join("balance/runs.jsonl"));
    assert_eq!(all.len(), 11);
    let of = |way: &str, metric: &str| all[&(way.to_owned(), 0)][metric].as_f64();
    // Ten clusters know ten of the 16 experts; one network has no load.
    assert!((9.5..=10.0).contains(&of("known", "active").unwrap()));
    assert_eq!(of("parameters", "cv_load"), None);

    reproduce("conflict", "1", dir.path());
    let all = runs(&dir.path().join("conflict/runs.jsonl"));
    assert_eq!(all.len(), 15);
    for ((way, _), found) in &all {
        // A hundred steps of Adam go about 0.1, and there is nothing below the optimum.
        let start = [[-8.5, 7.5], [-8.5, -5.0], [9.0, 9.0]]
            [way[way.len() - 1..].parse::<usize>().unwrap() - 1];
        let moved = ["x1", "x2"].map(|x| found[x].as_f64().unwrap());
        assert!(
            moved.iter().zip(start).all(|(a, b): (&f64, f64)| (a - b).abs() < 0.2),
            "{way}: {moved:?}"
        );
        assert!(found["gap"].as_f64().unwrap() > 0.0, "{way}");
    }
}

#[test]
fn mixtures_and_fusions_have_their_exact_relations() {
    let dir = tempfile::tempdir().unwrap();
    reproduce("demix", "1", dir.path());
    let all = runs(&dir.path().join("demix/runs.jsonl"));
    assert_eq!(all.len(), 8);
    let of = |way: &str, metric: &str| all[&(way.to_owned(), 0)][metric].as_f64().unwrap();
    // A mixture is at most ln 4 a text of 63 tokens behind any of its experts, whichever text it is.
    let behind = (4f64.ln() / 63.0).exp();
    assert!(of("uniform", "blend") <= of("best", "blend") * behind * (1.0 + 1e-9));
    assert!(of("uniform", "domains") <= of("best", "domains") * behind * (1.0 + 1e-9));
    // Of texts of one domain the known weights are one expert: the domain's own.
    assert!(of("known", "domains") >= of("best", "domains") * (1.0 - 1e-9));
    assert!(of("removal", "own") > of("removal", "others"));

    reproduce("fusion", "1", dir.path());
    let all = runs(&dir.path().join("fusion/runs.jsonl"));
    assert_eq!(all.len(), 14);
    for n in [64, 2048] {
        let learned = |way: &str| all[&(format!("{way}-{n}"), 0)]["learned"].as_f64().unwrap();
        // Whole digits of n.
        for way in ["single", "fusion", "head"] {
            let whole = learned(way) * f64::from(n);
            assert!((whole - whole.round()).abs() < 1e-6, "{way}: {whole} of {n}");
        }
    }
}

#[test]
fn what_is_trained_and_what_is_shared_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    reproduce("tuning", "1", dir.path());
    let all = runs(&dir.path().join("tuning/runs.jsonl"));
    assert_eq!(all.len(), 4);
    let share = |way: &str| all[&(way.to_owned(), 0)]["share"].as_f64().unwrap();
    // Of each of two layers six matrices, their biases, two normalisations; of words, positions and
    // the one type a row each, and a normalisation.
    let biases = 4 * 128 + 256 + 128 + 2 * 128;
    let encoder = 2 * (4 * 128 * 128 + 2 * 128 * 256 + biases + 2 * 128) + (33 + 16 + 1 + 2) * 128;
    for (way, own) in [
        ("full", encoder),
        // Of rank 3, at two sites of each layer.
        ("lora", 4 * 3 * (128 + 128)),
        ("bitfit", 2 * biases + 128),
        ("probe", 0),
    ] {
        let wanted = 100.0 * f64::from(own) / f64::from(encoder);
        assert!((share(way) - wanted).abs() < 1e-9, "{way}: {} and {wanted}", share(way));
    }

    reproduce("dropping", "1", dir.path());
    let all = runs(&dir.path().join("dropping/runs.jsonl"));
    assert_eq!(all.len(), 2);
    for ((way, _), found) in &all {
        assert!(found["apart"].as_f64().unwrap() <= 1e-4, "{way}: a pass for all gives the same");
        assert!(found["separate"].as_f64().unwrap() > 0.0, "{way}");
    }
}

#[test]
fn what_is_asked_wrongly_is_refused_in_words() {
    refuse(&["reproduce", "mital"], &["unknown experiment", "did you mean `mittal`"]);
    refuse(&["reproduce", "mittal", "--seeds", "0"], &["--seeds"]);
    let out = run(&["list", "experiments", "--json"]);
    assert!(text(&out.stdout).contains("2206.02713"));
}
