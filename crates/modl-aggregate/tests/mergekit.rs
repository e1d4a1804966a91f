//! What mergekit made of three tiny Llamas by each of its methods, against what is made here of the
//! same files. The fixtures come from `tests/python/make_merge_golden.py`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use modl_aggregate::merge::{Elements, MergeMethods, Source, run};
use modl_aggregate::mergekit::{Options, plan, read_documents};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mergekit")
}

fn options() -> Options {
    Options { folder: fixtures().join("models"), ..Options::default() }
}

/// All numbers of a file.
fn numbers(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let source = Source::open("result", path).unwrap();
    let one = |(name, place): (&String, &modl_aggregate::merge::Place)| {
        let mut values = vec![0.0; place.shape.iter().product()];
        source.elements(name, None).unwrap().read(0, &mut values).unwrap();
        (name.clone(), values)
    };
    source.tensors().iter().map(one).collect()
}

fn merged(yaml: &str, out: &Path) -> BTreeMap<String, Vec<f32>> {
    let configs = read_documents(yaml).unwrap();
    let methods = MergeMethods::default();
    let plan = plan(&configs[0], &methods, &options()).unwrap();
    run(&plan, &methods, out, |_| {}).unwrap();
    numbers(out)
}

/// Methods that draw: mergekit's generator is not ours.
const DRAWN: [&str; 4] = ["dare_linear", "dare_ties", "della", "della_linear"];

#[test]
fn every_method_gives_what_mergekit_gives() {
    let mut done = Vec::new();
    for entry in fs::read_dir(fixtures()).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        if name == "models" || DRAWN.contains(&name.as_str()) {
            continue;
        }
        let made = tempfile::tempdir().unwrap();
        let ours =
            merged(&fs::read_to_string(dir.join("config.yml")).unwrap(), &made.path().join("m"));
        let theirs = numbers(&dir.join("merged.safetensors"));
        assert!(ours.keys().eq(theirs.keys()), "{name}: {:?}", ours.keys());
        let mut worst = (0f32, "");
        for (key, theirs) in &theirs {
            for (a, b) in ours[key].iter().zip(theirs) {
                // 1e-6, also of large numbers.
                let off = (a - b).abs() / b.abs().max(1.0);
                if off.is_nan() || off > worst.0 {
                    worst = (off, key);
                }
            }
        }
        assert!(worst.0 <= 1e-6, "{name}: {worst:?}");
        if dir.join("config.json").is_file() {
            let layers = |path: &Path| {
                let text = fs::read_to_string(path).unwrap();
                let json: serde_json::Value = serde_json::from_str(&text).unwrap();
                json["num_hidden_layers"].clone()
            };
            let made = layers(&made.path().join("m/config.json"));
            assert_eq!(made, layers(&dir.join("config.json")), "{name}");
        }
        done.push(name);
    }
    assert!(done.len() >= 32, "{done:?}");
}
