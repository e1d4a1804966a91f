//! Masks that are chosen during training: exact counts, rewinding, and weights that do not move.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use modl_compute::sparse::{choose_fish_mask, fisher, pack_next};
use modl_compute::{DiffPruning, FishMask, LotteryTicket, LtSft, PackNet, Part, Union};
use modl_core::testing::{Sum, TinyBackbone};
use modl_core::{
    Bank, Context, Device, Init, Kind, Modular, ModuleConfig, Result, Router, RouterConfig,
    Routing, Scope, Seed, Select, Signal, Site, Targets, Tensor, Tensors, Weights, no_grad,
};
use serde_json::Value;

const SITES: [&str; 3] = ["layer.0.query", "layer.0.value", "conv"];

fn model(config: impl ModuleConfig + 'static) -> Modular {
    of_box(Box::new(config))
}

fn of_box(config: Box<dyn ModuleConfig>) -> Modular {
    let mut model =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap();
    model.attach("a", config, &Targets::names(SITES)).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    only(&mut model, 0);
    model
}

fn only(model: &mut Modular, j: usize) {
    model.route(Box::new(Only(j)), false).unwrap();
}

/// Routes everything to one module, and lets further ones come.
#[derive(Debug, Clone, Copy)]
struct Only(usize);

impl Router for Only {
    fn kind(&self) -> &'static str {
        "only"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        Ok(Routing::new(Weights::Fixed(vec![(self.0, 1.0)]), bank.len()))
    }

    fn grow(&mut self, _: usize, _: &mut Scope) -> Result<()> {
        Ok(())
    }
}

impl RouterConfig for Only {
    fn kind(&self) -> &'static str {
        "only"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(Value::Null)
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(*self))
    }
}

fn output(model: &Modular, cx: &Context) -> Tensor {
    let inputs = TinyBackbone::inputs(4, 6, Seed(5)).unwrap();
    model.forward(&inputs, cx).unwrap().need("logits").unwrap().clone()
}

/// Steps of gradient descent with weight decay, which moves also what has no gradient.
fn train(model: &Modular, name: &str, total: u64, mut after: impl FnMut(u64, &Tensors)) {
    model.train_only(&Select::new(format!("modules.{name}.*"))).unwrap();
    let phi = model.trainable();
    let inputs: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
    for done in 1..=total {
        let cx = Context::train(Seed(6), done);
        let y = output(model, &cx);
        let target =
            Init::Normal(1.0).tensor(&y.size(), Seed(7), Kind::Float, Device::Cpu).unwrap();
        let mut loss = y.mse(&target).unwrap();
        if let Some(penalty) = model.penalty(&cx).unwrap() {
            loss = loss.add(&penalty).unwrap();
        }
        let gradients: Tensors = phi
            .iter()
            .zip(loss.gradients(&inputs, false).unwrap())
            .filter_map(|((n, _), g)| Some((n.clone(), g?)))
            .collect();
        no_grad(|| {
            for (n, t) in &phi {
                let decayed = t.mul_scalar(0.999).unwrap();
                let step = gradients.get(n).map(|g| g.mul_scalar(-0.5).unwrap());
                let new = step.map_or(decayed.clone(), |s| decayed.add(&s).unwrap());
                t.clone().copy_from(&new).unwrap();
            }
        });
        model.after_step(&gradients, done, total).unwrap();
        after(done, &gradients);
    }
}

/// θ' of module `j` by `SITE.NAME`.
fn composed(model: &Modular, j: usize) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    for site in model.modular_sites() {
        let theta = model.backbone().theta(&site).unwrap();
        let module = model.layer(&site).unwrap().bank.module(j).unwrap();
        let merged = no_grad(|| module.compose(&theta)).unwrap().unwrap();
        for (name, t) in merged.iter() {
            all.insert(format!("{}.{name}", site.path), t.to_vec().unwrap());
        }
    }
    all
}

