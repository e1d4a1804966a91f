//! Routing by task that is learned, against closed forms and arithmetic in f64.

#![allow(clippy::unwrap_used, clippy::panic)]

mod made;

use std::collections::BTreeSet;

use made::{Made, assert_close, check, normal, t};
use modl_core::testing::{RouterClaims, Sum, TinyBackbone, perturb, standins};
use modl_core::{
    Context, Device, Error, Kind, Modular, ModuleConfig, Result, RouterConfig, Seed, Select,
    Targets, Tensor, no_grad,
};
use modl_route::{Soft, SubNetwork, TaskLabels, TaskMoe};
use serde_json::{Value, json};

fn claims() -> RouterClaims {
    RouterClaims { tasks: ["x", "y"].map(String::from).to_vec(), ..RouterClaims::soft() }
}

#[test]
fn task_level_routers_keep_the_laws() {
    let tasks = json!(["x", "y"]);
    let drawn = || RouterClaims { draws: true, ..claims() };
    check(json!({"type": "polytropon", "tasks": tasks}), drawn());
    check(json!({"type": "polytropon", "tasks": tasks, "ibp": 3.0, "temperature": 0.5}), drawn());
    check(json!({"type": "multi_head", "tasks": tasks, "heads": 2}), drawn());
    let moe = |k, sums_to_one| RouterClaims { at_most: Some(k), sums_to_one, ..claims() };
    check(json!({"type": "task_moe", "tasks": tasks, "k": 2}), moe(2, true));
    check(json!({"type": "task_moe", "tasks": tasks}), moe(1, false));
    let language = RouterClaims { label: "language", ..moe(2, true) };
    check(json!({"type": "task_moe", "tasks": tasks, "k": 2, "label": "language"}), language);
}

#[test]
fn a_sub_network_keeps_the_laws() {
    let part = json!({"modules": [["a", 0.25], ["c", 0.75]], "normalised": true});
    let sites = json!({"site": part, "layer.0.query": part});
    let claims = RouterClaims { at_most: Some(2), ..RouterClaims::fixed() };
    check(json!({"type": "sub_network", "sites": sites}), claims);
}

fn polytropon(tasks: &[&str], skills: &[&str], more: Value) -> Made {
    let mut config = json!({"type": "polytropon", "tasks": tasks});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Made::named(config, skills, 6).unwrap()
}

