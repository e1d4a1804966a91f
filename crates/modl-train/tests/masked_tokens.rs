//! Masked language modelling: what is shown against the published shares, and what it costs against
//! loops in f64.
#![allow(clippy::unwrap_used, clippy::panic)]

use modl_aggregate::{Stack, WeightedSum};
use modl_compute::{Bottleneck, Invertible, InvertibleBlock};
use modl_core::testing::TinyBackbone;
use modl_core::{Context, Device, Init, Kind, Modular, Seed, Targets, Tensor, no_grad};
use modl_route::{Fixed, Soft};
use modl_train::{Batch, Dataset, Example, MaskedTokens, Objective, evaluate};

const WORDS: usize = 16;
const DIM: usize = 8;
/// The special tokens: begin, end, mask.
const SPECIAL: [i64; 3] = [0, 1, 2];

fn objective() -> MaskedTokens {
    MaskedTokens { head: "tokens".into(), rate: 0.15, mask: 2, special: SPECIAL.to_vec() }
}

fn text(row: usize, len: usize) -> Vec<i64> {
    let own = (0..len).map(|k| 3 + ((row * 5 + k * k * 3 + k) % 13) as i64);
    [0].into_iter().chain(own).chain([1]).collect()
}

fn data() -> Dataset {
    let example = |i: usize| Example {
        id: i.to_string(),
        task: "t".into(),
        ids: text(i, [9, 1, 14, 0, 20][i]).into(),
        target: 0.0,
    };
    Dataset::new((0..5).map(example).collect()).unwrap()
}

fn batch() -> Batch {
    data().batch(&[0, 1, 2, 3, 4], Device::Cpu).unwrap()
}

/// A model in f64 whose head is drawn, so that nothing is 0 or 1 by chance.
fn model(build: impl FnOnce(&mut Modular)) -> Modular {
    let mut model =
        Modular::new(TinyBackbone::new(Seed(3), Kind::Double).unwrap(), Seed(4)).unwrap();
    build(&mut model);
    objective().setup(&mut model).unwrap();
    for (name, p) in model.params().iter().filter(|(n, _)| !n.contains("dense.weight")) {
        let t = Init::Normal(0.5).tensor(
            &p.tensor().size(),
            Seed(9).child(name),
            Kind::Double,
            Device::Cpu,
        );
        no_grad(|| p.tensor().clone().copy_from(&t.unwrap())).unwrap();
    }
    model
}

#[test]
fn chosen_and_shown_in_the_published_shares() {
    let (objective, rows, len) = (objective(), 4000, 40);
    let (mut masks, mut others, mut kept) = (0.0, 0.0, 0.0);
    let (mut places, mut drawn) = (vec![0.0; len + 2], [0.0; WORDS]);
    for row in 0..rows {
        let ids = text(row, len);
        let shown = objective.show(&ids, WORDS as i64, Seed(7).nth(row as u64));
        assert_eq!(shown.chosen.len(), 6, "15 % of 40");
        assert!(shown.chosen.is_sorted());
        for (place, (old, new)) in ids.iter().zip(&shown.ids).enumerate() {
            if !shown.chosen.contains(&place) {
                assert_eq!(old, new);
                continue;
            }
            assert!(!SPECIAL.contains(old));
            places[place] += 1.0;
            match *new {
                2 => masks += 1.0,
                n if n == *old => kept += 1.0,
                n => {
                    others += 1.0;
                    drawn[n as usize] += 1.0;
                }
            }
        }
    }
    // Of the tokens drawn at random 1⁄16 are the right one and look kept, 1⁄16 are the mask.
    let n = 6.0 * rows as f64;
    let near = |found: f64, p: f64| {
        let sigma = (n * p * (1.0 - p)).sqrt();
        assert!((found - n * p).abs() < 4.0 * sigma, "{found} of {n}, expected {p}");
    };
    near(masks, 0.8 + 0.1 / 16.0);
    near(others, 0.1 * 14.0 / 16.0);
    near(kept, 0.1 + 0.1 / 16.0);
    // χ² with 39 degrees of freedom is below 72.1 in 999 of 1000 cases: all places alike.
    let expected = n / len as f64;
    let chi: f64 = places[1..=len].iter().map(|o| (o - expected).powi(2) / expected).sum();
    assert!(chi < 72.1, "{chi}");
    assert_eq!((places[0], places[len + 1]), (0.0, 0.0));
    assert!(drawn.iter().enumerate().all(|(w, n)| w == 2 || *n > 0.0), "{drawn:?}");
}

