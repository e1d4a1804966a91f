//! Soups, searches, lines between models and orders of units, against closed forms and brute force.

#![allow(clippy::unwrap_used, clippy::panic)]

use modl_aggregate::connectivity::{between, curve};
use modl_aggregate::rebasin::{Layer, Permutations, match_activations, match_weights, permuted};
use modl_aggregate::search::{Evolution, lora_hub};
use modl_aggregate::soups::{Convention, greedy, weighted};
use modl_core::{Device, Init, Kind, Result, Seed, Tensor, Tensors};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Models on a line with a validation score of their own; the paper's recipe, step by step.
    #[test]
    fn a_greedy_soup_is_the_recipe_and_no_worse_than_the_best(
        at in prop::collection::vec(-4i8..5, 1..8), strict in any::<bool>(),
    ) {
        let score = |members: &[usize]| {
            -(members.iter().map(|m| f64::from(at[*m])).sum::<f64>() / members.len() as f64).abs()
        };
        let alone: Vec<f64> = (0..at.len()).map(|m| score(&[m])).collect();
        let convention = if strict { Convention::Reference } else { Convention::Paper };
        let soup = greedy(&alone, convention, |m| Ok(score(m))).unwrap();
        let best = alone.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
        prop_assert!(soup.score >= best);
        prop_assert_eq!(soup.score, score(&soup.members));
        // By hand: repeatedly the best of the models that were not tried, first of equals.
        let mut left: Vec<usize> = (0..at.len()).collect();
        let (mut members, mut now) = (Vec::new(), f64::NEG_INFINITY);
        while !left.is_empty() {
            let mut pick = 0;
            for n in 1..left.len() {
                if alone[left[n]] > alone[left[pick]] {
                    pick = n;
                }
            }
            let model = left.remove(pick);
            let mut with = members.clone();
            with.push(model);
            if members.is_empty() || score(&with) > now || (!strict && score(&with) == now) {
                now = score(&with);
                members = with;
            }
        }
        prop_assert_eq!(soup.members, members);
        prop_assert_eq!(soup.tried.len(), at.len());
    }
}

#[test]
fn soups_need_scores_that_are_numbers() {
    assert!(greedy(&[], Convention::Paper, |_| Ok(0.0)).is_err());
    assert!(greedy(&[f64::NAN], Convention::Paper, |_| Ok(0.0)).is_err());
    let e = greedy(&[1.0, 2.0], Convention::Paper, |_| Ok(f64::NAN)).unwrap_err();
    assert!(e.to_string().contains("model 0"), "{e}");
}

#[test]
fn evolution_finds_the_optimum_of_a_bent_bowl_within_bounds_and_out_of_them() -> Result<()> {
    // f = (x − 1)² + 100 (y − x)² + (z + 2)²: condition number 400, optimum at (1, 1, −2).
    let bowl =
        |w: &[f64]| Ok((w[0] - 1.0).powi(2) + 100.0 * (w[1] - w[0]).powi(2) + (w[2] + 2.0).powi(2));
    for seed in 0..3 {
        let search = Evolution { evaluations: 1500, seed: Seed(seed), ..Evolution::default() };
        let found = search.minimize(&[0.0; 3], bowl)?;
        assert!(found.loss < 1e-10, "{found:?}");
        assert!((found.weights[2] + 2.0).abs() < 1e-4);
        assert!(found.curve.windows(2).all(|w| w[1] <= w[0]));
        assert_eq!(found, search.minimize(&[0.0; 3], bowl)?, "the same seed");
        // With z ≥ −1 the optimum is on the bound.
        let bounded = Evolution { bounds: Some((-1.0, 1.5)), ..search };
        let found = bounded.minimize(&[0.0; 3], bowl)?;
        assert!((found.loss - 1.0).abs() < 1e-6, "{found:?}");
        assert!(found.weights.iter().all(|w| (-1.0..=1.5).contains(w)));
    }
    // Long after the optimum: no weight is ever no number, and the search ends by itself.
    let (mut measured, long) = (0, Evolution { evaluations: 60_000, ..Evolution::default() });
    let found = long.minimize(&[0.0; 3], |w| {
        measured += 1;
        assert!(w.iter().all(|w| w.is_finite()), "{w:?} after {measured}");
        bowl(w)
    })?;
    assert!(found.loss < 1e-20 && measured < 60_000, "{found:?} {measured}");
    let none = Evolution::default().minimize(&[], |_| Ok(0.0));
    assert!(none.unwrap_err().to_string().contains("no weight"));
    assert!(Evolution::default().minimize(&[0.0], |_| Ok(f64::NAN)).is_err());
    Ok(())
}

