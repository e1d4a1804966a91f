//! A backbone with modules attached, through the public API.

#![allow(clippy::unwrap_used)]

use modl_core::testing::standins::{self, Prompt, Scale, WeightMask};
use modl_core::testing::{Given, PlainSum, Sum, TinyBackbone, perturb};
use modl_core::{
    Bank, Base, Context, Device, Error, Kind, Modular, Registry, Result, Router, RouterConfig,
    Routing, Scope, Seed, Select, Signal, Site, Targets, Tensor, Tensors, Weights,
};

const SEED: Seed = Seed(9);

fn model() -> Modular {
    Modular::new(TinyBackbone::new(SEED, Kind::Float).unwrap(), SEED).unwrap()
}

fn inputs() -> Tensors {
    TinyBackbone::inputs(4, 6, SEED).unwrap()
}

fn logits(model: &Modular, cx: &Context) -> Result<Tensor> {
    model.forward(&inputs(), cx)?.need("logits").cloned()
}

#[test]
fn a_module_that_does_not_fit_leaves_nothing_behind() {
    let mut m = model();
    // A mask on a weight fits `query`, but there is no weight at `layer.0`.
    let mixed = Targets::names(["query", "layer.0"]);
    m.attach("a", Box::new(WeightMask), &mixed).unwrap();
    m.aggregate(Box::new(Sum::default())).unwrap();
    m.route(Given::only(0), false).unwrap();
    let e = logits(&m, &Context::eval()).unwrap_err();
    assert!(e.to_string().contains("layer.0"), "the site is named: {e}");

    let mut m = model();
    let e = m.attach("a.b", Box::new(Scale), &Targets::names(["query"])).unwrap_err();
    assert!(e.to_string().contains("a.b"), "{e}");
    assert!(m.attach("a", Box::new(Scale), &Targets::names(["qurey"])).is_err());
    assert!(m.modules().is_empty() && m.params().iter().next().is_none());
    m.attach("a", Box::new(Scale), &Targets::names(["query"])).unwrap();
    let again = m.attach("a", Box::new(Scale), &Targets::names(["value"]));
    assert!(matches!(again, Err(Error::Duplicate { .. })));
    assert_eq!(m.modular_sites().len(), 1);
}

#[test]
fn without_router_or_aggregator_the_error_says_what_to_call() {
    let mut m = model();
    assert!(m.route(Given::only(0), false).unwrap_err().to_string().contains("attach"));
    m.attach("a", Box::new(Scale), &Targets::names(["query"])).unwrap();
    let e = logits(&m, &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("Modular::route") && e.contains("layer.0.query"), "{e}");
    m.route(Given::only(0), false).unwrap();
    let e = logits(&m, &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("Modular::aggregate"), "{e}");
}

#[test]
fn one_router_for_all_sites_decides_once_and_is_saved_once() {
    let registry = Registry::new().with(standins::register).unwrap();
    let mut m = model();
    for name in ["a", "b"] {
        m.attach(name, Box::new(Scale), &Targets::names(["query", "value", "output.dense"]))
            .unwrap();
    }
    m.aggregate(Box::new(Sum::default())).unwrap();
    m.route(registry.routers.parse(&serde_json::json!({"type": "balanced_halves"})).unwrap(), true)
        .unwrap();
    let all_routers = Select::new("routers.*");
    let routers: Vec<_> = m.params().select(&all_routers).map(|(n, _)| n).collect();
    assert_eq!(routers, ["routers.global.direction"]);
    let cx = Context::eval();
    logits(&m, &cx).unwrap();
    let trace = cx.take_trace();
    assert_eq!(trace.routings.len(), 3);
    let first = trace.routings[0].1.dense(Kind::Float, Device::Cpu).unwrap();
    for (site, routing) in &trace.routings {
        let here = routing.dense(Kind::Float, Device::Cpu).unwrap();
        assert!(here.bit_equal(&first).unwrap(), "{site} follows");
    }
}