fn base(model: &Modular) -> BTreeMap<String, Vec<f32>> {
    let params = model.backbone().params();
    let names = composed(model, 0).into_keys();
    names.map(|n| (n.clone(), params.get(&n).unwrap().to_vec().unwrap())).collect()
}

fn param(model: &Modular, name: &str) -> Vec<f32> {
    model.params().get(&format!("modules.{name}")).unwrap().to_vec().unwrap()
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|x| x.to_bits()).collect()
}

/// 2·(64 + 8) + (192 + 8).
const ALL: usize = 344;

/// The `SITE.PART.NAME` of a module, by `SITE.NAME`.
fn parts(model: &Modular, module: &str, part: &str) -> BTreeMap<String, Vec<f32>> {
    let prefix = format!("modules.{module}.");
    let infix = format!(".{part}.");
    let own = model.params().iter().filter_map(|(n, p)| {
        let n = n.strip_prefix(&prefix)?;
        Some((n.contains(&infix).then(|| n.replace(&infix, "."))?, p.tensor().to_vec().unwrap()))
    });
    own.collect()
}

/// The places of the `k` largest among all, ties to the first.
fn largest(scores: &BTreeMap<String, Vec<f32>>, k: usize) -> Vec<(String, usize)> {
    let mut all: Vec<(f32, String, usize)> = scores
        .iter()
        .flat_map(|(n, v)| v.iter().enumerate().map(move |(i, x)| (*x, n.clone(), i)))
        .collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut places: Vec<_> = all.into_iter().take(k).map(|(_, n, i)| (n, i)).collect();
    places.sort();
    places
}

fn on(masks: &BTreeMap<String, Vec<f32>>) -> Vec<(String, usize)> {
    let at = |(n, v): (&String, &Vec<f32>)| -> Vec<(String, usize)> {
        let on = v.iter().enumerate().filter(|(_, x)| **x == 1.0);
        on.map(|(i, _)| (n.clone(), i)).collect()
    };
    masks.iter().flat_map(at).collect()
}

#[test]
fn lt_sft_takes_the_largest_changes_rewinds_and_touches_nothing_else() {
    // The phase-1 deltas come from a run that never chooses before its end.
    let dense = model(LtSft { choose_at: 1.0, density: 1.0, l1: 0.0 });
    let mut before = BTreeMap::new();
    train(&dense, "a", 5, |done, _| {
        if done == 4 {
            before = parts(&dense, "a", "delta");
        }
    });
    let scores = before.iter().map(|(n, v)| (n.clone(), v.iter().map(|x| x.abs()).collect()));
    let expected = largest(&scores.collect(), 34);

    let sparse = model(LtSft { choose_at: 0.5, density: 0.1, l1: 0.0 });
    let theta = base(&sparse);
    train(&sparse, "a", 8, |done, gradients| {
        let mask = parts(&sparse, "a", "mask");
        match done {
            1..4 => assert_eq!(on(&mask).len(), ALL),
            4 => {
                assert_eq!(on(&mask), expected, "⌊0.1 · 344⌋ = 34, over all sites together");
                assert_eq!(composed(&sparse, 0), theta, "phase 2 starts from θ");
            }
            _ => {
                for (name, m) in &mask {
                    let (site, short) = name.rsplit_once('.').unwrap();
                    let g = gradients.need(&format!("modules.a.{site}.delta.{short}")).unwrap();
                    let g: Vec<f32> = g.to_vec().unwrap();
                    assert!(g.iter().zip(m).all(|(g, m)| *m == 1.0 || *g == 0.0), "{name}");
                }
            }
        }
    });
    let now = composed(&sparse, 0);
    for (name, v) in &now {
        for (i, x) in v.iter().enumerate() {
            let same = x.to_bits() == theta[name][i].to_bits();
            assert_eq!(same, !expected.contains(&(name.clone(), i)), "{name} {i}");
        }
    }
    // A second training goes on with the same mask.
    train(&sparse, "a", 2, |_, _| {});
    assert_eq!(on(&parts(&sparse, "a", "mask")), expected);
}

