//! Switch, GShard and ST-MoE: balance, z-loss, jitter, and the second module at random.

use modl_core::{Context, Tensor};
use serde_json::{Value, json};

use super::support::*;

/// A router that is told ln p by its input: row i has the probabilities `p[i]`.
fn told(p: &[&[f64]], mut config: Value) -> (Made, Tensor) {
    let (n, m) = (p.len(), p[0].len());
    config["bias"] = json!(false);
    let made = Made::new(config, m, n as i64).unwrap();
    let logits = (0..m).flat_map(|j| p.iter().map(move |p| p[j].max(1e-300).ln()));
    made.set("router.weight", &logits.collect::<Vec<_>>());
    (made, t(&identity(n, n), &[n as i64, n as i64]))
}

#[test]
fn balance_of_switch_is_one_if_uniform_and_not_always_above() {
    let balance = |p: &[&[f64]]| {
        let (made, x) = told(p, json!({"type": "switch", "jitter": 0.0}));
        loss(&made.routed(&x, &training(0)), "balance").item().unwrap()
    };
    let even: [&[f64]; 3] = [&[0.5, 0.3, 0.2], &[0.2, 0.5, 0.3], &[0.3, 0.2, 0.5]];
    assert!((balance(&even) - 1.0).abs() < 1e-12);
    // f = (½, ½, 0), P = (.17, .42, .41): 3 · .295.
    let apart: [&[f64]; 2] = [&[0.34, 0.33, 0.33], &[0.0, 0.51, 0.49]];
    assert!((balance(&apart) - 0.885).abs() < 1e-12);
    // Certain choices have f = P: 3 · Σ f², here for f = (¾, ¼, 0).
    let one = |j: usize| [j == 0, j == 1, j == 2].map(|b| f64::from(u8::from(b)));
    let certain = [one(0), one(0), one(0), one(1)];
    let certain: Vec<&[f64]> = certain.iter().map(|p| p.as_slice()).collect();
    assert!((balance(&certain) - 3.0 * (0.5625 + 0.0625)).abs() < 1e-12);
}

#[test]
fn balance_counts_what_was_chosen_before_anything_was_dropped() {
    let p: [&[f64]; 2] = [&[0.8, 0.2], &[0.6, 0.4]];
    for capacity in [0.0, 0.5] {
        let config = json!({"type": "switch", "jitter": 0.0, "capacity_factor": capacity});
        let (made, x) = told(&p, config);
        let routing = made.routed(&x, &training(0));
        assert_eq!(noted(&routing, "overflow"), [if capacity > 0.0 { 1.0 } else { 0.0 }]);
        // f = (1, 0), P = (.7, .3).
        assert!((loss(&routing, "balance").item().unwrap() - 1.4).abs() < 1e-12);
    }
}

#[test]
fn the_weight_of_switch_is_its_probability_and_starts_small() {
    let p: [&[f64]; 2] = [&[0.7, 0.1, 0.2], &[0.25, 0.45, 0.3]];
    let (made, x) = told(&p, json!({"type": "switch"}));
    let (index, weight) = sparse(&made.routed(&x, &Context::eval()));
    assert_eq!(index, [[0], [1]]);
    close(&weight.concat(), &[0.7, 0.45], 1e-12);

    // Variance 0.1 ⁄ width over 64 · 256 numbers.
    let made = Made::new(json!({"type": "switch"}), 64, 256).unwrap();
    let w = made.param("router.weight").to_vec::<f64>().unwrap();
    let variance = w.iter().map(|w| w * w).sum::<f64>() / w.len() as f64;
    assert!((variance * 256.0 - 0.1).abs() < 0.005, "{variance}");
}

#[test]
fn jitter_multiplies_each_element_by_up_to_one_percent() {
    let config = |jitter: f64| json!({"type": "switch", "bias": false, "jitter": jitter});
    let (m, width) = (2, 400);
    let logit = |jitter: f64, step: u64| {
        // One element a row: ℓ = (x, 0), so that ln p₀ ⁄ p₁ = x · u.
        let made = Made::new(config(jitter), m, width as i64).unwrap();
        let mut w = vec![0.0; m * width];
        w[..width].fill(1.0);
        made.set("router.weight", &w);
        let x = t(&identity(width, width), &[width as i64, width as i64]);
        let (_, weight) = sparse(&made.routed(&x.mul_scalar(2.0).unwrap(), &training(step)));
        weight.iter().map(|w| (w[0] / (1.0 - w[0])).ln() / 2.0).collect::<Vec<f64>>()
    };
    // Dropped rows have weight 0 and so no logarithm: 250 of 400 have a place.
    let seen = |l: Vec<f64>| l.into_iter().filter(|u| u.is_finite()).collect::<Vec<_>>();
    assert!(seen(logit(0.0, 0)).iter().all(|u| (u - 1.0).abs() < 1e-9));
    let shaken = seen(logit(0.01, 0));
    assert_eq!(shaken.len(), 250);
    assert!(shaken.iter().all(|u| (0.99 - 1e-9..1.01 + 1e-9).contains(u)));
    let mean = shaken.iter().sum::<f64>() / 250.0;
    let variance = shaken.iter().map(|u| (u - mean).powi(2)).sum::<f64>() / 250.0;
    // Of a uniform distribution 0.02 wide: 0.02² ⁄ 12.
    assert!((mean - 1.0).abs() < 0.0015 && (variance / (0.0004 / 12.0) - 1.0).abs() < 0.2);
    assert_ne!(seen(logit(0.01, 1)), shaken);
}

