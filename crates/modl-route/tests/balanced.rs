//! Balanced routing: the assignment against all assignments and against a certificate, BASE and
//! S-BASE against their formulas.

#![allow(clippy::unwrap_used, clippy::panic)]

mod made;

use made::{Made, assert_close, dot, normal, rule_data, softmax, sparse, t, top};
use modl_core::testing::{RouterClaims, Sum, check_router};
use modl_core::{
    AggregatorConfig, Context, Error, Host, Kind, ModularLayer, ParamStore, Registry, Result,
    Scope, Seed, Signal, Site, SiteKind, Tensor, Tensors,
};
use modl_route::balanced_assignment;
use proptest::prelude::*;
use serde_json::{Value, json};

fn train() -> Context {
    Context::train(Seed(3), 0)
}

fn total(affinity: &[f64], modules: usize, owner: &[usize]) -> f64 {
    owner.iter().enumerate().map(|(token, e)| affinity[token * modules + e]).sum()
}

fn loads(owner: &[usize], modules: usize) -> Vec<usize> {
    let mut loads = vec![0; modules];
    owner.iter().for_each(|e| loads[*e] += 1);
    loads
}

fn are_balanced(loads: &[usize]) -> bool {
    let n: usize = loads.iter().sum();
    loads.iter().all(|l| (n / loads.len()..=n.div_ceil(loads.len())).contains(l))
}

/// The largest total of all assignments with even loads, and the largest one of the others.
fn by_trying(affinity: &[f64], modules: usize) -> (f64, Vec<usize>, f64) {
    let tokens = affinity.len() / modules;
    let (mut best, mut second) = ((f64::NEG_INFINITY, Vec::new()), f64::NEG_INFINITY);
    let mut owner = vec![0; tokens];
    loop {
        if are_balanced(&loads(&owner, modules)) {
            let own = total(affinity, modules, &owner);
            if own > best.0 {
                second = best.0;
                best = (own, owner.clone());
            } else if own > second {
                second = own;
            }
        }
        let Some(next) = owner.iter().rposition(|e| e + 1 < modules) else { break };
        owner[next] += 1;
        owner[next + 1..].fill(0);
    }
    (best.0, best.1, second)
}

/// Whether no exchange of tokens along a cycle of modules gains anything, which is so exactly where
/// an assignment is the best one for its loads.
fn no_exchange_gains(affinity: &[f64], m: usize, owner: &[usize]) -> bool {
    let mut d = vec![f64::INFINITY; m * m];
    for (token, a) in owner.iter().enumerate() {
        for b in 0..m {
            // A little more than is lost, so that rounding makes no cycle that gains.
            let loss = affinity[token * m + a] - affinity[token * m + b] + 1e-10;
            d[a * m + b] = d[a * m + b].min(loss);
        }
    }
    for via in 0..m {
        for a in 0..m {
            for b in 0..m {
                d[a * m + b] = d[a * m + b].min(d[a * m + via] + d[via * m + b]);
            }
        }
    }
    (0..m).all(|a| d[a * m + a] >= 0.0)
}