/// What each step says to the optimiser.
fn restarted(config: impl ModuleConfig + 'static, total: u64) -> Vec<Vec<String>> {
    let model = model(config);
    (1..=total).map(|n| model.after_step(&Tensors::new(), n, total).unwrap()).collect()
}

#[test]
fn what_goes_back_to_its_start_has_the_optimiser_start_anew() {
    let none = Vec::<String>::new();
    let all = |part: &str| -> Vec<String> {
        let names = ["conv", "layer.0.query", "layer.0.value"].iter().flat_map(|site| {
            ["bias", "weight"].map(|name| format!("modules.a.{site}.{part}.{name}"))
        });
        names.collect()
    };
    let lt_sft = restarted(LtSft { choose_at: 0.5, ..LtSft::default() }, 4);
    assert_eq!(lt_sft, [none.clone(), all("delta"), none.clone(), none.clone()]);
    let ticket = restarted(LotteryTicket::default(), 4);
    assert_eq!(ticket, [none.clone(), all("trained"), none.clone(), none.clone()]);
    let pruned = restarted(LotteryTicket { rewind: false, ..LotteryTicket::default() }, 2);
    assert_eq!(pruned, [none.clone(), none]);
}

#[test]
fn parts_of_a_union_do_after_a_step_what_they_do_alone() {
    let part = |site: &str, config: LtSft| Part::new(Targets::names([site]), config);
    let lt_sft = |density| LtSft { density, choose_at: 0.5, l1: 0.0 };
    let union = model(Union::new([part("query", lt_sft(0.25)), part("value", lt_sft(0.5))]));
    let noise = |model: &Modular| {
        for (name, p) in model.params().iter().filter(|(_, p)| !p.is_buffer()) {
            // By what the parameter is called without a part.
            let own = name.replace(".part0", "").replace(".part1", "");
            let t = p.tensor();
            let d = Init::Normal(1.0).tensor(&t.size(), Seed(8).child(&own), t.kind(), t.device());
            no_grad(|| t.clone().copy_from(&d.unwrap())).unwrap();
        }
    };
    noise(&union);
    let restarted = union.after_step(&Tensors::new(), 1, 2).unwrap();
    assert_eq!(restarted.len(), 4);
    assert!(restarted.contains(&"modules.a.layer.0.value.part1.delta.bias".to_owned()));
    for (i, (site, density)) in [("query", 0.25), ("value", 0.5)].into_iter().enumerate() {
        let mut alone =
            Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap();
        alone.attach("a", Box::new(lt_sft(density)), &Targets::names([site])).unwrap();
        noise(&alone);
        alone.after_step(&Tensors::new(), 1, 2).unwrap();
        for name in ["mask.weight", "mask.bias", "delta.weight"] {
            let of = |m: &Modular, part: &str| -> Vec<f32> {
                let name = format!("modules.a.layer.0.{site}{part}.{name}");
                let t = m.params().get(&name).unwrap().to_kind(Kind::Float).unwrap();
                t.to_vec().unwrap()
            };
            let found = of(&union, &format!(".part{i}"));
            assert_eq!(found, of(&alone, ""), "{site} {name}");
            assert!(name != "mask.weight" || found.contains(&1.0) && found.contains(&0.0));
        }
    }
}

#[test]
fn the_l1_penalty_is_a_mean_over_all_sites() {
    let model = model(LtSft { l1: 0.5, ..LtSft::default() });
    let mut sum = 0.0;
    for (i, (n, p)) in model.params().iter().filter(|(n, _)| n.contains(".delta.")).enumerate() {
        let value = [0.25, -0.5, 0.75][i % 3];
        sum += f64::abs(value) * p.tensor().numel() as f64;
        let t = Tensor::full(&p.tensor().size(), value, Kind::Float, Device::Cpu).unwrap();
        no_grad(|| model.params().get(n).unwrap().clone().copy_from(&t)).unwrap();
    }
    let penalty = model.penalty(&Context::eval()).unwrap().unwrap().item().unwrap();
    assert!((penalty - 0.5 * sum / ALL as f64).abs() < 1e-6, "{penalty}");
}