#[test]
fn the_gradient_of_z_is_twice_the_logsumexp_times_p() {
    let p = [0.5, 0.3, 0.2];
    let made = Made::new(json!({"type": "st_moe"}), 3, 1).unwrap();
    let x = t(&[0.0], &[1, 1]);
    let mut alphas = Vec::new();
    for shift in [0.0, 2.0, -1.5] {
        made.set("router.bias", &p.map(|p: f64| p.ln() + shift));
        let routing = made.routed(&x, &training(0));
        let z = loss(&routing, "z");
        // ln Σ p e^c = c: least where the shift is 0.
        assert!((z.item().unwrap() - shift * shift).abs() < 1e-12);
        close(&gradient(&z, &made.param("router.bias")), &p.map(|p| 2.0 * shift * p), 1e-12);
        alphas.push(made.alphas(&x, &Context::eval()).concat());
    }
    // The softmax does not see the shift.
    close(&alphas[0], &alphas[1], 1e-12);
    close(&alphas[0], &[0.625, 0.375, 0.0], 1e-12);
}

#[test]
fn the_second_module_is_kept_with_its_chance() {
    // g = (0.9, 0.1): the second is kept with probability 0.1 ⁄ 0.2, and always from 0.2 on.
    for (threshold, chance) in [(0.2, 0.5), (0.5, 0.2), (0.1, 1.0), (0.0, 1.0)] {
        let config = json!({"type": "gshard", "threshold": threshold, "capacity_factor": 0.0,
            "eval_capacity_factor": 0.0, "bias": false});
        let made = Made::new(config, 3, 1).unwrap();
        made.set("router.weight", &[0.72f64.ln(), 0.08f64.ln(), 1e-9f64.ln()]);
        let n = 4000;
        let x = Tensor::ones(&[n, 1], modl_core::Kind::Double, modl_core::Device::Cpu).unwrap();
        let (index, weight) = sparse(&made.routed(&x, &training(1)));
        let kept = index.iter().filter(|i| i[1] == 1).count() as f64 / n as f64;
        // Three standard deviations of 4,000 draws are at most 0.024.
        assert!((kept - chance).abs() < 0.024, "{threshold}: {kept}");
        for (i, w) in index.iter().zip(&weight) {
            let second = if i[1] < 0 { 0.0 } else { 0.1 };
            close(w, &[0.9, second], 1e-12);
        }
        let (index, _) = sparse(&made.routed(&x, &Context::eval()));
        assert!(index.iter().all(|i| i == &[0, 1]));
    }
}

#[test]
fn a_limit_for_two_choices_is_refused_where_later_tokens_are_unknown() {
    let ahead = |config: Value| Made::new(config, 4, 4).unwrap().router.looks_ahead();
    assert!(ahead(json!({"type": "gshard"})) && ahead(json!({"type": "st_moe"})));
    let free = json!({"type": "gshard", "capacity_factor": 0.0, "eval_capacity_factor": 0.0});
    assert!(!ahead(free));
    assert!(!ahead(json!({"type": "switch"})));
    assert!(ahead(json!({"type": "switch", "fill": "random"})));

    // Why: with one place each, a later token's first choice takes an earlier one's second.
    let config = json!({"type": "gshard", "input": "tokens", "bias": false,
        "eval_capacity_factor": 0.5});
    let made = Made::new(config, 2, 2).unwrap();
    made.set("router.weight", &identity(2, 2));
    let alone = sparse(&made.routed(&t(&[1.0, 0.0, 1.0, 0.0], &[1, 2, 2]), &Context::eval())).0;
    let other = sparse(&made.routed(&t(&[1.0, 0.0, 0.0, 1.0], &[1, 2, 2]), &Context::eval())).0;
    assert_eq!((&alone[0], &other[0]), (&vec![0, 1], &vec![0, -1]));
}
