//! PEFT's functions on tensors (`peft.utils.merge_utils`), against `convention: peft`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use modl_aggregate::merge::{Elements, Group, Input, MergeMethods, Settings, Source, merge_group};
use modl_core::Seed;

fn file() -> Source {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft");
    Source::open("peft", &dir.join("merge_utils.safetensors")).unwrap()
}

fn read(file: &Source, name: &str) -> Vec<f32> {
    let mut values = vec![0.0; file.place(name).unwrap().shape.iter().product()];
    file.elements(name, None).unwrap().read(0, &mut values).unwrap();
    values
}

#[test]
fn the_peft_convention_gives_what_peft_gives() {
    let file = file();
    let mut tensors: Vec<Vec<f32>> = (0..3).map(|i| read(&file, &format!("t{i}"))).collect();
    let n = tensors[0].len();
    tensors.push(vec![0.0; n]);
    let methods = MergeMethods::default();
    let weighted = || Settings::default().set_each("weight", [0.5, 0.3, 0.4]);
    let dense = || weighted().set_each("density", [0.5; 3]);
    let peft =
        |majority: &str| dense().set("convention", "peft").set("majority_sign_method", majority);
    let cases = [
        ("task_arithmetic", "task_arithmetic", weighted()),
        ("magnitude_prune", "magnitude_prune_d0.5", dense()),
        ("ties", "ties_d0.5_total", peft("total")),
        ("ties", "ties_d0.5_frequency", peft("frequency")),
    ];
    for (method, theirs, settings) in cases {
        let inputs = tensors.iter().map(|t| Input::new("m", t)).collect();
        let group = Group::new("t", &[24, 16], inputs, Seed(0)).with_base(3);
        let ours = merge_group(methods.find(method).unwrap(), group, settings).unwrap();
        for (a, b) in ours.iter().zip(read(&file, theirs)) {
            assert!((a - b).abs() <= 1e-6, "{theirs}: {a} {b}");
        }
    }
}
