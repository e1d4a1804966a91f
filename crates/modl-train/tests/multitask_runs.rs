//! Multitask strategies in recipes: what a step does, that losses fall, and that stopped runs go on bit
//! for bit.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod toy;

use std::collections::BTreeMap;
use std::path::Path;

use modl_core::{Context, Modular, Result, Seed, Tensor};
use modl_train::joint::Gram;
use modl_train::{Dataset, Event, Example, Objective, Recipe, Sink, restore, run};
use toy::{StopAfter, backbone, head, methods};

/// Three tasks of like texts, of which the second wants the opposite of the first, with 24, 16 and 8
/// examples.
fn data() -> Dataset {
    let mut examples = Vec::new();
    for (t, (task, n)) in [("plus", 24usize), ("minus", 16), ("low", 8)].iter().enumerate() {
        for i in 0..*n {
            let ids: Vec<i64> =
                (0..2 + i % 5).map(|k| ((i * 7 + k * k * 3 + t) % 16) as i64).collect();
            let share =
                |f: fn(&i64) -> bool| ids.iter().filter(|k| f(k)).count() as f32 / ids.len() as f32;
            let target = match t {
                0 => share(|k| k % 2 == 0),
                1 => -share(|k| k % 2 == 0),
                _ => share(|k| *k < 8),
            };
            let ids = ids.into();
            examples.push(Example { id: i.to_string(), task: (*task).to_owned(), ids, target });
        }
    }
    Dataset::new(examples).unwrap()
}

/// A module for all tasks and one for each.
fn recipe(strategy: &str, more: &str) -> Result<Recipe> {
    let modules: String = ["all", "plus", "minus", "low"]
        .iter()
        .map(|name| {
            format!(
                "[modules.{name}]\ntype = \"lora\"\ntargets = [\"query\", \"value\"]\nr = 2\n\
                 alpha = 4\ndropout = 0.1\n\n"
            )
        })
        .collect();
    let text = format!(
        r#"
[backbone]
path = "toy"

[data]
tasks = {{ plus = "plus.tsv", minus = "minus.tsv", low = "low.tsv" }}

{modules}
[router]
type = "fixed"
table = {{ plus = ["all", "plus"], minus = ["all", "minus"], low = ["all", "low"] }}

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "learn"
strategy = {strategy}
{more}
"#
    );
    Recipe::parse(&text, "recipe.toml", &methods())
}

const USUAL: &str = "steps = 60\nbatch_size = 6\nlr = 0.03\ncheckpoint_every = 7";

const ALL: [&str; 9] = [
    r#""scalarised""#,
    r#"{ type = "scalarised", weights = { plus = 2.0, low = 0.5 } }"#,
    r#""uncertainty""#,
    r#"{ type = "dwa", steps = 5 }"#,
    r#"{ type = "gradnorm", alpha = 0.5 }"#,
    r#""pcgrad""#,
    r#"{ type = "cagrad", c = 0.4 }"#,
    r#""mgda""#,
    r#""nash_mtl""#,
];

fn learn(recipe: &Recipe, folder: &Path, sink: &mut dyn Sink) -> Result<Modular> {
    let mut model = Modular::new(backbone(), Seed(3))?;
    run(recipe, &methods(), &mut model, &head(), &data(), folder, sink)?;
    Ok(model)
}

/// The model before any step.
fn fresh(recipe: &Recipe) -> Modular {
    let mut model = Modular::new(backbone(), Seed(3)).unwrap();
    recipe.attach(&mut model, &methods()).unwrap();
    head().setup(&mut model).unwrap();
    model
}

/// The mean loss of each task's rows in a batch, without dropout.
fn losses(model: &Modular, data: &Dataset, rows: &[usize]) -> BTreeMap<String, Tensor> {
    let batch = data.batch(rows, model.device()).unwrap();
    let parts = batch.by_task().unwrap().into_iter();
    parts
        .map(|(task, part)| {
            let cx = part.describe(Context::eval()).unwrap();
            (task, head().loss(model, &part, &cx).unwrap())
        })
        .collect()
}

fn mean_loss(model: &Modular) -> f64 {
    let data = data();
    let all = losses(model, &data, &(0..data.len()).collect::<Vec<_>>());
    all.values().map(|l| l.item().unwrap()).sum::<f64>() / 3.0
}