/// Up to 8 tokens and 4 modules; affinities are any numbers, or few different ones, so that there
/// are ties.
fn small() -> impl Strategy<Value = (usize, Vec<f64>)> {
    (1usize..=4, 1usize..=8, any::<bool>()).prop_flat_map(|(m, n, whole)| {
        let number = (-3.0f64..3.0).prop_map(move |a| if whole { a.round() } else { a });
        (Just(m), prop::collection::vec(number, n * m))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn an_assignment_is_the_best_of_all((m, affinity) in small()) {
        let owner = balanced_assignment(&affinity, m).unwrap();
        prop_assert!(are_balanced(&loads(&owner, m)), "{owner:?}");
        let (best, _, _) = by_trying(&affinity, m);
        prop_assert!((total(&affinity, m, &owner) - best).abs() < 1e-9);
        prop_assert_eq!(owner, balanced_assignment(&affinity, m).unwrap());
    }

    #[test]
    fn a_plan_has_its_sums_and_its_form(x in prop::collection::vec(-3.0f64..3.0, 24), tau in 0.1f64..2.0) {
        let plan = plan(&x, 6, 4, json!({"temperature": tau, "iterations": 10000}));
        for row in plan.chunks(4) {
            prop_assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-3);
        }
        for j in 0..4 {
            let sum: f64 = plan.iter().skip(j).step_by(4).sum();
            prop_assert!((sum - 1.5).abs() < 1.5e-3);
        }
        // ln π − ℓ ⁄ τ is a number of the row and a number of the column.
        let rest: Vec<f64> = plan.iter().zip(&x).map(|(p, l)| p.ln() - l / tau).collect();
        for i in 1..6 {
            for j in 1..4 {
                let cross = rest[i * 4 + j] - rest[i * 4] - rest[j] + rest[0];
                prop_assert!(cross.abs() < 1e-9, "{cross}");
            }
        }
    }

    #[test]
    fn neither_plan_nor_weights_know_a_shift(x in prop::collection::vec(-3.0f64..3.0, 24), by in -50.0f64..50.0) {
        let made = identity(json!({"type": "sinkhorn", "k": 2}), 4);
        let shifted: Vec<f64> =
            x.iter().enumerate().map(|(i, v)| v + by * (1.0 + (i / 4) as f64)).collect();
        let [a, b] = [&x, &shifted].map(|x| made.route(&t(x, &[1, 6, 4]), &train()).unwrap());
        let of = |r: &modl_core::Routing| r.noted.need("plan").unwrap().to_vec::<f64>().unwrap();
        assert_close(&of(&a), &of(&b), 1e-9);
        prop_assert_eq!(sparse(&a).0, sparse(&b).0);
        assert_close(&sparse(&a).1, &sparse(&b).1, 1e-9);
    }
}

/// A router whose scores are x itself.
fn identity(config: Value, modules: usize) -> Made {
    let made = Made::new(config, modules, modules as i64).unwrap();
    let eye: Vec<f64> =
        (0..modules * modules).map(|i| f64::from(u8::from(i % (modules + 1) == 0))).collect();
    made.set("router.weight", &eye);
    made
}

fn plan(x: &[f64], n: i64, m: usize, extra: Value) -> Vec<f64> {
    let mut config = json!({"type": "sinkhorn", "k": 1});
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let routing = identity(config, m).route(&t(x, &[1, n, m as i64]), &train()).unwrap();
    routing.noted.need("plan").unwrap().to_vec().unwrap()
}

#[test]
fn large_assignments_are_even_and_leave_nothing_to_gain() -> Result<()> {
    let of = |n: usize, m: usize, seed: u64| {
        let (noise, taste) = (normal(&[n as i64, m as i64], seed), normal(&[1, m as i64], 9));
        noise.add(&taste.mul_scalar(3.0)?)?.to_vec::<f64>()
    };
    for (n, m) in [(512, 16), (500, 16), (64, 64), (10, 64), (257, 3), (40, 1)] {
        for seed in 0..3 {
            let affinity = of(n, m, seed)?;
            let owner = balanced_assignment(&affinity, m)?;
            assert_eq!(owner.len(), n);
            assert!(are_balanced(&loads(&owner, m)), "{n} tokens, {m} modules");
            assert!(no_exchange_gains(&affinity, m, &owner), "{n} tokens, {m} modules");
        }
    }
    // Half of the tokens are the same one.
    let mut affinity = of(512, 16, 4)?;
    let first = affinity[..16].to_vec();
    affinity.chunks_mut(32).for_each(|pair| pair[..16].copy_from_slice(&first));
    let owner = balanced_assignment(&affinity, 16)?;
    assert_eq!(loads(&owner, 16), vec![32; 16]);
    assert!(no_exchange_gains(&affinity, 16, &owner));
    // All are.
    assert_eq!(loads(&balanced_assignment(&vec![1.5; 512 * 16], 16)?, 16), vec![32; 16]);
    Ok(())
}

#[test]
fn the_places_that_are_left_over_go_where_they_are_wanted() -> Result<()> {
    // Four tokens for three modules, and nobody wants the first two.
    let affinity = [0.0, 0.0, 9.0].repeat(4);
    assert_eq!(loads(&balanced_assignment(&affinity, 3)?, 3), [1, 1, 2]);
    Ok(())
}

#[test]
fn numbers_that_are_none_are_refused_by_name() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let e = balanced_assignment(&[0.0, bad], 2).unwrap_err();
        assert!(matches!(&e, Error::Invalid { .. }) && e.to_string().contains("finite"), "{e}");
        for kind in ["base", "sinkhorn"] {
            let made = Made::new(json!({"type": kind}), 2, 4).unwrap();
            let x = normal(&[1, 3, 4], 1).mul_scalar(bad).unwrap();
            let e = made.route(&x, &train()).unwrap_err().to_string();
            assert!(e.contains(kind) && e.contains("finite"), "{e}");
        }
    }
    assert!(balanced_assignment(&[0.0; 5], 2).unwrap_err().to_string().contains("multiple"));
    assert!(balanced_assignment(&[0.0; 5], 0).is_err());
    assert!(balanced_assignment(&[], 3).unwrap().is_empty());
}

