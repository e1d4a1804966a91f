//! Tasks that are told apart by what is said: SupSup from a recipe, without labels in the end.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod toy;

use std::path::Path;

use modl_core::{Context, Device, Modular, Result, Seed, Tensor};
use modl_train::{
    AccuracyMatrix, Batch, Classification, Event, Examples, Objective, Recipe, Sink, TaskInference,
    run,
};
use toy::{CLASSES, SIDE, StopAfter, THREE, methods, stream};

fn recipe(strategy: &str, outputs: &str) -> Recipe {
    let text = format!(
        r#"
backbone.fresh = {{ type = "mlp", inputs = {SIDE}, hidden = [64, 64], bias = false{outputs} }}
data.tasks.a = "none"
head = {{ type = "classification", heads = "backbone", classes = ["0", "1", "2", "3"] }}
modules.a = {{ type = "sup_sup", targets = ["linear"] }}
router.type = "fixed"
aggregator.type = "weighted_sum"

[[phases]]
name = "learn"
strategy = {strategy}
tasks = ["a", "b", "c"]
steps = 60
batch_size = 32
lr = 3e-3
optimizer.type = "rmsprop"
checkpoint_every = 25
"#
    );
    Recipe::parse(&text, "recipe.toml", &methods()).unwrap()
}

const OUTPUTS: &str = ", outputs = 40";

fn learn(
    recipe: &Recipe,
    objective: &dyn Objective,
    folder: &Path,
    sink: &mut dyn Sink,
) -> Result<Modular> {
    let fresh = recipe.fresh_backbone(&methods())?.unwrap();
    let mut model = Modular::from_box(fresh, Seed(3))?;
    let (train, test) = (stream(128, 1), stream(80, 2));
    let examples = Examples { train: &train, test: Some(&test) };
    run(recipe, &methods(), &mut model, objective, examples, folder, sink)?;
    Ok(model)
}

fn own_outputs() -> Classification {
    let classes = (0..CLASSES).map(|c| c.to_string()).collect();
    Classification { classes, of_backbone: true, ..Classification::default() }
}

fn read<T: serde::de::DeserializeOwned>(folder: &Path, name: &str) -> T {
    let path = folder.join("phases/1-learn").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn tasks_are_found_without_their_labels_and_what_is_said_is_as_with_them() {
    for search in ["one_shot", "binary"] {
        let strategy = format!(r#"{{ type = "module_per_task", infer = "{search}", rows = 32 }}"#);
        let dir = tempfile::tempdir().unwrap();
        let mut events: Vec<Event> = Vec::new();
        let recipe = recipe(&strategy, OUTPUTS);
        let objective = own_outputs();
        let model = learn(&recipe, &objective, dir.path(), &mut events).unwrap();
        let found: TaskInference = read(dir.path(), "task_inference.json");
        let matrix: AccuracyMatrix = read(dir.path(), "accuracy_matrix.json");
        assert_eq!((found.rows, found.metric.as_str()), (32, "accuracy"));
        for (j, (task, inferred)) in THREE.iter().zip(&found.tasks).enumerate() {
            assert_eq!((inferred.task.as_str(), inferred.task_id), (*task, 1.0), "{found:?}");
            let (own, then) = (matrix.at(2, j).unwrap(), matrix.at(j, j).unwrap());
            assert!(own > 0.9 && own == then, "{matrix:?}");
            assert_eq!(inferred.score, Some(own), "the mask is that of the task");
        }
        let told = events.iter().find_map(|e| match e {
            Event::Evaluated { name, metrics, .. } if name == "learn/without task labels" => {
                Some(metrics.clone())
            }
            _ => None,
        });
        assert_eq!(told.unwrap()["task_id"], found.task_id());
        // The router goes by task again, and there is no head: a mask is all that a task has.
        let batch = stream(80, 2).batch(&[100], Device::Cpu).unwrap();
        let said = |cx| objective.predict(&model, &batch, &cx).unwrap();
        let own = said(batch.describe(Context::eval()).unwrap());
        let as_task = |task: &str| said(Context::eval().with_tasks([task]));
        assert!(own.bit_equal(&as_task("b")).unwrap());
        assert!(!own.bit_equal(&as_task("a")).unwrap());
        assert!(model.params().iter().all(|(n, _)| n.starts_with("modules.")), "no head");
    }
}

#[test]
fn a_stopped_run_finds_the_same() {
    let strategy = r#"{ type = "module_per_task", infer = "one_shot", rows = 16 }"#;
    let (whole, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let recipe = recipe(strategy, OUTPUTS);
    learn(&recipe, &own_outputs(), whole.path(), &mut ()).unwrap();
    for saved in [1, 5] {
        learn(&recipe, &own_outputs(), stopped.path(), &mut StopAfter(saved)).unwrap_err();
    }
    learn(&recipe, &own_outputs(), stopped.path(), &mut ()).unwrap();
    for file in ["task_inference.json", "accuracy_matrix.json", "params.safetensors"] {
        let bytes = |folder: &Path| std::fs::read(folder.join("phases/1-learn").join(file));
        assert_eq!(bytes(whole.path()).unwrap(), bytes(stopped.path()).unwrap(), "{file}");
    }
}

#[test]
fn what_cannot_be_told_apart_is_refused_in_words() {
    let strategy = r#"{ type = "module_per_task", infer = "one_shot" }"#;
    let refused = |recipe: &Recipe, objective: &dyn Objective| {
        let dir = tempfile::tempdir().unwrap();
        learn(recipe, objective, dir.path(), &mut ()).unwrap_err().to_string()
    };
    // Heads of tasks go by the label.
    let all: Vec<usize> = (0..CLASSES).collect();
    let tasks = THREE.map(|t| (t.to_owned(), all.clone())).to_vec();
    let of_tasks =
        Classification { head: "h".into(), dim: 64, tasks, of_backbone: false, ..own_outputs() };
    let e = refused(&recipe(strategy, OUTPUTS), &of_tasks);
    assert!(e.contains("one head for all tasks"), "{e}");
    let e = refused(&recipe(r#""module_per_task""#, ""), &own_outputs());
    assert!(e.contains("an output layer (`outputs`)"), "{e}");
    let e = refused(&recipe(r#""module_per_task""#, ", outputs = 3"), &own_outputs());
    assert!(e.contains("4 classes want"), "{e}");
    for (strategy, word) in [
        (r#"{ type = "module_per_task", infer = "twice" }"#, "one_shot"),
        (r#"{ type = "module_per_task", rows = 0 }"#, "rows"),
    ] {
        let mut recipe = recipe(r#""naive""#, "");
        let e = recipe.set(&format!("phases.0.strategy={strategy}"), &methods()).unwrap_err();
        assert!(e.to_string().contains(word), "{e}");
    }
    let mut recipe = recipe(r#""naive""#, "");
    let e = recipe.set("head.outputs=9", &methods()).unwrap_err().to_string();
    assert!(e.contains("those of the backbone"), "{e}");
}

/// What a batch is described by, without its tasks, has all else.
#[test]
fn a_description_without_tasks_has_the_rest() {
    let rows = Tensor::from_slice(&[1f32, 2.0], &[2, 1], Device::Cpu).unwrap();
    let data = toy::data(1).with_feature("embedding", rows).unwrap();
    let batch: Batch = data.batch(&[0, 1], Device::Cpu).unwrap();
    let cx = batch.describe_without_tasks(Context::eval()).unwrap();
    assert!(cx.tasks().is_err() && cx.find("mask").is_some() && cx.find("embedding").is_some());
}
