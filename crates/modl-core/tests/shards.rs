//! Models in several files: what is in which, what is read back, and what is left of older ones.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::shards::{Index, ShardSize, save};
use modl_core::{Device, Init, Kind, Seed, Tensor};

/// Tensors with 4, 8, 40, 12, 4 and 8 bytes.
fn tensors(seed: u64) -> BTreeMap<String, Tensor> {
    let one = |name: &str, shape: &[i64], kind| {
        let drawn = Init::Normal(1.0).tensor(shape, Seed(seed).child(name), kind, Device::Cpu);
        (name.to_owned(), drawn.unwrap())
    };
    BTreeMap::from([
        one("a", &[], Kind::Float),
        one("b", &[2, 2], Kind::BFloat16),
        one("c", &[10], Kind::Float),
        one("d", &[3], Kind::Float),
        one("e", &[2], Kind::Half),
        one("f", &[1], Kind::Double),
    ])
}

fn write(dir: &Path, tensors: &BTreeMap<String, Tensor>, max: u64) {
    let all = tensors.iter().map(|(n, t)| (n.as_str(), t));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    save(dir, "model", all, &metadata, ShardSize::bytes(max).unwrap()).unwrap();
}

fn files(dir: &Path) -> Vec<String> {
    let all = fs::read_dir(dir).unwrap();
    let mut all: Vec<String> = all.map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

fn shard(n: usize, of: usize) -> String {
    format!("model-{n:05}-of-{of:05}.safetensors")
}

#[test]
fn tensors_go_into_shards_in_their_order_and_are_read_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let all = tensors(1);
    write(dir.path(), &all, 16);
    // 4 + 8, then 40 for itself, 12 + 4, 8.
    let wanted: [&[&str]; 4] = [&["a", "b"], &["c"], &["d", "e"], &["f"]];
    let index = "model.safetensors.index.json".to_owned();
    let names: Vec<String> = (1..=4).map(|n| shard(n, 4)).chain([index]).collect();
    assert_eq!(files(dir.path()), names);
    for (n, own) in wanted.iter().enumerate() {
        let file = Checkpoint::open(dir.path().join(&names[n])).unwrap();
        assert_eq!(file.names(), *own);
        assert_eq!(file.metadata()["format"], "pt");
    }
    let text = fs::read_to_string(dir.path().join(&names[4])).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let metadata = serde_json::json!({"total_parameters": 21, "total_size": 76});
    assert_eq!(json["metadata"], metadata);
    let index = Index::read(dir.path().join(&names[4])).unwrap();
    assert_eq!(index.files(), names[..4].iter().map(|n| dir.path().join(n)).collect::<Vec<_>>());
    for (name, tensor) in &all {
        let file = Checkpoint::open(dir.path().join(&index.weight_map[name])).unwrap();
        let found = file.tensor(name, Device::Cpu).unwrap();
        assert!(found.bit_equal(tensor).unwrap(), "{name}");
    }
}

#[test]
fn what_fits_into_one_file_is_what_a_checkpoint_of_all_is() {
    let dir = tempfile::tempdir().unwrap();
    let all = tensors(1);
    write(dir.path(), &all, 76);
    assert_eq!(files(dir.path()), ["model.safetensors"]);
    let other = dir.path().join("other");
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    checkpoint::save(&other, all.iter().map(|(n, t)| (n.as_str(), t)), metadata).unwrap();
    let own = fs::read(dir.path().join("model.safetensors")).unwrap();
    assert!(own == fs::read(other).unwrap());
    // Nothing at all is a file without tensors.
    let empty = dir.path().join("empty");
    write(&empty, &BTreeMap::new(), 1);
    assert!(Checkpoint::open(empty.join("model.safetensors")).unwrap().names().is_empty());
}

