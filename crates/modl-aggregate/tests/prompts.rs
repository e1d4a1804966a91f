//! Prompts combined: ATTEMPT against its formula, concatenation, and the start that SPoT chooses.
#![allow(clippy::unwrap_used, clippy::panic)]

mod hub;

use hub::Named;
use modl_aggregate::{Attempt, AttemptForm, PromptConcat, nearest_prompts, start_from_prompt};
use modl_compute::{Lora, PTuning, PromptTuning};
use modl_core::testing::{Given, TinyBackbone};
use modl_core::{
    AggregatorConfig, Context, Device, Init, Kind, Modular, Seed, Select, Targets, Tensor, Weights,
    no_grad,
};

const NAMES: [&str; 3] = ["target", "first", "second"];

fn with(lengths: &[i64], config: Box<dyn AggregatorConfig>) -> Modular {
    let mut model =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Double).unwrap(), Seed(2)).unwrap();
    for (name, n) in NAMES.iter().zip(lengths) {
        let prompt = PromptTuning { num_virtual_tokens: *n, ..PromptTuning::default() };
        model.attach(name, Box::new(prompt), &Targets::pattern("all-tokens")).unwrap();
    }
    model.aggregate(config).unwrap();
    model.route(Named::all(&NAMES[..lengths.len()]), false).unwrap();
    model
}

fn logits(model: &Modular) -> Tensor {
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    model.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().detach().unwrap()
}

fn prompt(model: &Modular, name: &str) -> Tensor {
    model.params().get(&format!("modules.{name}.prompt_embeddings")).unwrap().detach().unwrap()
}

fn set_prompt(model: &Modular, name: &str, to: &Tensor) {
    let own = model.params().get(&format!("modules.{name}.prompt_embeddings")).unwrap();
    no_grad(|| own.clone().copy_from(to)).unwrap();
}

/// What one prompt gives.
fn alone(tokens: &Tensor) -> Tensor {
    let mut model = with(&[tokens.len_of(0)], Box::new(PromptConcat {}));
    set_prompt(&model, "target", tokens);
    model.route(Given::only(0), false).unwrap();
    logits(&model)
}

fn attempt(target: bool, form: AttemptForm, temperature: Option<f64>) -> Attempt {
    let target = target.then(|| "target".to_owned());
    Attempt { target, form, temperature, rank: 3 }
}

#[test]
fn prompts_stand_one_behind_the_other_in_the_order_of_the_router() {
    let mut model = with(&[2, 3, 1], Box::new(PromptConcat {}));
    let all: Vec<Tensor> = NAMES.iter().map(|n| prompt(&model, n)).collect();
    let wanted = alone(&Tensor::cat(&all, 0).unwrap());
    assert!(logits(&model).bit_equal(&wanted).unwrap());
    let order = Weights::Fixed(vec![(2, 1.0), (0, 1.0)]);
    model.route(Box::new(Given(order)), false).unwrap();
    let wanted = alone(&Tensor::cat(&[all[2].clone(), all[0].clone()], 0).unwrap());
    assert!(logits(&model).bit_equal(&wanted).unwrap());
    // Rows of their own prompts, the shorter ones padded: what real tokens say is the same.
    let rows = Weights::Rows(vec![vec![(0, 1.0)], vec![(0, 0.5), (1, 0.5)], vec![(2, 1.0)]]);
    model.route(Box::new(Given(rows)), false).unwrap();
    let found = logits(&model);
    let wanted = alone(&Tensor::cat(&all[..2], 0).unwrap());
    assert!(
        found.select(0, 1).unwrap().all_close(&wanted.select(0, 1).unwrap(), 1e-12, 1e-12).unwrap()
    );
    let uneven = Weights::Fixed(vec![(0, 0.3), (1, 0.7)]);
    model.route(Box::new(Given(uneven)), false).unwrap();
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    let e = model.forward(&inputs, &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("weight 0.3"), "{e}");
}

