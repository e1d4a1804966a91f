//! Phases with a head, a router and an aggregator of their own: MAD-X in small.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_core::{Device, Kind, Modular, Result, Seed, Tensors};
use modl_models::{LoadOptions, open};
use modl_train::recipe::Head;
use modl_train::{
    Dataset, Examples, Objective, Recipe, RunFolder, SpecialTokens, Work, restore, restore_at, run,
    run_in,
};
use toy::{StopAfter, methods};

/// Language adapters by masked tokens, each alone; then a task adapter on the frozen one of `en`, by
/// classes.
const RECIPE: &str = r#"
seed = 3

[backbone]
path = "model"

[data]
tasks = { en = "en.tsv", de = "de.tsv" }

[modules.en]
type = "bottleneck"
targets = '(.*\.)?\d+\.output'

[modules.de]
type = "bottleneck"
targets = '(.*\.)?\d+\.output'

[modules.task]
type = "bottleneck"
targets = '(.*\.)?\d+\.output'

[router]
type = "fixed"
table = { en = ["en", "task"], de = ["de", "task"] }

[aggregator]
type = "stack"

[head]
type = "classification"

[[phases]]
name = "languages"
strategy = "per_task"
tasks = ["de", "en"]
head = { type = "masked_tokens" }
train = ["modules.{module}.*", "heads.tokens.*"]
steps = 6
lr = 1e-2
checkpoint_every = 2

[[phases]]
name = "mixed"
strategy = "joint"
head = { type = "masked_tokens" }
router = { type = "soft" }
aggregator = { type = "weighted_sum" }
steps = 3
lr = 1e-2

[[phases]]
name = "task"
strategy = "joint"
tasks = ["en"]
train = ["modules.task.*", "heads.class.*"]
epochs = 6
lr = 1e-2
checkpoint_every = 4

[[phases]]
name = "again"
strategy = "routing"
head = { type = "masked_tokens" }
router = { type = "soft" }
aggregator = { type = "weighted_sum" }
limit = 3
steps = 4
lr = 1e-2
"#;

fn recipe(folder: &Path) -> Recipe {
    for task in ["en", "de"] {
        let text: String = (0..40)
            .map(|i| {
                let word = [("pets", "cat dog"), ("food", "jam egg")][i % 2];
                format!("{i}\t{}\t{task} {} {i}\n", word.0, word.1)
            })
            .collect();
        std::fs::write(folder.join(format!("{task}.tsv")), text).unwrap();
    }
    Recipe::parse(RECIPE, folder.join("recipe.toml"), &methods()).unwrap()
}

fn bert() -> Modular {
    let folder = "../modl-models/tests/fixtures/deterministic_bert";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let options = LoadOptions { kind: Some(Kind::Float), ..LoadOptions::default() };
    Modular::from_box(open(folder, &options).unwrap(), Seed(1)).unwrap()
}

/// 1, a token for each byte, 2; 3 is the mask.
fn tokenise(text: &str) -> Result<Vec<i64>> {
    let bytes = text.bytes().map(|b| 4 + i64::from(b % 24));
    Ok([1].into_iter().chain(bytes).chain([2]).collect())
}

struct Parts {
    objectives: Vec<Box<dyn Objective>>,
    data: Vec<(Dataset, Dataset)>,
}

impl Parts {
    fn of(recipe: &Recipe) -> Self {
        let special = SpecialTokens { mask: Some(3), all: vec![0, 1, 2, 3] };
        let heads = recipe.heads();
        let objective = |h: &&Head| recipe.objective_of(h, &bert(), &special).unwrap();
        let data = |h: &&Head| recipe.load_data_of(h, &tokenise, 0).unwrap();
        Parts {
            objectives: heads.iter().map(objective).collect(),
            data: heads.iter().map(data).collect(),
        }
    }

    fn work(&self) -> Vec<Work<'_>> {
        let both = self.objectives.iter().zip(&self.data);
        both.map(|(o, (train, test))| Work {
            objective: o.as_ref(),
            examples: Examples { train, test: Some(test) },
        })
        .collect()
    }

    fn objectives(&self) -> Vec<&dyn Objective> {
        self.objectives.iter().map(AsRef::as_ref).collect()
    }
}