#[test]
fn sparse_differences_with_disjoint_masks_add_up_in_any_order() {
    let mut two = model(LtSft::default());
    two.attach("b", Box::new(LtSft::default()), &Targets::names(SITES)).unwrap();
    for (n, p) in two.params().iter().filter(|(_, p)| p.tensor().dim() > 0) {
        let t = p.tensor();
        let size = t.size();
        if n.contains(".delta.") {
            let d =
                Init::Normal(1.0).tensor(&size, Seed(8).child(n), t.kind(), t.device()).unwrap();
            no_grad(|| t.clone().copy_from(&d)).unwrap();
        } else if n.contains(".mask.") {
            let odd = i64::from(n.starts_with("modules.a"));
            let half: Vec<bool> = (0..t.numel() as i64).map(|i| i % 2 == odd).collect();
            let half = Tensor::from_slice(&half, &size, Device::Cpu).unwrap();
            no_grad(|| t.clone().copy_from(&half)).unwrap();
        }
    }
    for site in two.modular_sites() {
        let theta = two.backbone().theta(&site).unwrap();
        let bank = &two.layer(&site).unwrap().bank;
        let apply = |j: usize, t: &Tensors| bank.module(j).unwrap().compose(t).unwrap().unwrap();
        let (ab, ba) = (apply(1, &apply(0, &theta)), apply(0, &apply(1, &theta)));
        for (name, t) in ab.iter() {
            assert!(t.bit_equal(ba.need(name).unwrap()).unwrap());
            assert!(!t.bit_equal(apply(0, &theta).need(name).unwrap()).unwrap());
        }
    }
}

#[test]
fn phi_is_the_effective_change_so_that_different_masks_can_be_averaged() {
    let kinds: [Box<dyn ModuleConfig>; 4] = [
        Box::new(LtSft { density: 0.2, ..LtSft::default() }),
        Box::new(LotteryTicket::default()),
        Box::new(DiffPruning { density: 0.2, start: 0.3, ..DiffPruning::default() }),
        Box::new(PackNet::default()),
    ];
    for config in kinds {
        let kind = config.kind();
        let model = of_box(config);
        train(&model, "a", 4, |_, _| {});
        let mut moved = false;
        for site in model.modular_sites() {
            let theta = model.backbone().theta(&site).unwrap();
            let module = model.layer(&site).unwrap().bank.module(0).unwrap();
            let again = module.with_phi(&module.phi()).unwrap();
            let expected = module.compose(&theta).unwrap().unwrap();
            for (name, t) in again.compose(&theta).unwrap().unwrap().iter() {
                assert!(t.all_close(expected.need(name).unwrap(), 0.0, 0.0).unwrap(), "{kind}");
                moved |= t.max_abs_diff(theta.need(name).unwrap()).unwrap() > 0.0;
            }
            assert!(module.with_phi(&Tensors::new()).is_err());
        }
        assert!(moved, "{kind}");
    }
}

