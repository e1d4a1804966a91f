//! Soft MoE: what goes into slots and what comes back.

use modl_core::{Context, Tensor, Weights, no_grad};
use proptest::prelude::*;
use serde_json::json;

use super::support::*;

const M: usize = 3;
const P: usize = 2;
const D: usize = 4;

fn made(normalise: bool) -> Made {
    let config = json!({"type": "soft_moe", "slots": P, "normalise": normalise});
    Made::new(config, M, D as i64).unwrap()
}

/// Dispatch and combine, `[batch, seq, m, slots]`.
fn slots(made: &Made, x: &Tensor, cx: &Context) -> (Tensor, Tensor) {
    match made.routed(x, cx).weights {
        Weights::Slots { dispatch, combine } => (dispatch, combine),
        other => panic!("{other:?}"),
    }
}

fn unit(v: &[f64]) -> Vec<f64> {
    let length = (v.iter().map(|v| v * v).sum::<f64>() + 1e-6).sqrt();
    v.iter().map(|v| v / length).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn mixtures_are_softmaxes_over_tokens_and_over_slots(
        x in prop::collection::vec(-2.0f64..2.0, 2 * 5 * D),
        scale in 0.2f64..3.0,
        normalise in any::<bool>(),
        n in 1..=5usize,
    ) {
        let made = made(normalise);
        if normalise {
            made.set("router.scale", &[scale]);
        }
        let phi = rows(&made.param("router.phi"));
        // The second row has n real tokens.
        let mask: Vec<f64> =
            (0..10).map(|u| f64::from(u8::from(u < 5 || u - 5 < n))).collect();
        let cx = Context::eval().with_feature("mask", t(&mask, &[2, 5]));
        let (dispatch, combine) = slots(&made, &t(&x, &[2, 5, D as i64]), &cx);
        prop_assert_eq!(dispatch.size(), [2, 5, M as i64, P as i64]);
        let (dispatch, combine) =
            (dispatch.to_vec::<f64>().unwrap(), combine.to_vec::<f64>().unwrap());
        for b in 0..2 {
            let logits: Vec<Vec<f64>> = (0..5).map(|i| {
                let x = &x[(b * 5 + i) * D..][..D];
                phi.iter().map(|phi| {
                    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                    if normalise { scale * dot(&unit(x), &unit(phi)) } else { dot(x, phi) }
                }).collect()
            }).collect();
            let len = if b == 0 { 5 } else { n };
            for s in 0..M * P {
                let column: Vec<f64> = logits[..len].iter().map(|l| l[s]).collect();
                let mut expected = softmax(&column);
                expected.resize(5, 0.0);
                let found: Vec<f64> = (0..5).map(|i| dispatch[(b * 5 + i) * M * P + s]).collect();
                close(&found, &expected, 1e-12);
            }
            for (i, l) in logits.iter().enumerate() {
                close(&combine[(b * 5 + i) * M * P..][..M * P], &softmax(l), 1e-12);
            }
        }
    }
}

/// Σⱼₛ combine · hⱼ(Σₜ dispatch · x) with a different function for each module, `[seq][D]`.
fn output(made: &Made, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let tensor = t(&x.concat(), &[1, x.len() as i64, D as i64]);
    let (dispatch, combine) = slots(made, &tensor, &Context::eval());
    let (d, c) = (dispatch.to_vec::<f64>().unwrap(), combine.to_vec::<f64>().unwrap());
    let mut y = vec![vec![0.0; D]; x.len()];
    for s in 0..M * P {
        let mixed = |e: usize| (0..x.len()).map(|i| d[i * M * P + s] * x[i][e]).sum::<f64>();
        for e in 0..D {
            let h = (mixed(e) * (1.0 + (s / P) as f64)).tanh();
            y.iter_mut().enumerate().for_each(|(i, y)| y[e] += c[i * M * P + s] * h);
        }
    }
    y
}

#[test]
fn exchanging_tokens_exchanges_outputs() {
    let made = made(true);
    made.set("router.scale", &[4.0]);
    let x = rows(&normal(&[6, D as i64], 4));
    let y = output(&made, &x);
    let order = [3, 0, 5, 1, 2, 4];
    let turned = output(&made, &order.map(|i| x[i].clone()));
    for (i, y_turned) in order.iter().zip(&turned) {
        close(y_turned, &y[*i], 1e-12);
    }
    assert!((y[0][0] - y[1][0]).abs() > 1e-3);
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let made = made(true);
    made.set("router.scale", &[2.0]);
    let mut x = normal(&[2, 3, D as i64], 8);
    x.set_requires_grad(true).unwrap();
    let (wd, wc) = (normal(&[2, 3, 3, 2], 9), normal(&[2, 3, 3, 2], 10));
    let f = |x: &Tensor| {
        let (d, c) = slots(&made, x, &Context::eval());
        let sum = |t: &Tensor, w: &Tensor| t.mul(w).unwrap().sum().unwrap();
        sum(&d, &wd).add(&sum(&c, &wc)).unwrap()
    };
    let (mut phi, mut scale) = (made.param("router.phi"), made.param("router.scale"));
    let grads: Vec<Vec<f64>> = f(&x)
        .gradients(&[&phi, &scale, &x], false)
        .unwrap()
        .into_iter()
        .map(|g| g.unwrap().to_vec().unwrap())
        .collect();
    let h = 1e-5;
    for (which, grads) in grads.iter().enumerate() {
        for (i, g) in grads.iter().enumerate() {
            let mut at = |by: f64| {
                let target = [&mut phi, &mut scale, &mut x].into_iter().nth(which).unwrap();
                let before = target.to_vec::<f64>().unwrap();
                let mut moved = before.clone();
                moved[i] += by;
                let size = target.size();
                no_grad(|| target.copy_from(&t(&moved, &size))).unwrap();
                let value = no_grad(|| f(&x)).item().unwrap();
                let target = [&mut phi, &mut scale, &mut x].into_iter().nth(which).unwrap();
                no_grad(|| target.copy_from(&t(&before, &size))).unwrap();
                value
            };
            let numeric = (at(h) - at(-h)) / (2.0 * h);
            assert!((g - numeric).abs() < 1e-7, "{which}, {i}: {g} is not {numeric}");
        }
    }
}

#[test]
fn a_row_of_padding_alone_gives_numbers() {
    let made = made(true);
    let cx = Context::eval().with_feature("mask", t(&[0.0, 0.0], &[1, 2]));
    let (dispatch, combine) = slots(&made, &normal(&[1, 2, D as i64], 1), &cx);
    dispatch.check_finite("dispatch").unwrap();
    combine.check_finite("combine").unwrap();
}
