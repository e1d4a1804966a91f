//! Hard learned routing: the laws, published properties against closed forms, and rules that are
//! learned.

#![allow(clippy::unwrap_used, clippy::panic)]

mod made;

use made::{Made, assert_close, bank, check, numbered, site, softmax, t};
use modl_core::testing::RouterClaims;
use modl_core::{
    Context, Device, Init, Kind, Outcome, Result, Routing, Seed, Tensor, Weights, no_grad,
};
use serde_json::{Value, json};

/// A router whose parameters stand under `path`.
fn made_at(path: &str, config: Value, modules: usize, width: i64) -> Result<Made> {
    Made::build(config, bank(&numbered(modules), width), &site(width), path, Kind::Double)
}

fn ones(shape: &[i64]) -> Tensor {
    Tensor::ones(shape, Kind::Double, Device::Cpu).unwrap()
}

fn train(seed: u64, step: u64) -> Context {
    Context::train(Seed(seed), step)
}

// ---- The laws ----

/// Drawn in training and one module in evaluation, which no gradient goes through.
fn drawn() -> RouterClaims {
    RouterClaims { draws: true, learns: false, ..RouterClaims::top_k(1) }
}

#[test]
fn gumbel_softmax_keeps_the_laws() {
    check(json!({"type": "gumbel_softmax"}), drawn());
    let anneal = json!({"to": 0.5, "steps": 10, "shape": "linear"});
    check(json!({"type": "gumbel_softmax", "hard": true, "anneal": anneal}), drawn());
    check(json!({"type": "gumbel_softmax", "hard": true, "input": "tokens"}), drawn());
}

#[test]
fn concrete_bernoulli_keeps_the_laws() {
    let gates = |learns| RouterClaims { sums_to_one: false, at_most: None, learns, ..drawn() };
    check(json!({"type": "concrete_bernoulli"}), gates(false));
    check(json!({"type": "concrete_bernoulli", "hard": true, "input": "tokens"}), gates(false));
    check(json!({"type": "concrete_bernoulli", "evaluation": "probability"}), gates(true));
}

#[test]
fn policies_keep_the_laws() {
    for baseline in ["none", "mean", "learned"] {
        let config = json!({"type": "reinforce", "baseline": baseline, "entropy": 0.1});
        check(config, drawn());
    }
    check(json!({"type": "reinforce", "baseline": "learned", "input": "tokens"}), drawn());
    check(json!({"type": "relax"}), drawn());
    check(json!({"type": "relax", "input": "tokens"}), drawn());
    check(json!({"type": "modular_network"}), drawn());
}

#[test]
fn routing_networks_keep_the_laws() {
    for agent in ["wpl", "reinforce", "q_learning"] {
        let claims = RouterClaims { tasks: vec!["x".into(), "y".into()], ..drawn() };
        check(json!({"type": "routing_network", "tasks": ["x", "y"], "agent": agent}), claims);
    }
}

#[test]
fn path_net_keeps_the_laws() {
    // The path of a step is that of the step, whatever the seed of the pass.
    let paths = |n| RouterClaims {
        sums_to_one: false,
        draws: false,
        learns: false,
        ..RouterClaims::top_k(n)
    };
    check(json!({"type": "path_net"}), paths(3));
    let average = RouterClaims { sums_to_one: true, ..paths(2) };
    check(json!({"type": "path_net", "active": 2, "average": true}), average);
}

// ---- Draws ----

const LOGITS: [f64; 5] = [0.7, -0.4, 1.2, 0.0, -1.0];
/// The value that χ² with 4 degrees of freedom is above with probability 0.001.
const CHI2_4: f64 = 18.467;
const DRAWS: i64 = 100_000;

fn chi2(counts: &[f64], p: &[f64]) -> f64 {
    let n: f64 = counts.iter().sum();
    counts.iter().zip(p).map(|(c, p)| (c - n * p).powi(2) / (n * p)).sum()
}

#[test]
fn choices_are_drawn_with_the_frequencies_of_the_softmax() {
    for (n, config) in [
        json!({"type": "gumbel_softmax", "tau": 0.7}),
        json!({"type": "gumbel_softmax", "hard": true}),
        json!({"type": "reinforce"}),
        json!({"type": "relax"}),
        json!({"type": "modular_network"}),
    ]
    .into_iter()
    .enumerate()
    {
        let made = Made::new(config.clone(), 5, 1).unwrap();
        made.set("router.bias", &LOGITS);
        let alpha = made.dense(&ones(&[DRAWS, 1]), &train(n as u64, 2)).unwrap();
        let chosen = alpha.argmax(-1).unwrap().to_vec::<i64>().unwrap();
        let mut counts = [0.0; 5];
        chosen.iter().for_each(|j| counts[*j as usize] += 1.0);
        let found = chi2(&counts, &softmax(&LOGITS));
        assert!(found < CHI2_4, "{config}: χ² = {found}");
        // The test would notice frequencies that are a little wrong.
        let mut other = LOGITS;
        other[0] += 0.1;
        assert!(chi2(&counts, &softmax(&other)) > CHI2_4);
    }
}

#[test]
fn a_relaxed_choice_is_one_hot_as_tau_goes_to_0_and_spread_where_it_is_large() {
    let mean_of_largest = |tau: f64| {
        let made = Made::new(json!({"type": "gumbel_softmax", "tau": tau}), 5, 1).unwrap();
        made.set("router.bias", &LOGITS);
        let largest = made.dense(&ones(&[1000, 1]), &train(3, 0)).unwrap().max_dim(-1).unwrap().0;
        let largest = largest.to_vec::<f64>().unwrap();
        (largest.iter().sum::<f64>() / 1000.0, largest.iter().copied().fold(1.0, f64::min))
    };
    assert!(mean_of_largest(1e-8).1 > 1.0 - 1e-9, "all are one-hot");
    assert!((0.4..0.9).contains(&mean_of_largest(1.0).0));
    assert!(mean_of_largest(1e4).0 < 0.201);
}

