//! `modl align`: models whose hidden units were shuffled come back as they were, bit for bit.

#![allow(clippy::unwrap_used, clippy::panic)]

mod modl;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Device, Init, Kind, Seed, Tensor};

use modl::{refuse, succeed};

type Named = Vec<(String, Tensor)>;

fn read(folder: &Path) -> Named {
    let file = Checkpoint::open(folder.join("model.safetensors")).unwrap();
    file.tensors(Device::Cpu).unwrap()
}

fn write(folder: &Path, tensors: &Named) {
    let named = tensors.iter().map(|(n, t)| (n.as_str(), t));
    checkpoint::save(folder.join("model.safetensors"), named, HashMap::new()).unwrap();
}

fn equal(a: &Named, b: &Named) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && a.1.bit_equal(&b.1).unwrap())
}

/// The model with the units on these axes turned round and shifted, block by block.
fn shuffled(model: &Named, axis: impl Fn(&str) -> Option<i64>) -> Named {
    let one = |(name, t): &(String, Tensor)| {
        let Some(axis) = axis(name) else { return (name.clone(), t.clone()) };
        let n = t.len_of(axis);
        let layer = name.bytes().map(i64::from).filter(|b| (48..58).contains(b)).sum::<i64>();
        let order: Vec<i64> = (0..n).rev().map(|i| (i + 3 + layer) % n).collect();
        let index = Tensor::from_slice(&order, &[n], Device::Cpu).unwrap();
        (name.clone(), t.index_select(axis, &index).unwrap())
    };
    model.iter().map(one).collect()
}

#[test]
fn shuffled_feed_forward_networks_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    type Axis = fn(&str) -> Option<i64>;
    let llama: Axis = |n| match n {
        n if n.ends_with("gate_proj.weight") || n.ends_with("up_proj.weight") => Some(0),
        n if n.ends_with("down_proj.weight") => Some(1),
        _ => None,
    };
    let bert: Axis = |n| match n {
        n if n.contains("intermediate.dense") => Some(0),
        n if n.ends_with("output.dense.weight") && !n.contains("attention") => Some(1),
        _ => None,
    };
    let gpt2: Axis = |n| match n {
        n if n.ends_with("mlp.c_fc.weight") => Some(1),
        n if n.ends_with("mlp.c_fc.bias") || n.ends_with("mlp.c_proj.weight") => Some(0),
        _ => None,
    };
    let t5: Axis = |n| match n {
        n if n.contains("DenseReluDense.wi") => Some(0),
        n if n.ends_with("DenseReluDense.wo.weight") => Some(1),
        _ => None,
    };
    for (name, axis) in [("llama", llama), ("bert", bert), ("gpt2", gpt2), ("t5", t5)] {
        let folder = format!("../modl-models/tests/fixtures/base_{name}");
        let model = read(Path::new(&folder));
        let other = shuffled(&model, axis);
        assert!(!equal(&model, &other));
        write(&dir.path().join(name), &other);
        fs::copy(format!("{folder}/config.json"), dir.path().join(name).join("config.json"))
            .unwrap();
        let out = format!("{name}_back");
        let text = succeed(&["align", &folder, &at(name), "--out", &at(&out)]);
        assert!(text.contains("moved") && text.contains("now"), "{text}");
        assert!(equal(&read(&dir.path().join(&out)), &model), "{name}");
        let files = fs::read_dir(dir.path().join(&out)).unwrap().count();
        assert_eq!(files, 3, "the model, its configuration and the orders");
    }
}

#[test]
fn chains_are_found_and_anything_else_is_said_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let draw = |shape: &[i64], n| {
        Init::Normal(1.0).tensor(shape, Seed(n), Kind::Float, Device::Cpu).unwrap()
    };
    let named = |all: Vec<(&str, Tensor)>| -> Named {
        all.into_iter().map(|(n, t)| (n.to_owned(), t)).collect()
    };
    let chain = named(vec![
        ("net.0.bias", draw(&[16], 0)),
        ("net.0.weight", draw(&[16, 4], 1)),
        ("net.2.weight", draw(&[3, 16], 2)),
    ]);
    let axis = |n: &str| Some(i64::from(n == "net.2.weight"));
    write(&dir.path().join("a"), &chain);
    let order: Vec<i64> = (0..16).map(|i| (5 * i + 2) % 16).collect();
    let index = Tensor::from_slice(&order, &[16], Device::Cpu).unwrap();
    let turn =
        |(n, t): &(String, Tensor)| (n.clone(), t.index_select(axis(n).unwrap(), &index).unwrap());
    write(&dir.path().join("b"), &chain.iter().map(turn).collect::<Named>());
    succeed(&["align", &at("a"), &at("b"), "--out", &at("back")]);
    assert!(equal(&read(&dir.path().join("back")), &chain));

    let conv = named(vec![("conv.weight", draw(&[16, 2, 3, 3], 3)), ("head", draw(&[5, 16], 4))]);
    let turn = |(n, t): &(String, Tensor)| {
        (n.clone(), t.index_select(i64::from(n == "head"), &index).unwrap())
    };
    write(&dir.path().join("c"), &conv);
    write(&dir.path().join("d"), &conv.iter().map(turn).collect::<Named>());
    let args = ["align", &at("c"), &at("d"), "--out", &at("e")];
    refuse(&args, "--permutations");
    fs::write(dir.path().join("units.yml"), "filters: {conv.weight: 0, head: 1}\n").unwrap();
    let file = at("units.yml");
    succeed(&[&args[..], &["--permutations", &file]].concat());
    assert!(equal(&read(&dir.path().join("e")), &conv));
    refuse(&[&args[..], &["--permutations", &file]].concat(), "is there already");
}