fn eval(tasks: &[&str]) -> Context {
    Context::eval().with_tasks(tasks)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[test]
fn skills_are_the_sigmoids_of_their_task_made_to_sum_to_one() -> Result<()> {
    let made = polytropon(&["x", "y"], &["a", "b", "c"], json!({}));
    let start = made.store.get("router.logits")?.to_vec::<f64>()?;
    assert!(start.iter().all(|l| l.abs() <= 1e-3) && start.iter().any(|l| *l != 0.0));
    let logits = [0.3, -1.2, 2.0, -0.5, 0.0, 4.0];
    made.set("router.logits", &logits);
    let row = |t: usize| -> Vec<f64> {
        let z: Vec<f64> = logits[3 * t..][..3].iter().map(|l| sigmoid(*l)).collect();
        z.iter().map(|v| v / z.iter().sum::<f64>()).collect()
    };
    let x = normal(&[3, 6], 1);
    let expected = [row(1), row(0), row(1)].concat();
    assert_close(&made.alpha(&x, &eval(&["y", "x", "y"]))?, &expected, 1e-9);
    // Exchanging the tasks' rows of ℓ exchanges their α.
    made.set("router.logits", &[&logits[3..], &logits[..3]].concat());
    assert_close(&made.alpha(&x, &eval(&["x", "y", "x"]))?, &expected, 1e-9);
    // A batch of one task has one α.
    assert_close(&made.alpha(&x, &eval(&["x", "x", "x"]))?, &row(1), 1e-9);
    Ok(())
}

#[test]
fn one_skill_is_a_shared_module_and_z_of_ones_and_zeros_are_private_ones() -> Result<()> {
    let x = normal(&[4, 6], 2);
    let shared = polytropon(&["x", "y"], &["a"], json!({}));
    for cx in
        [eval(&["x", "y", "x", "y"]), Context::train(Seed(3), 0).with_tasks(["x", "y", "y", "x"])]
    {
        assert_close(&shared.alpha(&x, &cx)?, &[1.0; 4], 1e-9);
    }
    // Z = I.
    let private = polytropon(&["x", "y"], &["a", "b"], json!({}));
    private.set("router.logits", &[60.0, -60.0, -60.0, 60.0]);
    for cx in
        [eval(&["y", "x", "x", "y"]), Context::train(Seed(3), 0).with_tasks(["y", "x", "x", "y"])]
    {
        let alpha = private.alpha(&x, &cx)?;
        assert_close(&alpha, &[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0], 1e-9);
    }
    Ok(())
}

#[test]
fn relaxed_skills_are_on_as_often_as_their_sigmoid_says() -> Result<()> {
    // With two skills of which the second is always on, α₁ > ⅓ just where z₁ > ½.
    let n = 4000;
    let x = Tensor::zeros(&[n, 6], Kind::Double, Device::Cpu)?;
    for (logit, temperature) in [(0.8, 1.0), (-1.0, 0.3)] {
        let made = polytropon(&["x"], &["a", "b"], json!({"temperature": temperature}));
        made.set("router.logits", &[logit, 60.0]);
        let cx = Context::train(Seed(9), 0).with_tasks(vec!["x"; n as usize]);
        let alpha = made.alpha(&x, &cx)?;
        let on = alpha.chunks(2).filter(|a| a[0] > 1.0 / 3.0).count() as f64 / n as f64;
        let (p, deviation) = (sigmoid(logit), (0.25 / n as f64).sqrt());
        assert!((on - p).abs() < 3.5 * deviation, "{on} is not {p}");
    }
    Ok(())
}

/// −ln P([Z]) of the training loss for Z as it is rounded, `tasks` by modules.
fn ibp(z: &[&[f64]], a: f64) -> Result<(f64, Vec<f64>)> {
    let names = ["t0", "t1", "t2", "t3"];
    let skills = ["a", "b", "c"];
    let made = polytropon(&names[..z.len()], &skills[..z[0].len()], json!({"ibp": a}));
    let logits: Vec<f64> =
        z.concat().iter().map(|on| if *on == 1.0 { 0.7 } else { -0.7 }).collect();
    made.set("router.logits", &logits);
    let cx = Context::train(Seed(0), 0).with_tasks(["t0"]);
    let routing = made.route(&normal(&[1, 6], 1), &cx)?;
    assert_eq!(routing.losses[0].0, "ibp");
    let g = routing.losses[0].1.gradients(&[made.store.get("router.logits")?], false)?;
    Ok((routing.losses[0].1.item()?, g[0].as_ref().unwrap().to_vec()?))
}

#[test]
fn the_prior_is_what_it_is_by_hand() -> Result<()> {
    let (a, harmonic) = (3.0f64, 1.0 + 1.0 / 2.0 + 1.0 / 3.0);
    // N = 3, m = (2, 2), no equal columns: P = a² e^(−a H₃) (1!·1! ⁄ 3!)².
    let (found, _) = ibp(&[&[1.0, 0.0], &[1.0, 1.0], &[0.0, 1.0]], a)?;
    assert!((found - (-2.0 * a.ln() + a * harmonic + 2.0 * 6f64.ln())).abs() < 1e-10, "{found}");
    // Equal columns are one of two orders: P is divided by 2!.
    let (found, _) = ibp(&[&[1.0, 1.0], &[1.0, 1.0], &[0.0, 0.0]], a)?;
    let expected = -2.0 * a.ln() + a * harmonic + 2.0 * 6f64.ln() + 2f64.ln();
    assert!((found - expected).abs() < 1e-10, "{found}");
    // A column that nobody has counts nothing; m = (1, 3): (2!·0! ⁄ 3!)(0!·2! ⁄ 3!).
    let z: [&[f64]; 3] = [&[1.0, 0.0, 1.0], &[0.0, 0.0, 1.0], &[0.0, 0.0, 1.0]];
    let (found, gradient) = ibp(&z, a)?;
    assert!((found - (-2.0 * a.ln() + a * harmonic + 2.0 * 3f64.ln())).abs() < 1e-10, "{found}");
    // d(−ln P)/dm = ψ(N − m + 1) − ψ(m): ψ(3) − ψ(1) = 3⁄2 for m = 1 and −3⁄2 for m = 3, and
    // dσ/dℓ = σ(1 − σ) straight through the rounding.
    let slope = sigmoid(0.7) * (1.0 - sigmoid(0.7));
    let expected: Vec<f64> =
        [1.5, 0.0, -1.5].iter().map(|g| g * slope).collect::<Vec<_>>().repeat(3);
    assert_close(&gradient, &expected, 1e-9);
    Ok(())
}

#[test]
fn the_prior_is_a_distribution() -> Result<()> {
    // All classes of Z with N = 2 tasks and up to three modules: those with h₁ columns (1, 0), h₂
    // (0, 1) and h₃ (1, 1). With a = 0.2 more than three modules have probability
    // P(K₊ > 3) for K₊ ~ Poisson(a H₂).
    let a: f64 = 0.2;
    let columns = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]];
    let mut sum = 0.0;
    for i in 0..4 {
        for j in i..4 {
            for k in j..4 {
                let z = [0, 1].map(|n| [i, j, k].map(|c: usize| columns[c][n]));
                let (cost, _) = ibp(&[&z[0], &z[1]], a)?;
                sum += (-cost).exp();
            }
        }
    }
    let mean = a * 1.5;
    let expected = (-mean).exp() * (1.0 + mean + mean.powi(2) / 2.0 + mean.powi(3) / 6.0);
    assert!((sum - expected).abs() < 1e-10, "{sum} is not {expected}");
    Ok(())
}