#[test]
fn dispatch_by_rows_and_sums_is_the_plain_formula() {
    let t = |v: &[f32], shape: &[i64]| Tensor::from_slice(v, shape, Device::Cpu).unwrap();
    let i = |v: &[i64], shape: &[i64]| Tensor::from_slice(v, shape, Device::Cpu).unwrap();
    let token_index: Vec<i64> = (0..24).map(|n| n % 3).collect();
    let token_weight: Vec<f32> = (0..24).map(|n| 0.1 + n as f32 / 30.0).collect();
    let forms = [
        Weights::Fixed(vec![(0, 0.3), (2, 0.9)]),
        Weights::Fixed(vec![]),
        Weights::Rows(vec![vec![(1, 1.0)], vec![], vec![(0, 1.0)], vec![(1, 1.0)]]),
        Weights::Rows(vec![vec![(1, 0.5), (2, 0.25)], vec![], vec![(0, 2.0)], vec![(1, 1.0)]]),
        Weights::Dense(t(&[0.2, 0.3, 0.5], &[3])),
        Weights::Dense(t(&[0.2, 0.3, 0.5, 1.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.0, 0.7, 0.6], &[4, 3])),
        Weights::Sparse {
            index: i(&[2, 0, 0, 1], &[4, 1]),
            weight: t(&[0.9, 0.1, 1.0, 0.4], &[4, 1]),
        },
        Weights::Sparse {
            index: i(&token_index, &[4, 6, 1]),
            weight: t(&token_weight, &[4, 6, 1]),
        },
    ];
    for base in [Base::Kept, Base::Replaced] {
        for weights in &forms {
            let mut m = model();
            for name in ["a", "b", "c"] {
                m.attach(name, Box::new(WeightMask), &Targets::names(["query"])).unwrap();
            }
            perturb(&m, &Select::all(), 0.7, SEED).unwrap();
            m.route(Box::new(Given(weights.clone())), false).unwrap();
            m.aggregate(Box::new(Sum(base))).unwrap();
            let fast = logits(&m, &Context::eval()).unwrap();
            m.aggregate(Box::new(PlainSum(base))).unwrap();
            let plain = logits(&m, &Context::eval()).unwrap();
            assert!(fast.all_close(&plain, 1e-5, 1e-5).unwrap(), "{base:?} {weights:?}");
        }
    }
}

#[test]
fn rows_with_and_without_a_prompt_share_a_batch() {
    let mut m = model();
    m.attach("p", Box::new(Prompt), &Targets::names(["embeddings"])).unwrap();
    m.aggregate(Box::new(Sum::default())).unwrap();
    m.route(Given::rows(&[Some(0), None, None, Some(0)]), false).unwrap();
    let mixed = logits(&m, &Context::eval()).unwrap();
    assert_eq!(mixed.size(), [4, 8, 5], "two virtual tokens, and padding for the rows without");
    let base = m.forward_base(&inputs(), &Context::eval()).unwrap();
    let row = mixed.select(0, 1).unwrap().narrow(0, 0, 6).unwrap();
    assert!(
        row.all_close(&base.need("logits").unwrap().select(0, 1).unwrap(), 1e-5, 1e-5).unwrap()
    );
}

/// Modules by the task of each row.
#[derive(Debug)]
struct ByTask;

impl Router for ByTask {
    fn kind(&self) -> &'static str {
        "by_task"
    }

    fn route(&self, _: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let rows: Result<_> =
            cx.tasks()?.iter().map(|t| Ok(vec![(bank.position(t)?, 1.0)])).collect();
        Ok(Routing::new(Weights::Rows(rows?), bank.len()))
    }
}

impl RouterConfig for ByTask {
    fn kind(&self) -> &'static str {
        "by_task"
    }

    fn to_json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(ByTask))
    }
}

#[test]
fn a_site_within_a_layer_that_is_split_by_rows_routes_its_own_rows() {
    let tasks = ["a", "b", "b", "a"];
    let mut m = model();
    for name in ["a", "b"] {
        m.attach(name, Box::new(Scale), &Targets::names(["layer.0", "query"])).unwrap();
    }
    perturb(&m, &Select::all(), 0.7, SEED).unwrap();
    m.aggregate(Box::new(Sum::default())).unwrap();
    m.route(Box::new(ByTask), false).unwrap();
    let mixed = logits(&m, &Context::eval().with_tasks(tasks)).unwrap();
    for (row, task) in tasks.iter().enumerate() {
        let alone = logits(&m, &Context::eval().with_tasks([task; 4])).unwrap();
        let (x, y) = (mixed.select(0, row as i64).unwrap(), alone.select(0, row as i64).unwrap());
        assert!(x.all_close(&y, 1e-5, 1e-5).unwrap(), "row {row}");
    }
}

#[test]
fn merging_twice_is_refused_and_unmerging_is_exact() {
    let mut m = model();
    m.attach("a", Box::new(WeightMask), &Targets::names(["query"])).unwrap();
    perturb(&m, &Select::all(), 0.7, SEED).unwrap();
    let before = m.forward_base(&inputs(), &Context::eval()).unwrap();
    m.merge("a").unwrap();
    assert!(m.merge("a").is_err());
    let merged = m.forward_base(&inputs(), &Context::eval()).unwrap();
    assert!(
        merged.need("logits").unwrap().max_abs_diff(before.need("logits").unwrap()).unwrap() > 1e-3
    );
    m.unmerge().unwrap();
    let after = m.forward_base(&inputs(), &Context::eval()).unwrap();
    assert!(after.need("logits").unwrap().bit_equal(before.need("logits").unwrap()).unwrap());
    assert!(m.merge("b").unwrap_err().to_string().contains("unknown module `b`"));
}

#[test]
fn a_backbone_has_the_same_fingerprint_in_bf16_and_another_after_training() {
    let print = |seed, kind| {
        let m = Modular::new(TinyBackbone::new(seed, kind).unwrap(), SEED).unwrap();
        m.backbone().fingerprint().unwrap()
    };
    assert_eq!(print(SEED, Kind::Float), print(SEED, Kind::BFloat16));
    assert_ne!(print(SEED, Kind::Float), print(Seed(10), Kind::Float));
}
