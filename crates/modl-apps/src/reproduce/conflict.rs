//! Liu et al. 2021, arXiv 2110.14048, figure 1: two losses of two numbers whose gradients conflict, from
//! three starts.
//!
//! Above x₂ = 0, where each start but one lies, both losses are logarithms with a deep narrow valley of
//! their own; below, they are bowls around (7, −8) and (−7, −8). The points between the bowls are those
//! where one loss cannot fall without the other's rise, and the mean has its minimum in the middle of
//! them.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use modl_core::{Device, Registry, Tensor};
use modl_train::OptimizerConfig;
use modl_train::joint::{Gram, cagrad, mgda, nash_mtl, pcgrad};
use serde_json::{Value, json};

use super::experiment::{About, Bound, Condition, Experiment, Lab, Threshold};
use crate::trials::{Measure, View};

/// Where a run starts.
const STARTS: [[f64; 2]; 3] = [[-8.5, 7.5], [-8.5, -5.0], [9.0, 9.0]];
const METHODS: [(&str, &str); 5] = [
    ("mean", "mean gradient"),
    ("pcgrad", "PCGrad"),
    ("mgda", "MGDA"),
    ("cagrad", "CAGrad, c = 0.5"),
    ("nash_mtl", "Nash-MTL"),
];
const C: f64 = 0.5;
const RATE: f64 = 1e-3;
/// How near the optimum's mean loss counts as there.
const NEAR: f64 = 1e-2;
/// What the logarithms are not taken below.
const LOWEST: f64 = 5e-6;

/// The experiment.
#[derive(Debug)]
pub(super) struct Conflict;

fn steps(quick: bool) -> u64 {
    if quick { 100 } else { 100_000 }
}

impl Experiment for Conflict {
    fn about(&self) -> About {
        About {
            name: "conflict",
            title: "Gradients of two tasks that conflict",
            citation: "Liu et al. 2021, arXiv 2110.14048",
            section: "6.1",
            claim: "CAGrad comes to the minimum of the mean loss from all three starts; the mean \
                    gradient and PCGrad do not from some, and MGDA stops wherever no direction \
                    serves both tasks.",
            setup: "The paper's two losses of two numbers, from (−8.5, 7.5), (−8.5, −5) and (9, 9); \
                    100,000 steps of Adam with a learning rate of 0.001. Nothing is random: one seed \
                    says all.",
            seeds: 1,
        }
    }

    fn settings(&self, quick: bool) -> Value {
        json!({
            "version": 1,
            "steps": steps(quick),
            "starts": STARTS,
            "methods": METHODS.map(|(key, _)| key),
            "c": C,
            "lr": RATE,
            "lowest": LOWEST,
        })
    }

    fn conditions(&self, _: &Registry) -> Vec<Condition> {
        let condition = |start: usize, (key, title): (&str, &str)| Condition {
            key: named(key, start),
            group: format!("from ({}, {})", STARTS[start][0], STARTS[start][1]),
            series: title.to_owned(),
            reference: (key != "mean").then(|| named("mean", start)),
        };
        let of = |start| METHODS.into_iter().map(move |method| condition(start, method));
        (0..STARTS.len()).flat_map(of).collect()
    }

    fn measures(&self) -> &'static [Measure] {
        const ALL: [Measure; 5] = [
            Measure { key: "gap", title: "mean loss above the optimum", digits: 4 },
            Measure { key: "first", title: "first loss", digits: 3 },
            Measure { key: "second", title: "second loss", digits: 3 },
            Measure { key: "x1", title: "x₁", digits: 3 },
            Measure { key: "x2", title: "x₂", digits: 3 },
        ];
        &ALL
    }

    fn steps(&self, quick: bool) -> u64 {
        steps(quick)
    }

    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>> {
        let all = (0..STARTS.len()).flat_map(|s| METHODS.map(|(key, _)| (key, s)));
        let chosen = all.into_iter().find(|(key, start)| named(key, *start) == condition);
        let (method, start) = chosen.with_context(|| format!("there is no `{condition}`"))?;
        let params = vec![("x".to_owned(), Tensor::from_slice(&STARTS[start], &[2], Device::Cpu)?)];
        let mut adam = OptimizerConfig::default().build()?;
        let mut at = STARTS[start];
        for n in 0..steps(lab.quick) {
            let (_, grads) = losses(at);
            let dot = |a: [f64; 2], b: [f64; 2]| a[0] * b[0] + a[1] * b[1];
            let gram = Gram::new(&grads.map(|a| grads.map(|b| dot(a, b)).to_vec()))?;
            let w = match method {
                "pcgrad" => pcgrad(&gram, lab.seed.nth(n)),
                "mgda" => mgda(&gram),
                "cagrad" => cagrad(&gram, C),
                "nash_mtl" => nash_mtl(&gram),
                _ => vec![0.5, 0.5],
            };
            let d = [0, 1].map(|k| w.iter().zip(grads).map(|(w, g)| w * g[k]).sum::<f64>());
            adam.step(&params, &[Some(Tensor::from_slice(&d, &[2], Device::Cpu)?)], &|_| RATE)?;
            let now = params[0].1.to_vec::<f64>()?;
            at = [now[0], now[1]];
            (lab.tick)();
        }
        let ([first, second], _) = losses(at);
        let gap = 0.5 * (first + second) - optimum();
        let found =
            [("gap", gap), ("first", first), ("second", second), ("x1", at[0]), ("x2", at[1])];
        Ok(found.map(|(key, value)| (key.to_owned(), value)).into())
    }

    fn thresholds(&self) -> Vec<Threshold> {
        vec![
            Threshold {
                text: "starts from which CAGrad ends within 0.01 of the optimum",
                statistic: |v| arrived(v, "cagrad"),
                bound: Bound::AtLeast(3.0),
            },
            Threshold {
                text: "starts from which the mean gradient does",
                statistic: |v| arrived(v, "mean"),
                bound: Bound::AtMost(2.0),
            },
        ]
    }
}