#[test]
fn base_keeps_the_laws_of_routing() -> Result<()> {
    laws(json!({"type": "base"}))?;
    laws(json!({"type": "base", "input": "mean"}))
}

#[test]
fn sinkhorn_keeps_the_laws_of_routing() -> Result<()> {
    laws(json!({"type": "sinkhorn"}))?;
    laws(json!({"type": "sinkhorn", "input": "mean", "temperature": 0.5}))
}

fn laws(config: Value) -> Result<()> {
    let registry = Registry::new().with(modl_route::register)?;
    registry.routers.parse(&config)?;
    let claims = RouterClaims { sums_to_one: false, ..RouterClaims::top_k(1) };
    check_router(&|| registry.routers.parse(&config).unwrap(), &claims, &registry);
    Ok(())
}

#[test]
fn base_assigns_in_training_and_is_greedy_in_evaluation() -> Result<()> {
    let (m, n, width) = (4, 24, 6);
    let made = Made::new(json!({"type": "base"}), m, width)?;
    let w = made.get("router.weight");
    let x = normal(&[2, n / 2, width], 5).add_scalar(0.7)?;
    let tokens: Vec<Vec<f64>> =
        x.to_vec::<f64>()?.chunks(width as usize).map(<[f64]>::to_vec).collect();
    let score = |token: &[f64], e: usize| dot(token, &w[e * width as usize..][..width as usize]);
    let affinity: Vec<f64> =
        tokens.iter().flat_map(|x| (0..m).map(|e| score(x, e)).collect::<Vec<_>>()).collect();
    for (cx, even) in [(train(), true), (Context::eval(), false)] {
        let routing = made.route(&x, &cx)?;
        assert!(!routing.normalised);
        let (index, weight) = sparse(&routing);
        let owner: Vec<usize> = index.iter().map(|e| *e as usize).collect();
        if even {
            assert_eq!(loads(&owner, m), vec![6; m]);
            assert!(no_exchange_gains(&affinity, m, &owner));
        } else {
            let greedy: Vec<usize> = affinity.chunks(m).map(|row| top(row, 1)[0]).collect();
            assert_eq!(owner, greedy);
            assert_ne!(loads(&owner, m), vec![6; m]);
        }
        let gates = tokens.iter().zip(&owner).map(|(x, e)| 1.0 / (1.0 + (-score(x, *e)).exp()));
        assert_close(&weight, &gates.collect::<Vec<_>>(), 1e-12);
    }
    Ok(())
}

#[test]
fn base_learns_through_its_gate_alone() -> Result<()> {
    let made = Made::new(json!({"type": "base"}), 2, 3)?;
    let x = normal(&[1, 4, 3], 2);
    let routing = made.route(&x, &train())?;
    let (index, weight) = sparse(&routing);
    let modl_core::Weights::Sparse { weight: gate, .. } = &routing.weights else { panic!() };
    let g = gate.sum()?.gradients(&[made.store.get("router.weight")?], false)?;
    let x = x.to_vec::<f64>()?;
    let mut expected = [0.0; 6];
    for (token, (e, s)) in index.iter().zip(&weight).enumerate() {
        for c in 0..3 {
            expected[*e as usize * 3 + c] += s * (1.0 - s) * x[token * 3 + c];
        }
    }
    assert_close(&g[0].as_ref().unwrap().to_vec::<f64>()?, &expected, 1e-12);
    Ok(())
}

