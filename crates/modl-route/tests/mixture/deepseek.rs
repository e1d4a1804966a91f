//! DeepSeek: biases that choose and do not weigh, groups, shared modules, balance in time.

use modl_core::testing::{Sum, TinyBackbone, standins};
use modl_core::{
    Aggregator, AggregatorConfig, Context, Kind, Modular, Outcome, Registry, Result, Scope, Seed,
    Site, Targets, Tensor, Weights,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::support::*;

/// A router over `m` modules that gets its scores as a feature of the row.
fn told(mut config: Value, m: usize) -> Made {
    config["type"] = json!("deepseek");
    config["bias"] = json!(false);
    let made = Made::new(config, m, m as i64).unwrap();
    made.set("router.weight", &identity(m, m));
    made
}

fn sigmoid(l: f64) -> f64 {
    1.0 / (1.0 + (-l).exp())
}

fn learn(made: &Made, x: &Tensor, step: u64) -> Vec<f64> {
    let cx = training(step);
    let routing = made.routed(x, &cx);
    let loss = t(&vec![0.0; x.len_of(0) as usize], &[x.len_of(0)]);
    made.router.learn(&routing, &Outcome::new(&loss, &cx)).unwrap();
    noted(&routing, "load")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn biases_and_groups_choose_and_scores_weigh(
        x in prop::collection::vec(-2.0f64..2.0, 5 * 8),
        b in prop::collection::vec(-0.8f64..0.8, 8),
        n_group in prop::sample::select(vec![1usize, 2, 4, 8]),
        part in 0.0f64..1.0,
        k in 1..=3usize,
        factor in 0.5f64..3.0,
    ) {
        let each = 8 / n_group;
        let least = k.div_ceil(each);
        let topk_group = least + (part * (n_group - least + 1) as f64) as usize;
        let config = json!({"k": k, "n_group": n_group, "topk_group": topk_group,
            "routed_scaling_factor": factor});
        let made = told(config, 8);
        made.set("router.selection_bias", &b);
        let found = made.alphas(&t(&x, &[5, 8]), &Context::eval());
        for (l, found) in x.chunks(8).zip(&found) {
            let s: Vec<f64> = l.iter().map(|l| sigmoid(*l)).collect();
            let by: Vec<f64> = s.iter().zip(&b).map(|(s, b)| s + b).collect();
            let of_group: Vec<f64> = by.chunks(each).map(|g| {
                top(g, 2).iter().map(|j| g[*j]).sum()
            }).collect();
            let open = top(&of_group, topk_group);
            let within: Vec<f64> = (0..8)
                .map(|j| if open.contains(&(j / each)) { by[j] } else { f64::NEG_INFINITY })
                .collect();
            let kept = top(&within, k);
            let sum: f64 = kept.iter().map(|j| s[*j]).sum();
            let one = |j| if kept.contains(&j) { factor * s[j] / sum } else { 0.0 };
            close(found, &(0..8).map(one).collect::<Vec<_>>(), 1e-12);
        }
    }

    #[test]
    fn the_same_choice_has_the_same_weights_whatever_the_bias(
        x in prop::collection::vec(-2.0f64..2.0, 4 * 6),
        shift in -3.0f64..3.0,
    ) {
        let made = told(json!({"k": 2}), 6);
        let x = t(&x, &[4, 6]);
        let before = made.alphas(&x, &Context::eval());
        made.set("router.selection_bias", &[shift; 6]);
        prop_assert_eq!(made.alphas(&x, &Context::eval()), before);
    }
}

#[test]
fn the_bias_is_no_parameter_and_has_no_gradient() {
    let made = told(json!({"k": 2}), 4);
    let parameters: Vec<String> = made
        .store
        .iter()
        .filter(|(_, p)| !p.is_buffer())
        .map(|(name, _)| name.to_string())
        .collect();
    assert_eq!(parameters, ["router.weight"]);
    assert!(!made.param("router.selection_bias").requires_grad());
    let routing = made.routed(&normal(&[3, 4], 1), &training(0));
    assert!(routing.losses.is_empty());
    let Weights::Sparse { weight, .. } = &routing.weights else { panic!() };
    let narrow = weight.narrow(-1, 0, 1).unwrap().sum().unwrap();
    assert!(narrow.gradients(&[&made.param("router.selection_bias")], false).is_err());
    assert!(gradient(&narrow, &made.param("router.weight")).iter().any(|g| g.abs() > 1e-3));
}

#[test]
fn biases_follow_the_counts_of_a_step_when_it_is_over() {
    let made = told(json!({"k": 1, "bias_update": 0.01}), 4);
    // Module 0 has four rows, module 1 two, 2 and 3 one each: the mean is 2.
    let best = [0, 0, 0, 0, 1, 1, 2, 3];
    let rows: Vec<f64> =
        best.iter().flat_map(|b| (0..4).map(move |j| if j == *b { 2.0 } else { 0.0 })).collect();
    let x = t(&rows, &[8, 4]);
    let routing = made.routed(&x, &training(0));
    assert_eq!(noted(&routing, "load"), [4.0, 2.0, 1.0, 1.0]);
    assert_eq!(made.param("router.selection_bias").to_vec::<f64>().unwrap(), [0.0; 4]);
    assert_eq!(learn(&made, &x, 0), [4.0, 2.0, 1.0, 1.0]);
    close(
        &made.param("router.selection_bias").to_vec::<f64>().unwrap(),
        &[-0.01, 0.0, 0.01, 0.01],
        1e-15,
    );
    // Evaluation counts nothing.
    let quiet = made.routed(&x, &Context::eval());
    assert!(quiet.noted.is_empty());
    let loss = t(&[0.0; 8], &[8]);
    made.router.learn(&quiet, &Outcome::new(&loss, &Context::eval())).unwrap();
    close(
        &made.param("router.selection_bias").to_vec::<f64>().unwrap(),
        &[-0.01, 0.0, 0.01, 0.01],
        1e-15,
    );
}

#[test]
fn padding_is_not_counted() {
    let config = json!({"type": "deepseek", "k": 1, "input": "tokens", "bias": false});
    let made = Made::new(config, 2, 2).unwrap();
    made.set("router.weight", &identity(2, 2));
    let x = t(&[1.0, 0.0, 1.0, 0.0, 0.0, 1.0], &[1, 3, 2]);
    let cx = training(0).with_feature("mask", t(&[1.0, 0.0, 1.0], &[1, 3]));
    assert_eq!(noted(&made.routed(&x, &cx), "load"), [1.0, 1.0]);
}

/// Skewed logits: N(0, 1) for each module and N(0, 1) for each of 512 rows, drawn anew each step.
fn violation(u: f64, steps: u64) -> Vec<f64> {
    let made = told(json!({"k": 2, "bias_update": u}), 16);
    let offset = normal(&[16], 11);
    let of_step = |step| {
        let x = normal(&[512, 16], 1000 + step).add(&offset).unwrap();
        let load = learn(&made, &x, step);
        load.iter().copied().fold(0.0, f64::max) / 64.0 - 1.0
    };
    (0..steps).map(of_step).collect()
}

#[test]
fn biases_balance_skewed_scores_down_to_what_chance_leaves() {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let slow = violation(0.001, 400);
    assert!(slow[0] > 1.5, "{}", slow[0]);
    assert!(mean(&slow[380..]) <= 0.3, "{}", mean(&slow[380..]));
    // Ten times the step: there ten times as soon, where the slow one is not yet.
    let fast = violation(0.01, 60);
    assert!(mean(&fast[45..]) <= 0.35, "{}", mean(&fast[45..]));
    assert!(mean(&slow[45..60]) > 1.0, "{}", mean(&slow[45..60]));
    // Without biases nothing falls.
    let never = violation(0.0, 40);
    assert!(mean(&never[30..]) > 1.5);
}

#[test]
fn shared_modules_are_always_active_and_not_chosen() {
    let config = json!({"type": "deepseek", "k": 2, "shared": ["m3", "m1"], "bias": false});
    let made = Made::new(config, 6, 4).unwrap();
    made.set("router.weight", &identity(4, 4));
    // Four are routed, m0, m2, m4, m5, by the four coordinates.
    let x = [1.0, -1.0, 0.5, 2.0];
    let routing = made.routed(&t(&x, &[1, 4]), &Context::eval());
    let (index, weight) = sparse(&routing);
    assert_eq!(index, [[3, 1, 5, 0]]);
    let (a, b) = (sigmoid(2.0), sigmoid(1.0));
    close(&weight[0], &[1.0, 1.0, a / (a + b), b / (a + b)], 1e-12);
    assert!(!routing.normalised);
}

#[test]
fn the_loss_of_a_sequence_is_its_formula() {
    let config = json!({"type": "deepseek", "k": 2, "input": "tokens", "bias": false,
        "sequence_balance": true});
    let made = Made::new(config, 3, 3).unwrap();
    made.set("router.weight", &identity(3, 3));
    let x = normal(&[3, 4, 3], 9);
    let real = [4, 2, 0];
    let mask: Vec<f64> =
        real.iter().flat_map(|n| (0..4).map(move |i| f64::from(u8::from(i < *n)))).collect();
    let cx = training(0).with_feature("mask", t(&mask, &[3, 4]));
    let found = loss(&made.routed(&x, &cx), "sequence_balance").item().unwrap();

    let tokens = rows(&x);
    let mut sum = 0.0;
    for (r, n) in [(0, 4), (1, 2)] {
        let (mut f, mut p) = ([0.0; 3], [0.0; 3]);
        for l in &tokens[r * 4..r * 4 + n] {
            let s: Vec<f64> = l.iter().map(|l| sigmoid(*l)).collect();
            top(&s, 2).iter().for_each(|j| f[*j] += 3.0 / (2.0 * n as f64));
            p.iter_mut().zip(&s).for_each(|(p, v)| *p += v / s.iter().sum::<f64>() / n as f64);
        }
        sum += f.iter().zip(&p).map(|(f, p)| f * p).sum::<f64>();
    }
    assert!((found - sum / 2.0).abs() < 1e-12, "{found}");
}

/// The testing kit's sum, as a file can name it.
#[derive(Debug, Default, serde::Deserialize)]
struct Summed {}

impl AggregatorConfig for Summed {
    fn kind(&self) -> &'static str {
        "sum"
    }
    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }
    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(Sum::default()))
    }
}