/// The gradient of Σ c α with respect to ℓ (b, in f64) for one row, and α.
fn pulled(config: Value, c: &[f64], step: u64) -> (Vec<f64>, Vec<f64>) {
    let made = Made::new(config, 5, 1).unwrap();
    made.set("router.bias", &LOGITS);
    let alpha = made.dense(&ones(&[1, 1]), &train(5, step)).unwrap();
    let loss = alpha.mul(&t(c, &[1, 5])).unwrap().sum().unwrap();
    let g = loss.gradients(&[made.store.get("router.bias").unwrap()], false).unwrap();
    (alpha.to_vec().unwrap(), g[0].as_ref().unwrap().to_vec().unwrap())
}

#[test]
fn straight_through_is_one_hot_forward_and_the_soft_sample_backward() {
    let (c, tau) = ([0.3, -1.0, 2.0, 0.5, 0.1], 0.8);
    for step in 0..20 {
        let soft = json!({"type": "gumbel_softmax", "tau": tau});
        let (y, of_soft) = pulled(soft, &c, step);
        let hard = json!({"type": "gumbel_softmax", "tau": tau, "hard": true});
        let (one, of_hard) = pulled(hard, &c, step);
        let top = (0..5).max_by(|a, b| y[*a].total_cmp(&y[*b])).unwrap();
        let expected: Vec<f64> = (0..5).map(|j| f64::from(u8::from(j == top))).collect();
        assert_eq!(one, expected, "exactly");
        // ∂ Σ c y ⁄ ∂ℓⱼ = yⱼ (cⱼ − Σ c y) ⁄ τ
        let mean: f64 = c.iter().zip(&y).map(|(c, y)| c * y).sum();
        let by_hand: Vec<f64> = (0..5).map(|j| y[j] * (c[j] - mean) / tau).collect();
        assert_close(&of_hard, &by_hand, 1e-12);
        assert_close(&of_soft, &by_hand, 1e-12);
    }
}

#[test]
fn tau_falls_as_it_is_told() {
    let c = [1.0, 0.0, 0.0, 0.0, 0.0];
    for kind in ["gumbel_softmax", "concrete_bernoulli"] {
        // 1 → ¼ in 100 steps: ½ in the middle where by the same factor, ⅝ where by the same step.
        for (shape, step, tau) in
            [("exponential", 50, 0.5), ("linear", 50, 0.625), ("linear", 500, 0.25)]
        {
            let anneal = json!({"to": 0.25, "steps": 100, "shape": shape});
            let falling = pulled(json!({"type": kind, "anneal": anneal}), &c, step);
            let fixed = pulled(json!({"type": kind, "tau": tau}), &c, step);
            assert_close(&falling.0, &fixed.0, 1e-12);
            let other = pulled(json!({"type": kind}), &c, step);
            assert!((falling.0[0] - other.0[0]).abs() > 1e-6);
        }
    }
}

#[test]
fn gates_open_with_the_frequency_of_the_sigmoid() {
    for (hard, tau) in [(false, 1.0), (false, 0.1), (true, 1.0)] {
        let config = json!({"type": "concrete_bernoulli", "hard": hard, "tau": tau});
        let made = Made::new(config, 5, 1).unwrap();
        made.set("router.bias", &LOGITS);
        let open = made.dense(&ones(&[DRAWS, 1]), &train(7, 1)).unwrap().gt_scalar(0.5).unwrap();
        let open = open.to_kind(Kind::Double).unwrap().mean_dims(&[0], false).unwrap();
        for (found, l) in open.to_vec::<f64>().unwrap().iter().zip(LOGITS) {
            let p = 1.0 / (1.0 + (-l).exp());
            let error = (p * (1.0 - p) / DRAWS as f64).sqrt();
            assert!((found - p).abs() < 3.0 * error, "{found} {p}");
        }
    }
}

#[test]
fn gates_are_0_or_1_as_tau_goes_to_0_and_straight_through_learns_as_soft_ones_do() {
    let c = [0.3, -1.0, 2.0, 0.5, 0.1];
    for step in 0..20 {
        let (z, of_soft) = pulled(json!({"type": "concrete_bernoulli", "tau": 0.8}), &c, step);
        let hard = json!({"type": "concrete_bernoulli", "tau": 0.8, "hard": true});
        let (gate, of_hard) = pulled(hard, &c, step);
        let expected: Vec<f64> = z.iter().map(|z| f64::from(u8::from(*z > 0.5))).collect();
        assert_eq!(gate, expected, "exactly");
        let by_hand: Vec<f64> = z.iter().zip(c).map(|(z, c)| c * z * (1.0 - z) / 0.8).collect();
        assert_close(&of_soft, &by_hand, 1e-12);
        assert_close(&of_hard, &by_hand, 1e-12);
        let (sharp, _) = pulled(json!({"type": "concrete_bernoulli", "tau": 1e-8}), &c, step);
        assert_close(&sharp, &expected, 1e-9);
    }
}

#[test]
fn gates_in_evaluation_are_a_threshold_or_the_probability() {
    let alpha = |evaluation: &str, bias: &[f64]| {
        let config = json!({"type": "concrete_bernoulli", "evaluation": evaluation});
        let made = Made::new(config, 5, 1).unwrap();
        made.set("router.bias", bias);
        let routing = made.route(&ones(&[1, 1]), &Context::eval()).unwrap();
        let alpha = routing.dense(Kind::Double, Device::Cpu).unwrap().to_vec::<f64>().unwrap();
        (alpha, routing.support().unwrap())
    };
    assert_eq!(alpha("threshold", &LOGITS), (vec![1.0, 0.0, 1.0, 0.0, 0.0], vec![0, 2]));
    assert_eq!(alpha("threshold", &[-1.0; 5]), (vec![0.0; 5], vec![]));
    let p: Vec<f64> = LOGITS.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
    assert_close(&alpha("probability", &LOGITS).0, &p, 1e-12);
}