/// y = α·E(x) + (1 − α)·x at a site that is the identity.
#[test]
fn base_mixes_the_module_with_the_base_function() -> Result<()> {
    let width = 5;
    let made = Made::new(json!({"type": "base"}), 3, width)?;
    let x = normal(&[2, 3, width], 8);
    let (index, gate) = sparse(&made.route(&x, &train())?);
    let mut expected = Vec::new();
    for (token, x) in x.to_vec::<f64>()?.chunks(width as usize).enumerate() {
        let low = made.bank.module(index[token] as usize).unwrap().low_rank(&train()).unwrap();
        let inner = dot(x, &low.down.to_vec::<f64>()?);
        for (x, up) in x.iter().zip(low.up.to_vec::<f64>()?) {
            expected.push(gate[token] * (x + up * inner) + (1.0 - gate[token]) * x);
        }
    }
    let path = "site".into();
    let site = Site { path, kind: SiteKind::Linear, input: width, output: width, index: 0 };
    let f = |_: &Tensors, x: &Signal, _: &Context| Ok(x.clone());
    let theta = Tensors::new();
    let mut store = ParamStore::new();
    let sum = Sum::default().build(&site, &mut Scope::new(&mut store, Seed(0)))?;
    let layer = ModularLayer::from_boxes(made.bank, made.router, sum);
    let y = layer.forward(&Host::new(&site, &theta, &f), &Signal::from(x), &train())?;
    assert_close(&y.x.to_vec::<f64>()?, &expected, 1e-12);
    Ok(())
}

#[test]
fn base_starts_at_right_angles() -> Result<()> {
    for (m, width) in [(3, 8), (8, 3), (4, 4)] {
        let made = Made::new(json!({"type": "base", "gain": 0.2}), m, width)?;
        let w = made.store.get("router.weight")?;
        let gram = if (m as i64) < width { w.matmul(&w.t()?)? } else { w.t()?.matmul(w)? };
        let eye = Tensor::eye(gram.len_of(0), Kind::Double, gram.device())?.mul_scalar(0.04)?;
        assert!(gram.max_abs_diff(&eye)? < 1e-12, "{m} × {width}");
    }
    Ok(())
}

#[test]
fn padding_takes_no_places() -> Result<()> {
    let (m, width) = (4, 6);
    let x = normal(&[2, 8, width], 5);
    // 5 + 3 real tokens: two for each module.
    let real: Vec<f64> =
        (0..16).map(|i| f64::from(u8::from(i < 5 || (8..11).contains(&i)))).collect();
    let cx = |cx: Context| cx.with_feature("mask", t(&real, &[2, 8]));
    for kind in ["base", "sinkhorn"] {
        let made = Made::new(json!({"type": kind}), m, width)?;
        for cx in [cx(train()), cx(Context::eval())] {
            let routing = made.route(&x, &cx)?;
            let (index, _) = sparse(&routing);
            assert!(index.iter().zip(&real).all(|(e, real)| (*e >= 0) == (*real == 1.0)));
            let alpha = routing.dense(Kind::Double, x.device())?.to_vec::<f64>()?;
            let nobody =
                |(row, real): (&[f64], &f64)| *real == 1.0 || row.iter().all(|w| *w == 0.0);
            assert!(alpha.chunks(m).zip(&real).all(nobody));
            // What padding holds changes nothing.
            let other = x.add(&t(&real, &[2, 8, 1]).add_scalar(-1.0)?.mul_scalar(5.0)?)?;
            let again = made.route(&other, &cx)?;
            assert_eq!(sparse(&again).0, index);
            assert_eq!(again.dense(Kind::Double, x.device())?.to_vec::<f64>()?, alpha);
            if kind == "base" && cx.train {
                let owner: Vec<usize> = index.iter().flat_map(|e| usize::try_from(*e)).collect();
                assert_eq!(loads(&owner, m), [2; 4]);
            }
            if let Some(plan) = routing.noted.get("plan") {
                assert_eq!(plan.size(), [8, 4]);
            }
        }
    }
    Ok(())
}

