//! A pool of prompts from a recipe: queries of the frozen backbone, restarts, and no label in the end.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod toy;

use std::path::Path;

use modl_core::{Context, Device, Modular, Result, Seed, Tensor, no_grad};
use modl_train::{Examples, Recipe, Sink, base_vectors, run, sentence_vectors};
use toy::{StopAfter, backbone, data, head, methods};

/// A pool of prompts as L2P has it, or a prompt for each task as DualPrompt has them.
fn recipe(modules: &[&str], router: &str, train: &str) -> Recipe {
    let prompt = |name: &&str| {
        format!(
            "{name} = {{ type = \"prompt_tuning\", num_virtual_tokens = 2, std = 0.5, \
             targets = \"all-tokens\" }}\n"
        )
    };
    let modules: String = modules.iter().map(prompt).collect();
    let text = format!(
        r#"
[backbone]
path = "toy"

[data]
tasks = {{ plus = "plus.tsv", minus = "minus.tsv" }}
features = {{ query = "backbone" }}

[head]
type = "regression"

[router]
type = "prompt_pool"
input = "feature:query"
{router}

[aggregator]
type = "prompt_concat"

[[phases]]
name = "learn"
strategy = "naive"
train = {train}
tasks = ["plus", "minus"]
steps = 40
batch_size = 4
lr = 0.03
checkpoint_every = 15

[modules]
{modules}
"#
    );
    Recipe::parse(&text, "recipe.toml", &methods()).unwrap()
}

fn learn(recipe: &Recipe, folder: &Path, sink: &mut dyn Sink) -> Result<Modular> {
    let mut model = Modular::new(backbone(), Seed(3))?;
    let data = recipe.add_features(&model, data(24))?;
    let examples = Examples { train: &data, test: Some(&data) };
    run(recipe, &methods(), &mut model, &head(), examples, folder, sink)?;
    Ok(model)
}

const ALL: &str = r#"["modules.*", "routers.*", "heads.*"]"#;
const POOL: [&str; 4] = ["p0", "p1", "p2", "p3"];

#[test]
fn queries_are_what_the_backbone_says_of_each_text_alone() {
    let (recipe, data) = (recipe(&POOL, "k = 2", ALL), data(9));
    let mut model = Modular::new(backbone(), Seed(3)).unwrap();
    let found = recipe.add_features(&model, data.clone()).unwrap();
    assert_eq!(found.examples(), data.examples());
    // Modules and routers change nothing of it, nor do the batches.
    recipe.attach(&mut model, &methods()).unwrap();
    let other = base_vectors(&model, &data, 3).unwrap();
    for row in 0..data.len() {
        let batch = data.batch(&[row], Device::Cpu).unwrap();
        let cx = batch.describe(Context::eval()).unwrap();
        let outputs = no_grad(|| model.forward_base(&batch.inputs, &cx)).unwrap();
        let wanted = sentence_vectors(&outputs, &batch).unwrap();
        let own = found.batch(&[row], Device::Cpu).unwrap().features.need("query").unwrap().clone();
        assert!(own.all_close(&wanted, 1e-6, 1e-6).unwrap(), "{row}");
        assert!(other.narrow(0, row as i64, 1).unwrap().all_close(&wanted, 1e-6, 1e-6).unwrap());
    }
}

#[test]
fn a_stopped_run_comes_to_the_same_bytes() {
    for router in ["k = 2", "k = 2\ndiversity = true"] {
        let recipe = recipe(&POOL, router, ALL);
        let (whole, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        learn(&recipe, whole.path(), &mut ()).unwrap();
        for saved in [1, 3] {
            learn(&recipe, stopped.path(), &mut StopAfter(saved)).unwrap_err();
        }
        learn(&recipe, stopped.path(), &mut ()).unwrap();
        let bytes = |folder: &Path| {
            std::fs::read(folder.join("phases/1-learn/params.safetensors")).unwrap()
        };
        assert_eq!(bytes(whole.path()), bytes(stopped.path()), "{router}");
    }
}

/// Each task learns its prompt and its key, and moves no other; in the end keys find the prompt.
#[test]
fn a_prompt_for_each_task_is_found_by_its_key() {
    let train = r#"["modules.{task}.*", "routers.*.keys.{task}", "heads.*"]"#;
    let recipe = recipe(&["plus", "minus"], "k = 1\nlabel = \"task\"", train);
    let (dir, first) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = learn(&recipe, dir.path(), &mut ()).unwrap();
    let mut alone = recipe.clone();
    alone.set(r#"phases.0.tasks=["plus"]"#, &methods()).unwrap();
    let before = learn(&alone, first.path(), &mut ()).unwrap();
    let start = {
        let mut model = Modular::new(backbone(), Seed(3)).unwrap();
        recipe.attach(&mut model, &methods()).unwrap();
        model
    };
    let get = |model: &Modular, name: &str| -> Tensor { model.params().get(name).unwrap().clone() };
    for name in ["modules.T.prompt_embeddings", "routers.embeddings.keys.T"] {
        let same = |a: &Modular, b: &Modular, task: &str| {
            let name = name.replace('T', task);
            get(a, &name).bit_equal(&get(b, &name)).unwrap()
        };
        assert!(same(&model, &before, "plus") && same(&start, &before, "minus"), "{name}");
        assert!(!same(&start, &model, "plus") && !same(&start, &model, "minus"), "{name}");
    }
    // Who says nothing gets what everyone gets.
    let data = recipe.add_features(&model, data(24)).unwrap();
    let batch = data.batch(&[0, 30, 7], Device::Cpu).unwrap();
    let said = |cx: Context| {
        let outputs = no_grad(|| model.forward(&batch.inputs, &cx)).unwrap();
        outputs.need("last_hidden_state").unwrap().clone()
    };
    let told = said(batch.describe(Context::eval()).unwrap());
    let untold = said(batch.describe_without_tasks(Context::eval()).unwrap());
    assert!(told.bit_equal(&untold).unwrap());
}
