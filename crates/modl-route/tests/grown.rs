//! Routers that get another module to choose from: what they learned about the first ones stays. Which
//! routers refuse is written down here.

#![allow(clippy::unwrap_used, clippy::panic)]

mod made;

use std::collections::BTreeMap;

use made::{Made, bank, numbered, registry};
use modl_core::{Init, Kind, Scope, Seed, Tensor, no_grad};
use serde_json::{Value, json};

const WIDTH: i64 = 8;

/// Routers that cannot: groups and products of a number that another module does not divide, a table
/// that says for each id which of m modules it has, prototypes that are made of the modules.
const REFUSE: [&str; 5] = ["hash", "arrow", "product_key", "prompt_pool", "hierarchical"];

fn config(name: &str) -> Value {
    let tasks = json!(["x", "y"]);
    match name {
        "hash" => json!({"type": name, "vocab": 16}),
        "polytropon" | "multi_head" | "task_moe" | "routing_network" => {
            json!({"type": name, "tasks": tasks})
        }
        "sub_network" => {
            json!({"type": name, "sites": {"site": {"modules": [["m0", 1.0]], "normalised": true}}})
        }
        "x_lora" => json!({"type": name, "depth": 2, "size": 4}),
        "soft_moe" => json!({"type": name, "slots": 2}),
        "prompt_pool" => json!({"type": name, "k": 2}),
        _ => json!({"type": name}),
    }
}

/// Whether `old` stands at the beginning of `new` along one dimension.
fn leads(old: &Tensor, new: &Tensor) -> bool {
    let (a, b) = (old.size(), new.size());
    let Some(dim) = (0..a.len()).find(|d| a[*d] != b[*d]) else {
        return old.bit_equal(new).unwrap();
    };
    let first = new.narrow(dim as i64, 0, a[dim]).unwrap();
    first.size() == a && old.bit_equal(&first).unwrap()
}

#[test]
fn what_was_learned_about_the_first_modules_stays() {
    let mut refused = Vec::new();
    for entry in registry().routers.entries() {
        let name = entry.name;
        let mut made = Made::new(config(name), 3, WIDTH).unwrap();
        for (n, p) in made.store.iter() {
            let t = p.tensor();
            if !modl_core::is_float(t.kind()) {
                continue;
            }
            let learned =
                Init::Uniform(0.5).tensor(&t.size(), Seed(8).child(n), Kind::Double, t.device());
            let learned = learned.unwrap().add_scalar(1.0).unwrap();
            no_grad(|| t.clone().copy_from(&learned)).unwrap();
        }
        let copies: BTreeMap<String, (Tensor, bool)> = made
            .store
            .iter()
            .map(|(n, p)| (n.to_owned(), (p.tensor().copy().unwrap(), p.is_buffer())))
            .collect();
        let mut scope =
            Scope::at(&mut made.store, "router", Seed(1)).on(Kind::Double, modl_core::Device::Cpu);
        let grown = made.router.grown(4, &mut scope);
        let Ok(router) = grown else {
            refused.push(name);
            for (n, (old, _)) in &copies {
                assert!(made.store.get(n).unwrap().bit_equal(old).unwrap(), "{name}: {n}");
            }
            continue;
        };
        made.router = router;
        made.bank = bank(&numbered(4), WIDTH);
        for (n, p) in made.store.iter() {
            let (old, buffer) = &copies[n];
            assert_eq!(*buffer, p.is_buffer(), "{name}: {n}");
            let new = p.tensor();
            assert_eq!(old.kind(), new.kind(), "{name}: {n}");
            // Probabilities make room, each by as much.
            let scaled =
                name == "routing_network" && (n.ends_with("table") || n.ends_with("shares"));
            let old = if scaled { old.mul_scalar(0.75).unwrap() } else { old.clone() };
            assert!(leads(&old, new), "{name}: {n}: {old:?} {new:?}");
        }
    }
    let all = registry();
    let known = all.routers.entries().iter().map(|e| e.name).filter(|n| REFUSE.contains(n));
    assert_eq!(refused, known.collect::<Vec<_>>());
}
