//! What routers hear of their choices, and several passes of a batch.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use modl_core::{
    Bank, Context, Device, Error, Init, Kind, Modular, Outcome, Result, Router, RouterConfig,
    Routing, Scope, Seed, Signal, Site, Targets, Tensor, Weights, no_grad,
};
use modl_train::{Batch, Batches, Combine, Event, Objective, Passes, TrainConfig, Trainer};
use rand::Rng;
use serde_json::{Value, json};
use toy::{data, head, model, with_dropout};

const STEPS: u64 = 6;
const BATCH: usize = 4;

/// Draws a module for each row by softmax(ℓ), and hears what became of it.
#[derive(Debug, Clone, Default)]
struct Lottery {
    logits: Option<Tensor>,
    /// For each module the number of rows that had it, the sum of their losses, and how many of them
    /// counted.
    heard: Option<Tensor>,
    path: String,
}

impl RouterConfig for Lottery {
    fn kind(&self) -> &'static str {
        "lottery"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, _: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let m = bank.len() as i64;
        let path = scope.path().to_owned();
        let logits = Some(scope.param("logits", &[m], Init::Normal(0.1))?);
        let none = Tensor::zeros(&[m, 3], Kind::Float, Device::Cpu)?;
        let heard = Some(scope.buffer("heard", &none)?);
        Ok(Box::new(Lottery { logits, heard, path }))
    }
}