// ---- Gradients of policies on a bandit ----

/// A bandit whose arm j costs `costs[j]`: what `credit` gives for ∂⁄∂ℓ in each of `batches` batches.
struct Bandit<'a> {
    made: &'a Made,
    costs: &'a [f64],
    rows: i64,
}

impl Bandit<'_> {
    /// The mean and the variance of the gradient over batches, for each arm, with what learns
    /// without gradients learning where `teach`.
    fn gradient(&self, batches: u64, teach: bool) -> (Vec<f64>, Vec<f64>) {
        let bias = self.made.store.get("router.bias").unwrap();
        let mut all = Vec::new();
        for n in 0..batches {
            let (cx, loss, own) = self.pass(n);
            let g = own.gradients(&[bias], false).unwrap();
            all.push(g[0].as_ref().unwrap().to_vec::<f64>().unwrap());
            if teach {
                let routing = self.made.route(&ones(&[self.rows, 1]), &cx).unwrap();
                self.made.router.learn(&routing, &Outcome::new(&loss, &cx)).unwrap();
            }
        }
        let n = all.len() as f64;
        let mean = |j: usize| all.iter().map(|g| g[j]).sum::<f64>() / n;
        let variance =
            |j: usize| all.iter().map(|g| (g[j] - mean(j)).powi(2)).sum::<f64>() / (n - 1.0);
        let arms = 0..self.costs.len();
        (arms.clone().map(mean).collect(), arms.map(variance).collect())
    }

    /// A pass, its losses, and the loss that the router derives from them.
    fn pass(&self, n: u64) -> (Context, Tensor, Tensor) {
        let cx = train(11, n);
        let routing = self.made.route(&ones(&[self.rows, 1]), &cx).unwrap();
        let alpha = routing.dense(Kind::Double, Device::Cpu).unwrap();
        let costs = t(self.costs, &[self.costs.len() as i64, 1]);
        let loss = alpha.matmul(&costs).unwrap().squeeze(-1).unwrap().detach().unwrap();
        let own = self.made.router.credit(&routing, &Outcome::new(&loss, &cx)).unwrap().unwrap();
        (cx, loss, own.1)
    }

    /// ∂ E f ⁄ ∂ℓⱼ = πⱼ (fⱼ − Σ π f)
    fn exact(&self, logits: &[f64]) -> Vec<f64> {
        let p = softmax(logits);
        let mean: f64 = p.iter().zip(self.costs).map(|(p, f)| p * f).sum();
        p.iter().zip(self.costs).map(|(p, f)| p * (f - mean)).collect()
    }
}

fn assert_unbiased(mean: &[f64], variance: &[f64], exact: &[f64], batches: u64, what: &str) {
    for ((m, v), e) in mean.iter().zip(variance).zip(exact) {
        let error = (v / batches as f64).sqrt();
        assert!((m - e).abs() < 3.0 * error, "{what}: {m} ± {error} is not {e}");
        assert!(error < 0.1 * e.abs(), "{what}: ± {error} says little about {e}");
    }
}

const BATCHES: u64 = 400;
const ROWS: i64 = 250;

#[test]
fn reinforce_is_unbiased_and_a_baseline_takes_variance_away() {
    let (logits, costs) = ([0.3, -0.2], [1.0, 0.25]);
    let mut variances = Vec::new();
    for baseline in ["none", "mean", "learned"] {
        let config = json!({"type": "reinforce", "baseline": baseline});
        let made = Made::new(config, 2, 1).unwrap();
        made.set("router.bias", &logits);
        if baseline == "learned" {
            made.set("router.value.bias", &[-0.6]);
        }
        let bandit = Bandit { made: &made, costs: &costs, rows: ROWS };
        let (mean, variance) = bandit.gradient(BATCHES, true);
        assert_unbiased(&mean, &variance, &bandit.exact(&logits), BATCHES, baseline);
        variances.push(variance[0]);
    }
    // Without a baseline Var f(1[a = 0] − π₀) = 0.093 by hand, with the best one 0.0087.
    assert!(variances[1] < 0.3 * variances[0], "{variances:?}");
    assert!(variances[2] < 0.3 * variances[0], "{variances:?}");
}

#[test]
fn relax_is_unbiased_whatever_the_critic_says_and_a_right_one_takes_variance_away() {
    let (logits, costs) = ([0.3, -0.2, 0.5], [1.0, 0.25, 0.4]);
    let mut variances = Vec::new();
    let plain = Made::new(json!({"type": "reinforce", "baseline": "none"}), 3, 1).unwrap();
    let relax = |critic: [f64; 3]| {
        let made = Made::new(json!({"type": "relax"}), 3, 1).unwrap();
        made.set("router.critic.bias", &critic);
        made
    };
    for (what, made) in [
        ("reinforce", plain),
        ("no critic", relax([0.0; 3])),
        ("a wrong critic", relax([-2.0, 2.0, 1.0])),
        ("a right critic", relax(costs)),
    ] {
        made.set("router.bias", &logits);
        let bandit = Bandit { made: &made, costs: &costs, rows: ROWS };
        let (mean, variance) = bandit.gradient(BATCHES, false);
        assert_unbiased(&mean, &variance, &bandit.exact(&logits), BATCHES, what);
        variances.push(variance.iter().sum::<f64>());
    }
    assert!((variances[1] / variances[0] - 1.0).abs() < 1e-9, "without critic they are one");
    assert!(variances[2] > variances[0], "{variances:?}");
    assert!(variances[3] < 0.3 * variances[0], "{variances:?}");
    // Of one draw, by 20,000 draws of the formulas in another language: 0.243 and 0.0314.
    for (found, expected) in [(variances[0], 0.243), (variances[3], 0.0314)] {
        let found = found * ROWS as f64;
        assert!((found / expected - 1.0).abs() < 0.2, "{found} is not {expected}");
    }
}

