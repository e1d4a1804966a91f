//! Routers that learn nothing by gradients: lots, hashes, prototypes.

#![allow(clippy::unwrap_used, clippy::panic)]

mod made;

use made::{Made, assert_close, check, normal, t};
use modl_core::testing::{RouterClaims, TinyBackbone};
use modl_core::{
    Context, Device, Error, Kind, Modular, Outcome, Result, Seed, Targets, Tensor, Weights,
};
use modl_route::{Assignment, Hash, NearestPrototype};
use serde_json::json;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

#[test]
fn routers_by_lot_keep_the_laws() {
    let drawn = |k| RouterClaims { draws: true, at_most: Some(k), ..RouterClaims::fixed() };
    // In evaluation a row's draw is that of its place in the batch.
    let placed = |k| RouterClaims { looks_at_batch: true, ..drawn(k) };
    for level in ["static", "example", "token"] {
        check(json!({"type": "random", "k": 1, "level": level}), placed(1));
        check(json!({"type": "random", "k": 2, "level": level}), placed(2));
        check(json!({"type": "thor", "level": level}), drawn(3));
        check(json!({"type": "thor", "level": level, "evaluation": "draw"}), placed(1));
    }
    check(json!({"type": "random", "evaluation": "all"}), drawn(3));
    check(json!({"type": "adamix"}), drawn(3));
    check(json!({"type": "adamix", "independent": true}), drawn(3));
}

/// χ² of counts against equal shares.
fn chi_square(counts: &[usize]) -> f64 {
    let expected = counts.iter().sum::<usize>() as f64 / counts.len() as f64;
    counts.iter().map(|c| (*c as f64 - expected).powi(2) / expected).sum()
}

#[test]
fn lots_are_even_over_modules_and_pairs() -> Result<()> {
    let made = Made::named(json!({"type": "random", "k": 2, "level": "token"}), &NAMES, 8)?;
    let x = Tensor::zeros(&[60, 100, 8], Kind::Double, Device::Cpu)?;
    let chosen = made.chosen(&x, &Context::train(Seed(4), 0))?;
    let mut pairs = [0usize; 16];
    chosen.chunks(2).for_each(|c| pairs[(c[0].min(c[1]) * 4 + c[0].max(c[1])) as usize] += 1);
    let pairs: Vec<usize> = pairs.into_iter().filter(|n| *n > 0).collect();
    // Six pairs without order, none of a module with itself; χ² with 5 degrees of freedom is below
    // 20.5 with probability 0.999.
    assert_eq!(pairs.len(), 6);
    assert!(chi_square(&pairs) < 20.5, "{pairs:?}");
    let weights = made.alpha(&x, &Context::train(Seed(4), 0))?;
    assert!(weights.iter().all(|w| *w == 0.0 || *w == 0.5));
    Ok(())
}

#[test]
fn lots_follow_step_seed_and_their_own_seed() -> Result<()> {
    let x = Tensor::zeros(&[40, 8], Kind::Double, Device::Cpu)?;
    let at = |own: u64, seed: u64, step: u64| {
        Made::named(json!({"type": "random", "seed": own}), &NAMES, 8)?
            .chosen(&x, &Context::train(Seed(seed), step))
    };
    let first = at(0, 1, 0)?;
    assert_eq!(at(0, 1, 0)?, first);
    for other in [at(1, 1, 0)?, at(0, 2, 0)?, at(0, 1, 1)?] {
        assert_ne!(other, first);
    }
    Ok(())
}

#[test]
fn thor_and_adamix_run_one_module_in_training_and_all_in_evaluation() -> Result<()> {
    let x = normal(&[3, 5, 8], 1);
    for kind in ["thor", "adamix"] {
        let made = Made::named(json!({"type": kind}), &NAMES, 8)?;
        let mut counts = [0usize; 4];
        for step in 0..400 {
            let routing = made.route(&x, &Context::train(Seed(2), step))?;
            let Weights::Fixed(one) = &routing.weights else { panic!("{routing:?}") };
            assert!(matches!(one.as_slice(), [(_, 1.0)]));
            counts[one[0].0] += 1;
        }
        // 3 degrees of freedom, 0.999.
        assert!(chi_square(&counts) < 16.3, "{kind}: {counts:?}");
        assert_close(&made.alpha(&x, &Context::eval())?, &[0.25; 4], 1e-15);
    }
    Ok(())
}