impl Router for Lottery {
    fn kind(&self) -> &'static str {
        "lottery"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let p = self.logits.as_ref().unwrap().softmax(-1)?;
        let known = p.to_vec::<f32>()?;
        let mut rng = cx.draw(&self.path).rng();
        let chosen: Vec<i64> =
            (0..x.rows()).map(|_| i64::from(cx.train && rng.r#gen::<f32>() > known[0])).collect();
        let index = Tensor::from_slice(&chosen, &[x.rows(), 1], x.x.device())?;
        let of_rows = p.unsqueeze(0)?.expand(&[x.rows(), bank.len() as i64])?.gather(-1, &index)?;
        let weight = of_rows.ones_like()?.detach()?;
        let routing = Routing::new(Weights::Sparse { index, weight }, bank.len()).normalised();
        Ok(routing.note("log_prob", of_rows.log()?.squeeze(-1)?))
    }

    fn credit(&self, routing: &Routing, outcome: &Outcome) -> Result<Option<(String, Tensor)>> {
        let own = routing.noted.need("log_prob")?.mul(outcome.loss)?;
        let own = outcome.chosen.map_or(Ok(own.clone()), |c| own.mul(c))?;
        Ok(Some(("reinforce".into(), own.mean()?)))
    }

    fn learn(&self, routing: &Routing, outcome: &Outcome) -> Result<()> {
        let Weights::Sparse { index, .. } = &routing.weights else { panic!() };
        let ones = outcome.loss.ones_like()?;
        let counted = outcome.chosen.unwrap_or(&ones).to_kind(ones.kind())?;
        let all = Tensor::stack(&[ones, outcome.loss.clone(), counted], 1)?;
        let mut heard = self.heard.clone().unwrap();
        let sum = heard.index_add(0, &index.squeeze(-1)?, &all)?;
        heard.copy_from(&sum)
    }
}

fn lottery(seed: u64) -> Modular {
    lottery_at(&["query"], false, seed)
}

fn lottery_at(sites: &[&str], global: bool, seed: u64) -> Modular {
    let mut model = with_dropout(0.0, seed);
    for name in ["plus", "minus"] {
        model.detach(name).unwrap();
    }
    for name in ["a", "b"] {
        let lora = modl_compute::Lora { r: 2, alpha: 4.0, ..Default::default() };
        model.attach(name, Box::new(lora), &Targets::names(sites.iter().copied())).unwrap();
    }
    perturbed(&model);
    model.route(Box::new(Lottery::default()), global).unwrap();
    model.aggregate(Box::new(modl_aggregate::WeightedSum::default())).unwrap();
    model
}

fn config(passes: Passes) -> TrainConfig {
    TrainConfig {
        steps: Some(STEPS),
        batch_size: BATCH,
        lr: 0.05,
        passes,
        loss_weights: [("reinforce".to_owned(), 1.0)].into(),
        ..TrainConfig::default()
    }
}

fn train(model: &Modular, config: TrainConfig) -> Result<Vec<Event>> {
    let (head, mut events) = (head(), Vec::new());
    Trainer::new("toy", model, &head, config, Seed(7))?.train(
        &data(10),
        &Batch::describe,
        &mut events,
    )?;
    Ok(events)
}

fn heard(model: &Modular) -> Vec<f32> {
    let sites = model.modular_sites();
    let name = format!("routers.{}.heard", sites[0].path);
    model.params().get(&name).unwrap().to_vec::<f32>().unwrap()
}

fn losses(events: &[Event]) -> Vec<f64> {
    let loss = |e: &Event| match e {
        Event::Step { loss, .. } => Some(*loss),
        _ => None,
    };
    events.iter().filter_map(loss).collect()
}

#[test]
fn routers_hear_the_loss_of_each_row() {
    let model = lottery(3);
    let logits = format!("routers.{}.logits", model.modular_sites()[0].path);
    let before = model.params().get(&logits).unwrap().copy().unwrap();
    let events = train(&model, config(Passes::default())).unwrap();
    let heard = heard(&model);
    let all = losses(&events);
    assert_eq!(heard[0] + heard[3], (STEPS as usize * BATCH) as f32, "each row once");
    assert!(heard[0] > 0.0 && heard[3] > 0.0, "both modules were tried: {heard:?}");
    let sum = all.iter().sum::<f64>() * BATCH as f64;
    assert!((f64::from(heard[1] + heard[4]) - sum).abs() < 1e-4 * sum, "{heard:?} {sum}");
    // The choice is hard: all that moves ℓ is the loss that it derives from the outcome.
    let after = model.params().get(&logits).unwrap();
    assert!(after.max_abs_diff(&before).unwrap() > 0.01);
    let silent = TrainConfig {
        loss_weights: [("reinforce".to_owned(), 0.0)].into(),
        ..config(Passes::default())
    };
    let model = lottery(3);
    train(&model, silent).unwrap();
    assert!(model.params().get(&logits).unwrap().bit_equal(&before).unwrap());
}

#[test]
fn a_loss_from_the_outcome_has_to_be_weighed() {
    let unsaid = TrainConfig { loss_weights: [].into(), ..config(Passes::default()) };
    let e = train(&lottery(3), unsaid).unwrap_err().to_string();
    // This router is nobody's whose paper says what its loss counts.
    assert!(e.contains("loss_weights.reinforce") && e.contains("no usual weight"), "{e}");
}

/// The loss of one step by hand: each pass draws as the trainer's does.
fn by_hand(model: &Modular, count: u64) -> Vec<Vec<f64>> {
    by_hand_counting(model, count, 1.0)
}

/// The same where ln p of a choice counts `times`.
fn by_hand_counting(model: &Modular, count: u64, times: f64) -> Vec<Vec<f64>> {
    let data = data(10);
    let mut batches = Batches::new(&data, BATCH, Seed(7), Device::Cpu, Default::default()).unwrap();
    let batch = batches.advance().unwrap();
    let pass = |n: u64| {
        let seed = if n == 0 { Seed(7) } else { Seed(7).child("pass").nth(n) };
        let cx = batch.describe(Context::train(seed, 0)).unwrap();
        let out = no_grad(|| head().predict(model, &batch, &cx)).unwrap();
        let losses = out.sub(&batch.targets).unwrap().square().unwrap();
        let log_prob = cx.take_trace().routings[0].1.noted.need("log_prob").unwrap().clone();
        let cost = losses.sub(&log_prob.mul_scalar(times).unwrap()).unwrap();
        (losses.to_vec::<f64>().unwrap(), cost.to_vec::<f64>().unwrap())
    };
    let (losses, costs): (Vec<_>, Vec<_>) = (0..count).map(pass).unzip();
    let best = |row: usize| {
        let at = |n: &usize| costs[*n][row];
        (0..count as usize).min_by(|a, b| at(a).total_cmp(&at(b))).unwrap()
    };
    let chosen = (0..BATCH).map(|row| losses[best(row)][row]).collect();
    losses.into_iter().chain([chosen]).collect()
}

#[test]
fn several_passes_are_averaged_or_the_best_is_taken() {
    let hands = by_hand(&lottery(3), 4);
    let mean = |all: &[f64]| all.iter().sum::<f64>() / all.len() as f64;
    let one_step = |combine| {
        let config = TrainConfig {
            steps: Some(1),
            ..config(Passes { count: 4, combine, ..Passes::default() })
        };
        losses(&train(&lottery(3), config).unwrap())[0]
    };
    let all = hands[..4].concat();
    assert!((one_step(Combine::Mean) - mean(&all)).abs() < 1e-6);
    assert!((one_step(Combine::Best) - mean(&hands[4])).abs() < 1e-6, "{hands:?}");
    assert!(hands[4] != hands[0], "the best is not always the first: {hands:?}");
}

/// One router for two sites draws once: the second site has its notes, and nobody counts them twice.
#[test]
fn what_followers_note_is_counted_once() {
    let with = |apart: f32| {
        let model = lottery_at(&["query", "value"], true, 3);
        let unlike = Tensor::from_slice(&[apart, -apart], &[2], Device::Cpu).unwrap();
        let logits = model.params().get("routers.global.logits").unwrap();
        no_grad(|| logits.clone().copy_from(&unlike)).unwrap();
        model
    };
    // Choices as unlike as makes the two ways of counting differ.
    let tells = |apart: &f32| by_hand(&with(*apart), 4) != by_hand_counting(&with(*apart), 4, 2.0);
    let apart = [0.02, 0.05, 0.1, 0.2, 0.4, 0.8].into_iter().find(tells).unwrap();
    let model = || with(apart);
    let data = data(10);
    let batch = data.batch(&[0, 3, 5, 7], Device::Cpu).unwrap();
    let cx = batch.describe(Context::train(Seed(2), 0)).unwrap();
    head().predict(&model(), &batch, &cx).unwrap();
    let trace = cx.take_trace();
    let [(_, leader), (_, follower)] = trace.routings.as_slice() else { panic!("{trace:?}") };
    assert!(!leader.repeated && follower.repeated);
    let log_prob = |r: &Routing| r.noted.need("log_prob").unwrap().clone();
    assert!(log_prob(leader).bit_equal(&log_prob(follower)).unwrap());
    // The credit of one draw, whatever else hears of it.
    let loss = Tensor::full(&[4], 2.0, Kind::Float, Device::Cpu).unwrap();
    let found = model().router_losses(&trace, &Outcome::new(&loss, &cx)).unwrap();
    let once = log_prob(leader).mul_scalar(2.0).unwrap().mean().unwrap().item().unwrap();
    assert!((found["reinforce"].item().unwrap() - once).abs() < 1e-6);
    // The best pass by the loss and one ln p; with it twice another one would win somewhere.
    let hands = by_hand(&model(), 4);
    let passes = Passes { count: 4, combine: Combine::Best, ..Passes::default() };
    let config = TrainConfig { steps: Some(1), ..config(passes) };
    let model = model();
    let found = losses(&train(&model, config).unwrap())[0];
    let wanted = hands[4].iter().sum::<f64>() / BATCH as f64;
    assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
    let sum = |i: usize| {
        let heard = model.params().get("routers.global.heard").unwrap().to_vec::<f32>().unwrap();
        heard[i] + heard[i + 3]
    };
    assert_eq!(sum(0), 4.0 * BATCH as f32, "each row of each pass is heard of once");
    assert_eq!(sum(2), BATCH as f32, "each row counts in its best pass alone");
}

/// Each pass draws for itself, and knows its number and a seed that all passes of its batch know.
#[test]
fn passes_know_of_one_another() {
    let seen = std::cell::RefCell::new(Vec::new());
    let (model, head) = (lottery(3), head());
    let passes = Passes { count: 3, combine: Combine::Mean, ..Passes::default() };
    let config = TrainConfig { steps: Some(2), ..config(passes) };
    let note = |batch: &Batch, cx: Context| {
        seen.borrow_mut().push((cx.pass("x"), cx.draw("x")));
        batch.describe(cx)
    };
    let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
    trainer.train(&data(10), &note, &mut ()).unwrap();
    let seen = seen.into_inner();
    let numbers: Vec<u64> = seen.iter().map(|((n, _), _)| *n).collect();
    assert_eq!(numbers, [0, 1, 2, 0, 1, 2]);
    let known = |i: usize| seen[i].0.1;
    assert!(known(0) == known(2) && known(3) == known(5) && known(0) != known(3));
    assert!(seen[0].1 != seen[1].1 && seen[1].1 != seen[2].1);
}

#[test]
fn passes_that_agree_add_nothing_and_others_are_drawn_together() {
    let aux = |model: &Modular| {
        let passes = Passes { count: 2, combine: Combine::Consistent(5.0), ..Passes::default() };
        let config = TrainConfig { lr: 0.0, ..config(passes) };
        let found = |e: &Event| match e {
            Event::Step { aux, .. } => aux.get("consistency").copied(),
            _ => None,
        };
        train(model, config).unwrap().iter().filter_map(found).fold(0.0, f64::max)
    };
    assert_eq!(aux(&with_dropout(0.0, 3)), 0.0);
    let dropout = model(3);
    perturbed(&dropout);
    assert!(aux(&dropout) > 0.0);
}

/// LoRA's B is no longer 0, so that dropout shows.
fn perturbed(model: &Modular) {
    for (name, p) in model.params().iter().filter(|(n, _)| n.contains("lora_B")) {
        let t = p.tensor();
        let drawn = Init::Normal(0.5).tensor(&t.size(), Seed(5).child(name), t.kind(), t.device());
        no_grad(|| t.clone().copy_from(&drawn.unwrap())).unwrap();
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    for (passes, name) in [
        (Passes { count: 0, combine: Combine::Mean, ..Passes::default() }, "passes.count"),
        (Passes { count: 1, combine: Combine::Best, ..Passes::default() }, "passes.count"),
        (
            Passes { count: 2, combine: Combine::Consistent(-1.0), ..Passes::default() },
            "passes.combine.consistent",
        ),
    ] {
        let e = train(&lottery(3), config(passes)).unwrap_err();
        assert!(matches!(e.root(), Error::Invalid { what, .. } if what == name), "{e}");
    }
}