#[test]
fn a_critic_learns_to_take_variance_away() {
    let (logits, costs) = ([0.3, -0.2, 0.5], [1.0, 0.25, 0.4]);
    let made = Made::new(json!({"type": "relax"}), 3, 1).unwrap();
    made.set("router.bias", &logits);
    let bandit = Bandit { made: &made, costs: &costs, rows: ROWS };
    let before: f64 = bandit.gradient(50, false).1.iter().sum();
    let critic = made.store.get("router.critic.bias").unwrap();
    for n in 0..200 {
        let g = bandit.pass(1000 + n).2.gradients(&[critic], false).unwrap();
        let step = g[0].as_ref().unwrap().mul_scalar(-0.5).unwrap();
        no_grad(|| critic.clone().add_in_place(&step)).unwrap();
    }
    let after: f64 = bandit.gradient(50, false).1.iter().sum();
    assert!(after < 0.5 * before, "{before} → {after}, {:?}", made.get("router.critic.bias"));
}

/// A choice of two rows, for credit by hand.
fn two_rows(config: Value) -> (Made, Routing, Context, Vec<f64>) {
    let made = Made::new(config, 2, 1).unwrap();
    made.set("router.bias", &[0.3, -0.2]);
    let cx = train(2, 0);
    let routing = made.route(&ones(&[2, 1]), &cx).unwrap();
    let p = softmax(&[0.3, -0.2]);
    let Weights::Sparse { index, .. } = &routing.weights else { panic!("{routing:?}") };
    let index = index.to_vec::<i64>().unwrap();
    let log_prob = index.iter().map(|j| p[*j as usize].ln()).collect();
    (made, routing, cx, log_prob)
}

#[test]
fn the_running_mean_is_that_of_past_rewards() {
    let config = json!({"type": "reinforce", "decay": 0.5});
    let (made, routing, cx, log_prob) = two_rows(config);
    let credit = |loss: &[f64]| {
        let loss = t(loss, &[2]);
        let own = made.router.credit(&routing, &Outcome::new(&loss, &cx)).unwrap().unwrap();
        assert_eq!(own.0, "reinforce");
        own.1.item().unwrap()
    };
    let by_hand =
        |loss: &[f64], b: f64| (0..2).map(|r| -(-loss[r] - b) * log_prob[r]).sum::<f64>() / 2.0;
    assert_close(&[credit(&[1.0, 4.0])], &[by_hand(&[1.0, 4.0], 0.0)], 1e-12);
    // Rewards −1 and then −2 in the mean: (½ · −1 + −2) ⁄ 1.5.
    for loss in [[0.5, 1.5], [1.0, 3.0]] {
        made.router.learn(&routing, &Outcome::new(&t(&loss, &[2]), &cx)).unwrap();
    }
    assert_close(&[credit(&[1.0, 4.0])], &[by_hand(&[1.0, 4.0], -2.5 / 1.5)], 1e-12);
}

#[test]
fn rewards_of_correctness_and_the_bonus_of_entropy_are_their_formulas() {
    let config = json!({
        "type": "reinforce", "baseline": "none", "entropy": 0.2, "reward": {"below": 0.7},
    });
    let (made, routing, cx, log_prob) = two_rows(config);
    let loss = t(&[0.6, 0.8], &[2]); // R = 1, −1
    let own = made.router.credit(&routing, &Outcome::new(&loss, &cx)).unwrap().unwrap().1;
    let p = softmax(&[0.3, -0.2]);
    let h: f64 = p.iter().map(|p| -p * p.ln()).sum();
    let by_hand = (-log_prob[0] + log_prob[1]) / 2.0 - 0.2 * h;
    assert_close(&[own.item().unwrap()], &[by_hand], 1e-12);
}

#[test]
fn only_rows_that_were_chosen_of_several_passes_count() {
    for (kind, name) in [("reinforce", "reinforce"), ("modular_network", "controller")] {
        let (made, routing, cx, log_prob) = two_rows(json!({"type": kind}));
        let (loss, chosen) = (t(&[0.6, 0.8], &[2]), t(&[0.0, 1.0], &[2]));
        let mut outcome = Outcome::new(&loss, &cx);
        outcome.chosen = Some(&chosen);
        let own = made.router.credit(&routing, &outcome).unwrap().unwrap();
        let factor = if kind == "reinforce" { -0.8 } else { 1.0 };
        assert_eq!(own.0, name);
        assert_close(&[own.1.item().unwrap()], &[-factor * log_prob[1] / 2.0], 1e-12);
    }
}

#[test]
fn a_choice_for_each_token_sums_over_the_real_ones() {
    let config = json!({"type": "reinforce", "baseline": "none", "input": "tokens"});
    let made = Made::new(config, 2, 1).unwrap();
    made.set("router.bias", &[0.3, -0.2]);
    let mask = t(&[1.0, 1.0, 0.0, 1.0, 0.0, 0.0], &[2, 3]);
    let cx = train(4, 0).with_feature("mask", mask);
    let routing = made.route(&ones(&[2, 3, 1]), &cx).unwrap();
    let Weights::Sparse { index, .. } = &routing.weights else { panic!("{routing:?}") };
    let p = softmax(&[0.3, -0.2]);
    let own: Vec<f64> =
        index.to_vec::<i64>().unwrap().iter().map(|j| p[*j as usize].ln()).collect();
    let loss = t(&[2.0, 5.0], &[2]);
    let found = made.router.credit(&routing, &Outcome::new(&loss, &cx)).unwrap().unwrap().1;
    let by_hand = (2.0 * (own[0] + own[1]) + 5.0 * own[3]) / 2.0;
    assert_close(&[found.item().unwrap()], &[by_hand], 1e-12);
    let log_prob = routing.noted.need("log_prob").unwrap().to_vec::<f64>().unwrap();
    assert_close(&log_prob, &[own[0], own[1], 0.0, own[3], 0.0, 0.0], 1e-12);
}

// ---- Routing networks ----

