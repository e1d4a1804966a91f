//! Classification and next-token prediction: losses against loops in f64, and whole recipes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_core::{Device, Error, Kind, Modular, Result, Seed, Tensor, Tensors, no_grad};
use modl_models::{LoadOptions, open};
use modl_train::{
    Batch, Classification, Dataset, Event, Example, NextToken, Objective, Recipe, Sink, evaluate,
    restore, run,
};
use toy::methods;

/// ln Σ exp, by hand.
fn log_sum(l: &[f64]) -> f64 {
    l.iter().map(|v| v.exp()).sum::<f64>().ln()
}

fn double(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values, shape, Device::Cpu).unwrap()
}

fn wave(n: usize) -> Vec<f64> {
    (0..n).map(|i| ((i * i * 7 + 3 * i) as f64 * 0.37).sin() * 2.0).collect()
}

/// Sentences of 5, 3 and 1 tokens over a vocabulary of 4, of which `targets` tokens are prompts.
fn batch(targets: [f32; 3]) -> Batch {
    let example = |(i, target): (usize, f32)| Example {
        id: i.to_string(),
        task: "t".into(),
        ids: [vec![1, 3, 0, 2, 2], vec![2, 1, 3], vec![3]][i].clone().into(),
        target,
    };
    let data = Dataset::new(targets.into_iter().enumerate().map(example).collect()).unwrap();
    data.batch(&[0, 1, 2], Device::Cpu).unwrap()
}

fn of_classes(label_smoothing: f64) -> Classification {
    let classes = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
    Classification {
        head: "class".into(),
        dim: 8,
        classes,
        label_smoothing,
        ..Classification::default()
    }
}

fn assert_close(found: &[f64], right: &[f64], within: f64) {
    assert_eq!(found.len(), right.len());
    for (a, b) in found.iter().zip(right) {
        assert!((a - b).abs() < within, "{found:?} {right:?}");
    }
}

/// The gradient of the sum of losses, against central differences.
fn assert_gradient(objective: &dyn Objective, at: &[f64], shape: &[i64], batch: &Batch) {
    let sum = |at: &[f64]| -> f64 {
        let losses = objective.losses(&double(at, shape), batch).unwrap();
        losses.sum().unwrap().item().unwrap()
    };
    let x = double(at, shape);
    x.set_requires_grad(true).unwrap();
    let total = objective.losses(&x, batch).unwrap().sum().unwrap();
    let found = total.gradients(&[&x], false).unwrap()[0].clone().unwrap();
    let numeric: Vec<f64> = (0..at.len())
        .map(|i| {
            let moved = |by: f64| {
                let mut at = at.to_vec();
                at[i] += by;
                sum(&at)
            };
            (moved(1e-5) - moved(-1e-5)) / 2e-5
        })
        .collect();
    assert!(numeric.iter().any(|g| g.abs() > 0.01));
    assert_close(&found.to_vec::<f64>().unwrap(), &numeric, 1e-8);
}

#[test]
fn cross_entropy_is_as_by_hand_with_and_without_smoothing() {
    let (logits, batch) = (wave(12), batch([2.0, 0.0, 3.0]));
    for epsilon in [0.0, 0.1, 0.6] {
        let objective = of_classes(epsilon);
        let right: Vec<f64> = logits
            .chunks(4)
            .zip([2, 0, 3])
            .map(|(l, y)| {
                let q = |k| epsilon / 4.0 + if k == y { 1.0 - epsilon } else { 0.0 };
                (0..4).map(|k| -q(k) * (l[k] - log_sum(l))).sum()
            })
            .collect();
        let found = objective.losses(&double(&logits, &[3, 4]), &batch).unwrap();
        assert_close(&found.to_vec::<f64>().unwrap(), &right, 1e-12);
        assert_gradient(&objective, &logits, &[3, 4], &batch);
    }
    // p = (¾, ¼) and q = (½, ½): ½ (¼ ln 3⁄2 − ¼ ln ½) = ⅛ ln 3.
    let (p, q) = (double(&[3f64.ln(), 0.0], &[1, 2]), double(&[1.0, 1.0], &[1, 2]));
    let apart = of_classes(0.0).divergence(&p, &q, &batch).unwrap().to_vec::<f64>().unwrap();
    assert_close(&apart, &[3f64.ln() / 8.0], 1e-12);
}