/// Prompts as long as each other go in one pass, whatever each row has chosen.
#[test]
fn rows_with_as_many_prompts_go_together() {
    let mut model = with(&[2, 2, 2], Box::new(PromptConcat {}));
    let all: Vec<Tensor> = NAMES.iter().map(|n| prompt(&model, n)).collect();
    let orders = [[2, 0], [0, 1], [1, 2]];
    let rows = orders.map(|row| row.map(|j| (j, 0.5)).to_vec()).to_vec();
    model.route(Box::new(Given(Weights::Rows(rows))), false).unwrap();
    let found = logits(&model);
    for (row, [a, b]) in orders.into_iter().enumerate() {
        let wanted = alone(&Tensor::cat(&[all[a].clone(), all[b].clone()], 0).unwrap());
        let own = |t: &Tensor| t.select(0, row as i64).unwrap();
        assert!(own(&found).all_close(&own(&wanted), 1e-12, 1e-12).unwrap(), "row {row}");
    }
    // Of three prompts one is chosen by nobody: it has no gradient.
    let rows = vec![vec![(0, 0.5), (2, 0.5)], vec![(2, 0.5), (0, 0.5)], vec![(0, 0.5), (2, 0.5)]];
    model.route(Box::new(Given(Weights::Rows(rows))), false).unwrap();
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    let outputs = model.forward(&inputs, &Context::eval()).unwrap();
    let own = NAMES.map(|n| {
        let name = format!("modules.{n}.prompt_embeddings");
        model.params().get(&name).unwrap().clone()
    });
    let loss = outputs.need("logits").unwrap().square().unwrap().sum().unwrap();
    let gradients = loss.gradients(&own.iter().collect::<Vec<_>>(), false).unwrap();
    let there: Vec<bool> = gradients.iter().map(Option::is_some).collect();
    assert_eq!(there, [true, false, true]);
    let uneven = Weights::Rows(vec![vec![(0, 0.3), (1, 0.7)]; 3]);
    model.route(Box::new(Given(uneven)), false).unwrap();
    let e = model.forward(&inputs, &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("weight 0.3"), "{e}");
}

#[test]
fn a_prompt_of_a_network_is_one_like_others() {
    let mut model = with(&[2], Box::new(PromptConcat {}));
    let encoded = PTuning { num_virtual_tokens: 3, encoder_hidden_size: 4, ..PTuning::default() };
    model.detach("target").unwrap();
    model.attach("encoded", Box::new(encoded), &Targets::pattern("all-tokens")).unwrap();
    model.route(Given::only(0), false).unwrap();
    let one = logits(&model);
    model.aggregate(Box::<modl_aggregate::WeightedSum>::default()).unwrap();
    assert!(logits(&model).bit_equal(&one).unwrap());
    model.attach("lora", Box::<Lora>::default(), &Targets::names(["query"])).unwrap_err();
}

