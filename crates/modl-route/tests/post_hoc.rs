//! Routers over modules that were trained each on its own, against arithmetic in f64, and Arrow
//! against numpy's singular vectors and PEFT's outputs.

#![allow(clippy::unwrap_used, clippy::panic)]

mod made;

use made::{Made, assert_close, dot, normal, rule_data, softmax, sparse, t, top};
use modl_core::testing::{RouterClaims, check_router};
use modl_core::{
    Bank, Context, Device, Kind, LowRank, Module, Registry, Result, Routing, Seed, Tensor, Weights,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn train() -> Context {
    Context::train(Seed(3), 0)
}

fn laws(config: Value, claims: RouterClaims) -> Result<()> {
    let registry = Registry::new().with(modl_route::register)?;
    registry.routers.parse(&config)?;
    check_router(&|| registry.routers.parse(&config).unwrap(), &claims, &registry);
    Ok(())
}

fn refused(config: Value, words: &str) {
    let e = Made::new(config, 3, 8).err().unwrap().to_string();
    assert!(e.contains(words), "{e}");
}

// Arrow

#[test]
fn arrow_keeps_the_laws_of_routing() -> Result<()> {
    let claims = |k| RouterClaims { learns: false, ..RouterClaims::top_k(k) };
    laws(json!({"type": "arrow"}), claims(3))?;
    laws(json!({"type": "arrow", "k": 2, "temperature": 0.3}), claims(2))?;
    laws(json!({"type": "arrow", "k": 1, "input": "mean"}), claims(1))
}

fn module(rank: i64, width: i64, out: i64, seed: u64) -> LowRank {
    LowRank { down: normal(&[rank, width], seed), up: normal(&[out, rank], seed + 1), scale: 0.5 }
}

fn prototypes(modules: Vec<LowRank>, width: i64) -> Vec<Vec<f64>> {
    let made = Made::over(json!({"type": "arrow", "k": 1}), modules, width).unwrap();
    let all = made.get("router.prototypes");
    all.chunks(width as usize).map(<[f64]>::to_vec).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// v is the direction that ΔW changes most: |v| = 1, ΔWᵀΔW v = σ² v, and no direction that is
    /// met by the power iteration from any start is stretched more.
    #[test]
    fn a_prototype_is_the_top_right_singular_vector(
        rank in 1i64..7, width in 1i64..6, out in 1i64..6, seed in 0u64..1000,
    ) {
        let low = module(rank, width, out, seed);
        let v = prototypes(vec![low.clone()], width).remove(0);
        let (r, w, o) = (rank as usize, width as usize, out as usize);
        let (a, b) = (low.down.to_vec::<f64>().unwrap(), low.up.to_vec::<f64>().unwrap());
        let delta = |i: usize, j: usize| (0..r).map(|k| b[i * r + k] * a[k * w + j]).sum::<f64>();
        let square = |v: &[f64]| -> Vec<f64> {
            let y: Vec<f64> = (0..o).map(|i| (0..w).map(|j| delta(i, j) * v[j]).sum()).collect();
            (0..w).map(|j| (0..o).map(|i| delta(i, j) * y[i]).sum()).collect()
        };
        prop_assert!((dot(&v, &v) - 1.0).abs() < 1e-12);
        let image = square(&v);
        let sigma = dot(&image, &v);
        assert_close(&image, &v.iter().map(|x| sigma * x).collect::<Vec<_>>(), 1e-10 * sigma.max(1.0));
        for start in 0..w {
            let mut u = vec![0.1; w];
            u[start] = 1.0;
            for _ in 0..500 {
                u = square(&u);
                let norm = dot(&u, &u).sqrt();
                u.iter_mut().for_each(|x| *x /= norm);
            }
            prop_assert!(dot(&square(&u), &u) < sigma * (1.0 + 1e-9));
        }
    }
}

#[test]
fn arrow_is_a_softmax_of_the_k_largest_products() -> Result<()> {
    let (width, k, tau) = (5, 2, 0.7);
    let modules: Vec<LowRank> = (0..4).map(|j| module(2, width, 5, 10 * j)).collect();
    let config = json!({"type": "arrow", "k": k, "temperature": tau});
    let made = Made::over(config, modules.clone(), width)?;
    let v = prototypes(modules, width);
    let x = normal(&[2, 3, width], 4);
    let mut expected = Vec::new();
    for token in x.to_vec::<f64>()?.chunks(width as usize) {
        let scores: Vec<f64> = v.iter().map(|v| dot(v, token).abs()).collect();
        let kept = top(&scores, k);
        let weights = softmax(&kept.iter().map(|j| scores[*j] / tau).collect::<Vec<_>>());
        let at = |j| kept.iter().position(|kept| *kept == j).map_or(0.0, |place| weights[place]);
        expected.extend((0..4).map(at));
    }
    assert_close(&made.alpha(&x, &Context::eval())?, &expected, 1e-12);
    // A singular vector has no sign.
    assert_close(&made.alpha(&x.neg()?, &train())?, &expected, 1e-12);
    Ok(())
}

/// Numbers by `tests/python/make_arrow_golden.py`.
#[test]
fn arrow_agrees_with_numpy_and_peft() -> Result<()> {
    let golden: Value = serde_json::from_str(include_str!("fixtures/arrow.json")).unwrap();
    let numbers = |v: &Value| -> Vec<f64> {
        v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let of = |key: &str| golden[key].as_array().unwrap();
    let (width, rank, out) = (6, 3, 5);
    let modules: Vec<LowRank> = of("down")
        .iter()
        .zip(of("up"))
        .zip(of("scale"))
        .map(|((down, up), scale)| LowRank {
            down: t(&numbers(down), &[rank, width]),
            up: t(&numbers(up), &[out, rank]),
            scale: scale.as_f64().unwrap(),
        })
        .collect();
    for (v, expected) in prototypes(modules.clone(), width).iter().zip(of("numpy")) {
        let expected = numbers(expected);
        let sign = dot(v, &expected).signum();
        assert_close(v, &expected.iter().map(|x| sign * x).collect::<Vec<_>>(), 1e-12);
    }
    let config = json!({"type": "arrow", "k": 2, "temperature": golden["temperature"]});
    let made = Made::over(config, modules.clone(), width)?;
    let x = numbers(&golden["x"]);
    let n = x.len() as i64 / width;
    let alpha = made.alpha(&t(&x, &[1, n, width]), &Context::eval())?;
    let mut delta = vec![0.0; (n * out) as usize];
    for (token, row) in alpha.chunks(modules.len()).enumerate() {
        for (alpha, module) in row.iter().zip(&modules) {
            let x = t(&x[token * width as usize..][..width as usize], &[1, width]);
            let h = module.apply(&x)?.to_vec::<f64>()?;
            let y = &mut delta[token * out as usize..][..out as usize];
            y.iter_mut().zip(h).for_each(|(y, h)| *y += alpha * h);
        }
    }
    // PEFT computes in f32, and its prototypes are approximate.
    assert_close(&delta, &numbers(&golden["peft"]), 2e-5);
    Ok(())
}

/// A module that is no low-rank product.
#[derive(Debug)]
struct Whole;

impl Module for Whole {
    fn kind(&self) -> &'static str {
        "whole"
    }
}

#[test]
fn arrow_wants_low_rank_modules_and_takes_ones_that_change_nothing() -> Result<()> {
    let mut bank = Bank::new();
    bank.insert("thin", Box::new(module(2, 4, 4, 1)))?;
    bank.insert("big", Box::new(Whole))?;
    let e = Made::with_bank(json!({"type": "arrow", "k": 1}), bank, 4).err().unwrap().to_string();
    assert!(e.contains("`big`") && e.contains("`whole`") && e.contains("lora"), "{e}");

    let fresh =
        LowRank { up: Tensor::zeros(&[4, 2], Kind::Double, Device::Cpu)?, ..module(2, 4, 4, 1) };
    let made = Made::over(json!({"type": "arrow", "k": 1}), vec![fresh, module(2, 4, 4, 7)], 4)?;
    assert_eq!(made.get("router.prototypes")[..4], [0.0; 4]);
    assert_eq!(sparse(&made.route(&normal(&[1, 5, 4], 3), &train())?).0, [1; 5]);

    let broken = LowRank { down: normal(&[2, 4], 1).mul_scalar(f64::NAN)?, ..module(2, 4, 4, 1) };
    let e = Made::over(json!({"type": "arrow", "k": 1}), vec![broken], 4).err().unwrap();
    assert!(e.to_string().contains("`m0`"), "{e}");
    refused(json!({"type": "arrow", "k": 4}), "3 modules");
    refused(json!({"type": "arrow", "temperature": 0.0}), "arrow.temperature");
    Ok(())
}

/// Each module of a library was trained on inputs in a direction of its own.
#[test]
fn arrow_finds_the_module_that_was_trained_on_such_inputs() -> Result<()> {
    let (rules, width) = (4, 16);
    let mut modules = Vec::new();
    let (x, rule) = rule_data(rules, 200, width, 1);
    let tokens: Vec<Vec<f64>> = x.to_vec::<f64>()?.chunks(width).map(<[f64]>::to_vec).collect();
    for r in 0..rules {
        // Fits y = c for the tokens of one rule by gradient descent on both factors.
        let mine: Vec<f64> =
            (0..tokens.len()).filter(|i| rule[*i] == r).flat_map(|i| tokens[i].clone()).collect();
        let x = t(&mine, &[-1, width as i64]);
        let target = normal(&[1, 6], 50 + r as u64);
        let mut down = normal(&[2, width as i64], 60 + r as u64).mul_scalar(0.2)?;
        let mut up = Tensor::zeros(&[6, 2], Kind::Double, Device::Cpu)?;
        for _ in 0..400 {
            down.set_requires_grad(true)?;
            up.set_requires_grad(true)?;
            let y = x.linear(&down, None)?.linear(&up, None)?;
            let loss = y.sub(&target)?.square()?.mean()?;
            let g = loss.gradients(&[&down, &up], false)?;
            let step = |p: &Tensor, g: &Option<Tensor>| {
                p.detach()?.sub(&g.as_ref().unwrap().mul_scalar(0.05)?)
            };
            (down, up) = (step(&down, &g[0])?, step(&up, &g[1])?);
        }
        modules.push(LowRank { down, up, scale: 1.0 });
    }
    let made = Made::over(json!({"type": "arrow", "k": 1}), modules, width as i64)?;
    let (x, rule) = rule_data(rules, 200, width, 2);
    let (index, _) = sparse(&made.route(&x, &Context::eval())?);
    let right = index.iter().zip(&rule).filter(|(j, r)| **j == **r as i64).count();
    assert!(right >= 180, "{right} of 200");
    Ok(())
}

// PHATGOOSE

#[test]
fn phatgoose_keeps_the_laws_of_routing() -> Result<()> {
    let tasks = vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
    let told = |claims: RouterClaims| RouterClaims { tasks: tasks.clone(), ..claims };
    laws(json!({"type": "phatgoose"}), told(RouterClaims::top_k(2)))?;
    laws(json!({"type": "phatgoose", "phase": "route", "k": 3}), RouterClaims::top_k(3))?;
    let gate = RouterClaims { sums_to_one: false, ..told(RouterClaims::top_k(1)) };
    laws(json!({"type": "phatgoose", "phase": "gate"}), gate.clone())?;
    laws(json!({"type": "phatgoose", "phase": "gate", "input": "mean"}), gate)
}

#[test]
fn a_gate_is_trained_with_its_own_module_alone() -> Result<()> {
    let made = Made::new(json!({"type": "phatgoose"}), 3, 4)?;
    let v = normal(&[3, 4], 2).to_vec::<f64>()?;
    made.set("router.weight", &v);
    let x = normal(&[2, 2, 4], 3);
    let routing = made.route(&x, &train().with_tasks(["m2", "m0"]))?;
    assert!(!routing.normalised);
    let (index, weight) = sparse(&routing);
    assert_eq!(index, [2, 2, 0, 0]);
    let flat = x.to_vec::<f64>()?;
    let gate = |(token, j): (usize, &i64)| {
        1.0 / (1.0 + (-dot(&flat[token * 4..][..4], &v[*j as usize * 4..][..4])).exp())
    };
    assert_close(&weight, &index.iter().enumerate().map(gate).collect::<Vec<_>>(), 1e-12);
    let Weights::Sparse { weight, .. } = &routing.weights else { panic!() };
    let g = weight.sum()?.gradients(&[made.store.get("router.weight")?], false)?;
    let g = g[0].as_ref().unwrap().to_vec::<f64>()?;
    assert_eq!(g[4..8], [0.0; 4]);
    assert!(g[..4].iter().chain(&g[8..]).all(|g| *g != 0.0));

    let e = made.route(&x, &train().with_tasks(["m2", "m9"])).unwrap_err().to_string();
    assert!(e.contains("m9"), "{e}");
    assert!(made.route(&x, &train()).unwrap_err().to_string().contains("with_tasks"));
    assert!(made.route(&x, &train().with_tasks(["m2"])).is_err());
    Ok(())
}

fn standard(v: &[f64]) -> Vec<f64> {
    let n = v.len() as f64;
    let mean = v.iter().sum::<f64>() / n;
    let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    v.iter().map(|x| (x - mean) / (var + 1e-5).sqrt()).collect()
}

#[test]
fn phatgoose_routes_by_standardised_gates() -> Result<()> {
    let (m, width) = (4, 6usize);
    let made = Made::new(json!({"type": "phatgoose", "k": 2}), m, width as i64)?;
    let v = normal(&[m as i64, width as i64], 2).to_vec::<f64>()?;
    made.set("router.weight", &v);
    let x = normal(&[2, 3, width as i64], 3);
    let mut expected = Vec::new();
    for token in x.to_vec::<f64>()?.chunks(width) {
        let x = standard(token);
        let score = |v: &[f64]| dot(&standard(v), &x) / (width as f64).sqrt();
        let scores: Vec<f64> = v.chunks(width).map(score).collect();
        let kept = top(&scores, 2);
        let weights = softmax(&kept.iter().map(|j| scores[*j]).collect::<Vec<_>>());
        let at = |j| kept.iter().position(|kept| *kept == j).map_or(0.0, |place| weights[place]);
        expected.extend((0..m).map(at));
    }
    assert_close(&made.alpha(&x, &Context::eval())?, &expected, 1e-10);
    // How long a gate is, or x, and a shift of all components: no matter.
    let other = x.mul_scalar(3.0)?.add_scalar(2.0)?;
    made.set("router.weight", &v.iter().map(|v| 5.0 * v - 1.0).collect::<Vec<_>>());
    assert_close(&made.alpha(&other, &Context::eval())?, &expected, 1e-4);
    refused(json!({"type": "phatgoose", "k": 4}), "3 modules");
    refused(json!({"type": "phatgoose", "phase": "gates"}), "gate");
    Ok(())
}

/// Gates that were trained one task after the other, each without the others, tell mixed tokens
/// apart.
#[test]
fn gates_that_never_met_route_to_the_right_module() -> Result<()> {
    let (rules, width, n) = (4, 16, 32);
    let made = Made::new(json!({"type": "phatgoose", "k": 1}), rules, width)?;
    for rule in 0..rules {
        let mut losses = Vec::new();
        for step in 0..60 {
            let (x, of) = rule_data(rules, n * rules, width as usize, step);
            let mine: Vec<i64> =
                (0..).zip(&of).filter(|(_, r)| **r == rule).map(|(i, _)| i).collect();
            let mine = Tensor::from_slice(&mine, &[mine.len() as i64], Device::Cpu)?;
            let x = x.index_select(1, &mine)?;
            let cx = Context::train(Seed(1), step).with_tasks([format!("m{rule}")]);
            // The module is right, and so y = σ·h is to be h: the loss is (1 − σ)².
            let alpha = made.route(&x, &cx)?.dense(Kind::Double, Device::Cpu)?;
            let loss = alpha.select(-1, rule as i64)?.neg()?.add_scalar(1.0)?.square()?.mean()?;
            made.descend_by(&["router.weight"], &loss, 0.5)?;
            losses.push(loss.item()?);
        }
        assert!(losses[59] < 0.1 * losses[0], "{losses:?}");
    }
    let (x, rule) = rule_data(rules, 200, width as usize, 1000);
    let (index, _) = sparse(&made.route(&x, &Context::eval())?);
    let right = index.iter().zip(&rule).filter(|(j, r)| **j == **r as i64).count();
    assert!(right >= 195, "{right} of 200");
    Ok(())
}

// X-LoRA

#[test]
fn x_lora_keeps_the_laws_of_routing() -> Result<()> {
    let reads = |claims: RouterClaims, shape: &[i64]| RouterClaims {
        features: vec![("hidden".into(), shape.to_vec())],
        ..claims
    };
    let tokens = |claims| reads(claims, &[5, 8]);
    laws(json!({"type": "x_lora"}), tokens(RouterClaims::soft()))?;
    laws(json!({"type": "x_lora"}), reads(RouterClaims::soft(), &[8]))?;
    let raw = |claims| RouterClaims { sums_to_one: false, ..tokens(claims) };
    laws(
        json!({"type": "x_lora", "softmax": false, "depth": 2, "size": 6}),
        raw(RouterClaims::soft()),
    )?;
    laws(json!({"type": "x_lora", "k": 2}), raw(RouterClaims::top_k(2)))?;
    let own = json!({"type": "x_lora", "k": 2, "softmax": false, "softmax_k": true});
    laws(own, tokens(RouterClaims::top_k(2)))?;
    let dropped = json!({"type": "x_lora", "depth": 3, "size": 16, "relu": true});
    laws(dropped, RouterClaims { draws: true, ..tokens(RouterClaims::soft()) })
}

const WIDTH: usize = 5;
const SIZE: usize = 7;
const MODULES: usize = 4;

/// The network in plain numbers.
fn network(made: &Made, depth: usize, relu: bool, h: &[f64]) -> Vec<f64> {
    let mut h = h.to_vec();
    for layer in 0..depth {
        if layer > 0 && relu {
            h.iter_mut().for_each(|v| *v = v.max(0.0));
        }
        let of = |part: &str| made.get(&format!("router.layers.{layer}.{part}"));
        let (w, b) = (of("weight"), of("bias"));
        h = w.chunks(h.len()).zip(b).map(|(w, b)| dot(w, &h) + b).collect();
    }
    h
}

#[test]
fn x_lora_is_its_network_and_softmax() -> Result<()> {
    let hidden = normal(&[2, 3, WIDTH as i64], 5);
    let x = normal(&[2, 3, 9], 6);
    let cx = Context::eval().with_feature("hidden", hidden.clone());
    let run = |extra: Value| -> Result<(Made, Routing)> {
        let mut config = json!({"type": "x_lora", "width": WIDTH, "size": SIZE});
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let made = Made::new(config, MODULES, 9)?;
        let routing = made.route(&x, &cx)?;
        Ok((made, routing))
    };
    let check = |extra: Value, depth, relu, alpha: &dyn Fn(&[f64]) -> Vec<f64>| -> Result<()> {
        let (made, routing) = run(extra)?;
        let tokens = hidden.to_vec::<f64>()?;
        let expected = tokens.chunks(WIDTH).flat_map(|h| alpha(&network(&made, depth, relu, h)));
        let found = routing.dense(Kind::Double, Device::Cpu)?.to_vec::<f64>()?;
        assert_close(&found, &expected.collect::<Vec<_>>(), 1e-12);
        Ok(())
    };
    let scaled = |s: &[f64], by: f64| s.iter().map(|s| by * s).collect::<Vec<_>>();
    let keep = |s: &[f64], k: usize| -> Vec<f64> {
        let kept = top(s, k);
        (0..s.len()).map(|j| if kept.contains(&j) { s[j] } else { 0.0 }).collect()
    };
    check(json!({}), 1, false, &softmax)?;
    check(json!({"temperature": 0.2}), 1, false, &|s| softmax(&scaled(s, 5.0)))?;
    check(json!({"depth": 3, "relu": true}), 3, true, &softmax)?;
    check(json!({"depth": 2, "softmax": false, "scale": 2.0}), 2, false, &|s| scaled(s, 2.0))?;
    check(json!({"k": 2}), 1, false, &|s| keep(&softmax(s), 2))?;
    check(json!({"k": 2, "softmax": false}), 1, false, &|s| keep(s, 2))?;
    check(json!({"k": 2, "softmax": false, "softmax_k": true}), 1, false, &|s| {
        let kept = top(s, 2);
        let p = softmax(&[s[kept[0]], s[kept[1]]]);
        (0..s.len()).map(|j| kept.iter().position(|k| *k == j).map_or(0.0, |at| p[at])).collect()
    })?;
    let (_, routing) = run(json!({"k": 1}))?;
    assert_eq!(routing.noted.need("scalings")?.size(), [2, 3, MODULES as i64]);
    assert!(!routing.normalised && run(json!({}))?.1.normalised);
    assert!(!run(json!({"scale": 0.5}))?.1.normalised);
    Ok(())
}

#[test]
fn x_lora_says_what_is_wrong_with_its_feature() -> Result<()> {
    let made = Made::new(json!({"type": "x_lora"}), 3, 8)?;
    let x = normal(&[2, 3, 8], 1);
    let e = |cx: Context| made.route(&x, &cx).unwrap_err().to_string();
    let with = |shape: &[i64]| Context::eval().with_feature("hidden", normal(shape, 2));
    assert!(e(Context::eval()).contains("with_feature"));
    assert!(e(with(&[2, 3, 5])).contains("width"));
    assert!(e(with(&[1, 3, 8])).contains("hidden"));
    let bad = normal(&[2, 3, 8], 2).mul_scalar(f64::NAN)?;
    assert!(e(Context::eval().with_feature("hidden", bad)).contains("x_lora"));
    refused(json!({"type": "x_lora", "depth": 0}), "x_lora.depth");
    refused(json!({"type": "x_lora", "k": 4}), "3 modules");
    refused(json!({"type": "x_lora", "k": 2, "softmax_k": true}), "softmax = false");
    refused(json!({"type": "x_lora", "dropout": 1.0}), "x_lora.dropout");
    refused(json!({"type": "x_lora", "temperature": 0.0}), "x_lora.temperature");
    refused(json!({"type": "x_lora", "size": 0}), "x_lora.size");
    Ok(())
}

#[test]
fn x_lora_learns_which_module_is_right() -> Result<()> {
    let (rules, n) = (4, 64);
    let made =
        Made::new(json!({"type": "x_lora", "depth": 2, "size": 16, "relu": true}), rules, 8)?;
    let c = Tensor::eye(rules as i64, Kind::Double, Device::Cpu)?;
    let run = |cx: Context, seed: u64| -> Result<(Tensor, Vec<f64>, Vec<usize>)> {
        let (h, rule) = rule_data(rules, n, 8, seed);
        let routing = made.route(&h.zeros_like()?, &cx.with_feature("hidden", h))?;
        let of: Vec<i64> = rule.iter().map(|r| *r as i64).collect();
        let target = c.index_select(0, &Tensor::from_slice(&of, &[n as i64], Device::Cpu)?)?;
        let alpha = routing.dense(Kind::Double, Device::Cpu)?.squeeze(0)?;
        Ok((alpha.matmul(&c)?.mse(&target)?, alpha.to_vec()?, rule))
    };
    let first = run(Context::eval(), 1000)?.0.item()?;
    for step in 0..300 {
        let (loss, _, _) = run(Context::train(Seed(1), step), step)?;
        made.descend_by(&["router.layers.0.weight", "router.layers.1.weight"], &loss, 0.5)?;
    }
    let (loss, alpha, rule) = run(Context::eval(), 1000)?;
    let right = alpha.chunks(rules).zip(&rule).filter(|(a, r)| top(a, 1)[0] == **r).count();
    assert!(right == n && loss.item()? < 0.2 * first, "{right} of {n}");
    Ok(())
}