#[test]
fn at_least_one_token_is_chosen_and_the_same_seed_chooses_the_same() {
    let objective = objective();
    for (len, wanted) in [(0, 0), (1, 1), (4, 1), (10, 2), (13, 2), (20, 3)] {
        let chosen = objective.show(&text(1, len), WORDS as i64, Seed(1)).chosen;
        assert_eq!(chosen.len(), wanted, "of {len}");
    }
    let show = |seed| objective.show(&text(2, 40), WORDS as i64, Seed(seed));
    assert_eq!(show(5), show(5));
    assert_ne!(show(5).chosen, show(6).chosen);
    let all = MaskedTokens { rate: 1.0, ..objective.clone() };
    assert_eq!(all.show(&text(2, 40), WORDS as i64, Seed(5)).chosen, (1..=40).collect::<Vec<_>>());
}

fn param(model: &Modular, name: &str) -> Vec<f64> {
    model.params().get(name).unwrap().to_vec::<f64>().unwrap()
}

/// W x + b.
fn linear(w: &[f64], b: &[f64], x: &[f64]) -> Vec<f64> {
    let row = |(w, b): (&[f64], &f64)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + b;
    w.chunks(x.len()).zip(b).map(row).collect()
}

/// erf by its series, which converges for all arguments here.
fn erf(x: f64) -> f64 {
    let (mut sum, mut term) = (x, x);
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// E undo(LN(gelu(W h + c))) + b, by hand.
fn logits(model: &Modular, h: &[f64], undo: &dyn Fn(Vec<f64>) -> Vec<f64>) -> Vec<f64> {
    let own = |name: &str| param(model, &format!("heads.tokens.{name}"));
    let dense = linear(&own("transform.dense.weight"), &own("transform.dense.bias"), h);
    let gelu: Vec<f64> = dense.iter().map(|x| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()))).collect();
    let mean = gelu.iter().sum::<f64>() / DIM as f64;
    let variance = gelu.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / DIM as f64;
    let (gain, shift) = (own("transform.LayerNorm.weight"), own("transform.LayerNorm.bias"));
    let normed = gelu.iter().zip(gain.iter().zip(&shift));
    let normed = normed.map(|(x, (g, s))| (x - mean) / (variance + 1e-12).sqrt() * g + s).collect();
    let words = model.backbone().params().get("embeddings.words.weight").unwrap();
    linear(&words.to_vec::<f64>().unwrap(), &own("bias"), &undo(normed))
}