fn named(method: &str, start: usize) -> String {
    format!("{method}-{}", start + 1)
}

/// From how many starts a method came near the optimum; NaN where one was not run.
fn arrived(v: &View, method: &str) -> f64 {
    let gaps = (0..STARTS.len()).map(|start| v.mean(&named(method, start), "gap"));
    gaps.map(|gap| if gap.is_nan() { gap } else { f64::from(u8::from(gap <= NEAR)) }).sum()
}

/// Both losses and their gradients.
fn losses([x1, x2]: [f64; 2]) -> ([f64; 2], [[f64; 2]; 2]) {
    let slope = |t: f64| 1.0 - t * t; // of tanh, by its value
    // Above 0 the logarithms count tanh(x₂⁄2), below it the bowls tanh(−x₂⁄2).
    let half = (0.5 * x2).tanh();
    let (above, below) = (half.max(0.0), (-half).max(0.0));
    let above_slope = if half > 0.0 { 0.5 * slope(half) } else { 0.0 };
    let below_slope = if half < 0.0 { -0.5 * slope(half) } else { 0.0 };
    let bend = (-x2).tanh();
    // What the logarithm is of, with its derivatives −½ and ±(1 − tanh²).
    let logs =
        [(0.5 * (-x1 - 7.0) - bend, slope(bend)), (0.5 * (-x1 + 3.0) + bend + 2.0, -slope(bend))];
    let (mut values, mut grads) = ([0.0; 2], [[0.0; 2]; 2]);
    for (i, (inner, inner_x2)) in logs.into_iter().enumerate() {
        let centre = if i == 0 { 7.0 } else { -7.0 };
        let log = inner.abs().max(LOWEST).ln() + 6.0;
        let log_slope = if inner.abs() > LOWEST { inner.recip() } else { 0.0 };
        let bowl = ((x1 - centre).powi(2) + 0.1 * (x2 + 8.0).powi(2)) / 10.0 - 20.0;
        values[i] = log * above + bowl * below;
        grads[i] = [
            -0.5 * log_slope * above + 0.2 * (x1 - centre) * below,
            log_slope * inner_x2 * above
                + log * above_slope
                + 0.02 * (x2 + 8.0) * below
                + bowl * below_slope,
        ];
    }
    (values, grads)
}

/// The lowest mean loss: at x₁ = 0, by golden section in x₂.
fn optimum() -> f64 {
    let mean = |x2: f64| losses([0.0, x2]).0.iter().sum::<f64>() / 2.0;
    let golden = 0.5 * (5f64.sqrt() - 1.0);
    let (mut low, mut high) = (-12.0, -4.0);
    for _ in 0..100 {
        let (a, b) = (high - golden * (high - low), low + golden * (high - low));
        if mean(a) < mean(b) { high = b } else { low = a }
    }
    mean(0.5 * (low + high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_those_of_the_losses() {
        for x1 in [-9.3, -4.2, 0.4, 6.1, 10.0] {
            for x2 in [-9.0, -2.5, -0.3, 0.6, 3.0, 9.0] {
                let (_, grads) = losses([x1, x2]);
                let h = 1e-6;
                for (i, own) in grads.iter().enumerate() {
                    for (k, slope) in own.iter().enumerate() {
                        let moved = |by: f64| if k == 0 { [x1 + by, x2] } else { [x1, x2 + by] };
                        let (up, down) = (losses(moved(h)).0[i], losses(moved(-h)).0[i]);
                        let numeric = (up - down) / (2.0 * h);
                        assert!((slope - numeric).abs() < 1e-5 * (1.0 + numeric.abs()));
                    }
                }
            }
        }
    }

    #[test]
    fn the_optimum_is_where_the_paper_has_it() {
        // The authors mark (0, −8.3552).
        let (values, grads) = losses([0.0, -8.3552]);
        assert!((values.iter().sum::<f64>() / 2.0 - optimum()).abs() < 1e-6);
        assert!((grads[0][1] + grads[1][1]).abs() < 1e-4 && grads[0][0] + grads[1][0] == 0.0);
        // Nothing on a grid is lower.
        for i in -110..=110 {
            for j in -110..=110 {
                let x = [f64::from(i) / 10.0, f64::from(j) / 10.0];
                assert!(losses(x).0.iter().sum::<f64>() / 2.0 >= optimum(), "{x:?}");
            }
        }
    }
}