/// THOR's two experts are two: brute force over steps, with a χ² test of each pass and of the pairs.
#[test]
fn passes_of_a_batch_have_different_modules_of_thor() -> Result<()> {
    let x = normal(&[3, 2, 8], 1);
    // By the number of modules the 0.999 of χ² for one pass and for the pairs: m − 1 and
    // m (m − 1) − 1 degrees of freedom.
    for (m, of_one, of_pairs) in [(2usize, 10.8, 10.8), (3, 13.8, 20.5), (4, 16.3, 31.3)] {
        for (level, per_pass) in [("static", 1), ("example", 3), ("token", 6)] {
            let made = Made::named(json!({"type": "thor", "level": level}), &NAMES[..m], 8)?;
            let (mut counts, mut pairs) = (vec![vec![0usize; m]; 2], vec![0usize; m * m]);
            for step in 0..1200 / per_pass as u64 {
                let chosen = |pass: u64| -> Result<Vec<i64>> {
                    // Passes have seeds of their own, as the trainer gives them.
                    let cx = Context::train(Seed(9).child("pass").nth(pass), step);
                    let routing = made.route(&x, &cx.as_pass(pass, Seed(9)))?;
                    Ok(match &routing.weights {
                        Weights::Fixed(one) => one.iter().map(|(j, _)| *j as i64).collect(),
                        Weights::Sparse { index, .. } => index.to_vec::<i64>()?,
                        other => panic!("{other:?}"),
                    })
                };
                let (a, b) = (chosen(0)?, chosen(1)?);
                assert_eq!((a.len(), b.len()), (per_pass, per_pass));
                for (a, b) in a.into_iter().zip(b) {
                    assert_ne!(a, b, "{m} modules, {level}, step {step}");
                    counts[0][a as usize] += 1;
                    counts[1][b as usize] += 1;
                    pairs[m * a as usize + b as usize] += 1;
                }
            }
            for own in &counts {
                assert!(chi_square(own) < of_one, "{m} {level}: {own:?}");
            }
            let apart: Vec<usize> =
                (0..m * m).filter(|i| i / m != i % m).map(|i| pairs[i]).collect();
            assert!(chi_square(&apart) < of_pairs, "{m} {level}: {apart:?}");
        }
    }
    // m passes are an order of all; then another order begins.
    let made = Made::named(json!({"type": "thor"}), &NAMES, 8)?;
    let turn = |pass: u64| -> Result<usize> {
        let routing = made.route(&x, &Context::train(Seed(1), 0).as_pass(pass, Seed(9)))?;
        Ok(routing.support()?[0])
    };
    for first in [0, 4] {
        let mut all: Vec<usize> = (first..first + 4).map(turn).collect::<Result<_>>()?;
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3]);
    }
    Ok(())
}

#[test]
fn adamix_draws_in_and_out_independently_where_it_is_asked_to() -> Result<()> {
    let made = Made::named(json!({"type": "adamix", "independent": true}), &NAMES, 8)?;
    let x = normal(&[3, 5, 8], 1);
    let mut pairs = [0usize; 16];
    for step in 0..1600 {
        let routing = made.route(&x, &Context::train(Seed(2), step))?;
        let heads = routing.heads.as_ref().unwrap().to_vec::<f64>()?;
        let at = |q: usize| (0..4).find(|j| heads[4 * q + j] == 1.0).unwrap();
        assert_eq!(heads.iter().sum::<f64>(), 2.0);
        // α of the module is the mean of its heads.
        let mean: Vec<f64> = (0..4).map(|j| (heads[j] + heads[4 + j]) / 2.0).collect();
        assert_eq!(routing.dense(Kind::Double, Device::Cpu)?.to_vec::<f64>()?, mean);
        pairs[4 * at(0) + at(1)] += 1;
    }
    // 15 degrees of freedom, 0.999.
    assert!(chi_square(&pairs) < 37.7, "{pairs:?}");
    assert!(made.route(&x, &Context::eval())?.heads.is_none());
    Ok(())
}

#[test]
fn hash_keeps_the_laws() {
    let claims =
        || RouterClaims { at_most: Some(1), vocabulary: Some(12), ..RouterClaims::fixed() };
    check(json!({"type": "hash", "vocab": 12}), claims());
    let counts: Vec<f64> = (1..=12).map(|i| 1.0 / f64::from(i)).collect();
    check(json!({"type": "hash", "assignment": "balanced", "counts": counts}), claims());
    let table: Vec<i64> = (0..12).map(|i| i % 3).collect();
    check(json!({"type": "hash", "assignment": "given", "table": table}), claims());
}