/// Trains agents of tasks `a` and `b` on costs `[task][module]`.
fn agents(config: Value, costs: &[[f64; 3]; 2], steps: u64) -> (Made, Vec<usize>) {
    let made = Made::new(config, 3, 1).unwrap();
    let tasks = (0..8).map(|r| ["a", "b"][r % 2]);
    for step in 0..steps {
        let cx = train(9, step).with_tasks(tasks.clone());
        let routing = made.route(&ones(&[8, 1]), &cx).unwrap();
        let Weights::Sparse { index, .. } = &routing.weights else { panic!("{routing:?}") };
        let index = index.to_vec::<i64>().unwrap();
        let loss: Vec<f64> =
            index.iter().enumerate().map(|(r, j)| costs[r % 2][*j as usize]).collect();
        made.router.learn(&routing, &Outcome::new(&t(&loss, &[8]), &cx)).unwrap();
    }
    let alpha = made.dense(&ones(&[2, 1]), &Context::eval().with_tasks(["a", "b"])).unwrap();
    let chosen = alpha.argmax(-1).unwrap().to_vec::<i64>().unwrap();
    (made, chosen.into_iter().map(|j| j as usize).collect())
}

#[test]
fn each_agent_finds_the_module_of_its_task() {
    let costs = [[0.9, 0.2, 1.0], [0.5, 0.8, 0.1]];
    for agent in ["wpl", "reinforce", "q_learning"] {
        for reward in [json!("neg_loss"), json!({"below": 0.3})] {
            let config = json!({
                "type": "routing_network", "tasks": ["a", "b"], "agent": agent, "reward": reward,
            });
            let (made, chosen) = agents(config, &costs, 300);
            assert_eq!(chosen, [1, 2], "{agent} {reward}: {:?}", made.get("router.table"));
            if agent == "wpl" {
                for p in made.get("router.table").chunks(3) {
                    assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{p:?}");
                    assert!(p.iter().all(|p| *p >= 0.0), "{p:?}");
                }
            }
        }
    }
}

#[test]
fn collaboration_draws_tasks_to_the_same_module() {
    // Two modules are equally good for both tasks, and the third is bad.
    let costs = [[0.2, 0.2, 0.9], [0.2, 0.2, 0.9]];
    let same = |rho: f64| {
        let alike = |seed: u64| {
            let config = json!({
                "type": "routing_network", "tasks": ["a", "b"], "collaboration": rho,
                "seed": seed, "agent": "q_learning", "epsilon": 0.3,
            });
            let (_, chosen) = agents(config, &costs, 400);
            assert!(chosen.iter().all(|j| *j < 2));
            usize::from(chosen[0] == chosen[1])
        };
        (0..12).map(alike).sum::<usize>()
    };
    let (without, with) = (same(0.0), same(0.5));
    assert!(with == 12 && without < 12, "{without} and {with} of 12 agree");
}

#[test]
fn tasks_without_an_agent_are_refused() {
    let refused = |config: Value, words: &str| {
        let e = Made::new(config, 3, 1).err().unwrap().to_string();
        assert!(e.contains(words), "{e}");
    };
    refused(json!({"type": "routing_network"}), "routing_network.tasks");
    refused(json!({"type": "routing_network", "tasks": ["a", "a"]}), "`a` twice");
    let made =
        Made::new(json!({"type": "routing_network", "tasks": ["pos", "ner"]}), 3, 1).unwrap();
    let x = ones(&[1, 1]);
    let e = made.route(&x, &Context::eval().with_tasks(["nerr"])).unwrap_err().to_string();
    assert!(e.contains("did you mean `ner`"), "{e}");
    assert!(made.route(&x, &Context::eval()).unwrap_err().to_string().contains("with_tasks"));
}

// ---- PathNet ----

/// One step at several sites that hear the same losses of `cost(genes of the first site)`.
fn step(sites: &[Made], n: u64, cost: impl Fn(&[usize]) -> f64) -> Vec<usize> {
    let (cx, x) = (train(1, n), ones(&[2, 1]));
    let routings: Vec<Routing> = sites.iter().map(|s| s.route(&x, &cx).unwrap()).collect();
    let path = routings[0].support().unwrap();
    let loss = t(&[cost(&path); 2], &[2]);
    for (site, routing) in sites.iter().zip(&routings) {
        site.router.learn(routing, &Outcome::new(&loss, &cx)).unwrap();
    }
    path
}

fn genes(made: &Made, path: &str) -> Vec<Vec<i64>> {
    let t = made.store.get(&format!("{path}.population")).unwrap();
    let n = t.len_of(-1) as usize;
    t.to_vec::<i64>().unwrap().chunks(n).map(<[i64]>::to_vec).collect()
}