#[test]
fn losses_fall_with_every_method() {
    let start = mean_loss(&fresh(&recipe(ALL[0], USUAL).unwrap()));
    for strategy in ALL {
        let dir = tempfile::tempdir().unwrap();
        let mut events: Vec<Event> = Vec::new();
        let model = learn(&recipe(strategy, USUAL).unwrap(), dir.path(), &mut events).unwrap();
        let end = mean_loss(&model);
        assert!(end < 0.5 * start, "{strategy}: {start} → {end}");
        let Some(Event::Step { aux, .. }) =
            events.iter().find(|e| matches!(e, Event::Step { step: 1, .. }))
        else {
            panic!("{events:?}")
        };
        assert!(aux.keys().any(|k| k.starts_with("weight.")), "{strategy}: {aux:?}");
    }
}

#[test]
fn stopped_runs_come_to_the_same_bytes() {
    modl_core::set_threads(1);
    for (n, strategy) in ALL.into_iter().enumerate() {
        // Each second one also with tasks that are drawn and two passes.
        let more = ["", "sampling = { temperature = 4.0 }\npasses = { count = 2 }"][n % 2];
        let steps = USUAL.replace("60", "20");
        let recipe = recipe(strategy, &format!("{steps}\n{more}")).unwrap();
        let whole = tempfile::tempdir().unwrap();
        learn(&recipe, whole.path(), &mut ()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        assert!(learn(&recipe, dir.path(), &mut StopAfter(2)).is_err());
        learn(&recipe, dir.path(), &mut ()).unwrap();
        for file in ["params.safetensors", "state-20.safetensors"] {
            let read = |dir: &Path| std::fs::read(dir.join("phases/1-learn").join(file));
            let (a, b) = (read(whole.path()).unwrap(), read(dir.path()).unwrap());
            assert!(a == b, "{strategy} {more}: {file}");
        }
        let mut again = Modular::new(backbone(), Seed(3)).unwrap();
        restore(&recipe, &methods(), &mut again, &head(), dir.path()).unwrap();
    }
}

/// One step of SGD over all rows, without dropout.
const ONE: &str = "steps = 1\nlr = 0.1\nclip = 1e9\noptimizer = { type = \"sgd\" }";

/// Without the third task.
const TWO: &str = r#"tasks = ["plus", "minus"]"#;

fn undropped(strategy: &str, more: &str) -> Recipe {
    let size = if more.contains("batch_size") { "" } else { "batch_size = 48\n" };
    let mut recipe = recipe(strategy, &format!("{size}{ONE}\n{more}")).unwrap();
    for name in ["all", "plus", "minus", "low"] {
        recipe.set(&format!("modules.{name}.dropout=0.0"), &methods()).unwrap();
    }
    recipe
}

/// Asserts that one step of `strategy` goes along Σ cᵢ gᵢ for shared parameters and Σ gᵢ pᵢ for
/// others, where these factors are made of the tasks' gradients by name.
fn assert_step(
    strategy: &str,
    more: &str,
    factors: impl Fn(&BTreeMap<String, Vec<f64>>) -> [BTreeMap<String, f64>; 2],
) {
    let recipe = undropped(strategy, more);
    let (before, mut data) = (fresh(&recipe), data());
    if more.contains(TWO) {
        data = data.filter(|e| e.task != "low").unwrap();
    }
    before.train_only(&modl_core::Select::all()).unwrap();
    let params: Vec<(String, Tensor)> =
        before.trainable().into_iter().filter(|(n, _)| !n.starts_with("base.")).collect();
    let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
    let rows: Vec<usize> = (0..data.len()).collect();
    let grads: BTreeMap<String, Vec<Option<Vec<f64>>>> = losses(&before, &data, &rows)
        .into_iter()
        .map(|(task, loss)| {
            let own = loss.gradients(&leaves, false).unwrap().into_iter();
            (task, own.map(|g| g.map(|g| g.to_vec::<f64>().unwrap())).collect())
        })
        .collect();
    let uses = |k: usize| grads.values().filter(|g| g[k].is_some()).count();
    let shared: Vec<usize> = (0..params.len()).filter(|k| uses(*k) > 1).collect();
    assert!(!shared.is_empty() && shared.len() < params.len());
    let flat = |own: &Vec<Option<Vec<f64>>>| {
        shared.iter().flat_map(|k| own[*k].clone().unwrap()).collect::<Vec<f64>>()
    };
    let vectors = grads.iter().map(|(task, own)| (task.clone(), flat(own))).collect();
    let [of_shared, of_private] = factors(&vectors);

    let dir = tempfile::tempdir().unwrap();
    let after = learn(&recipe, dir.path(), &mut ()).unwrap();
    for (k, (name, old)) in params.iter().enumerate() {
        let factors = if shared.contains(&k) { &of_shared } else { &of_private };
        let mut expected = old.to_vec::<f64>().unwrap();
        for (task, own) in &grads {
            for (v, g) in expected.iter_mut().zip(own[k].iter().flatten()) {
                *v -= 0.1 * factors[task] * g;
            }
        }
        let found = after.params().get(name).unwrap().to_vec::<f64>().unwrap();
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-6, "{strategy} {more}, {name}: {a}, wanted {b}");
        }
    }
}

