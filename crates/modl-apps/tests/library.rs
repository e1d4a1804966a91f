//! `modl lib`: what a run has trained is kept, listed, found and removed.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bench;

use bench::{Bench, LORA, refuse, succeed};

#[test]
fn the_modules_of_a_run_are_kept_with_where_they_come_from() {
    let bench = Bench::new();
    let at = |name: &str| bench.dir.path().join(name).display().to_string();
    let (library, run) = (at("library"), at("run"));
    refuse(&["lib", "add", &library, &run], &["is no run"]);
    succeed(&["train", &at("recipe.toml"), "--out", &run]);
    let added = succeed(&["lib", "add", &library, &run, "--about", "a test"]);
    assert_eq!(added.lines().collect::<Vec<_>>(), ["added a@1", "added b@1"]);
    refuse(&["lib", "add", &library, &run], &["is there already, as a@1"]);
    let cards = succeed(&["lib", "list", &library, "--json"]);
    let cards: serde_json::Value = serde_json::from_str(&cards).unwrap();
    let card = &cards[0];
    let recipe = std::fs::read_to_string(at("recipe.toml")).unwrap();
    assert_eq!(
        (card["name"].as_str(), card["recipe"].as_str()),
        (Some("a"), Some(recipe.as_str()))
    );
    assert!(card["metrics"]["sign_accuracy"].is_number() && card["about"] == "a test");
    assert_ne!(card["data"], cards[1]["data"], "each of the task of its name");
    let folder = succeed(&["lib", "path", &library, "a"]);
    let kept = std::fs::read(format!("{}/adapter_model.safetensors", folder.trim())).unwrap();
    let trained = std::path::Path::new(&run).join("phases");
    let last = std::fs::read_dir(&trained).unwrap().flatten().map(|e| e.path()).max().unwrap();
    assert_eq!(kept, std::fs::read(last.join("modules/a/adapter_model.safetensors")).unwrap());
    // Of the two the one is nearer whose texts these are.
    let text = std::fs::read_to_string(at("a.tsv")).unwrap();
    let texts: Vec<&str> = text.lines().filter_map(|l| l.splitn(3, '\t').nth(2)).collect();
    let model = at("model");
    let mut search = vec!["lib", "search", &library, "--model", &model];
    texts.iter().for_each(|t| search.extend(["--text", t]));
    let found = succeed(&search);
    let place = |name: &str| found.find(name).unwrap();
    assert!(place("a@1") < place("b@1"), "{found}");
    succeed(&["lib", "add", &library, &format!("{LORA}/adapter"), "--name", "b"]);
    let listed = succeed(&["lib", "list", &library]);
    assert!(listed.contains("b@2"), "{listed}");
    assert_eq!(succeed(&["lib", "remove", &library, "b@1"]), "removed b@1\n");
    assert_eq!(succeed(&["lib", "remove", &library, "b"]), "removed b@2\n");
    refuse(&["lib", "path", &library, "b"], &["b", "a@1"]);
}