#[test]
fn the_winner_of_a_tournament_overwrites_the_loser_with_few_mutations() {
    let (m, active, layers, tries) = (7, 4, 2, 3);
    let config = json!({
        "type": "path_net", "active": active, "layers": layers, "population": 6,
        "evaluate_for": tries,
    });
    let sites = ["one", "two"].map(|p| made_at(p, config.clone(), m, 1).unwrap());
    let mut losers = 0;
    for tournament in 0..400u64 {
        let (one, two) = (genes(&sites[0], "one"), genes(&sites[1], "two"));
        let mut paths = Vec::new();
        for n in 0..2 * tries {
            // The second path of even tournaments and the first of odd ones is the better one.
            let second = n >= tries;
            let cost = if second == (tournament % 2 == 0) { 0.1 } else { 0.9 };
            paths.push(step(&sites, tournament * 2 * tries + n, |_| cost));
        }
        assert!(paths[..3].iter().all(|p| *p == paths[0]), "one path for three steps");
        assert!(paths[3..].iter().all(|p| *p == paths[3]), "and then the other");
        // It is over when the next step begins.
        step(&sites, (tournament + 1) * 2 * tries, |_| 0.5);
        let leaders = [
            sites[0].store.get("one.leader").unwrap().to_vec::<i64>().unwrap()[0],
            sites[1].store.get("two.leader").unwrap().to_vec::<i64>().unwrap()[0],
        ];
        assert_eq!(leaders[0], leaders[1], "all sites agree");
        let winner = leaders[0] as usize;
        let won = if tournament % 2 == 0 { &paths[3] } else { &paths[0] };
        let mut distinct: Vec<usize> = one[winner].iter().map(|g| *g as usize).collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(*won, distinct);
        for (old, new) in [(one, genes(&sites[0], "one")), (two, genes(&sites[1], "two"))] {
            assert!(new.iter().flatten().all(|g| (0..m as i64).contains(g)));
            assert_eq!(new[winner], old[winner]);
            let changed: Vec<usize> = (0..6).filter(|i| new[*i] != old[*i]).collect();
            assert!(changed.len() < 2 && !changed.contains(&winner), "{changed:?}");
            if let [loser] = changed[..] {
                for (gene, parent) in new[loser].iter().zip(&new[winner]) {
                    let by = (gene - parent).rem_euclid(m as i64);
                    assert!([0, 1, 2, 5, 6].contains(&by), "{by}");
                }
                losers += 1;
            }
        }
        // Undo the first step of the next tournament, which this loop makes again.
        for (site, path) in sites.iter().zip(["one", "two"]) {
            let mut fitness = site.store.get(&format!("{path}.fitness")).unwrap().clone();
            no_grad(|| fitness.zero_in_place()).unwrap();
        }
    }
    assert!(losers > 100, "{losers} of 800 copies changed anything");
}

#[test]
fn a_gene_moves_with_one_chance_in_all_genes() {
    // One gene of one site, m = 7: moved in every copy, and so changed in 4 of 5.
    for (active, layers) in [(1, 1), (2, 3)] {
        let config = json!({
            "type": "path_net", "active": active, "layers": layers, "population": 2,
            "evaluate_for": 1,
        });
        let made = [made_at("one", config, 7, 1).unwrap()];
        let (mut changed, mut all) = (0.0, 0.0);
        for tournament in 0..2000u64 {
            step(&made, 2 * tournament, |_| 0.5 + (tournament % 3) as f64);
            step(&made, 2 * tournament + 1, |_| 1.0);
            // Settled when it is looked at in evaluation, and written by the next step.
            step(&made, 2 * tournament + 2, |_| 0.5);
            let pair = genes(&made[0], "one");
            changed += pair[0].iter().zip(&pair[1]).filter(|(a, b)| a != b).count() as f64;
            all += active as f64;
            let mut fitness = made[0].store.get("one.fitness").unwrap().clone();
            no_grad(|| fitness.zero_in_place()).unwrap();
        }
        let p = 0.8 / f64::from(active * layers);
        let error = (p * (1.0 - p) / all).sqrt();
        let found: f64 = changed / all;
        assert!((found - p).abs() < 3.0 * error, "{found} ± {error} is not {p}");
    }
}

#[test]
fn the_tournament_finds_the_path_of_the_right_modules() {
    let config = json!({
        "type": "path_net", "active": 2, "population": 16, "evaluate_for": 2, "seed": 4,
    });
    let made = [made_at("one", config, 6, 1).unwrap()];
    // Modules 1 and 4 are needed; each other one costs.
    let cost = |path: &[usize]| {
        let needed = [1, 4].iter().filter(|j| path.contains(j)).count() as f64;
        2.0 - needed + 0.1 * (path.len() as f64 - needed)
    };
    for n in 0..1200 {
        step(&made, n, cost);
    }
    let routing = made[0].route(&ones(&[2, 1]), &Context::eval()).unwrap();
    assert_eq!(routing.support().unwrap(), [1, 4]);
}

// ---- Modular networks: EM ----

/// y = w_a x for one of three slopes, with random assignments.
struct Mixture {
    x: Vec<f64>,
    y: Vec<f64>,
}

impl Mixture {
    fn new() -> Self {
        let draw =
            |n: u64| Init::Normal(1.0).tensor(&[60], Seed(n), Kind::Double, Device::Cpu).unwrap();
        let (x, noise) = (draw(1).to_vec::<f64>().unwrap(), draw(2).to_vec::<f64>().unwrap());
        let slopes = [2.0, -1.0, 0.3];
        let y = x.iter().zip(&noise).enumerate().map(|(i, (x, e))| slopes[i % 3] * x + 0.2 * e);
        Mixture { y: y.collect(), x }
    }

    /// ln p(y | x, a) + ln p(a) up to constants, with p(a) = ⅓.
    fn score(&self, w: &[f64; 3], i: usize, a: usize) -> f64 {
        -0.5 * (self.y[i] - w[a] * self.x[i]).powi(2)
    }

    /// The M-step: least squares for each slope.
    fn fitted(&self, w: &[f64; 3], a: &[usize]) -> [f64; 3] {
        let slope = |j: usize| {
            let own = || (0..60).filter(|i| a[*i] == j);
            let (xy, xx) = (
                own().map(|i| self.x[i] * self.y[i]).sum::<f64>(),
                own().map(|i| self.x[i] * self.x[i]).sum::<f64>(),
            );
            if xx > 0.0 { xy / xx } else { w[j] }
        };
        [slope(0), slope(1), slope(2)]
    }

    fn e_step(&self, w: &[f64; 3], a: &[usize], drawn: &[Vec<usize>]) -> (Vec<usize>, f64) {
        let score = |a: &[usize]| (0..60).map(|i| self.score(w, i, a[i])).collect::<Vec<_>>();
        let whole = |a: &[usize]| a.iter().map(|j| *j as i64).collect::<Vec<_>>();
        let s = drawn.len() as i64;
        let index =
            |v: Vec<i64>, shape: &[i64]| Tensor::from_slice(&v, shape, Device::Cpu).unwrap();
        let of_drawn: Vec<i64> = drawn.iter().flat_map(|a| whole(a)).collect();
        let scores: Vec<f64> = drawn.iter().flat_map(|a| score(a)).collect();
        let (kept, scores) = modl_route::keep_better(
            (&index(whole(a), &[60, 1]), &t(&score(a), &[60])),
            (&index(of_drawn, &[s, 60, 1]), &t(&scores, &[s, 60])),
        )
        .unwrap();
        let kept = kept.to_vec::<i64>().unwrap().iter().map(|j| *j as usize).collect();
        (kept, scores.to_vec::<f64>().unwrap().iter().sum())
    }
}