#[test]
fn the_next_token_costs_as_by_hand_without_padding_and_prompt() {
    let logits = wave(60); // [3, 5, 4]
    for prompts in [[0.0, 0.0, 0.0], [3.0, 2.0, 0.0]] {
        let batch = batch(prompts);
        let ids = [vec![1, 3, 0, 2, 2], vec![2, 1, 3], vec![3]];
        let cost = |b: usize, t: usize| {
            let l = &logits[20 * b + 4 * (t - 1)..20 * b + 4 * t];
            log_sum(l) - l[ids[b][t] as usize]
        };
        let first = |b: usize| (prompts[b] as usize).max(1);
        let mean = |b: usize| {
            let all: Vec<f64> = (first(b)..ids[b].len()).map(|t| cost(b, t)).collect();
            all.iter().sum::<f64>() / all.len().max(1) as f64
        };
        let x = double(&logits, &[3, 5, 4]);
        let found = NextToken.losses(&x, &batch).unwrap().to_vec::<f64>().unwrap();
        assert_close(&found, &[mean(0), mean(1), 0.0], 1e-12);
        assert_gradient(&NextToken, &logits, &[3, 5, 4], &batch);
        let counted: Vec<f64> =
            NextToken.said(&x, &batch).unwrap().iter().map(|s| s.weight).collect();
        assert_eq!(counted, [5.0 - first(0) as f64, 3.0 - first(1) as f64, 0.0]);
    }
}

fn llama(kind: Kind) -> Modular {
    let folder = "../modl-models/tests/fixtures/deterministic_llama";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let options = LoadOptions { kind: Some(kind), ..LoadOptions::default() };
    Modular::from_box(open(folder, &options).unwrap(), Seed(1)).unwrap()
}

fn sentences() -> Dataset {
    let example = |i: i64| Example {
        id: i.to_string(),
        task: "t".into(),
        ids: (0..2 + 3 * i).map(|k| (7 * i + 5 * k * k + k) % 64).collect(),
        target: i as f32,
    };
    Dataset::new((0..4).map(example).collect()).unwrap()
}

#[test]
fn a_uniform_model_has_the_perplexity_of_its_vocabulary_and_padding_changes_nothing() {
    let (model, data) = (llama(Kind::Double), sentences());
    let scores = |size: usize| {
        let said = evaluate(&model, &NextToken, &data, size, &Batch::describe).unwrap();
        (NextToken.scores(&said.iter().collect::<Vec<_>>()), said)
    };
    let ((padded, a), (alone, b)) = (scores(4), scores(1));
    for (a, b) in a.iter().zip(&b) {
        assert!((a.prediction - b.prediction).abs() < 1e-10 && a.weight == b.weight, "{a:?} {b:?}");
    }
    assert!((padded["loss"] - alone["loss"]).abs() < 1e-10);
    // Over all tokens, not over rows: 1, 4, 6 and 8 tokens.
    let tokens: Vec<f64> = a.iter().map(|p| p.weight).collect();
    assert_eq!(tokens, [1.0, 4.0, 6.0, 8.0]);
    let sum: f64 = a.iter().map(|p| p.weight * p.prediction).sum();
    assert!((padded["loss"] - sum / 19.0).abs() < 1e-12);

    let mut head = model.backbone().params().get("lm_head.weight").unwrap().clone();
    no_grad(|| head.zero_in_place()).unwrap();
    let (uniform, _) = scores(4);
    assert!((uniform["perplexity"] - 64.0).abs() < 1e-6, "{uniform:?}");
}