#[test]
fn tickets_are_nested_counted_and_rewound() {
    for (across, rewind_to) in [(false, 0), (false, 1), (true, 0)] {
        let config = LotteryTicket { prune: 0.3, rounds: 3, rewind: true, rewind_to, across };
        let model = model(config);
        let mut start = parts(&model, "a", "trained");
        assert_eq!(start, base(&model));
        let mut left = parts(&model, "a", "mask");
        // Rounds end after 3, 6 and 9 of 12 steps.
        train(&model, "a", 12, |done, gradients| {
            if done == rewind_to {
                start = parts(&model, "a", "trained");
            }
            let mask = parts(&model, "a", "mask");
            if matches!(done, 3 | 6 | 9) {
                assert_eq!(parts(&model, "a", "trained"), start, "rewound after step {done}");
                let rate = 0.7f64.powi(done as i32 / 3);
                let kept = |n: usize| (rate * n as f64 + 1e-6).floor() as usize;
                let count = |v: &Vec<f32>| v.iter().filter(|m| **m == 1.0).count();
                if across {
                    assert_eq!(on(&mask).len(), kept(64 + 64 + 192));
                } else {
                    assert!(mask.values().all(|v| count(v) == kept(v.len())), "step {done}");
                }
                assert!(on(&mask).iter().all(|place| on(&left).contains(place)), "nested");
                left = mask;
            } else {
                assert_eq!(mask, left, "step {done}");
                for (name, m) in &mask {
                    let (site, short) = name.rsplit_once('.').unwrap();
                    let g = gradients.need(&format!("modules.a.{site}.trained.{short}")).unwrap();
                    let g: Vec<f32> = g.to_vec().unwrap();
                    assert!(g.iter().zip(m).all(|(g, m)| *m == 1.0 || *g == 0.0), "{name}");
                }
            }
        });
        for (name, m) in &left {
            let now = &composed(&model, 0)[name];
            assert!(now.iter().zip(m).all(|(w, m)| (*m == 1.0) != (*w == 0.0)), "{name}");
        }
    }
}

#[test]
fn pruning_keeps_the_largest_and_a_late_rewind_is_refused() {
    let model = model(LotteryTicket { prune: 0.5, rewind: false, ..LotteryTicket::default() });
    model.after_step(&Tensors::new(), 5, 10).unwrap();
    let theta = base(&model);
    for (name, m) in parts(&model, "a", "mask") {
        let sizes = theta[&name].iter().map(|x| x.abs()).collect();
        let expected = largest(&BTreeMap::from([(name.clone(), sizes)]), m.len() / 2);
        assert_eq!(on(&BTreeMap::from([(name, m)])), expected);
    }
    let late = self::model(LotteryTicket { rewind_to: 5, ..LotteryTicket::default() });
    let e = late.after_step(&Tensors::new(), 1, 10).unwrap_err().to_string();
    assert!(e.contains("rewind_to") && e.contains("ends after 5 of 10"), "{e}");
}

#[test]
fn diff_pruning_projects_what_the_gates_leave_and_then_only_trains_that() {
    let model = model(DiffPruning { density: 0.1, start: 0.3, ..DiffPruning::default() });
    let theta = base(&model);
    let mut chosen = Vec::new();
    train(&model, "a", 8, |done, _| {
        let mask = on(&parts(&model, "a", "mask"));
        if done == 4 {
            assert_eq!(mask.len(), 34);
            chosen = mask;
        } else if done > 4 {
            assert_eq!(mask, chosen);
            // Open gates have no noise left.
            let noisy = output(&model, &Context::train(Seed(3), done));
            assert!(noisy.bit_equal(&output(&model, &Context::eval())).unwrap());
        }
    });
    for (name, v) in composed(&model, 0) {
        for (i, x) in v.iter().enumerate() {
            let same = x.to_bits() == theta[&name][i].to_bits();
            assert_eq!(same, !chosen.contains(&(name.clone(), i)), "{name} {i}");
        }
    }
}

