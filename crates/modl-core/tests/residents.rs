//! Modules within a memory limit.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;

use modl_core::testing::standins::Scale;
use modl_core::testing::{Given, Sum, TinyBackbone, perturb};
use modl_core::{Context, Kind, Modular, Residents, Result, Seed, Select, Targets, Tensor};

fn tiny() -> Modular {
    Modular::new(TinyBackbone::new(Seed(7), Kind::Float).unwrap(), Seed(1)).unwrap()
}

/// A scale at `query`: 8 numbers, 32 bytes, different for each name.
fn load(model: &mut Modular, name: &str) -> Result<()> {
    model.attach(name, Box::new(Scale), &Targets::names(["query"]))?;
    perturb(model, &Select::new(format!("modules.{name}.*")), 0.5, Seed(9).child(name))
}

fn logits(model: &Modular) -> Tensor {
    let inputs = TinyBackbone::inputs(2, 5, Seed(3)).unwrap();
    model.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().clone()
}

#[test]
fn the_least_recently_needed_leaves_and_comes_back_the_same() {
    let mut model = tiny();
    let mut residents = Residents::new(64);
    let loaded = RefCell::new(Vec::new());
    let mut need = |model: &mut Modular, names: &[&str]| {
        residents
            .need(model, names, |m, n| {
                loaded.borrow_mut().push(n.to_owned());
                load(m, n)
            })
            .unwrap();
        assert!(residents.bytes() <= 64);
        residents.names().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(need(&mut model, &["a"]), ["a"]);
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    let first = logits(&model);
    assert_eq!(need(&mut model, &["b"]), ["a", "b"]);
    assert_eq!(need(&mut model, &["a"]), ["b", "a"], "nothing is loaded twice");
    assert_eq!(need(&mut model, &["c"]), ["a", "c"], "b was needed longest ago");
    assert_eq!(model.modules(), ["a", "c"]);
    assert!(logits(&model).bit_equal(&first).unwrap(), "the router is there and routes to a");
    assert_eq!(need(&mut model, &["b", "c"]), ["b", "c"]);
    assert_eq!(need(&mut model, &["a"]), ["c", "a"]);
    assert_eq!(*loaded.borrow(), ["a", "b", "c", "b", "a"]);
}

#[test]
fn what_cannot_fit_is_refused_and_changes_nothing() {
    let mut model = tiny();
    let mut residents = Residents::new(40);
    residents.need(&mut model, &["c"], load).unwrap();
    let e = residents.need(&mut model, &["a", "b"], load).unwrap_err().to_string();
    assert!(e.contains("64 bytes for a, b, the limit is 40"), "{e}");
    assert!(model.modules() == ["c"] && residents.bytes() == 32);
    let e = residents.need(&mut model, &["a"], |_, _| Ok(())).unwrap_err().to_string();
    assert!(e.contains("was not attached"), "{e}");
}
