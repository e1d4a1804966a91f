//! Expert choice: exact loads, and what it must not be used for.

use modl_core::testing::TinyBackbone;
use modl_core::{
    Backbone, Context, Kind, Layers, Modular, ParamStore, Registry, Result, Seed, Site, Targets,
    Tensor, Tensors,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::support::*;

fn made(cf: f64, over: &str, m: usize) -> Made {
    let config = json!({"type": "expert_choice", "input": "tokens", "bias": false, "over": over,
        "capacity_factor": cf});
    let made = Made::new(config, m, m as i64).unwrap();
    made.set("router.weight", &identity(m, m));
    made
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn each_module_takes_exactly_its_best_tokens(
        (b, seq, m, over_batch, x, real, part) in (1..4usize, 1..7usize, 2..6usize, any::<bool>())
            .prop_flat_map(|(b, seq, m, over)| (
                Just(b), Just(seq), Just(m), Just(over),
                prop::collection::vec(-2.0f64..2.0, b * seq * m),
                prop::collection::vec(0..=seq, b),
                0.1f64..1.0,
            )),
    ) {
        let cf = part * m as f64;
        let over = if over_batch { "batch" } else { "row" };
        let mask: Vec<f64> = real
            .iter()
            .flat_map(|n| (0..seq).map(move |i| f64::from(u8::from(i < *n))))
            .collect();
        let cx = Context::eval().with_feature("mask", t(&mask, &[b as i64, seq as i64]));
        let x_tensor = t(&x, &[b as i64, seq as i64, m as i64]);
        let routing = made(cf, over, m).routed(&x_tensor, &cx);
        let found = rows(&routing.dense(Kind::Double, modl_core::Device::Cpu).unwrap());

        let s: Vec<Vec<f64>> = x.chunks(m).map(softmax).collect();
        let mut expected = vec![vec![0.0; m]; b * seq];
        let units: Vec<usize> = (0..b * seq).collect();
        let mut places = Vec::new();
        for group in units.chunks(if over_batch { b * seq } else { seq }) {
            let group: Vec<usize> = group.iter().copied().filter(|u| mask[*u] > 0.0).collect();
            let c = ((cf * group.len() as f64 / m as f64 + 1e-9) as usize).max(1).min(group.len());
            places.push(c);
            for j in 0..m {
                let scores: Vec<f64> = group.iter().map(|u| s[*u][j]).collect();
                top(&scores, c).iter().for_each(|i| expected[group[*i]][j] = s[group[*i]][j]);
            }
        }
        close(&found.concat(), &expected.concat(), 1e-12);
        // The load of each module is exactly C.
        for j in 0..m {
            let load = found.iter().filter(|a| a[j] > 0.0).count();
            prop_assert_eq!(load, places.iter().sum::<usize>());
        }
        let none = (0..b * seq)
            .filter(|u| mask[*u] > 0.0 && found[*u].iter().all(|w| *w == 0.0))
            .count();
        prop_assert_eq!(noted(&routing, "unrouted"), [none as f64]);
    }
}

#[test]
fn equal_scores_are_spread_over_the_tokens() {
    let config = json!({"type": "expert_choice", "input": "tokens"});
    let made = Made::new(config, 4, 6).unwrap();
    let alpha = made.alphas(&normal(&[1, 64, 6], 3), &Context::eval());
    // 4 · 32 choices of 64 tokens: without a rule for ties all modules would take the first 32.
    let late = alpha[32..].iter().flatten().filter(|w| **w > 0.0).count();
    assert!((40..88).contains(&late), "{late}");
}

#[test]
fn a_later_token_takes_an_earlier_ones_place() {
    let made = made(1.0, "row", 2);
    let x = |last: f64| t(&[1.0, 0.0, 0.5, 0.0, 0.0, 1.0, last, 0.0], &[1, 4, 2]);
    let (before, after) =
        (made.alphas(&x(0.0), &Context::eval()), made.alphas(&x(9.0), &Context::eval()));
    assert!(before[1][0] > 0.5 && after[1][0] == 0.0, "{before:?} {after:?}");
    assert!(made.router.looks_ahead());
}

/// The tiny backbone as if it were a decoder.
#[derive(Debug)]
struct Decoder(TinyBackbone);

impl Backbone for Decoder {
    fn sites(&self) -> &[Site] {
        self.0.sites()
    }
    fn params(&self) -> &ParamStore {
        self.0.params()
    }
    fn theta(&self, site: &Site) -> Result<Tensors> {
        self.0.theta(site)
    }
    fn config(&self) -> &Value {
        self.0.config()
    }
    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        self.0.forward(inputs, layers, cx)
    }
    fn causal(&self, _site: &Site) -> bool {
        true
    }
}

#[test]
fn routers_that_look_ahead_are_refused_in_decoders() -> Result<()> {
    let registry = Registry::new().with(modl_route::register)?;
    let route = |causal: bool, config: Value| -> Result<()> {
        let tiny = TinyBackbone::new(Seed(1), Kind::Float)?;
        let mut model = match causal {
            true => Modular::new(Decoder(tiny), Seed(1))?,
            false => Modular::new(tiny, Seed(1))?,
        };
        for name in ["a", "b", "c"] {
            let module = Box::new(modl_core::testing::standins::Scale);
            model.attach(name, module, &Targets::names(["query"]))?;
        }
        model.route(registry.routers.parse(&config)?, false)
    };
    for kind in ["expert_choice", "soft_moe", "gshard", "st_moe"] {
        let refused = route(true, json!({"type": kind})).unwrap_err().to_string();
        assert!(refused.contains(kind) && refused.contains("later tokens"), "{refused}");
        route(false, json!({"type": kind}))?;
    }
    for kind in ["switch", "deepseek", "noisy_top_k", "product_key", "hierarchical"] {
        route(true, json!({"type": kind}))?;
    }
    Ok(())
}

#[test]
fn rows_compete_where_each_has_one_alpha() {
    let config = json!({"type": "expert_choice", "bias": false, "capacity_factor": 1.0});
    let made = Made::new(config, 2, 2).unwrap();
    made.set("router.weight", &identity(2, 2));
    let x: Tensor = t(&[3.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0], &[4, 2]);
    let alpha = made.alphas(&x, &Context::eval());
    let taken: Vec<[bool; 2]> = alpha.iter().map(|a| [a[0] > 0.0, a[1] > 0.0]).collect();
    assert_eq!(taken, [[true, false], [true, false], [false, true], [false, true]]);
}