fn ids(values: &[i64], rows: i64) -> Context {
    let shape = [rows, values.len() as i64 / rows];
    Context::eval()
        .with_feature("input_ids", Tensor::from_slice(values, &shape, Device::Cpu).unwrap())
}

#[test]
fn a_hash_looks_at_the_id_alone() -> Result<()> {
    let made = Made::named(json!({"type": "hash", "vocab": 50}), &NAMES, 8)?;
    let all: Vec<i64> = (0..50).collect();
    let table = made.chosen(&normal(&[1, 50, 8], 1), &ids(&all, 1))?;
    assert!((0..4).all(|j| table.contains(&j)), "{table:?}");
    // The same ids elsewhere, with other x, in training.
    let mixed: Vec<i64> = (0..50).map(|i| (i * 7 + 3) % 50).collect();
    let found = made.chosen(&normal(&[5, 10, 8], 2), &ids(&mixed, 5))?;
    let expected: Vec<i64> = mixed.iter().map(|id| table[*id as usize]).collect();
    assert_eq!(found, expected);
    assert_eq!(made.store.trainable().count(), 0, "nothing to learn");
    let again = Made::named(json!({"type": "hash", "vocab": 50}), &NAMES, 8)?;
    assert_eq!(again.chosen(&normal(&[1, 50, 8], 3), &ids(&all, 1))?, table);
    let other = Made::named(json!({"type": "hash", "vocab": 50, "seed": 1}), &NAMES, 8)?;
    assert_ne!(other.chosen(&normal(&[1, 50, 8], 3), &ids(&all, 1))?, table);
    Ok(())
}

#[test]
fn balanced_hashes_spread_tokens_evenly_where_random_ones_do_not() -> Result<()> {
    // Zipf's law over 2,000 ids: the most frequent one makes 12 % of a text.
    let counts: Vec<f64> = (1..=2000).map(|r| 1e6 / f64::from(r)).collect();
    let all: Vec<i64> = (0..2000).collect();
    let loads = |config| -> Result<Vec<f64>> {
        let made = Made::named(config, &NAMES, 8)?;
        let table = made.chosen(&normal(&[1, 2000, 8], 1), &ids(&all, 1))?;
        let mut loads = [0.0; 4];
        table.iter().zip(&counts).for_each(|(j, c)| loads[*j as usize] += c);
        Ok(loads.iter().map(|l| l * 4.0 / counts.iter().sum::<f64>()).collect())
    };
    let even = loads(json!({"type": "hash", "assignment": "balanced", "counts": counts}))?;
    assert!(even.iter().all(|l| (l - 1.0).abs() < 0.05), "{even:?}");
    let by_lot = loads(json!({"type": "hash", "vocab": 2000}))?;
    assert!(by_lot.iter().any(|l| (l - 1.0).abs() > 0.05), "{by_lot:?}");
    // Ids that never occur are spread, too.
    let zeros = Made::named(
        json!({"type": "hash", "assignment": "balanced", "counts": vec![0.0; 40]}),
        &NAMES,
        8,
    )?;
    let table = zeros.chosen(&normal(&[1, 40, 8], 1), &ids(&all[..40], 1))?;
    assert!((0..4).all(|j| table.iter().filter(|t| **t == j).count() == 10));
    Ok(())
}

#[test]
fn clustered_hashes_find_clusters_and_are_a_fixed_point_of_k_means() -> Result<()> {
    // Three groups of twenty around corners that are far apart.
    let corners = t(&[9.0, 0.0, 0.0, -9.0, 0.0, 9.0], &[3, 2]);
    let index: Vec<i64> = (0..60).map(|i| i % 3).collect();
    let of = Tensor::from_slice(&index, &[60], Device::Cpu)?;
    let vectors = corners.index_select(0, &of)?.add(&normal(&[60, 2], 6))?;
    for seed in 0..5 {
        let table = Hash::clustered(&vectors, 3, seed)?.table;
        let same = |a: usize, b: usize| (table[a] == table[b]) == (index[a] == index[b]);
        assert!((0..60).all(|a| (0..60).all(|b| same(a, b))), "{table:?}");
    }
    // Without clusters: each vector is nearest to the mean of its own cluster, and none is empty.
    let (n, k, width) = (200, 7, 3);
    let vectors = normal(&[n, width], 8);
    let hash = Hash::clustered(&vectors, k, 0)?;
    assert_eq!(hash.assignment, Assignment::Given);
    let v = vectors.to_vec::<f64>()?;
    let row = |i: usize| &v[i * width as usize..][..width as usize];
    let mean = |j: usize| -> Vec<f64> {
        let own: Vec<usize> = (0..n as usize).filter(|i| hash.table[*i] == j as i64).collect();
        assert!(!own.is_empty());
        let of = |c: usize| own.iter().map(|i| row(*i)[c]).sum::<f64>() / own.len() as f64;
        (0..width as usize).map(of).collect()
    };
    let means: Vec<Vec<f64>> = (0..k).map(mean).collect();
    let far = |i: usize, j: usize| -> f64 {
        row(i).iter().zip(&means[j]).map(|(a, b)| (a - b).powi(2)).sum()
    };
    for i in 0..n as usize {
        let own = far(i, hash.table[i] as usize);
        assert!((0..k).all(|j| own <= far(i, j) + 1e-12), "{i}");
    }
    let same = Tensor::ones(&[5, 2], Kind::Double, Device::Cpu)?;
    assert!(Hash::clustered(&same, 2, 0).is_err());
    Ok(())
}