/// Fixed functions: module j has the value v_j.
fn values() -> Tensor {
    t(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], &[3, 3])
}

/// The mean over rows of |Σ αⱼ vⱼ − target|².
fn loss(made: &Made, cx: &Context, target: &Tensor) -> Result<Tensor> {
    let rows = target.len_of(0);
    let routing = made.route(&Tensor::zeros(&[rows, 6], Kind::Double, Device::Cpu)?, cx)?;
    let alpha = routing.dense(Kind::Double, Device::Cpu)?;
    let alpha = if alpha.dim() == 1 { alpha.unsqueeze(0)?.expand(&[rows, -1])? } else { alpha };
    alpha.matmul(&values())?.sub(target)?.square()?.sum_dims(&[-1], false)?.mean()
}

#[test]
fn skills_of_tasks_are_learned() -> Result<()> {
    // Task x is skill a, y is skill c, and z is a and b in equal parts.
    let tasks = ["x", "y", "z"];
    let target = t(&[1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.0], &[3, 3]);
    for (config, rate) in [
        (json!({"type": "polytropon", "tasks": tasks}), 5.0),
        (json!({"type": "multi_head", "heads": 2, "tasks": tasks}), 10.0),
    ] {
        let made = Made::named(config, &["a", "b", "c"], 6)?;
        let before = loss(&made, &eval(&tasks), &target)?.item()?;
        for step in 0..600 {
            let cx = Context::train(Seed(1), step).with_tasks(tasks);
            made.descend(&loss(&made, &cx, &target)?, rate)?;
        }
        let after = loss(&made, &eval(&tasks), &target)?.item()?;
        assert!(after < 0.02 * before, "{before} → {after}");
        let alpha = made.alpha(&normal(&[3, 6], 1), &eval(&tasks))?;
        assert_close(&alpha, &target.to_vec::<f64>()?, 0.1);
    }
    Ok(())
}

#[test]
fn heads_have_skills_of_their_own_and_one_head_is_polytropon() -> Result<()> {
    let tasks = json!(["x", "y"]);
    let x = normal(&[3, 6], 1);
    let names = ["x", "y", "x"];
    let one =
        Made::named(json!({"type": "multi_head", "heads": 1, "tasks": tasks}), &["a", "b"], 6)?;
    let plain = polytropon(&["x", "y"], &["a", "b"], json!({}));
    for made in [&one, &plain] {
        made.set("router.logits", &[0.5, -0.3, 1.0, 2.0]);
    }
    for cx in [eval(&names), Context::train(Seed(2), 1).with_tasks(names)] {
        assert_eq!(one.alpha(&x, &cx)?, plain.alpha(&x, &cx)?);
    }
    let two =
        Made::named(json!({"type": "multi_head", "heads": 2, "tasks": tasks}), &["a", "b"], 6)?;
    let logits = [0.5, -0.3, 1.0, 2.0, -1.0, 0.2, 0.0, 0.7];
    two.set("router.logits", &logits);
    let share = |t: usize, q: usize, j: usize| {
        let z = |j: usize| sigmoid(logits[4 * t + 2 * q + j]);
        z(j) / (z(0) + z(1))
    };
    let routing = two.route(&x, &eval(&names))?;
    let mut expected = Vec::new();
    for t in [0, 1, 0] {
        for q in 0..2 {
            expected.extend((0..2).map(|j| share(t, q, j)));
        }
    }
    assert_close(&routing.heads.as_ref().unwrap().to_vec::<f64>()?, &expected, 1e-9);
    let means: Vec<f64> =
        expected.chunks(4).flat_map(|h| [(h[0] + h[2]) / 2.0, (h[1] + h[3]) / 2.0]).collect();
    assert_close(&two.alpha(&x, &eval(&names))?, &means, 1e-9);
    // The heads go with their rows.
    let last = routing.select_rows(&[1])?.heads.unwrap();
    assert_close(&last.to_vec::<f64>()?, &expected[4..8], 1e-9);
    Ok(())
}