#[test]
fn the_partial_e_step_never_falls_and_is_hard_em_where_all_is_enumerated() {
    let data = Mixture::new();
    let total = |w: &[f64; 3], a: &[usize]| (0..60).map(|i| data.score(w, i, a[i])).sum::<f64>();
    let (mut w, mut a) = ([0.1, -0.1, 0.0], vec![0usize; 60]);
    let (mut last, mut partial) = (total(&w, &a), false);
    for round in 0..12u64 {
        let draw =
            Init::Uniform(1.5).tensor(&[120], Seed(round), Kind::Double, Device::Cpu).unwrap();
        let draw: Vec<usize> =
            draw.to_vec::<f64>().unwrap().iter().map(|u| ((u + 1.5) as usize).min(2)).collect();
        let drawn: Vec<Vec<usize>> = draw.chunks(60).map(<[usize]>::to_vec).collect();
        let (kept, score) = data.e_step(&w, &a, &drawn);
        assert!(score >= last - 1e-12, "E-step {round}: {last} → {score}");
        assert!((score - total(&w, &kept)).abs() < 1e-12, "the scores are those of what is kept");
        // Each row's own is the best of its three candidates.
        for i in 0..60 {
            let of = |a: &[usize]| data.score(&w, i, a[i]);
            let best = drawn.iter().map(|d| of(d)).fold(of(&a), f64::max);
            assert_eq!(data.score(&w, i, kept[i]), best);
            let of_all = (0..3).map(|j| data.score(&w, i, j)).fold(f64::NEG_INFINITY, f64::max);
            partial |= best < of_all;
        }
        a = kept;
        w = data.fitted(&w, &a);
        last = total(&w, &a);
        assert!(last >= score - 1e-12, "M-step {round}: {score} → {last}");
    }
    assert!(partial, "some E-steps were partial");

    let (mut w, mut a, mut hard) = ([1.0, -0.1, 0.0], vec![0usize; 60], [1.0, -0.1, 0.0]);
    for _ in 0..10 {
        let every: Vec<Vec<usize>> = (0..3).map(|j| vec![j; 60]).collect();
        a = data.e_step(&w, &a, &every).0;
        w = data.fitted(&w, &a);
        let best = |i: usize| {
            (0..3).max_by(|j, k| data.score(&hard, i, *j).total_cmp(&data.score(&hard, i, *k)))
        };
        let by_hand: Vec<usize> = (0..60).map(|i| best(i).unwrap()).collect();
        assert_eq!(a, by_hand);
        hard = data.fitted(&hard, &by_hand);
    }
    let mut found = w;
    found.sort_by(f64::total_cmp);
    assert_close(&found, &[-1.0, 0.3, 2.0], 0.2);
}

#[test]
fn an_e_step_over_several_sites_keeps_whole_assignments() {
    let index = |v: &[i64], shape: &[i64]| Tensor::from_slice(v, shape, Device::Cpu).unwrap();
    let stored = (index(&[0, 1, 2, 2], &[2, 2]), t(&[-1.0, -1.0], &[2]));
    let drawn =
        (index(&[1, 1, 0, 0, 2, 0, 1, 2], &[2, 2, 2]), t(&[-0.5, -1.0, -2.0, -0.9], &[2, 2]));
    let (kept, scores) =
        modl_route::keep_better((&stored.0, &stored.1), (&drawn.0, &drawn.1)).unwrap();
    // Row 0: the first draw (1, 1); row 1: the second draw (1, 2), as the first is only as good.
    assert_eq!(kept.to_vec::<i64>().unwrap(), [1, 1, 1, 2]);
    assert_eq!(scores.to_vec::<f64>().unwrap(), [-0.5, -0.9]);
    let nan = t(&[f64::NAN, 0.0], &[2]);
    assert!(modl_route::keep_better((&stored.0, &nan), (&drawn.0, &drawn.1)).is_err());
    let short = t(&[0.0], &[1]);
    let e = modl_route::keep_better((&stored.0, &short), (&drawn.0, &drawn.1)).unwrap_err();
    assert!(e.to_string().contains("scores of stored assignments"), "{e}");
}

#[test]
fn a_controller_with_one_pass_is_refused_in_words() {
    let (made, routing, cx, _) = two_rows(json!({"type": "modular_network"}));
    let loss = t(&[0.6, 0.8], &[2]);
    let e = made.router.credit(&routing, &Outcome::new(&loss, &cx)).unwrap_err().to_string();
    assert!(e.contains("combine = \"best\""), "{e}");
}

// ---- Rules ----

const RULES: i64 = 3;
const RIGHT: [usize; 3] = [2, 0, 1];

/// Rows whose first three numbers say which rule they are of, with noise.
fn rules(rows: i64, seed: u64) -> (Tensor, Vec<usize>) {
    let rule: Vec<usize> = (0..rows as usize).map(|r| (r * 7 + seed as usize) % 3).collect();
    let index: Vec<i64> = rule.iter().map(|r| *r as i64).collect();
    let one = Tensor::from_slice(&index, &[rows], Device::Cpu).unwrap().one_hot(RULES).unwrap();
    let noise = Init::Normal(0.1).tensor(&[rows, RULES], Seed(seed), Kind::Double, Device::Cpu);
    (one.to_kind(Kind::Double).unwrap().add(&noise.unwrap()).unwrap(), rule)
}