/// The loss, its tokens and their accuracy for each row, by hand.
fn by_hand(
    model: &Modular,
    cx: &Context,
    seed: Seed,
    undo: &dyn Fn(usize, Vec<f64>) -> Vec<f64>,
) -> Vec<[f64; 3]> {
    let (objective, batch) = (objective(), batch());
    let rows: Vec<Vec<i64>> = data().examples().iter().map(|e| e.ids.to_vec().unwrap()).collect();
    let longest = rows.iter().map(Vec::len).max().unwrap();
    let shown: Vec<_> = (0..5)
        .map(|i| objective.show(&rows[i], WORDS as i64, seed.child(&format!("t/{i}"))))
        .collect();
    let padded: Vec<i64> =
        shown.iter().flat_map(|s| s.ids.iter().copied().chain([0; 30]).take(longest)).collect();
    let mut inputs = batch.inputs.clone();
    inputs
        .set("input_ids", Tensor::from_slice(&padded, &[5, longest as i64], Device::Cpu).unwrap());
    let states = model.forward(&inputs, cx).unwrap();
    let states = states.need("last_hidden_state").unwrap().to_vec::<f64>().unwrap();
    let of = |(row, shown): (usize, &modl_train::Shown)| {
        let (mut loss, mut hits) = (0.0, 0.0);
        for place in &shown.chosen {
            let at = (row * longest + place) * DIM;
            let all = logits(model, &states[at..at + DIM], &|x| undo(row, x));
            let right = rows[row][*place] as usize;
            loss += all.iter().map(|l| l.exp()).sum::<f64>().ln() - all[right];
            hits += f64::from(u8::from(all.iter().all(|l| *l <= all[right])));
        }
        let n = shown.chosen.len() as f64;
        [loss / n.max(1.0), n, hits / n.max(1.0)]
    };
    shown.iter().enumerate().map(of).collect()
}

fn assert_as_by_hand(
    model: &Modular,
    cx: &Context,
    seed: Seed,
    undo: &dyn Fn(usize, Vec<f64>) -> Vec<f64>,
) {
    let (objective, batch) = (objective(), batch());
    let predicted = objective.predict(model, &batch, cx).unwrap();
    let said = objective.said(&predicted, &batch).unwrap();
    let losses = objective.losses(&predicted, &batch).unwrap().to_vec::<f64>().unwrap();
    for ((said, loss), [right, tokens, hits]) in
        said.iter().zip(losses).zip(by_hand(model, cx, seed, undo))
    {
        assert!(
            (said.prediction - right).abs() < 1e-9 && (loss - right).abs() < 1e-9,
            "{loss} {right}"
        );
        assert_eq!((said.weight, said.target), (tokens, hits));
    }
}

#[test]
fn the_cost_is_as_by_hand_in_training_and_in_evaluation() {
    let model = model(|_| ());
    let batch = batch();
    let cx = batch.describe(Context::eval()).unwrap();
    assert_as_by_hand(&model, &cx, Seed(0).child("masked_tokens"), &|_, x| x);
    let cx = batch.describe(Context::train(Seed(8), 3)).unwrap();
    assert_as_by_hand(&model, &cx, cx.draw("masked_tokens"), &|_, x| x);
    // Another step masks other tokens.
    let at = |step| {
        let cx = batch.describe(Context::train(Seed(8), step)).unwrap();
        objective().predict(&model, &batch, &cx).unwrap().to_vec::<f64>().unwrap()
    };
    assert_eq!(at(3), at(3));
    assert_ne!(at(3), at(4));
}

#[test]
fn gradients_are_those_of_the_cost() {
    let model = model(|_| ());
    let batch = batch();
    let cx = batch.describe(Context::eval()).unwrap();
    for name in ["heads.tokens.transform.dense.weight", "heads.tokens.bias"] {
        let t = model.params().get(name).unwrap().clone();
        t.set_requires_grad(true).unwrap();
        let loss = || objective().loss(&model, &batch, &cx).unwrap();
        let found = loss().gradients(&[&t], false).unwrap()[0].clone().unwrap();
        let found = found.to_vec::<f64>().unwrap();
        let start = t.detach().unwrap().to_vec::<f64>().unwrap();
        for i in [0, 3, 7] {
            let moved = |by: f64| {
                let mut values = start.clone();
                values[i] += by;
                let values = Tensor::from_slice(&values, &t.size(), Device::Cpu).unwrap();
                no_grad(|| t.clone().copy_from(&values)).unwrap();
                loss().item().unwrap()
            };
            let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            moved(0.0);
            assert!((found[i] - numeric).abs() < 1e-7, "{name}: {} {numeric}", found[i]);
        }
    }
}

