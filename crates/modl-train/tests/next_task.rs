//! A recipe whose phases are PathNet's tasks: what won stays, all else begins again.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::collections::BTreeMap;
use std::path::Path;

use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Modular, Result, Seed, Tensor};
use modl_route::winning_path;
use modl_train::{Event, Recipe, Sink, run};
use toy::{StopAfter, backbone, data, head, methods};

/// The recipe with its first `phases` phases: three tasks, one after the other.
fn recipe(phases: usize) -> Recipe {
    let mut text = r#"
[backbone]
path = "toy"

[data]
tasks = { plus = "plus.tsv", minus = "minus.tsv" }

[router]
type = "path_net"
active = 1
layers = 2
population = 4
evaluate_for = 2

[aggregator]
type = "weighted_sum"

[head]
type = "regression"
"#
    .to_owned();
    for name in ["a", "b", "c", "d"] {
        text += &format!(
            "\n[modules.{name}]\ntype = \"lora\"\ntargets = [\"query\", \"value\"]\nr = 2\n"
        );
    }
    let all = [("first", "plus", false), ("second", "minus", true), ("third", "plus", true)];
    for (name, task, next) in all.into_iter().take(phases) {
        text += &format!(
            "\n[[phases]]\nname = \"{name}\"\nstrategy = \"joint\"\ntasks = [\"{task}\"]\n\
             next_task = {next}\nsteps = 8\nlr = 0.05\ncheckpoint_every = 3\n"
        );
    }
    Recipe::parse(&text, "recipe.toml", &methods()).unwrap()
}

fn start(recipe: &Recipe, folder: &Path, sink: &mut dyn Sink) -> Result<Modular> {
    let mut model = Modular::new(backbone(), Seed(recipe.seed)).unwrap();
    run(recipe, &methods(), &mut model, &head(), &data(10), folder, sink)?;
    Ok(model)
}

fn saved(folder: &Path, phase: &str) -> BTreeMap<String, Tensor> {
    let file = folder.join("phases").join(phase).join("params.safetensors");
    Checkpoint::open(file).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

#[test]
fn paths_of_earlier_tasks_stay_and_all_else_begins_again() {
    modl_core::set_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| dir.path().join(name);
    let mut events: Vec<Event> = Vec::new();
    start(&recipe(3), &folder("all"), &mut events).unwrap();
    // A phase sees its own tasks' examples alone.
    let examples = |e: &Event| match e {
        Event::Started { examples, .. } => Some(*examples),
        _ => None,
    };
    assert_eq!(events.iter().filter_map(examples).collect::<Vec<_>>(), [10, 10, 10]);

    let path = |phases: usize| {
        let model = start(&recipe(phases), &folder(&phases.to_string()), &mut ()).unwrap();
        winning_path(&model).unwrap()
    };
    let paths = [path(1), path(2)];
    let on = |name: &str, path: &BTreeMap<String, Vec<String>>| {
        path.iter().any(|(site, kept)| {
            kept.iter().any(|m| name.starts_with(&format!("modules.{m}.{site}.")))
        })
    };
    let all = ["1-first", "2-second", "3-third"].map(|phase| saved(&folder("all"), phase));
    let (mut kept, mut anew) = (0, 0);
    for (phase, (before, after)) in all.iter().zip(&all[1..]).enumerate() {
        for (name, old) in before.iter().filter(|(n, _)| n.starts_with("modules.")) {
            let same = old.bit_equal(&after[name]).unwrap();
            if paths[..=phase].iter().any(|path| on(name, path)) {
                assert!(same, "{name} is on an earlier path");
                kept += 1;
            } else if name.ends_with("lora_A.weight") {
                assert!(!same, "{name} has begun again");
                anew += 1;
            }
        }
        let moved = |n: &&String| {
            n.ends_with("lora_B.weight")
                && !paths[..=phase].iter().any(|path| on(n, path))
                && after[*n].abs().unwrap().sum().unwrap().item().unwrap() > 0.0
        };
        assert!(after.keys().any(|n| moved(&n)), "the next task has trained something");
    }
    assert!(kept >= 6 && anew >= 6, "{kept} {anew}");

    // Stopped anywhere in the later tasks it ends as the straight run.
    for saves in [4, 5, 7] {
        let own = folder(&format!("stopped-{saves}"));
        start(&recipe(3), &own, &mut StopAfter(saves)).unwrap_err();
        start(&recipe(3), &own, &mut ()).unwrap();
        for (name, t) in saved(&own, "3-third") {
            assert!(t.bit_equal(&all[2][&name]).unwrap(), "{saves}: {name}");
        }
    }
}

#[test]
fn what_has_no_path_has_no_next_task() {
    let dir = tempfile::tempdir().unwrap();
    let mut other = recipe(2);
    other.set(r#"router={ type = "soft" }"#, &methods()).unwrap();
    let e = start(&other, dir.path(), &mut ()).map(drop).unwrap_err().to_string();
    assert!(e.contains("second") && e.contains("`soft`, which has no winning path"), "{e}");
    let e = recipe(2).set("phases.0.next_task=true", &methods()).unwrap_err().to_string();
    assert!(e.contains("next_task"), "{e}");
    let mut unknown = recipe(2);
    unknown.set(r#"phases.0.tasks=["pluss"]"#, &methods()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let e = start(&unknown, dir.path(), &mut ()).map(drop).unwrap_err().to_string();
    assert!(e.contains("first") && e.contains("did you mean `plus`"), "{e}");
}