#[test]
fn classes_are_measured_by_accuracy_and_macro_f1() {
    let logits = double(&[0., 2., 1., 0., 9., 0., 0., 0., 0., 0., 5., 0.], &[3, 4]);
    let objective = of_classes(0.0);
    let said = objective.said(&logits, &batch([1.0, 1.0, 2.0])).unwrap();
    let said: Vec<modl_train::Prediction> = said
        .iter()
        .map(|s| modl_train::Prediction {
            id: "x".into(),
            task: "t".into(),
            target: s.target,
            prediction: s.prediction,
            weight: s.weight,
        })
        .collect();
    // Said 1, 0, 2 for 1, 1, 2: F1 is 0 of class 0, 2⁄3 of class 1, 1 of class 2.
    let found = objective.scores(&said.iter().collect::<Vec<_>>());
    assert!((found["accuracy"] - 2.0 / 3.0).abs() < 1e-12);
    assert!((found["macro_f1"] - 5.0 / 9.0).abs() < 1e-12);
    assert!(objective.scores(&[]).is_empty() && NextToken.scores(&[]).is_empty());
}

const RECIPE: &str = r#"
[backbone]
path = "toy"

[data]
tasks = { t = "t.tsv" }

[modules.t]
type = "lora"
targets = ["q_proj", "v_proj", "down_proj"]
r = 4

[router]
type = "soft"

[aggregator]
type = "weighted_sum"

[head]
HEAD

[[phases]]
name = "fit"
strategy = "joint"
steps = 60
lr = 0.02
checkpoint_every = 20
"#;

fn recipe(folder: &Path, head: &str) -> Recipe {
    let text = RECIPE.replace("HEAD", head);
    Recipe::parse(&text, folder.join("recipe.toml"), &methods()).unwrap()
}

/// A token of the small vocabulary for each byte, after one that begins the text.
fn tokenise(text: &str) -> Result<Vec<i64>> {
    Ok([1].into_iter().chain(text.bytes().map(|b| 2 + i64::from(b % 32))).collect())
}

/// Stops when a state has been saved.
struct Stop;

impl Sink for Stop {
    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Saved { .. } => Err(Error::invalid("test", "stop")),
            _ => Ok(()),
        }
    }
}

fn params(model: &Modular) -> Tensors {
    model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().clone())).collect()
}

/// Trains straight, and with a stop in between; what `eval` says before and after.
fn trained(folder: &Path, recipe: &Recipe) -> [std::collections::BTreeMap<String, f64>; 2] {
    let (train, test) = recipe.load_data(&tokenise, 0).unwrap();
    let mut straight = llama(Kind::Float);
    let objective = recipe.objective(&straight).unwrap();
    let go = |model: &mut Modular, name: &str, sink: &mut dyn Sink| {
        run(recipe, &methods(), model, &*objective, &train, folder.join(name), sink)
    };
    go(&mut straight, "straight", &mut ()).unwrap();
    go(&mut llama(Kind::Float), "stopped", &mut Stop).unwrap_err();
    let mut resumed = llama(Kind::Float);
    go(&mut resumed, "stopped", &mut ()).unwrap();
    let (a, b) = (params(&straight), params(&resumed));
    assert_eq!(a.len(), b.len());
    for (name, t) in a.iter() {
        assert!(t.bit_equal(b.need(name).unwrap()).unwrap(), "{name}");
    }
    let mut again = llama(Kind::Float);
    restore(recipe, &methods(), &mut again, &*objective, folder.join("straight")).unwrap();
    let mut fresh = llama(Kind::Float);
    recipe.attach(&mut fresh, &methods()).unwrap();
    objective.setup(&mut fresh).unwrap();
    [fresh, again].map(|model| {
        let said = evaluate(&model, &*objective, &test, 8, &Batch::describe).unwrap();
        objective.scores(&said.iter().collect::<Vec<_>>())
    })
}

fn write(folder: &Path, line: impl Fn(usize) -> String) {
    let text: String = (0..60).map(|i| format!("{i}\t{}\n", line(i))).collect();
    std::fs::write(folder.join("t.tsv"), text).unwrap();
}