/// NICE undone by hand: x₂ = y₂ − G(y₁), x₁ = y₁ − F(x₂).
fn undone(model: &Modular, module: &str, y: Vec<f64>) -> Vec<f64> {
    let network = |name: &str, x: &[f64]| {
        let own = |part: &str| param(model, &format!("modules.{module}.embeddings.{name}.{part}"));
        let inner = linear(&own("0.weight"), &own("0.bias"), x);
        let inner: Vec<f64> = inner.into_iter().map(|x| x.max(0.0)).collect();
        linear(&own("2.weight"), &own("2.bias"), &inner)
    };
    let (y1, y2) = y.split_at(DIM / 2);
    let minus = |a: &[f64], b: Vec<f64>| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<f64>>();
    let x2 = minus(y2, network("G", y1));
    let x1 = minus(y1, network("F", &x2));
    [x1, x2].concat()
}

#[test]
fn an_invertible_adapter_is_undone_before_the_output_embedding() {
    let nice = || Box::new(Invertible { block: InvertibleBlock::Nice, ..Invertible::default() });
    let mut model = model(|model| {
        for name in ["en", "de"] {
            model.attach(name, nice(), &Targets::names(["embeddings"])).unwrap();
        }
        let task = Box::new(Bottleneck::houlsby());
        model.attach("task", task, &Targets::names(["output"])).unwrap();
        model.aggregate(Box::new(Stack::default())).unwrap();
        let both = Fixed { skip_absent: true, ..Fixed::modules(["en", "task"]) };
        model.route(Box::new(both), false).unwrap();
    });
    let cx = batch().describe(Context::eval()).unwrap();
    let seed = Seed(0).child("masked_tokens");
    assert_as_by_hand(&model, &cx, seed, &|_, x| undone(&model, "en", x));

    // Each row its own, one of them none.
    let table = [("a", vec!["en"]), ("b", vec!["de"]), ("c", vec![])];
    let table = table.map(|(task, names)| {
        let names = names.into_iter().map(str::to_owned).collect();
        (task.to_owned(), modl_route::Choice::Equal(names))
    });
    let by_task = Fixed { table: Some(table.into()), skip_absent: true, ..Fixed::default() };
    model.route(Box::new(by_task), false).unwrap();
    let cx = cx.with_tasks(["a", "b", "c", "b", "a"]);
    assert_as_by_hand(&model, &cx, seed, &|row, x| match row {
        0 | 4 => undone(&model, "en", x),
        1 | 3 => undone(&model, "de", x),
        _ => x,
    });

    // A mixture of functions has no inverse that is known.
    model.aggregate(Box::new(WeightedSum::default())).unwrap();
    model.route(Box::new(Soft::default()), false).unwrap();
    let e = objective().predict(&model, &batch(), &cx).unwrap_err().to_string();
    assert!(e.contains("inverse") && e.contains("fixed"), "{e}");
}

#[test]
fn a_text_is_always_measured_with_the_same_masks() {
    let (model, objective) = (model(|_| ()), objective());
    let said = |size| evaluate(&model, &objective, &data(), size, &Batch::describe).unwrap();
    let (one, all) = (said(1), said(5));
    for (a, b) in one.iter().zip(&all) {
        assert!((a.prediction - b.prediction).abs() < 1e-12 && a.weight == b.weight, "{a:?} {b:?}");
    }
    let found = objective.scores(&all.iter().collect::<Vec<_>>());
    let tokens: f64 = all.iter().map(|p| p.weight).sum();
    let loss = all.iter().map(|p| p.weight * p.prediction).sum::<f64>() / tokens;
    assert!(
        (found["loss"] - loss).abs() < 1e-12 && (found["perplexity"].ln() - loss).abs() < 1e-12
    );
    assert_eq!(tokens, 1.0 + 1.0 + 2.0 + 0.0 + 3.0);
    assert!(objective.scores(&[]).is_empty());
}
