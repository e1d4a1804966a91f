//! Progressive networks from a recipe: what a task has learned stays, bit for bit.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_core::{Context, Device, Modular, Result, Seed, Select, Tensor};
use modl_train::{AccuracyMatrix, Classification, Examples, Objective, Recipe, Sink, run};
use toy::{CLASSES, SIDE, StopAfter, THREE, methods, stream};

fn recipe(tasks: &[&str]) -> Recipe {
    let text = format!(
        r#"
backbone.fresh = {{ type = "mlp", inputs = {SIDE}, hidden = [16, 16] }}
data.tasks = {{ a = "none", b = "none", c = "none" }}
head = {{ type = "classification", heads = "per_task", classes = ["0", "1", "2", "3"] }}
router = {{ type = "fixed", modules = ["columns"] }}
aggregator.type = "weighted_sum"

[modules.columns]
type = "progressive"
tasks = ["a", "b", "c"]
width = 4
targets = ["linear"]

[[phases]]
name = "learn"
strategy = "naive"
train = ["modules.columns.*.{{task}}.*", "heads.*.{{task}}.*"]
tasks = {tasks:?}
steps = 40
batch_size = 16
lr = 1e-2
optimizer = {{ type = "adamw", weight_decay = 0.1 }}
checkpoint_every = 15
"#
    );
    Recipe::parse(&text, "recipe.toml", &methods()).unwrap()
}

fn heads() -> Classification {
    let all: Vec<usize> = (0..CLASSES).collect();
    Classification {
        head: "class".into(),
        dim: 16,
        classes: all.iter().map(usize::to_string).collect(),
        tasks: THREE.map(|task| (task.to_owned(), all.clone())).to_vec(),
        ..Classification::default()
    }
}

fn learn(tasks: &[&str], folder: &Path, sink: &mut dyn Sink) -> Result<Modular> {
    let recipe = recipe(tasks);
    let mut model = Modular::from_box(recipe.fresh_backbone(&methods())?.unwrap(), Seed(3))?;
    let (train, test) = (stream(128, 1), stream(80, 2));
    let examples = Examples { train: &train, test: Some(&test) };
    run(&recipe, &methods(), &mut model, &heads(), examples, folder, sink)?;
    Ok(model)
}

fn said(model: &Modular, task: &str) -> Tensor {
    let data = stream(80, 2).of_task(task).unwrap();
    let batch = data.batch(&(0..80).collect::<Vec<_>>(), Device::Cpu).unwrap();
    let cx = batch.describe(Context::eval()).unwrap();
    heads().predict(model, &batch, &cx).unwrap()
}

#[test]
fn later_columns_leave_earlier_ones_as_they_were() {
    let folder = || tempfile::tempdir().unwrap();
    let (two, three) = (folder(), folder());
    let before = learn(&["a", "b"], two.path(), &mut ()).unwrap();
    let after = learn(&THREE, three.path(), &mut ()).unwrap();
    for task in ["a", "b"] {
        assert!(said(&before, task).bit_equal(&said(&after, task)).unwrap(), "{task}");
        let mut own = 0;
        let mine = Select::any([format!("modules.columns.*.{task}.*")]);
        for (name, t) in before.params().select(&mine) {
            assert!(t.bit_equal(after.params().get(name).unwrap()).unwrap(), "{name}");
            own += 1;
        }
        assert!(own >= 4, "{own}");
    }
    assert!(!said(&before, "c").bit_equal(&said(&after, "c")).unwrap());
    let file = three.path().join("phases/1-learn/accuracy_matrix.json");
    let matrix: AccuracyMatrix = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    for j in 0..3 {
        let (own, then) = (matrix.at(2, j).unwrap(), matrix.at(j, j).unwrap());
        assert!(own > 0.9 && own == then, "{matrix:?}");
    }
}

#[test]
fn a_stopped_run_comes_to_the_same_bytes() {
    let (whole, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    learn(&THREE, whole.path(), &mut ()).unwrap();
    for saved in [2, 3] {
        learn(&THREE, stopped.path(), &mut StopAfter(saved)).unwrap_err();
    }
    learn(&THREE, stopped.path(), &mut ()).unwrap();
    let bytes =
        |folder: &Path| std::fs::read(folder.join("phases/1-learn/params.safetensors")).unwrap();
    assert_eq!(bytes(whole.path()), bytes(stopped.path()));
}