fn params(model: &Modular) -> Tensors {
    model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().copy().unwrap())).collect()
}

fn assert_same(a: &Tensors, b: &Tensors) {
    assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>());
    for (name, t) in a.iter() {
        assert!(t.bit_equal(b.need(name).unwrap()).unwrap(), "{name}");
    }
}

#[test]
fn phases_have_heads_and_routing_of_their_own_and_resume() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path());
    let parts = Parts::of(&recipe);
    assert_eq!(parts.objectives.len(), 2, "equal heads are one");
    let go = |model: &mut Modular, name: &str, sink: &mut dyn modl_train::Sink| {
        let folder = RunFolder::hold(dir.path().join(name)).unwrap();
        run_in(&folder, &recipe, &methods(), model, &parts.work(), sink)
    };
    let mut straight = bert();
    go(&mut straight, "straight", &mut ()).unwrap();
    let end = params(&straight);
    assert!(end.names().any(|n| n.starts_with("routers.")), "the last phase's router");

    // Stopped after each state in turn; in the end it is the same.
    let mut last = None;
    for _ in 0..40 {
        let mut model = bert();
        if go(&mut model, "stopped", &mut StopAfter(2)).is_ok() {
            last = Some(model);
            break;
        }
    }
    assert_same(&end, &params(&last.unwrap()));

    // A run is restored at any of its phases.
    let at = |phase: Option<&str>| {
        let mut model = bert();
        let folder = dir.path().join("straight");
        restore_at(&recipe, &methods(), &mut model, &parts.objectives(), folder, phase).unwrap();
        model
    };
    assert_same(&end, &params(&at(None)));
    let (languages, mixed, task) = (at(Some("languages")), at(Some("mixed")), at(Some("task")));
    let of =
        |model: &Modular, name: &str| params(model).need(name).unwrap().to_vec::<f32>().unwrap();
    let own = |module: &str| {
        let all = languages.params().iter().map(|(n, _)| n.to_owned());
        let mut all = all.filter(|n| n.starts_with(&format!("modules.{module}.")));
        all.find(|n| n.ends_with("adapter_up.weight")).unwrap()
    };
    // The task's phase leaves language adapters and the other head as they are, and learns its own.
    for name in [own("en"), own("de"), "heads.tokens.bias".into()] {
        assert_eq!(of(&mixed, &name), of(&task, &name), "{name}");
    }
    for name in [own("task"), "heads.class.weight".into()] {
        assert_ne!(of(&mixed, &name), of(&task, &name), "{name}");
    }
    // By its default a phase does not train another one's head.
    assert_eq!(of(&languages, "heads.class.weight"), of(&mixed, "heads.class.weight"));
    assert_ne!(of(&languages, "heads.tokens.bias"), of(&mixed, "heads.tokens.bias"));
    assert!(task.params().iter().all(|(n, _)| !n.starts_with("routers.")), "its router is fixed");
    // A router that comes back has what it had learned: without a step it would be the same.
    let router = |model: &Modular| {
        let p = params(model);
        let names: Vec<String> =
            p.names().map(str::to_owned).filter(|n| n.starts_with("routers.")).collect();
        names.iter().flat_map(|n| p.need(n).unwrap().to_vec::<f64>().unwrap()).collect::<Vec<_>>()
    };
    let (before, after) = (router(&mixed), router(&straight));
    let moved = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(moved > 0.0 && moved < 0.05, "4 steps of 0.01 from where it was: {moved}");
}