#[test]
fn what_does_not_fit_a_hash_is_refused() -> Result<()> {
    let refused = |config, words: &str| {
        let e = Made::named(config, &NAMES, 8).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    };
    refused(json!({"type": "hash"}), "hash.vocab");
    refused(json!({"type": "hash", "assignment": "balanced"}), "hash.counts");
    refused(json!({"type": "hash", "assignment": "given", "table": [0, 4]}), "modules are 0 to 3");
    let made = Made::named(json!({"type": "hash", "vocab": 5}), &NAMES, 8)?;
    let x = normal(&[1, 3, 8], 1);
    let told = |cx: &Context| made.route(&x, cx).unwrap_err().to_string();
    assert!(told(&Context::eval()).contains("input_ids"));
    assert!(told(&ids(&[0, 1, 5], 1)).contains("5 is beyond the 5 ids"));
    assert!(told(&ids(&[0, 1], 1)).contains("do not fit"));
    Ok(())
}

#[test]
fn a_model_gives_its_ids_to_routers_that_read_them() -> Result<()> {
    let mut model = Modular::new(TinyBackbone::new(Seed(3), Kind::Float)?, Seed(4))?;
    for name in ["a", "b"] {
        let scale = Box::new(modl_core::testing::standins::Scale);
        model.attach(name, scale, &Targets::names(["query"]))?;
    }
    model.aggregate(Box::new(modl_core::testing::Sum::default()))?;
    let inputs = TinyBackbone::inputs(3, 6, Seed(5))?;
    let table: Vec<i64> = (0..64).map(|i| i % 2).collect();
    let hash = Hash { assignment: Assignment::Given, table: table.clone(), ..Hash::default() };
    for global in [false, true] {
        model.route(Box::new(hash.clone()), global)?;
        let cx = Context::eval();
        model.forward(&inputs, &cx)?;
        let trace = cx.take_trace();
        let Weights::Sparse { index, .. } = &trace.routings[0].1.weights else { panic!() };
        let ids = inputs.need("input_ids")?.to_vec::<i64>()?;
        let expected: Vec<i64> = ids.iter().map(|id| table[*id as usize]).collect();
        assert_eq!(index.to_vec::<i64>()?, expected);
    }
    Ok(())
}

#[test]
fn nearest_prototype_keeps_the_laws() {
    let vector = |by: i32| (0..8).map(|i| f64::from((i * by + 1) % 5) - 2.0).collect::<Vec<_>>();
    let prototypes = json!({"a": vector(1), "b": vector(2), "c": vector(3)});
    for similarity in ["cosine", "dot"] {
        for k in [1, 2] {
            let config = json!({"type": "nearest_prototype", "similarity": similarity, "k": k,
                                "temperature": 0.3, "prototypes": prototypes});
            check(config, RouterClaims { at_most: Some(k), ..RouterClaims::fixed() });
        }
    }
}