#[test]
fn nothing_is_left_of_older_saves_and_nothing_else_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let others = ["config.json", "model-00001-of-00009.bin", "other-00001-of-00009.safetensors"];
    fs::create_dir_all(dir.path()).unwrap();
    for other in others {
        fs::write(dir.path().join(other), "kept").unwrap();
    }
    // Several, one, several of another number, the same number.
    for (seed, max, count) in [(1, 16, 4), (2, 999, 1), (3, 40, 3), (4, 16, 4), (5, 16, 4)] {
        let all = tensors(seed);
        write(dir.path(), &all, max);
        let own: Vec<String> = files(dir.path());
        let own: Vec<&String> = own.iter().filter(|n| !others.contains(&n.as_str())).collect();
        assert_eq!(own.len(), if count == 1 { 1 } else { count + 1 }, "{own:?}");
        for (name, tensor) in &all {
            let path = match count {
                1 => dir.path().join("model.safetensors"),
                _ => {
                    let index = dir.path().join("model.safetensors.index.json");
                    dir.path().join(&Index::read(index).unwrap().weight_map[name])
                }
            };
            let found = Checkpoint::open(path).unwrap().tensor(name, Device::Cpu).unwrap();
            assert!(found.bit_equal(tensor).unwrap(), "{name}");
        }
    }
    assert!(others.iter().all(|o| fs::read(dir.path().join(o)).unwrap() == b"kept"));
}

/// The last shard cannot be encoded: by then others have been written under temporary names.
#[test]
fn a_refused_save_leaves_the_old_shards() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &tensors(1), 16);
    let read =
        || files(dir.path()).into_iter().map(|n| (fs::read(dir.path().join(&n)).unwrap(), n));
    let before: Vec<_> = read().collect();
    let mut all = tensors(2);
    let complex = Tensor::zeros(&[2], Kind::ComplexFloat, Device::Cpu).unwrap();
    all.insert("z".to_owned(), complex);
    let pairs = || all.iter().map(|(n, t)| (n.as_str(), t));
    let small = ShardSize::bytes(16).unwrap();
    let e = save(dir.path(), "model", pairs(), &HashMap::new(), small).unwrap_err().to_string();
    assert!(e.contains("`z`") && read().eq(before.iter().cloned()), "{e}");
    let twice = tensors(2);
    let twice = twice.iter().chain(&twice).map(|(n, t)| (n.as_str(), t));
    assert!(save(dir.path(), "model", twice, &HashMap::new(), small).is_err());
    assert!(read().eq(before.iter().cloned()));
}

#[test]
fn sizes_are_read_as_transformers_reads_them() {
    for (text, bytes) in [
        ("5GB", 5_000_000_000),
        ("50gb", 50_000_000_000),
        (" 300 MB ", 300_000_000),
        ("1.5KB", 1500),
        ("2TB", 2_000_000_000_000),
        ("1GiB", 1 << 30),
        ("123", 123),
    ] {
        assert_eq!(text.parse::<ShardSize>().unwrap(), ShardSize::bytes(bytes).unwrap(), "{text}");
    }
    for text in
        ["", "0", "0GB", "-1GB", "GB", "1.5", "5 parsecs", "nanGB", "infMB", "99999999999TB"]
    {
        let e = text.parse::<ShardSize>().unwrap_err().to_string();
        assert!(e.contains("max_shard_size"), "{text}: {e}");
    }
    for text in ["50GB", "300MB", "1TB", "7KB", "123"] {
        assert_eq!(text.parse::<ShardSize>().unwrap().to_string(), text);
    }
    assert_eq!(ShardSize::default().to_string(), "50GB");
}

#[test]
fn indices_that_cannot_be_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors.index.json");
    for (text, words) in [
        ("{", "is not JSON"),
        ("{}", "has no `weight_map`"),
        (r#"{"weight_map": {"a": 1}}"#, "`a` is in 1, no file beside it"),
        (r#"{"weight_map": {"a": "../b"}}"#, "no file beside it"),
        (r#"{"weight_map": {"a": "/etc/b"}}"#, "no file beside it"),
        (r#"{"weight_map": {"a": ".."}}"#, "no file beside it"),
        (r#"{"weight_map": {"a": "x", "a": "y"}}"#, "more than once"),
    ] {
        fs::write(&path, text).unwrap();
        let e = Index::read(&path).unwrap_err().to_string();
        assert!(e.contains(words) && e.contains("index.json"), "{e}");
    }
    fs::remove_file(&path).unwrap();
    assert!(Index::read(&path).unwrap_err().to_string().contains("cannot be read"));
}