#[test]
fn a_run_is_evaluated_with_other_routing_and_without_lower_layers() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path());
    let parts = Parts::of(&recipe);
    let folder = RunFolder::hold(dir.path().join("run")).unwrap();
    run_in(&folder, &recipe, &methods(), &mut bert(), &parts.work(), &mut ()).unwrap();
    let at = || {
        let mut model = bert();
        let folder = dir.path().join("run");
        let objectives = parts.objectives();
        restore_at(&recipe, &methods(), &mut model, &objectives, folder, Some("task")).unwrap();
        model
    };
    let said = |model: &Modular| -> Vec<(String, f64)> {
        let batch = parts.data[0].1.batch(&(0..8).collect::<Vec<_>>(), Device::Cpu).unwrap();
        let cx = batch.describe(modl_core::Context::eval()).unwrap();
        let said = parts.objectives[0].predict(model, &batch, &cx).unwrap();
        let each = said.select(1, 0).unwrap().to_vec::<f64>().unwrap();
        batch.tasks.into_iter().zip(each).collect()
    };
    let own = said(&at());
    let with = |router: &str| {
        let mut model = at();
        recipe.reroute(Some(router), None, &mut model, &methods()).unwrap();
        said(&model)
    };
    let (en, none) = (
        with("{ type = \"fixed\", modules = [\"en\", \"task\"] }"),
        with("{ type = \"fixed\", modules = [] }"),
    );
    for ((task, a), (_, b)) in own.iter().zip(&en) {
        assert_eq!(a == b, task == "en", "the adapters of en are those of en alone");
    }
    let mut bare = at();
    let layers = bare.modular_sites().iter().filter_map(modl_core::Site::layer).max().unwrap() + 1;
    let dropped = |n: i64| {
        let mut model = at();
        let phase = recipe.phases.iter().find(|p| p.name == "task").unwrap();
        recipe.drop_layers(n, phase, &mut model, &methods()).unwrap();
        said(&model)
    };
    assert_eq!(dropped(0), own);
    assert_ne!(dropped(1), own);
    assert_eq!(dropped(layers), none);

    for (router, words) in [
        ("{ type = \"fixd\" }", "did you mean `fixed`"),
        ("{ type = \"fixed\", modules = [\"fr\"] }", "`fr`"),
    ] {
        let e = recipe.reroute(Some(router), None, &mut bare, &methods()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}

#[test]
fn mistakes_are_answered_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = recipe(dir.path());
    let text = RECIPE;
    for (old, new, words) in [
        (
            "head = { type = \"masked_tokens\" }\ntrain",
            "head = { type = \"masked_token\" }\ntrain",
            "did you mean `masked_tokens`",
        ),
        (
            "head = { type = \"masked_tokens\" }\ntrain",
            "head = { type = \"masked_tokens\", rate = 0.0 }\ntrain",
            "`rate`",
        ),
        (
            "head = { type = \"masked_tokens\" }\ntrain",
            "head = { type = \"masked_tokens\", name = \"class\" }\ntrain",
            "another head is called `class`",
        ),
        ("router = { type = \"soft\" }", "router = { type = \"soff\" }", "did you mean `soft`"),
        (
            "aggregator = { type = \"weighted_sum\" }",
            "aggregator = { type = \"weighted_sun\" }",
            "did you mean `weighted_sum`",
        ),
        ("limit = 3", "limit = 0", "`limit`"),
    ] {
        let text = text.replacen(old, new, 1);
        let e = Recipe::parse(&text, "recipe.toml", &methods()).unwrap_err().to_string();
        assert!(e.starts_with("recipe.toml:") && e.contains(words), "{e}");
        let line: usize = e.split(':').nth(1).unwrap().trim().parse().unwrap();
        assert!(line > 35, "the line of the phase: {e}");
    }
    // One objective is not enough for two heads.
    let parts = Parts::of(&good);
    let (data, mut model) = (&parts.data[0].0, bert());
    let e = run(
        &good,
        &methods(),
        &mut model,
        parts.objectives()[0],
        data,
        dir.path().join("one"),
        &mut (),
    );
    assert!(e.unwrap_err().to_string().contains("2 heads"), "it is refused");
    let e = restore(&good, &methods(), &mut bert(), parts.objectives()[0], dir.path().join("none"));
    assert!(e.unwrap_err().to_string().contains("train first"));
    let per_task = RECIPE.replace("tasks = [\"de\", \"en\"]\n", "");
    let all = Recipe::parse(&per_task, dir.path().join("recipe.toml"), &methods()).unwrap();
    let folder = RunFolder::hold(dir.path().join("all")).unwrap();
    let e = run_in(&folder, &all, &methods(), &mut bert(), &parts.work(), &mut ()).unwrap_err();
    assert!(e.to_string().contains("`task`"), "{e}");
}