#[test]
fn a_recipe_of_classes_learns_them_resumes_and_keeps_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let word = |i: usize| [("pets", "cat dog"), ("food", "jam egg"), ("cars", "bus van")][i % 3];
    write(folder, |i| format!("{}\t{} {i}", word(i).0, word(i).1));
    let own = recipe(folder, "type = \"classification\"\nlabel_smoothing = 0.1");
    assert_eq!(own.classes().unwrap(), ["cars", "food", "pets"]);
    let [before, after] = trained(folder, &own);
    assert!(after["accuracy"] > 0.9 && after["macro_f1"] > 0.9, "{before:?} {after:?}");
    assert!(before["accuracy"] < 0.7, "{before:?}");
    let kept = std::fs::read_to_string(folder.join("straight/classes.json")).unwrap();
    assert_eq!(kept, r#"["cars","food","pets"]"#);

    // Another class in the data moves the indices: the run is not taken over.
    write(folder, |i| format!("{}\t{i}", ["bikes", "cars", "food", "pets"][i % 4]));
    let mut model = llama(Kind::Float);
    let objective = own.objective(&model).unwrap();
    let e = restore(&own, &methods(), &mut model, &*objective, folder.join("straight"));
    let e = e.unwrap_err().to_string();
    assert!(e.contains("classes.json") && e.contains("bikes"), "{e}");

    let few = recipe(folder, "type = \"classification\"\nclasses = [\"pets\", \"foot\", \"cars\"]");
    let e = few.load_data(&tokenise, 0).unwrap_err().to_string();
    assert!(e.contains("t.tsv:1") && e.contains("unknown class `bikes`"), "{e}");
    write(folder, |i| format!("food\t{i}"));
    let e = own.classes().unwrap_err().to_string();
    assert!(e.contains("1 classes") && e.contains("recipe.toml:19"), "{e}");
}

#[test]
fn a_recipe_of_the_next_token_learns_the_text_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let answer = |i: usize| ["one two three", "red green blue"][i % 2];
    write(folder, |i| format!("{}: \t{}", ["count", "paint"][i % 2], answer(i)));
    // The random head of the fixture is trained, too: no hidden state makes it sure of a token.
    let mut own = recipe(folder, "type = \"next_token\"");
    own.set("phases.0.train=[\"modules.*\", \"base.lm_head.weight\"]", &methods()).unwrap();
    let (train, _) = own.load_data(&tokenise, 0).unwrap();
    // The first token and seven bytes of prompt.
    assert!(train.examples().iter().all(|e| e.target == 8.0 && e.ids.len() > 20));
    let [before, after] = trained(folder, &own);
    assert!(after["loss"] < 0.3 * before["loss"], "{before:?} {after:?}");
    assert!((after["perplexity"].ln() - after["loss"]).abs() < 1e-12);
    assert!(!folder.join("straight/classes.json").exists());

    write(folder, |_| "all of it\t".to_owned());
    let e = own.load_data(&tokenise, 0).unwrap_err().to_string();
    assert!(e.contains("example `0` of `t`") && e.contains("no token to predict"), "{e}");
}

#[test]
fn mistakes_in_the_head_are_answered_with_what_was_meant() {
    for (head, words) in [
        ("type = \"clasification\"", "`classification`?"),
        ("type = \"next_tokens\"", "`next_token`?"),
        ("type = \"next_token\"\nname = \"x\"", "unknown key `name` in [head]"),
        ("type = \"classification\"\nlabel_smothing = 0.1", "did you mean `label_smoothing`?"),
        ("type = \"classification\"\nlabel_smoothing = 1.0", "[0, 1)"),
        ("type = \"classification\"\nclasses = [\"a\", \"a\"]", "two or more different names"),
    ] {
        let text = RECIPE.replace("HEAD", head);
        let e = Recipe::parse(&text, "recipe.toml", &methods()).unwrap_err().to_string();
        assert!(e.starts_with("recipe.toml:") && e.contains(words), "{e}");
    }
}