#[test]
fn biases_of_a_model_are_learned_and_survive_a_restart() -> Result<()> {
    let mut registry = Registry::new().with(modl_route::register)?;
    registry.aggregators.register::<Summed>("Sum", "for this test", "5")?;
    let model = || -> Result<Modular> {
        let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Float)?, Seed(1))?;
        for name in ["a", "b", "c"] {
            model.attach(name, Box::new(standins::Scale), &Targets::names(["query"]))?;
        }
        let config = json!({"type": "deepseek", "k": 1, "input": "tokens", "bias_update": 0.5});
        model.route(registry.routers.parse(&config)?, false)?;
        model.aggregate(Box::new(Summed {}))?;
        Ok(model)
    };
    let bias = |model: &Modular| -> Result<Vec<f64>> {
        model.params().get("routers.layer.0.query.selection_bias")?.to_vec()
    };
    let trained = model()?;
    let cx = training(0);
    trained.forward(&TinyBackbone::inputs(5, 7, Seed(2))?, &cx)?;
    let trace = cx.take_trace();
    let load = noted(&trace.routings[0].1, "load");
    let mean = load.iter().sum::<f64>() / 3.0; // of the real ones of 35 tokens
    assert!(mean > 5.0 && load.iter().any(|l| *l != mean));
    let loss = Tensor::zeros(&[5], Kind::Float, modl_core::Device::Cpu)?;
    trained.routers_learn(&trace, &Outcome::new(&loss, &cx))?;
    let expected: Vec<f64> = load.iter().map(|l| 0.5 * (mean - l).signum()).collect();
    assert_eq!(bias(&trained)?, expected);

    let path = std::env::temp_dir().join(format!("modl-biases-{}.safetensors", std::process::id()));
    trained.save_routing(&path)?;
    let mut restarted = model()?;
    assert_eq!(bias(&restarted)?, [0.0; 3]);
    let loaded = restarted.load_routing(&path, &registry);
    let _ = std::fs::remove_file(&path);
    loaded?;
    assert_eq!(bias(&restarted)?, expected);
    Ok(())
}
