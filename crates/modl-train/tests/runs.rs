//! Whole recipes in a folder: results, restarts, restoring.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_core::{Modular, Result, Seed, Tensor};
use modl_train::{Batch, Event, Recipe, Sink, evaluate, restore, run};
use toy::{StopAfter, backbone, data, head, methods};

const RECIPE: &str = r#"
[backbone]
path = "toy"

[data]
tasks = { plus = "plus.tsv", minus = "minus.tsv" }

[modules.plus]
type = "lora"
targets = ["query", "value"]
r = 2
dropout = 0.2

[modules.minus]
type = "bottleneck"
targets = ["output"]

[router]
type = "soft"

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "heads"
strategy = "joint"
train = ["heads.*", "routers.*"]
steps = 4

[[phases]]
name = "fit"
strategy = "per_task"
steps = 4
lr = 0.02
checkpoint_every = 2

[[phases]]
name = "route"
strategy = "routing"
steps = 4
lr = 0.1
"#;

fn recipe() -> Recipe {
    Recipe::parse(RECIPE, "recipe.toml", &methods()).unwrap()
}

fn fresh() -> Modular {
    Modular::new(backbone(), Seed(recipe().seed)).unwrap()
}

fn start(folder: &Path, sink: &mut dyn Sink) -> Result<Modular> {
    let mut model = fresh();
    run(&recipe(), &methods(), &mut model, &head(), &data(10), folder, sink)?;
    Ok(model)
}

fn params(model: &Modular) -> Vec<(String, Tensor)> {
    model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().copy().unwrap())).collect()
}

fn assert_bit_equal(a: &Modular, b: &Modular) {
    let (a, b) = (params(a), params(b));
    assert_eq!(a.len(), b.len());
    for ((name, x), (_, y)) in a.iter().zip(&b) {
        assert!(x.bit_equal(y).unwrap(), "{name}");
    }
}

#[test]
fn a_run_leaves_its_results_and_can_be_restored() {
    let dir = tempfile::tempdir().unwrap();
    let mut events: Vec<Event> = Vec::new();
    let model = start(dir.path(), &mut events).unwrap();
    let names: Vec<&str> = events
        .iter()
        .filter_map(
            |e| if let Event::Started { name, .. } = e { Some(name.as_str()) } else { None },
        )
        .collect();
    assert_eq!(names, ["heads", "fit/minus", "fit/plus", "route"]);
    for file in [
        "recipe.json",
        "phases/2-fit/plus/state.json",
        "phases/3-route/modules/plus/adapter_config.json",
        "phases/3-route/modules/minus.safetensors",
        "phases/3-route/routing.safetensors",
        "phases/3-route/heads.safetensors",
        "phases/3-route/params.safetensors",
    ] {
        assert!(dir.path().join(file).exists(), "{file}");
    }
    let mut again = fresh();
    restore(&recipe(), &methods(), &mut again, &head(), dir.path()).unwrap();
    assert_bit_equal(&model, &again);
    let said = |m: &Modular| evaluate(m, &head(), &data(10), 4, &Batch::describe).unwrap();
    assert_eq!(said(&model), said(&again));

    let mut third = fresh();
    modl_compute::peft::load(&mut third, dir.path().join("phases/3-route/modules/plus"), None)
        .unwrap();
}

#[test]
fn a_run_stopped_anywhere_ends_as_the_straight_one() {
    let dir = tempfile::tempdir().unwrap();
    let straight = start(&dir.path().join("straight"), &mut ()).unwrap();
    for saves in 1..=6 {
        let folder = dir.path().join(saves.to_string());
        start(&folder, &mut StopAfter(saves)).unwrap_err();
        let mut events: Vec<Event> = Vec::new();
        let resumed = start(&folder, &mut events).unwrap();
        assert_bit_equal(&straight, &resumed);
    }
}

#[test]
fn per_task_training_leaves_router_and_heads_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    start(dir.path(), &mut ()).unwrap();
    let of = |phase: &str| {
        let file = dir.path().join("phases").join(phase).join("params.safetensors");
        let file = modl_core::checkpoint::Checkpoint::open(file).unwrap();
        file.tensors(modl_core::Device::Cpu).unwrap()
    };
    for ((name, before), (_, after)) in of("1-heads").iter().zip(of("2-fit")) {
        let moved = !before.bit_equal(&after).unwrap();
        assert_eq!(moved, name.starts_with("modules."), "{name}");
    }
    for ((name, before), (_, after)) in of("2-fit").iter().zip(of("3-route")) {
        let moved = !before.bit_equal(&after).unwrap();
        assert!(!moved || name.starts_with("routers."), "{name}");
    }
}

#[test]
fn another_recipe_in_the_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    start(dir.path(), &mut StopAfter(1)).unwrap_err();
    let mut other = recipe();
    other.set("phases.0.lr=0.5", &methods()).unwrap();
    let e = run(&other, &methods(), &mut fresh(), &head(), &data(10), dir.path(), &mut ());
    let e = e.unwrap_err().to_string();
    assert!(e.contains("another recipe") && e.contains("phases"), "{e}");
    let e = restore(&recipe(), &methods(), &mut fresh(), &head(), dir.path()).unwrap_err();
    assert!(e.to_string().contains("no finished phase"), "{e}");
}

#[test]
fn strategies_refuse_what_they_do_not_do() {
    let mut wrong = recipe();
    wrong.set(r#"phases.2.train=["modules.*"]"#, &methods()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let e = run(&wrong, &methods(), &mut fresh(), &head(), &data(10), dir.path(), &mut ());
    assert!(e.unwrap_err().to_string().contains("leaves modules as they are"));
    let only_plus = data(10).of_task("plus").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let e = run(&recipe(), &methods(), &mut fresh(), &head(), &only_plus, dir.path(), &mut ());
    let e = e.unwrap_err().to_string();
    assert!(e.contains("unknown task of the data set `minus`"), "{e}");
}