fn gram(vectors: &BTreeMap<String, Vec<f64>>) -> Gram {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let rows: Vec<Vec<f64>> =
        vectors.values().map(|a| vectors.values().map(|b| dot(a, b)).collect()).collect();
    Gram::new(&rows).unwrap()
}

fn equal(c: f64) -> BTreeMap<String, f64> {
    ["low", "minus", "plus"].map(|t| (t.to_owned(), c)).into()
}

fn of(low: f64, minus: f64, plus: f64) -> BTreeMap<String, f64> {
    [("low", low), ("minus", minus), ("plus", plus)].map(|(t, c)| (t.to_owned(), c)).into()
}

#[test]
fn weights_of_losses_are_those_of_the_step_in_one_pass_or_in_parts() {
    let strategy = r#"{ type = "scalarised", weights = { plus = 2.0, low = 0.0 } }"#;
    for more in
        ["", "split_by_length = true", "batch_size = 12\naccumulate = 4", "passes = { count = 2 }"]
    {
        assert_step(strategy, more, |_| {
            let weights = of(0.0, 1.0 / 3.0, 2.0 / 3.0);
            [weights.clone(), weights]
        });
    }
    // s = 0 at first: ½ e⁰; no epoch is known: 1.
    assert_step(r#""uncertainty""#, "", |_| [equal(0.5 / 3.0), equal(0.5 / 3.0)]);
    assert_step(r#"{ type = "uncertainty", form = "classification" }"#, "", |_| {
        [equal(1.0 / 3.0), equal(1.0 / 3.0)]
    });
    assert_step(r#""dwa""#, "", |_| [equal(1.0 / 3.0), equal(1.0 / 3.0)]);
    assert_step(r#""gradnorm""#, "", |_| [equal(1.0 / 3.0), equal(1.0 / 3.0)]);
    assert_step(r#"{ type = "cagrad", c = 0.0 }"#, "", |_| [equal(1.0 / 3.0), equal(1.0 / 3.0)]);
}

#[test]
fn directions_are_made_of_shared_gradients_and_private_ones_are_plain() {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let third = 1.0 / 3.0;
    // gᵢ·d ≥ ‖d‖² for all i is what the shortest vector alone has.
    assert_step(r#""mgda""#, "", |g| {
        let w = modl_train::joint::mgda(&gram(g));
        let d: Vec<f64> =
            (0..g["low"].len()).map(|k| g.values().zip(&w).map(|(g, w)| w * g[k]).sum()).collect();
        assert!(g.values().all(|g| dot(g, &d) > dot(&d, &d) * (1.0 - 1e-6)));
        [of(w[0], w[1], w[2]), equal(third)]
    });
    // G α = 1 ⁄ α, and the length of the direction.
    assert_step(r#""nash_mtl""#, "", |g| {
        let all = gram(g);
        let alpha = modl_train::joint::nash_bargain(&all).unwrap();
        assert!(all.times(&alpha).iter().zip(&alpha).all(|(g, a)| (g * a - 1.0).abs() < 1e-6));
        let norm = g.values().flat_map(|a| g.values().map(move |b| dot(a, b).powi(2))).sum::<f64>();
        let c = norm.sqrt().sqrt() / 3.0;
        [of(c * alpha[0], c * alpha[1], c * alpha[2]), equal(third)]
    });
    let accumulated = format!("batch_size = 10\naccumulate = 4\n{TWO}");
    // Two that conflict, by the paper's formula, in one pass each and in several.
    for more in [TWO, &accumulated] {
        assert_step(r#""pcgrad""#, more, |g| {
            let (minus, plus) = (&g["minus"], &g["plus"]);
            let product = dot(minus, plus);
            assert!(product < 0.0);
            let (a, b) = (1.0 - product / dot(minus, minus), 1.0 - product / dot(plus, plus));
            [of(0.0, 0.5 * a, 0.5 * b), equal(0.5)]
        });
    }
}