#[test]
fn lora_hub_pays_for_size() -> Result<()> {
    // (w − 1)² + 0.05 |w| ⁄ 1 is least at 1 − 0.025; the second weight does nothing and goes to 0.
    let found = lora_hub(2, 600, Seed(4), |w| Ok((w[0] - 1.0).powi(2)))?;
    assert!((found.weights[0] - (1.0 - 0.0125)).abs() < 1e-3, "{found:?}");
    assert!(found.weights[1].abs() < 1e-3, "{found:?}");
    // What would be far away stays within 1.5.
    let found = lora_hub(1, 400, Seed(5), |w| Ok(-w[0]))?;
    assert!((found.weights[0] - 1.5).abs() < 1e-6, "{found:?}");
    Ok(())
}

fn draw(shape: &[i64], seed: Seed) -> Tensor {
    Init::Kaiming.tensor(shape, seed, Kind::Float, Device::Cpu).unwrap()
}

/// Layers `0`, `1`, … of these widths.
fn mlp(widths: &[i64], seed: Seed) -> Tensors {
    let mut all = Tensors::new();
    for (n, pair) in widths.windows(2).enumerate() {
        let seed = seed.nth(n as u64);
        all.set(format!("{n}.weight"), draw(&[pair[1], pair[0]], seed));
        all.set(format!("{n}.bias"), draw(&[pair[1], 4], seed.child("b")).select(1, 0).unwrap());
    }
    all
}

/// The activations of the layers, the last of which are the outputs.
fn run(model: &Tensors, x: &Tensor) -> Vec<Tensor> {
    let layers = model.len() / 2;
    let mut all: Vec<Tensor> = Vec::new();
    for n in 0..layers {
        let of = |part: &str| model.need(&format!("{n}.{part}")).unwrap();
        let x = all.last().unwrap_or(x).linear(of("weight"), Some(of("bias"))).unwrap();
        all.push(if n + 1 < layers { x.relu().unwrap() } else { x });
    }
    all
}

fn shuffled(n: usize, seed: Seed) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    all.sort_by_key(|i| seed.nth(*i as u64).0);
    all
}

fn names(layers: usize) -> Vec<String> {
    (0..layers).map(|n| n.to_string()).collect()
}

fn orders_of(widths: &[i64], seed: Seed) -> Vec<Vec<usize>> {
    let hidden = &widths[1..widths.len() - 1];
    hidden.iter().enumerate().map(|(n, w)| shuffled(*w as usize, seed.nth(n as u64))).collect()
}