#[test]
fn a_new_skill_leaves_what_was_learned() -> Result<()> {
    let mut made = polytropon(&["x", "y"], &["a", "b"], json!({}));
    let logits = [0.5, -0.3, 1.0, 2.0];
    made.set("router.logits", &logits);
    let mut scope =
        modl_core::Scope::at(&mut made.store, "router", Seed(1)).on(Kind::Double, Device::Cpu);
    made.router = made.router.grown(3, &mut scope)?;
    let grown = made.store.get("router.logits")?;
    assert_eq!(grown.size(), [2, 1, 3]);
    let grown = grown.to_vec::<f64>()?;
    assert_eq!([&grown[..2], &grown[3..5]].concat(), logits);
    assert!(grown[2].abs() <= 1e-3 && grown[5].abs() <= 1e-3);
    Ok(())
}

#[test]
fn task_moe_is_the_top_of_the_softmax_of_its_tasks_embedding() -> Result<()> {
    let made = Made::named(
        json!({"type": "task_moe", "tasks": ["x", "y"], "k": 2, "width": 2}),
        &["a", "b", "c"],
        6,
    )?;
    made.set("router.embedding", &[1.0, 0.5, -1.0, 2.0]);
    made.set("router.weight", &[1.0, 0.0, 0.3, 1.0, -2.0, 0.1]);
    // x: (1, 0.8, −1.95), y: (−1, 1.7, 2.2).
    let pair = |a: f64, b: f64| (a.exp() / (a.exp() + b.exp()), b.exp() / (a.exp() + b.exp()));
    let (xa, xb) = pair(1.0, 0.8);
    let (yb, yc) = pair(1.7, 2.2);
    let expected = [0.0, yb, yc, xa, xb, 0.0];
    let x = normal(&[2, 6], 1);
    assert_close(&made.alpha(&x, &eval(&["y", "x"]))?, &expected, 1e-12);
    // f = ½ of one choice for a, c and of both for b, P the mean of the two softmaxes.
    let routing = made.route(&x, &Context::train(Seed(0), 0).with_tasks(["y", "x"]))?;
    let softmax = |l: [f64; 3]| l.map(|v| v.exp() / l.iter().map(|v| v.exp()).sum::<f64>());
    let (px, py) = (softmax([1.0, 0.8, -1.95]), softmax([-1.0, 1.7, 2.2]));
    let f = [0.25, 0.5, 0.25];
    let balance: f64 = 3.0 * (0..3).map(|j| f[j] * (px[j] + py[j]) / 2.0).sum::<f64>();
    assert_eq!(routing.losses[0].0, "balance");
    assert!((routing.losses[0].1.item()? - balance).abs() < 1e-12);
    Ok(())
}

#[test]
fn experts_of_tasks_are_learned() -> Result<()> {
    let tasks = ["x", "y", "z"];
    // Each task has two experts of three; which parts they have is to be learned.
    let made =
        Made::named(json!({"type": "task_moe", "tasks": tasks, "k": 2}), &["a", "b", "c"], 6)?;
    let chosen = made.chosen(&normal(&[3, 6], 1), &eval(&tasks))?;
    let mut target = [0.0; 9];
    for (t, own) in chosen.chunks(2).enumerate() {
        target[3 * t + own[0] as usize] = 0.1;
        target[3 * t + own[1] as usize] = 0.9;
    }
    let target = t(&target, &[3, 3]);
    let before = loss(&made, &eval(&tasks), &target)?.item()?;
    for step in 0..300 {
        let cx = Context::train(Seed(1), step).with_tasks(tasks);
        made.descend(&loss(&made, &cx, &target)?, 1.0)?;
    }
    let after = loss(&made, &eval(&tasks), &target)?.item()?;
    assert!(after < 0.05 * before, "{before} → {after}");
    Ok(())
}

const EXPERTS: [&str; 6] = ["e0", "e1", "e2", "e3", "e4", "e5"];

fn mixture(names: &[&str], module: &dyn Fn() -> Box<dyn ModuleConfig>) -> Result<Modular> {
    let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Float)?, Seed(2))?;
    for name in names {
        model.attach(name, module(), &Targets::names(["query", "value"]))?;
    }
    model.aggregate(Box::new(Sum::default()))?;
    perturb(&model, &Select::new("modules.*"), 0.5, Seed(3))?;
    Ok(model)
}