#[test]
fn the_fisher_information_of_a_linear_gaussian_model_is_known() {
    // y = w·x + ε, ε ~ N(0, σ²): F_j = E[x_j²] ⁄ σ².
    const N: i64 = 4000;
    const SIGMA: f64 = 0.5;
    let normal = |shape: &[i64], name: &str| {
        Init::Normal(1.0).tensor(shape, Seed(4).child(name), Kind::Double, Device::Cpu).unwrap()
    };
    let scale = Tensor::from_slice(&[0.5f64, 1.0, 2.0], &[3], Device::Cpu).unwrap();
    let x = normal(&[N, 3], "x").mul(&scale).unwrap();
    let noise = normal(&[N], "noise").mul_scalar(SIGMA).unwrap();
    let w = Tensor::from_slice(&[1.0f64, -2.0, 0.3], &[3], Device::Cpu).unwrap();
    w.set_requires_grad(true).unwrap();
    let params = Tensors::new().with("w", w.clone());
    let log_p = |row: u64| {
        let x = x.select(0, row as i64)?;
        let y = w.detach()?.mul(&x)?.sum()?.add(&noise.select(0, row as i64)?)?;
        y.sub(&w.mul(&x)?.sum()?)?.square()?.mul_scalar(-0.5 / (SIGMA * SIGMA))
    };
    let found: Vec<f64> =
        fisher(&params, N as u64, log_p).unwrap().need("w").unwrap().to_vec().unwrap();
    let (x, noise): (Vec<f64>, Vec<f64>) = (x.to_vec().unwrap(), noise.to_vec().unwrap());
    for (j, scale) in [0.5f64, 1.0, 2.0].iter().enumerate() {
        let squares: Vec<f64> =
            (0..N as usize).map(|n| (noise[n] * x[3 * n + j] / (SIGMA * SIGMA)).powi(2)).collect();
        let mean = squares.iter().sum::<f64>() / N as f64;
        assert!((found[j] - mean).abs() < 1e-9 * mean, "each example's own square");
        // The square of εx has variance 8·(σ s)⁴.
        let exact = scale * scale / (SIGMA * SIGMA);
        let error = exact * (8.0 / N as f64).sqrt();
        assert!((found[j] - exact).abs() < 3.0 * error, "{} {exact} ± {error}", found[j]);
    }
    assert!(fisher(&params, 0, log_p).is_err());
}

#[test]
fn a_fish_mask_takes_exactly_the_largest() {
    let model = model(FishMask { density: 0.07 });
    let log_p = |n: u64| {
        let inputs = TinyBackbone::inputs(1, 6, Seed(11).nth(n))?;
        let logits = model.forward(&inputs, &Context::eval())?.need("logits")?.clone();
        logits.log_softmax(-1)?.select(-1, (n % 5) as i64)?.sum()
    };
    choose_fish_mask(&model, "a", 6, log_p).unwrap();
    let mask = on(&parts(&model, "a", "mask"));
    // 344 · 0.07 = 24.08. Squares of gradients of the examples one by one:
    let deltas: Vec<(String, Tensor)> = model.trainable();
    let mut squares: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let open = self::model(FishMask { density: 1.0 });
    let open_deltas = open.trainable();
    for n in 0..6 {
        let inputs = TinyBackbone::inputs(1, 6, Seed(11).nth(n)).unwrap();
        let out = open.forward(&inputs, &Context::eval()).unwrap();
        let logits = out.need("logits").unwrap().log_softmax(-1).unwrap();
        let loss = logits.select(-1, (n % 5) as i64).unwrap().sum().unwrap();
        let inputs: Vec<&Tensor> = open_deltas.iter().map(|(_, t)| t).collect();
        for ((name, _), g) in open_deltas.iter().zip(loss.gradients(&inputs, false).unwrap()) {
            let g: Vec<f64> = g.unwrap().to_vec().unwrap();
            let sum = squares.entry(name.clone()).or_insert_with(|| vec![0.0; g.len()]);
            sum.iter_mut().zip(g).for_each(|(s, g)| *s += g * g);
        }
    }
    let scores = squares.iter().map(|(n, v)| {
        let name = n.strip_prefix("modules.a.").unwrap().replace(".delta.", ".");
        (name, v.iter().map(|x| *x as f32).collect())
    });
    assert_eq!(mask, largest(&scores.collect(), 24));
    assert_eq!(deltas.len(), 6);
    let e = choose_fish_mask(&self::model(LtSft::default()), "a", 1, log_p).unwrap_err();
    assert!(e.to_string().contains("lt_sft"), "{e}");
}