fn layers_of(widths: &[i64]) -> Permutations {
    let names = names(widths.len() - 1);
    Permutations::mlp(&names.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn exchanged_units_leave_the_function_and_matching_undoes_the_exchange() -> Result<()> {
    for widths in [vec![6, 40, 3], vec![6, 32, 24, 3], vec![5, 20, 30, 20, 4]] {
        let (a, layers) = (mlp(&widths, Seed(1)), layers_of(&widths));
        let orders = orders_of(&widths, Seed(2));
        let b = permuted(&layers, &a, &orders)?;
        let x = draw(&[9, widths[0]], Seed(3)).mul_scalar(3.0)?;
        let (ya, yb) = (run(&a, &x).pop().unwrap(), run(&b, &x).pop().unwrap());
        assert!(ya.max_abs_diff(&yb)? <= 1e-5, "{}", ya.max_abs_diff(&yb)?);
        assert!(b.need("0.weight")?.max_abs_diff(a.need("0.weight")?)? > 0.1);

        // With several layers coordinate descent may stop early: one of a few seeds finds all.
        let found: Vec<_> =
            (0..6).map(|s| match_weights(&layers, &a, &b, Seed(s))).collect::<Result<_>>()?;
        let exact = |m: &Tensors| a.iter().all(|(n, t)| m.need(n).unwrap().bit_equal(t).unwrap());
        let whole = found.iter().filter(|m| exact(&m.model)).count();
        assert!(whole >= 1, "{widths:?}");
        if widths.len() == 3 {
            assert!(whole == 6 && found.iter().all(|m| m.sweeps == 1), "{found:?}");
        }
        for m in &found {
            assert!(m.objective.windows(2).all(|w| w[1] > w[0]), "{:?}", m.objective);
            let y = run(&m.model, &x).pop().unwrap();
            assert!(y.max_abs_diff(&yb)? <= 1e-5);
            // The last value is the objective itself.
            let mut value = 0.0;
            for (name, t) in
                a.iter().filter(|(n, _)| !n.ends_with(&format!("{}.bias", widths.len() - 2)))
            {
                value += t.mul(m.model.need(name)?)?.sum()?.item()?;
            }
            let last = *m.objective.last().unwrap();
            assert!((last - value).abs() < 1e-3 * value.abs(), "{last} {value}");
        }

        // By activations, whose units are the same up to their order.
        let hidden = |m: &Tensors| -> Vec<Tensor> {
            let mut all = run(m, &draw(&[200, widths[0]], Seed(4)));
            all.pop();
            all
        };
        let matched = match_activations(&hidden(&a), &hidden(&b))?;
        let back = permuted(&layers, &b, &matched)?;
        // Units that never fire are like no other and may change places.
        let y = run(&back, &x).pop().unwrap();
        assert!(y.max_abs_diff(&ya)? <= 1e-5);
        let agreeing: usize =
            matched.iter().flatten().zip(orders.iter().flatten()).filter(|(m, o)| *o != *m).count();
        assert!(agreeing > 0);
    }
    Ok(())
}

#[test]
fn one_layer_is_matched_as_well_as_by_trying_all_orders() -> Result<()> {
    let widths = [3, 5, 2];
    let layers = layers_of(&widths);
    for seed in 0..10 {
        let (a, b) = (mlp(&widths, Seed(seed)), mlp(&widths, Seed(seed + 100)));
        let value = |m: &Tensors| -> f64 {
            let on = ["0.weight", "0.bias", "1.weight"];
            let one = |n: &&str| a.need(n)?.mul(m.need(n)?)?.sum()?.item();
            on.iter().map(|n| one(n).unwrap()).sum()
        };
        let mut best = f64::NEG_INFINITY;
        let mut order: Vec<usize> = (0..5).collect();
        try_all(&mut order, 0, &mut |order| {
            best = best.max(value(&permuted(&layers, &b, &[order.to_vec()]).unwrap()));
        });
        let found = match_weights(&layers, &a, &b, Seed(0))?;
        assert!((value(&found.model) - best).abs() < 1e-5, "{} {best}", value(&found.model));
    }
    Ok(())
}

/// Networks that have nothing to do with each other: many sweeps, in which little is moved at a time.
#[test]
fn where_a_search_ends_no_layer_has_anything_to_gain() -> Result<()> {
    let widths = [7, 30, 40, 25, 4];
    let layers = layers_of(&widths);
    let mut most = 0;
    for seed in 0..4 {
        let (a, b) = (mlp(&widths, Seed(seed)), mlp(&widths, Seed(seed + 100)));
        let found = match_weights(&layers, &a, &b, Seed(seed))?;
        most = most.max(found.sweeps);
        let numbers =
            |m: &Tensors, name: &str| -> Vec<f64> { m.need(name).unwrap().to_vec().unwrap() };
        let mut objective = 0.0;
        for k in 0..3 {
            let (n, fan_in, fan_out) =
                (widths[k + 1] as usize, widths[k] as usize, widths[k + 2] as usize);
            let of = |m: &Tensors| {
                let [w, bias] = ["weight", "bias"].map(|p| numbers(m, &format!("{k}.{p}")));
                (w, bias, numbers(m, &format!("{}.weight", k + 1)))
            };
            let ((wa, ba, na), (wb, bb, nb)) = (of(&a), of(&found.model));
            let alike = |i: usize, j: usize| -> f64 {
                let own = (0..fan_in).map(|c| wa[i * fan_in + c] * wb[j * fan_in + c]).sum::<f64>();
                let next = (0..fan_out).map(|r| na[r * n + i] * nb[r * n + j]).sum::<f64>();
                own + ba[i] * bb[j] + next
            };
            let cost: Vec<Vec<f64>> =
                (0..n).map(|i| (0..n).map(|j| -alike(i, j)).collect()).collect();
            let best = modl_core::assignment(&cost)?;
            let best: f64 = best.iter().enumerate().map(|(i, j)| -cost[i][j.unwrap()]).sum();
            let own: f64 = (0..n).map(|i| -cost[i][i]).sum();
            assert!(best - own <= 1e-5 * own.abs(), "layer {k}: {own} could be {best}");
            objective +=
                wa.iter().zip(&wb).chain(ba.iter().zip(&bb)).map(|(a, b)| a * b).sum::<f64>();
            if k == 2 {
                objective += na.iter().zip(&nb).map(|(a, b)| a * b).sum::<f64>();
            }
        }
        let last = found.objective.last().unwrap();
        assert!((last - objective).abs() < 1e-5 * objective.abs(), "{last} {objective}");
    }
    assert!(most > 3, "the test would say little: {most}");
    Ok(())
}

fn try_all(order: &mut Vec<usize>, from: usize, work: &mut impl FnMut(&[usize])) {
    if from == order.len() {
        return work(order);
    }
    for i in from..order.len() {
        order.swap(from, i);
        try_all(order, from + 1, work);
        order.swap(from, i);
    }
}

#[test]
fn gated_feed_forward_networks_are_matched_and_what_does_not_fit_is_refused() -> Result<()> {
    let mut a = Tensors::new();
    for (name, shape) in
        [("up.weight", [12, 6]), ("gate.weight", [12, 6]), ("down.weight", [6, 12])]
    {
        a.set(name, draw(&shape, Seed(8).child(name)));
    }
    let layers = Permutations::feed_forward(&[(&["gate", "up"], "down")]);
    let b = permuted(&layers, &a, &[shuffled(12, Seed(1))])?;
    let x = draw(&[4, 6], Seed(2));
    let f = |m: &Tensors| -> Result<Tensor> {
        let gate = x.linear(m.need("gate.weight")?, None)?.silu()?;
        gate.mul(&x.linear(m.need("up.weight")?, None)?)?.linear(m.need("down.weight")?, None)
    };
    assert!(f(&a)?.max_abs_diff(&f(&b)?)? <= 1e-6);
    let found = match_weights(&layers, &a, &b, Seed(0))?;
    assert!(a.iter().all(|(n, t)| found.model.need(n).unwrap().bit_equal(t).unwrap()));

    let square = Layer { name: "s".into(), axes: vec![("w".into(), 0), ("w".into(), 1)] };
    assert!(Permutations::new(vec![square]).unwrap_err().to_string().contains("two axes"));
    let e = permuted(&layers, &a, &[vec![0; 12]]).unwrap_err().to_string();
    assert!(e.contains("none of 0 to 12"), "{e}");
    let other = mlp(&[3, 4, 2], Seed(1));
    assert!(match_weights(&layers, &a, &other, Seed(0)).is_err());
    assert!(match_weights(&layers, &other, &a, Seed(0)).is_err());
    Ok(())
}

#[test]
fn a_line_has_its_ends_bit_for_bit_and_the_barrier_of_a_hill() -> Result<()> {
    let (a, b) = (mlp(&[4, 8, 3], Seed(1)), mlp(&[4, 8, 3], Seed(2)));
    for (lambda, end) in [(0.0, &a), (1.0, &b)] {
        let there = between(&a, &b, lambda)?;
        assert!(there.iter().all(|(n, t)| t.bit_equal(end.need(n).unwrap()).unwrap()));
    }
    let at = |t: f64| {
        Ok::<_, modl_core::Error>(
            Tensors::new().with("x", Tensor::from_slice(&[t], &[], Device::Cpu)?),
        )
    };
    // L = 1 + x + sin² πx ⁄ 2 between 0 and 1: above the line by ½ in the middle.
    let loss = |t: &Tensors| {
        let x = t.need("x")?.item()?;
        Ok(1.0 + x + (std::f64::consts::PI * x).sin().powi(2) / 2.0)
    };
    let found = curve(&at(0.0)?, &at(1.0)?, 25, loss)?;
    assert_eq!((found.points.len(), found.at), (25, 0.5));
    assert!((found.barrier - 0.5).abs() < 1e-12);
    assert_eq!((found.points[0], found.points[24].0), ((0.0, 1.0), 1.0));
    // A valley has none.
    let valley = curve(&at(-1.0)?, &at(1.0)?, 5, |t| Ok(t.need("x")?.item()?.powi(2)))?;
    assert_eq!((valley.barrier, valley.at), (0.0, 0.0));
    assert!(curve(&a, &b, 1, |_| Ok(0.0)).is_err());
    assert!(curve(&a, &mlp(&[4, 8], Seed(1)), 3, |_| Ok(0.0)).is_err());
    assert!(curve(&a, &b, 3, |_| Ok(f64::NAN)).unwrap_err().to_string().contains("λ = 0"));

    let half = weighted(&[(&a, 0.5), (&b, 0.5)])?;
    let middle = between(&a, &b, 0.5)?;
    assert!(half.need("0.weight")?.max_abs_diff(middle.need("0.weight")?)? <= 1e-7);
    assert!(weighted(&[]).is_err());
    Ok(())
}