#[test]
fn prototypes_are_the_means_of_what_their_modules_were_trained_on() -> Result<()> {
    let made = Made::named(json!({"type": "nearest_prototype"}), &["a", "b", "c"], 4)?;
    let e = made.route(&normal(&[2, 4], 1), &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("train with labels"), "{e}");
    // Two of three modules see rows in batches of different size.
    let centre =
        |name: &str| if name == "a" { [3.0, 0.0, 1.0, 0.0] } else { [0.0, -2.0, 0.0, 1.0] };
    let mut seen: Vec<(&str, Vec<f64>)> = Vec::new();
    for (step, batch) in
        [vec!["a", "b", "a"], vec!["b"], vec!["a", "a", "b", "b", "b"]].iter().enumerate()
    {
        let rows = normal(&[batch.len() as i64, 4], 20 + step as u64);
        let centres: Vec<f64> = batch.iter().flat_map(|n| centre(n)).collect();
        let x = rows.mul_scalar(0.3)?.add(&t(&centres, &[batch.len() as i64, 4]))?;
        let cx = Context::train(Seed(0), step as u64).with_tasks(batch);
        let routing = made.route(&x, &cx)?;
        let chosen: Vec<i64> = batch.iter().map(|n| i64::from(*n == "b")).collect();
        let Weights::Sparse { index, .. } = &routing.weights else { panic!() };
        assert_eq!(index.to_vec::<i64>()?, chosen, "in training a row goes to its own module");
        let loss = Tensor::zeros(&[batch.len() as i64], Kind::Double, Device::Cpu)?;
        made.router.learn(&routing, &Outcome::new(&loss, &cx))?;
        seen.extend(batch.iter().copied().zip(x.to_vec::<f64>()?.chunks(4).map(<[f64]>::to_vec)));
    }
    let mean = |name: &str| -> Vec<f64> {
        let own: Vec<&Vec<f64>> = seen.iter().filter(|(n, _)| *n == name).map(|(_, x)| x).collect();
        (0..4).map(|c| own.iter().map(|x| x[c]).sum::<f64>() / own.len() as f64).collect()
    };
    let prototypes = made.store.get("router.prototypes")?.to_vec::<f64>()?;
    assert_close(&prototypes[..8], &[mean("a"), mean("b")].concat(), 1e-12);
    assert_eq!(made.store.get("router.counts")?.to_vec::<f64>()?, [4.0, 5.0, 0.0]);
    // New rows find their module without a label, and never the one that was not trained.
    let centres: Vec<f64> =
        (0..40).flat_map(|i| centre(if i % 2 == 0 { "a" } else { "b" })).collect();
    let x = normal(&[40, 4], 77).mul_scalar(0.3)?.add(&t(&centres, &[40, 4]))?;
    let expected: Vec<i64> = (0..40).map(|i| i % 2).collect();
    assert_eq!(made.chosen(&x, &Context::eval())?, expected);
    Ok(())
}

#[test]
fn similarities_and_weights_are_their_formulas() -> Result<()> {
    let (c, x) = ([[1.0, 2.0], [-1.0, 0.5], [0.3, 0.1]], [0.7, -0.4]);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let length = |a: &[f64]| dot(a, a).sqrt();
    for similarity in ["cosine", "dot"] {
        let config = json!({"type": "nearest_prototype", "similarity": similarity, "k": 2,
            "temperature": 0.5, "prototypes": {"a": c[0], "b": c[1], "c": c[2]}});
        let made = Made::named(config, &["a", "b", "c"], 2)?;
        let s = c.map(|c| match similarity {
            "dot" => dot(&c, &x),
            _ => dot(&c, &x) / length(&c) / length(&x),
        });
        // The least alike is left out.
        let least = (0..3).min_by(|a, b| s[*a].total_cmp(&s[*b])).unwrap();
        let e = |j: usize| if j == least { 0.0 } else { (s[j] / 0.5).exp() };
        let sum: f64 = (0..3).map(e).sum();
        let expected: Vec<f64> = (0..3).map(|j| e(j) / sum).collect();
        assert_close(&made.alpha(&t(&x, &[1, 2]), &Context::eval())?, &expected, 1e-12);
    }
    Ok(())
}

#[test]
fn prototypes_that_do_not_fit_are_refused() {
    let refused = |config, words: &str| {
        let e = Made::named(config, &["a", "b"], 3).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    };
    let kind = "nearest_prototype";
    refused(json!({"type": kind, "k": 3}), "2 modules");
    refused(json!({"type": kind, "input": "tokens"}), "nearest_prototype.input");
    refused(json!({"type": kind, "prototypes": {"a": [1.0]}}), "3 finite numbers");
    refused(json!({"type": kind, "prototypes": {"x": [1.0, 2.0, 3.0]}}), "`x`");
    refused(json!({"type": kind, "temperature": 0.0}), "nearest_prototype.temperature");
    assert!(matches!(NearestPrototype::default().k, 1));
    let unknown = Made::named(json!({"type": kind}), &["tweets", "news"], 3).unwrap();
    let cx = Context::train(Seed(0), 0).with_tasks(["tweet"]);
    let e = unknown.route(&normal(&[1, 3], 1), &cx).unwrap_err();
    assert!(matches!(e, Error::Unknown { nearest: Some(n), .. } if n == "tweets"));
}