/// The weights of rows by the formula, `[3][k]`.
fn attention(model: &Modular, names: &[&str], temperature: f64) -> Vec<Vec<f64>> {
    let p = |n: &str| {
        model.params().get(&format!("aggregators.embeddings.{n}")).unwrap().detach().unwrap()
    };
    let v = |t: &Tensor| t.to_vec::<f64>().unwrap();
    let (down, up, gain, shift) =
        (v(&p("down.weight")), v(&p("up.weight")), v(&p("norm.weight")), v(&p("norm.bias")));
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    let ids = inputs.need("input_ids").unwrap();
    let mask = inputs.need("attention_mask").unwrap().to_kind(Kind::Double).unwrap();
    let sites = model.backbone().sites();
    let table = model.backbone().theta(&sites[0]).unwrap();
    let x = table.need("weight").unwrap().embedding(ids).unwrap();
    let (x, mask) = (v(&x.detach().unwrap()), v(&mask));
    let top = |rows: &[&[f64]]| -> Vec<f64> {
        (0..8).map(|i| rows.iter().map(|r| r[i]).fold(f64::MIN, f64::max)).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    (0..3)
        .map(|row| {
            let real: Vec<&[f64]> = (0..5)
                .filter(|t| mask[row * 5 + t] > 0.0)
                .map(|t| &x[(row * 5 + t) * 8..][..8])
                .collect();
            let x = top(&real);
            let inner: Vec<f64> =
                down.chunks(8).map(|w| dot(w, &x)).map(|s| s / (1.0 + (-s).exp())).collect();
            let h: Vec<f64> = up.chunks(3).map(|w| dot(w, &inner)).collect();
            let mean = h.iter().sum::<f64>() / 8.0;
            let var = h.iter().map(|h| (h - mean).powi(2)).sum::<f64>() / 8.0;
            let h: Vec<f64> =
                (0..8).map(|i| (h[i] - mean) / (var + 1e-5).sqrt() * gain[i] + shift[i]).collect();
            let e: Vec<f64> = names
                .iter()
                .map(|n| {
                    let own = v(&prompt(model, n));
                    (dot(&top(&own.chunks(8).collect::<Vec<_>>()), &h) / temperature).exp()
                })
                .collect();
            let total: f64 = e.iter().sum();
            e.iter().map(|e| e / total).collect()
        })
        .collect()
}

#[test]
fn attempt_gives_each_row_the_prompt_that_the_formula_says() {
    for (target, form) in
        [(true, AttemptForm::Paper), (true, AttemptForm::Code), (false, AttemptForm::Paper)]
    {
        // As hot as the default, e·8, and hotter than that it is nearly uniform.
        for (given, t) in [(None, std::f64::consts::E * 8.0), (Some(0.7), 0.7)] {
            let model = with(&[2, 2, 2], Box::new(attempt(target, form, given)));
            for (i, (_, t)) in (60..).zip(model.params().select(&Select::new("aggregators.*"))) {
                let drawn = Init::Normal(1.0)
                    .tensor(&t.size(), Seed(i), Kind::Double, Device::Cpu)
                    .unwrap();
                no_grad(|| t.clone().copy_from(&drawn)).unwrap();
            }
            let found = logits(&model);
            for (row, a) in attention(&model, &NAMES, t).iter().enumerate() {
                let mut p = prompt(&model, "target").zeros_like().unwrap();
                for (name, a) in NAMES.iter().zip(a) {
                    p = p.add(&prompt(&model, name).mul_scalar(*a).unwrap()).unwrap();
                }
                if target && form == AttemptForm::Paper {
                    p = p.add(&prompt(&model, "target")).unwrap();
                }
                let wanted = alone(&p).select(0, row as i64).unwrap();
                let own = found.select(0, row as i64).unwrap();
                assert!(own.all_close(&wanted, 1e-9, 1e-9).unwrap(), "{form:?} {t} {row}");
            }
        }
    }
}

#[test]
fn hot_attention_is_uniform_and_without_sources_it_is_prompt_tuning() {
    let hot = with(&[2, 2, 2], Box::new(attempt(true, AttemptForm::Code, Some(1e12))));
    let all: Vec<Tensor> = NAMES.iter().map(|n| prompt(&hot, n)).collect();
    let mean = Tensor::stack(&all, 0).unwrap().mean_dims(&[0], false).unwrap();
    assert!(logits(&hot).all_close(&alone(&mean), 1e-9, 1e-9).unwrap());
    for (form, factor) in [(AttemptForm::Code, 1.0), (AttemptForm::Paper, 2.0)] {
        let mut lonely = with(&[2], Box::new(attempt(true, form, None)));
        lonely.route(Given::only(0), false).unwrap();
        let wanted = alone(&prompt(&lonely, "target").mul_scalar(factor).unwrap());
        assert!(logits(&lonely).all_close(&wanted, 1e-12, 1e-12).unwrap());
    }
}

#[test]
fn attempt_trains_its_attention_and_all_prompts() {
    let model = with(&[2, 2, 2], Box::new(attempt(true, AttemptForm::Paper, Some(1.0))));
    model.train_only(&Select::all()).unwrap();
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    let y = model.forward(&inputs, &Context::train(Seed(1), 0)).unwrap();
    let own: Vec<(String, Tensor)> =
        model.trainable().into_iter().filter(|(n, _)| !n.starts_with("base.")).collect();
    assert_eq!(own.len(), 3 + 4);
    let tensors: Vec<&Tensor> = own.iter().map(|(_, t)| t).collect();
    let loss = y.need("logits").unwrap().square().unwrap().sum().unwrap();
    for ((name, _), g) in own.iter().zip(loss.gradients(&tensors, false).unwrap()) {
        assert!(g.unwrap().abs().unwrap().sum().unwrap().item().unwrap() > 0.0, "{name}");
    }
}

#[test]
fn what_is_no_prompt_or_fits_no_other_is_refused() {
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    let refused =
        |model: Modular| model.forward(&inputs, &Context::eval()).unwrap_err().to_string();
    let uneven = with(&[2, 3], Box::new(attempt(true, AttemptForm::Paper, None)));
    assert!(refused(uneven).contains("one shape"));
    let mut without = with(&[2, 2], Box::new(attempt(true, AttemptForm::Paper, None)));
    without.route(Given::only(1), false).unwrap();
    assert!(refused(without).contains("`target`"));
    let mut rows = with(&[2, 2], Box::new(attempt(false, AttemptForm::Paper, None)));
    rows.route(Given::rows(&[Some(0), None, Some(1)]), false).unwrap();
    assert!(refused(rows).contains("a row has no module"));
    let mut lora = Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap();
    lora.attach("l", Box::<Lora>::default(), &Targets::names(["query"])).unwrap();
    let e = lora.aggregate(Box::<Attempt>::default()).unwrap_err().to_string();
    assert!(e.contains("all-tokens"), "{e}");
    lora.aggregate(Box::new(PromptConcat {})).unwrap();
    lora.route(Given::only(0), false).unwrap();
    assert!(refused(lora).contains("no prompt"));
    for (config, says) in [
        (Attempt { rank: 0, ..Attempt::default() }, "rank"),
        (Attempt { temperature: Some(0.0), ..Attempt::default() }, "temperature"),
    ] {
        let mut model = with(&[2], Box::new(PromptConcat {}));
        let e = model.aggregate(Box::new(config)).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
}

#[test]
fn spot_starts_from_the_source_with_the_most_alike_mean() {
    let model = with(&[4, 4, 4], Box::new(PromptConcat {}));
    let noise = prompt(&model, "first");
    // Twice as long in the same direction, and some noise whose mean is nearly 0 against it.
    let like =
        prompt(&model, "target").mul_scalar(2.0).unwrap().add(&noise.mul_scalar(0.01).unwrap());
    set_prompt(&model, "second", &like.unwrap());
    let found = nearest_prompts(&model, "target", &["first", "second"]).unwrap();
    assert_eq!(found[0].0, "second");
    assert!(found[0].1 > 0.99 && found[1].1 < found[0].1);
    let mean = |n: &str| prompt(&model, n).mean_dims(&[0], false).unwrap().to_vec::<f64>().unwrap();
    let (a, b) = (mean("target"), mean("first"));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
    assert!((found[1].1 - cosine).abs() < 1e-12);
    start_from_prompt(&model, "target", "second").unwrap();
    assert!(prompt(&model, "target").bit_equal(&prompt(&model, "second")).unwrap());
    assert!(nearest_prompts(&model, "target", &["third"]).is_err());
    let other = with(&[4, 5], Box::new(PromptConcat {}));
    let before = prompt(&other, "target");
    assert!(start_from_prompt(&other, "target", "first").is_err());
    assert!(prompt(&other, "target").bit_equal(&before).unwrap());
}
