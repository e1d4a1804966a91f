//! Routers learn which module a rule wants: module j always answers with the j-th unit vector.

use modl_core::{Device, Kind, Outcome, Tensor, Weights, no_grad};
use serde_json::{Value, json};

use super::support::*;

/// Adam (Kingma and Ba 2015) on the router's parameters.
fn train(made: &Made, steps: u64, rate: f64, mut loss: impl FnMut(u64) -> Tensor) {
    let mut params: Vec<Tensor> = made
        .store
        .iter()
        .filter(|(_, p)| !p.is_buffer())
        .map(|(_, p)| p.tensor().clone())
        .collect();
    let zero = |p: &Tensor| vec![0.0; p.numel()];
    let mut moments: Vec<[Vec<f64>; 2]> = params.iter().map(|p| [zero(p), zero(p)]).collect();
    for step in 0..steps {
        let grads = loss(step).gradients(&params.iter().collect::<Vec<_>>(), false).unwrap();
        for ((p, g), [mean, square]) in params.iter_mut().zip(grads).zip(&mut moments) {
            let Some(g) = g else { continue };
            let g = g.to_vec::<f64>().unwrap();
            let mut values = p.to_vec::<f64>().unwrap();
            let right = |beta: f64| 1.0 - beta.powi(step as i32 + 1);
            for i in 0..g.len() {
                mean[i] = 0.9 * mean[i] + 0.1 * g[i];
                square[i] = 0.99 * square[i] + 0.01 * g[i] * g[i];
                let by = mean[i] / right(0.9) / ((square[i] / right(0.99)).sqrt() + 1e-8);
                values[i] -= rate * by;
            }
            let size = p.size();
            no_grad(|| p.copy_from(&t(&values, &size))).unwrap();
        }
    }
}

/// Rows of the rules in turn, `[n, 2 · rules]`: the rule as a unit vector, and normal numbers.
fn data(rules: usize, n: usize, seed: u64) -> (Tensor, Tensor) {
    let unit = |r: usize| (0..rules).map(move |j| f64::from(u8::from(j == r % rules)));
    let rule = t(&(0..n).flat_map(unit).collect::<Vec<_>>(), &[n as i64, rules as i64]);
    let noise = normal(&[n as i64, rules as i64], seed);
    (Tensor::cat(&[rule.clone(), noise], -1).unwrap(), rule)
}

/// The share of right first choices before and after training, and the loss on new rows.
fn learns(config: Value, rules: usize) -> (f64, f64, f64) {
    let made = Made::new(config, rules, 2 * rules as i64).unwrap();
    let n = 20 * rules;
    let right = |made: &Made| {
        let (x, _) = data(rules, n, 999);
        let alpha = made.alphas(&x, &modl_core::Context::eval());
        let hits = alpha.iter().enumerate().filter(|(i, a)| top(a, 1)[0] == i % rules).count();
        hits as f64 / n as f64
    };
    let error = |alpha: &Tensor, rule: &Tensor| {
        alpha.sub(rule).unwrap().square().unwrap().sum_dims(&[-1], false).unwrap()
    };
    let before = right(&made);
    train(&made, 100, 0.1, |step| {
        let (x, rule) = data(rules, n, step);
        let cx = training(step);
        let routing = made.routed(&x, &cx);
        let rows = error(&routing.dense(Kind::Double, Device::Cpu).unwrap(), &rule);
        let known = rows.detach().unwrap();
        made.router.learn(&routing, &Outcome::new(&known, &cx)).unwrap();
        let mut total = rows.mean().unwrap();
        for (_, aux) in &routing.losses {
            total = total.add(&aux.mul_scalar(0.01).unwrap()).unwrap();
        }
        total
    });
    let (x, rule) = data(rules, n, 999);
    let alpha = made.routed(&x, &modl_core::Context::eval()).dense(Kind::Double, Device::Cpu);
    let after = error(&alpha.unwrap(), &rule).mean().unwrap().item().unwrap();
    (before, right(&made), after)
}

#[test]
fn each_rule_finds_its_module() {
    let free =
        |kind: &str| json!({"type": kind, "capacity_factor": 0.0, "eval_capacity_factor": 0.0});
    for (config, rules) in [
        (json!({"type": "noisy_top_k", "k": 2}), 4),
        (json!({"type": "noisy_top_k", "k": 2, "variant": "v_moe"}), 4),
        (free("gshard"), 4),
        (free("st_moe"), 4),
        (json!({"type": "gshard"}), 4),
        (json!({"type": "switch", "capacity_factor": 2.0}), 4),
        (json!({"type": "deepseek", "k": 2, "bias_update": 0.02}), 4),
        (json!({"type": "expert_choice", "capacity_factor": 1.0}), 4),
        (json!({"type": "product_key", "k": 3}), 4),
        (json!({"type": "hierarchical", "groups": 2}), 4),
    ] {
        let (before, after, error) = learns(config.clone(), rules);
        assert!(before < 0.6, "{config}: {before} from the start");
        assert!(after > 0.95, "{config}: {after} right, error {error}");
        assert!(error < 0.2, "{config}: error {error}");
    }
}

#[test]
fn soft_moe_brings_tokens_of_a_rule_together() {
    // Each token wants the mean of what the tokens of its rule have in the last coordinate. Modules
    // do nothing; only what goes into a slot together can be averaged.
    let (rules, seq, batch) = (3usize, 12usize, 16usize);
    let made = Made::new(json!({"type": "soft_moe", "slots": 1}), rules, 4).unwrap();
    let of_step = |seed: u64| {
        let u = normal(&[batch as i64, seq as i64, 1], seed);
        let unit = |i: usize| (0..rules).map(move |j| f64::from(u8::from(j == i % rules)));
        let rule: Vec<f64> = (0..batch * seq).flat_map(unit).collect();
        let rule = t(&rule, &[batch as i64, seq as i64, rules as i64]);
        let sums = rule.transpose(1, 2).unwrap().bmm(&u).unwrap(); // [batch, rules, 1]
        let mean = sums.mul_scalar(rules as f64 / seq as f64).unwrap();
        let target = rule.bmm(&mean).unwrap();
        let small = u.mul_scalar(0.3).unwrap();
        (Tensor::cat(&[rule, small], -1).unwrap(), u, target)
    };
    let error = |seed: u64| {
        let (x, u, target) = of_step(seed);
        let Weights::Slots { dispatch, combine } = made.routed(&x, &training(seed)).weights else {
            panic!()
        };
        let slots = dispatch.squeeze(-1).unwrap().transpose(1, 2).unwrap().bmm(&u).unwrap();
        let y = combine.squeeze(-1).unwrap().bmm(&slots).unwrap();
        y.sub(&target).unwrap().square().unwrap().mean().unwrap()
    };
    let before = error(77).item().unwrap();
    train(&made, 300, 0.05, error);
    let after = error(77).item().unwrap();
    assert!(after < 0.2 * before, "{before} before, {after} after");
}