/// Module j of a row of rule r answers rightly where j = RIGHT[r], and else is wrong by 1.
fn losses(alpha: &Tensor, rule: &[usize]) -> Tensor {
    let wanted: Vec<f64> =
        rule.iter().flat_map(|r| (0..3).map(|j| f64::from(u8::from(RIGHT[*r] == j)))).collect();
    let wanted = t(&wanted, &[rule.len() as i64, 3]);
    alpha.sub(&wanted).unwrap().square().unwrap().sum_dims(&[-1], false).unwrap()
}

/// Trains with plain gradient steps, `passes` passes a step of which the best is taken where there
/// are several. Gives the share of right choices in evaluation, before and after.
fn learned(config: Value, passes: u64, lr: f64) -> [f64; 2] {
    let made = Made::new(config, 3, RULES).unwrap();
    let accuracy = || {
        let (x, rule) = rules(300, 999);
        let alpha = made.dense(&x, &Context::eval()).unwrap();
        let off = losses(&alpha, &rule).to_vec::<f64>().unwrap();
        off.iter().filter(|l| **l < 0.01).count() as f64 / 300.0
    };
    let before = accuracy();
    for step in 0..300 {
        let (x, rule) = rules(48, step);
        let run = |n: u64| {
            let cx = Context::train(Seed(21).nth(n), step);
            let routing = made.route(&x, &cx).unwrap();
            let alpha = routing.dense(Kind::Double, Device::Cpu).unwrap();
            (cx, losses(&alpha, &rule), routing)
        };
        let all: Vec<_> = (0..passes).map(run).collect();
        let costs: Vec<Vec<f64>> = all
            .iter()
            .map(|(_, l, routing)| match routing.noted.get("log_prob") {
                Some(p) => l.sub(p).unwrap().to_vec().unwrap(),
                None => l.to_vec().unwrap(),
            })
            .collect();
        let best = |r: usize| {
            (0..passes as usize).min_by(|a, b| costs[*a][r].total_cmp(&costs[*b][r])).unwrap()
        };
        let mut total: Option<Tensor> = None;
        let known: Vec<Tensor> = all.iter().map(|(_, l, _)| l.detach().unwrap()).collect();
        let chosen: Vec<Tensor> = (0..passes as usize)
            .map(|n| {
                let mine = (0..48).map(|r| f64::from(u8::from(best(r) == n)));
                t(&mine.collect::<Vec<_>>(), &[48])
            })
            .collect();
        for (n, (cx, loss, routing)) in all.iter().enumerate() {
            let mut outcome = Outcome::new(&known[n], cx);
            let mut own = loss.mul(&chosen[n]).unwrap().mean().unwrap();
            if passes > 1 {
                outcome.chosen = Some(&chosen[n]);
            }
            if let Some((_, more)) = made.router.credit(routing, &outcome).unwrap() {
                own = own.add(&more).unwrap();
            }
            total = Some(total.map_or(Ok(own.clone()), |t| t.add(&own)).unwrap());
        }
        let total = total.unwrap();
        let params: Vec<&Tensor> = made.store.trainable().map(|(_, t)| t).collect();
        for (p, g) in params.iter().zip(total.gradients(&params, false).unwrap()) {
            let Some(g) = g else { continue };
            no_grad(|| (*p).clone().add_in_place(&g.mul_scalar(-lr).unwrap())).unwrap();
        }
        for (n, (cx, _, routing)) in all.iter().enumerate() {
            made.router.learn(routing, &Outcome::new(&known[n], cx)).unwrap();
        }
    }
    [before, accuracy()]
}

#[test]
fn the_right_module_is_learned_from_rules() {
    for (config, passes, lr) in [
        (json!({"type": "gumbel_softmax"}), 1, 1.0),
        (json!({"type": "gumbel_softmax", "anneal": {"to": 0.3, "steps": 200}}), 1, 1.0),
        (json!({"type": "gumbel_softmax", "hard": true}), 1, 1.0),
        (json!({"type": "concrete_bernoulli"}), 1, 1.0),
        (json!({"type": "concrete_bernoulli", "hard": true, "tau": 0.7}), 1, 1.0),
        (json!({"type": "reinforce", "baseline": "none"}), 1, 0.5),
        (json!({"type": "reinforce"}), 1, 0.5),
        (json!({"type": "reinforce", "baseline": "learned", "entropy": 0.01}), 1, 0.5),
        (json!({"type": "relax"}), 1, 0.3),
        (json!({"type": "modular_network"}), 4, 1.0),
    ] {
        let [before, after] = learned(config.clone(), passes, lr);
        println!("{config}: {before:.2} → {after:.2}");
        assert!(before < 0.7 && after > 0.97, "{config}: {before} → {after}");
    }
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let refused = |config: Value, words: &str| {
        let e = Made::new(config, 3, 1).err().unwrap().to_string();
        assert!(e.contains(words), "{e}");
    };
    refused(json!({"type": "gumbel_softmax", "tau": 0.0}), "gumbel_softmax.tau");
    let anneal = json!({"to": -1.0, "steps": 5});
    refused(json!({"type": "gumbel_softmax", "anneal": anneal}), "gumbel_softmax.anneal.to");
    let anneal = json!({"to": 0.5, "steps": 0});
    refused(json!({"type": "concrete_bernoulli", "anneal": anneal}), "anneal.steps");
    refused(json!({"type": "reinforce", "decay": 1.0}), "reinforce.decay");
    refused(json!({"type": "reinforce", "entropy": -0.1}), "reinforce.entropy");
    refused(json!({"type": "relax", "tau": -1.0}), "relax.tau");
    let network =
        |key: &str, value: f64| json!({"type": "routing_network", "tasks": ["a"], key: value});
    for (key, value) in [("rate", 0.0), ("epsilon", 1.5), ("collaboration", -1.0), ("memory", 1.0)]
    {
        refused(network(key, value), &format!("routing_network.{key}"));
    }
    for (key, value) in [("active", 0), ("layers", 0), ("population", 1), ("evaluate_for", 0)] {
        refused(json!({"type": "path_net", key: value}), &format!("path_net.{key}"));
    }
}