#[test]
fn pack_net_partitions_a_layer_and_earlier_tasks_stay_bit_for_bit() {
    let mut model = model(PackNet { prune: 0.6, ..PackNet::default() });
    let e = pack_next(&mut model, "a", "b").unwrap_err().to_string();
    assert!(e.contains("prune_at"), "{e}");
    train(&model, "a", 6, |_, _| {});
    let first = (output(&model, &Context::eval()), composed(&model, 0));
    pack_next(&mut model, "a", "b").unwrap();
    only(&mut model, 1);
    let start = output(&model, &Context::eval());
    assert!(start.all_close(&first.0, 0.0, 0.0).unwrap(), "a new task starts as the one before");
    let own = parts(&model, "b", "owner");
    train(&model, "b", 6, |done, gradients| {
        let owner = if done <= 3 { &own } else { &parts(&model, "b", "owner") };
        for (name, owner) in owner.iter().filter(|_| done != 3) {
            let (site, short) = name.rsplit_once('.').unwrap();
            let g = gradients.need(&format!("modules.b.{site}.own.{short}")).unwrap();
            let g: Vec<f32> = g.to_vec().unwrap();
            assert!(g.iter().zip(owner).all(|(g, o)| *o == 2.0 || *g == 0.0), "{name} {done}");
        }
    });
    pack_next(&mut model, "b", "c").unwrap();
    only(&mut model, 2);
    train(&model, "c", 6, |_, _| {});
    only(&mut model, 0);
    assert!(output(&model, &Context::eval()).bit_equal(&first.0).unwrap());
    for (name, v) in &first.1 {
        assert_eq!(bits(&composed(&model, 0)[name]), bits(v), "{name}");
    }
    let (one, two) = (composed(&model, 0), composed(&model, 1));
    for (name, labels) in parts(&model, "c", "owner") {
        let count = |t: f32| labels.iter().filter(|l| **l == t).count();
        let n = labels.len();
        let dropped = |n: usize| (0.6 * n as f64 + 1e-6).floor() as usize;
        let (free1, free2) = (dropped(n), dropped(dropped(n)));
        assert_eq!(count(1.0), n - free1, "{name}");
        assert_eq!(count(2.0), free1 - free2, "{name}");
        assert_eq!(count(3.0), free2 - dropped(free2), "{name}");
        assert_eq!(count(0.0), dropped(free2), "{name}");
        // Each module's own mask excludes what others own.
        for (t, module) in [(1.0, "a"), (2.0, "b")] {
            let own = &parts(&model, module, "owner")[&name];
            assert!(own.iter().zip(&labels).all(|(o, l)| (*o == t) == (*l == t)), "{name}");
        }
        let three = &composed(&model, 2)[&name];
        for (i, label) in labels.iter().enumerate() {
            match *label as u8 {
                0 => assert_eq!(three[i], 0.0),
                1 => assert!(three[i] == one[&name][i] && two[&name][i] == one[&name][i]),
                2 => assert!(three[i] == two[&name][i] && one[&name][i] == 0.0),
                _ => assert!(two[&name][i] == 0.0),
            }
        }
    }
    assert_eq!(param(&model, "c.conv.own.weight").len(), 192);
    // The first task trained the biases; they are its for good, and nobody else's parameters.
    for bias in ["layer.0.query.bias", "conv.bias"] {
        let theta: Vec<f32> = model.backbone().params().get(bias).unwrap().to_vec().unwrap();
        assert!(first.1[bias].iter().zip(&theta).all(|(b, t)| b != t), "{bias}");
        let (later, own) = (composed(&model, 2), bias.replace(".bias", ".own.bias"));
        assert_eq!(bits(&later[bias]), bits(&first.1[bias]), "{bias}");
        assert!(model.params().get(&format!("modules.a.{own}")).is_ok());
        assert!(model.params().get(&format!("modules.c.{own}")).is_err());
    }
    assert!(pack_next(&mut model, "a", "a").is_err());
}