#[test]
fn what_contradicts_is_in_the_log_and_what_cannot_be_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let mut events: Vec<Event> = Vec::new();
    learn(&undropped(r#""pcgrad""#, ""), dir.path(), &mut events).unwrap();
    let Some(Event::Step { aux, .. }) = events.iter().find(|e| matches!(e, Event::Step { .. }))
    else {
        panic!("{events:?}")
    };
    let cosine = |a: &str, b: &str| aux[&format!("conflict.cosine.{a}.{b}")];
    let all = [cosine("low", "minus"), cosine("low", "plus"), cosine("minus", "plus")];
    assert!(all[2] < -0.5 && all.iter().all(|c| (-1.0..=1.0).contains(c)), "{aux:?}");
    assert!((aux["conflict.mean_cosine"] - all.iter().sum::<f64>() / 3.0).abs() < 1e-12);
    let share = all.iter().filter(|c| **c < 0.0).count() as f64 / 3.0;
    assert_eq!(aux["conflict.share"], share);

    let said = |strategy: &str, more: &str| {
        let dir = tempfile::tempdir().unwrap();
        let ran = recipe(strategy, &format!("{USUAL}\n{more}"));
        ran.and_then(|r| learn(&r, dir.path(), &mut ())).unwrap_err().to_string()
    };
    for (strategy, more, part) in [
        (r#"{ type = "cagrad", c = 1.0 }"#, "", "wants 0 or more and less than 1"),
        (r#"{ type = "cagrad", d = 1.0 }"#, "", "unknown key `d`"),
        (r#"{ type = "scalarised", weights = { plu = 1.0 } }"#, "", "did you mean `plus`"),
        (r#"{ type = "scalarised", weights = { plus = -1.0 } }"#, "", "weights.plus"),
        (r#"{ type = "gradnorm", alpha = -1.0 }"#, "", "alpha"),
        (r#"{ type = "uncertainty", limit = 0.0 }"#, "", "limit"),
        (r#"{ type = "dwa", temperature = 0.0 }"#, "", "temperature"),
        (r#""pcgrad""#, r#"tasks = ["plus"]"#, "use `joint`"),
        (r#""joint""#, "sampling = { temperature = 0.5 }", "wants 1 or more"),
        (r#""joint""#, "sampling = \"uniforn\"", "uniform"),
    ] {
        let e = said(strategy, more);
        assert!(e.contains(part), "{strategy} {more}: {e}");
    }
}

#[test]
fn uncertainty_learns_the_logarithm_of_a_loss_that_stays() {
    // lr 0 holds the model where it is, and with it each task's loss over all rows.
    let strategy = r#"{ type = "uncertainty", lr = 0.05 }"#;
    let mut recipe = undropped(strategy, "");
    for set in ["phases.0.lr=0.0", "phases.0.steps=600"] {
        recipe.set(set, &methods()).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let mut events: Vec<Event> = Vec::new();
    let model = learn(&recipe, dir.path(), &mut events).unwrap();
    let data = data();
    let rows: Vec<usize> = (0..data.len()).collect();
    let last = events.iter().rev().find_map(|e| match e {
        Event::Step { aux, .. } => Some(aux.clone()),
        _ => None,
    });
    for (task, loss) in losses(&model, &data, &rows) {
        // ½ e^−s at s = ln L.
        let (weight, loss) =
            (last.as_ref().unwrap()[&format!("weight.{task}")], loss.item().unwrap());
        let expected = 0.5 / loss.max((-5f64).exp());
        assert!((weight / expected - 1.0).abs() < 0.02, "{task}: {weight}, wanted {expected}");
    }
}

/// Every multitask strategy stands on its page, and every line of the page is one.
#[test]
fn the_page_has_all_methods_and_what_it_says_is_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = std::fs::read_to_string(root.join("docs/multitask.md")).unwrap();
    let path = root.join("examples/recipes/multitask.toml");
    let example = std::fs::read_to_string(&path).unwrap();
    let mut found = std::collections::BTreeSet::new();
    for line in
        page.lines().filter(|l| l.starts_with("strategy = ") || l.starts_with("sampling = "))
    {
        let text = match line.starts_with("strategy") {
            true => example.replace("strategy = \"pcgrad\"", line),
            false => format!("{example}\n{line}"),
        };
        let recipe = Recipe::parse(&text, &path, &methods());
        let recipe = recipe.unwrap_or_else(|e| panic!("{line}: {e}"));
        found.insert(recipe.phases[0].strategy["type"].as_str().unwrap().to_owned());
    }
    for entry in methods().strategies.entries().iter().filter(|e| e.section == "6.1") {
        assert!(found.contains(entry.name) && page.contains(&format!("| `{}` |", entry.name)));
    }
}

#[test]
fn a_batch_may_have_one_task_only() {
    for strategy in ALL {
        let dir = tempfile::tempdir().unwrap();
        let more = "steps = 3\nbatch_size = 1\nlr = 0.01";
        learn(&recipe(strategy, more).unwrap(), dir.path(), &mut ()).unwrap();
    }
}