#[test]
fn sinkhorn_chooses_by_the_plan_and_weighs_by_p() -> Result<()> {
    let (m, n) = (4, 12);
    // Everybody prefers module 0.
    let x = normal(&[n, m], 6).add(&t(&[4.0, 0.0, 0.0, 0.0], &[4]))?;
    let x = x.to_vec::<f64>()?;
    let made = identity(json!({"type": "sinkhorn", "k": 2}), m as usize);
    for cx in [train(), Context::eval()] {
        let routing = made.route(&t(&x, &[1, n, m]), &cx)?;
        let (index, weight) = sparse(&routing);
        let order = match routing.noted.get("plan") {
            Some(plan) => plan.to_vec::<f64>()?,
            None => x.clone(),
        };
        assert_eq!(cx.train, order != x);
        for (row, (order, x)) in order.chunks(4).zip(x.chunks(4)).enumerate() {
            let (best, p) = (top(order, 2), softmax(x));
            assert_eq!([index[2 * row], index[2 * row + 1]], [best[0] as i64, best[1] as i64]);
            assert_close(&weight[2 * row..][..2], &[p[best[0]], p[best[1]]], 1e-12);
        }
        // In evaluation all go where they want to.
        let of_first = index.iter().step_by(2).filter(|e| **e == 0).count();
        assert!(if cx.train { of_first < 8 } else { of_first > 9 }, "{of_first}");
    }
    Ok(())
}

#[test]
fn a_cold_plan_is_the_balanced_assignment() {
    let mut checked = 0;
    for seed in 0..12 {
        let x = normal(&[6, 3], 100 + seed).to_vec::<f64>().unwrap();
        let (best, owner, second) = by_trying(&x, 3);
        if best - second < 0.3 {
            continue;
        }
        checked += 1;
        let share = |tau: f64| {
            let plan =
                plan(&x, 6, 3, json!({"temperature": tau, "iterations": 3000, "tolerance": 1e-4}));
            owner.iter().enumerate().map(|(i, e)| plan[i * 3 + e]).sum::<f64>() / 6.0
        };
        let [warm, cold] = [1.0, 0.03].map(share);
        assert!(cold > 0.99 && warm < cold, "{warm} → {cold}");
    }
    assert!(checked >= 4, "{checked}");
}

/// Four rules, each with a module that is right for it: y = α·cₑ against the c of the token's rule.
fn learns(kind: &str, rate: f64) -> Result<()> {
    let (rules, n) = (4, 64);
    let made = Made::new(json!({"type": kind, "seed": 2}), rules, 8)?;
    let c = Tensor::eye(rules as i64, Kind::Double, modl_core::Device::Cpu)?;
    let run = |cx: &Context, seed: u64| -> Result<(Tensor, f64)> {
        let (x, rule) = rule_data(rules, n, 8, seed);
        let routing = made.route(&x, cx)?;
        let (index, _) = sparse(&routing);
        let right = index.iter().zip(&rule).filter(|(e, r)| **e == **r as i64).count();
        let rule: Vec<i64> = rule.iter().map(|r| *r as i64).collect();
        let target = c.index_select(0, &Tensor::from_slice(&rule, &[n as i64], c.device())?)?;
        let y = routing.dense(Kind::Double, c.device())?.squeeze(0)?.matmul(&c)?;
        Ok((y.mse(&target)?, right as f64 / n as f64))
    };
    let first = run(&Context::eval(), 1000)?.0.item()?;
    for step in 0..300 {
        let (loss, _) = run(&Context::train(Seed(1), step), step)?;
        made.descend_by(&["router.weight"], &loss, rate)?;
    }
    let (loss, right) = run(&Context::eval(), 1000)?;
    let last = loss.item()?;
    assert!(right > 0.95 && last < 0.3 * first, "{right} right, {first} → {last}");
    Ok(())
}

#[test]
fn base_learns_which_module_is_right() -> Result<()> {
    learns("base", 3.0)
}

#[test]
fn sinkhorn_learns_which_module_is_right() -> Result<()> {
    learns("sinkhorn", 3.0)
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let refused = |config: Value, words: &str| {
        let e = Made::new(config, 3, 8).err().unwrap().to_string();
        assert!(e.contains(words), "{e}");
    };
    refused(json!({"type": "base", "gain": 0.0}), "base.gain");
    refused(json!({"type": "base", "width": 5}), "base.width");
    refused(json!({"type": "sinkhorn", "k": 4}), "3 modules");
    refused(json!({"type": "sinkhorn", "temperature": 0.0}), "sinkhorn.temperature");
    refused(json!({"type": "sinkhorn", "tolerance": -1.0}), "sinkhorn.tolerance");
    refused(json!({"type": "sinkhorn", "iterations": 0}), "sinkhorn.iterations");
    refused(json!({"type": "sinkhorn", "init_std": -1.0}), "sinkhorn.init_std");
}