fn task_moe(k: usize, renormalise: bool) -> Box<dyn RouterConfig> {
    let labels =
        TaskLabels { tasks: ["x", "y", "z"].map(String::from).to_vec(), ..TaskLabels::default() };
    Box::new(TaskMoe { labels, k, renormalise: Some(renormalise), ..TaskMoe::default() })
}

#[test]
fn what_a_task_uses_gives_its_outputs_without_the_rest() -> Result<()> {
    let scale = || Box::new(standins::Scale) as Box<dyn ModuleConfig>;
    let inputs = TinyBackbone::inputs(4, 6, Seed(5))?;
    for (k, renormalise) in [(1, false), (2, true), (2, false)] {
        for global in [false, true] {
            let mut full = mixture(&EXPERTS, &scale)?;
            full.route(task_moe(k, renormalise), global)?;
            for task in ["x", "y", "z"] {
                let cx = eval(&[task; 4]);
                let expected = full.forward(&inputs, &cx)?.need("logits")?.copy()?;
                let part = SubNetwork::of(&full, &eval(&[task]))?;
                let used: Vec<&str> = part.modules().into_iter().collect();
                assert!(used.len() <= if global { k } else { 2 * k });
                // A model that never had the others.
                let mut small = mixture(&used, &scale)?;
                for name in &used {
                    for (path, t) in full.params().select(&Select::new(format!("modules.{name}.*")))
                    {
                        let mut own = small.params().get(path)?.clone();
                        no_grad(|| own.copy_from(t))?;
                    }
                }
                small.route(Box::new(part.clone()), false)?;
                // No label is needed any more.
                let found = small.forward(&inputs, &Context::eval())?.need("logits")?.copy()?;
                assert!(found.bit_equal(&expected)?, "{task} {k} {renormalise}");
                let base = full.forward_base(&inputs, &Context::eval())?.need("logits")?.copy()?;
                assert!(!found.bit_equal(&base)?);
            }
        }
    }
    Ok(())
}

#[test]
fn tasks_use_different_parts_and_a_router_that_looks_at_x_has_none() -> Result<()> {
    let scale = || Box::new(standins::Scale) as Box<dyn ModuleConfig>;
    let mut full = mixture(&EXPERTS, &scale)?;
    full.route(task_moe(1, false), false)?;
    let parts: BTreeSet<String> = ["x", "y", "z"]
        .iter()
        .map(|task| format!("{:?}", SubNetwork::of(&full, &eval(&[task])).unwrap().modules()))
        .collect();
    assert!(parts.len() > 1, "{parts:?}");
    let e = SubNetwork::of(&full, &eval(&["w"])).unwrap_err();
    assert!(e.to_string().contains("`w`"), "{e}");
    full.route(Box::new(Soft::default()), false)?;
    perturb(&full, &Select::new("routers.*"), 0.5, Seed(3))?;
    assert!(matches!(SubNetwork::of(&full, &eval(&["x"])), Err(Error::Unsupported { .. })));
    Ok(())
}

#[test]
fn settings_out_of_range_and_unknown_tasks_are_refused() {
    let refused = |config: Value, words: &str| {
        let e = Made::named(config, &["a", "b"], 6).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    };
    refused(json!({"type": "polytropon"}), "polytropon.tasks");
    refused(json!({"type": "polytropon", "tasks": ["x", "x"]}), "`x` twice");
    refused(
        json!({"type": "polytropon", "tasks": ["x"], "temperature": 0.0}),
        "polytropon.temperature",
    );
    refused(json!({"type": "polytropon", "tasks": ["x"], "ibp": 0.0}), "polytropon.ibp");
    refused(json!({"type": "multi_head", "tasks": ["x"], "heads": 0}), "multi_head.heads");
    refused(json!({"type": "multi_head", "tasks": ["x"], "taks": 0}), "taks");
    refused(json!({"type": "task_moe", "tasks": ["x"], "k": 3}), "2 modules");
    refused(json!({"type": "task_moe", "tasks": ["x"], "init_std": 0.0}), "task_moe.init_std");
    refused(json!({"type": "sub_network"}), "`site`");
    for kind in ["polytropon", "multi_head", "task_moe"] {
        let made = Made::named(json!({"type": kind, "tasks": ["tweets", "news"]}), &["a", "b"], 6)
            .unwrap();
        let e = made.route(&normal(&[1, 6], 1), &eval(&["tweet"])).unwrap_err();
        assert!(matches!(&e, Error::Unknown { nearest: Some(n), .. } if n == "tweets"), "{e}");
        let e = made.route(&normal(&[2, 6], 1), &eval(&["tweets"])).unwrap_err().to_string();
        assert!(e.contains("1 names for 2 rows"), "{e}");
    }
}
