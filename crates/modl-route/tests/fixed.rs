//! Fixed routing by its table.

#![allow(clippy::unwrap_used, clippy::panic)]

use modl_core::{
    Bank, Context, Device, Error, Kind, LowRank, ParamStore, Registry, Result, Routing, Scope,
    Seed, Signal, Site, SiteKind, Tensor, Weights,
};
use serde_json::{Value, json};

fn route(config: Value, tasks: &[&str]) -> Result<Routing> {
    let registry = Registry::new().with(modl_route::register)?;
    let mut bank = Bank::new();
    for name in ["tweets", "news", "reviews"] {
        let ones = |shape: &[i64]| Tensor::ones(shape, Kind::Float, Device::Cpu);
        let module = LowRank { down: ones(&[1, 4])?, up: ones(&[4, 1])?, scale: 1.0 };
        bank.insert(name, Box::new(module))?;
    }
    let site = Site { path: "site".into(), kind: SiteKind::Linear, input: 4, output: 4, index: 0 };
    let mut store = ParamStore::new();
    let config = registry.routers.parse(&config)?;
    let router = config.build(&site, &bank, &mut Scope::new(&mut store, Seed(0)))?;
    let x = Tensor::ones(&[tasks.len().max(1) as i64, 4], Kind::Float, Device::Cpu)?;
    let cx = Context::eval();
    let cx = if tasks.is_empty() { cx } else { cx.with_tasks(tasks) };
    router.route(&Signal::from(x), &bank, &cx)
}

fn rows(routing: &Routing) -> &[Vec<(usize, f64)>] {
    let Weights::Rows(rows) = &routing.weights else { panic!("{routing:?}") };
    rows
}

#[test]
fn a_task_has_the_module_of_its_name() -> Result<()> {
    let r = route(json!({"type": "fixed"}), &["news", "tweets"])?;
    assert_eq!(rows(&r), [vec![(1, 1.0)], vec![(0, 1.0)]]);
    assert!(r.normalised);
    let alike = route(json!({"type": "fixed"}), &["reviews", "reviews"])?;
    assert!(matches!(alike.weights, Weights::Fixed(all) if all == [(2, 1.0)]));
    Ok(())
}

#[test]
fn a_table_gives_one_or_several_or_weighed_modules() -> Result<()> {
    let table = json!({"x": "news", "y": ["tweets", "news"], "z": {"news": 0.5}, "none": []});
    let config = json!({"type": "fixed", "table": table});
    let r = route(config, &["x", "y", "z", "none"])?;
    let expected = [vec![(1, 1.0)], vec![(0, 0.5), (1, 0.5)], vec![(1, 0.5)], vec![]];
    assert_eq!(rows(&r), expected);
    assert!(!r.normalised);
    Ok(())
}

/// Rows with labels of two kinds.
fn labelled(config: Value) -> Result<Routing> {
    let registry = Registry::new().with(modl_route::register)?;
    let mut bank = Bank::new();
    for name in ["en", "tr", "ner", "qa"] {
        let ones = |shape: &[i64]| Tensor::ones(shape, Kind::Float, Device::Cpu);
        let module = LowRank { down: ones(&[1, 4])?, up: ones(&[4, 1])?, scale: 1.0 };
        bank.insert(name, Box::new(module))?;
    }
    let site = Site { path: "site".into(), kind: SiteKind::Linear, input: 4, output: 4, index: 0 };
    let mut store = ParamStore::new();
    let config = registry.routers.parse(&config)?;
    let router = config.build(&site, &bank, &mut Scope::new(&mut store, Seed(0)))?;
    let x = Tensor::ones(&[3, 4], Kind::Float, Device::Cpu)?;
    let cx = Context::eval().with_tasks(["ner", "qa", "ner"]);
    let cx = cx.with_labels("language", ["tr", "tr", "en"]);
    router.route(&Signal::from(x), &bank, &cx)
}

#[test]
fn labels_of_any_kind_are_looked_up() -> Result<()> {
    let r = labelled(json!({"type": "fixed", "label": "language"}))?;
    assert_eq!(rows(&r), [vec![(1, 1.0)], vec![(1, 1.0)], vec![(0, 1.0)]]);
    let table = json!({"tr": ["en", "tr"], "en": "en"});
    let r = labelled(json!({"type": "fixed", "label": "language", "table": table}))?;
    assert_eq!(rows(&r)[0], [(0, 0.5), (1, 0.5)]);
    let e = labelled(json!({"type": "fixed", "label": "langauge"})).unwrap_err();
    assert!(matches!(&e, Error::Unknown { nearest: Some(n), .. } if n == "language"), "{e}");
    let e = labelled(json!({"type": "fixed", "label": "language", "table": {"tr": "tr"}}));
    assert!(e.unwrap_err().to_string().contains("`en`"));
    Ok(())
}

#[test]
fn several_labels_make_a_stack_in_their_order() -> Result<()> {
    // MAD-X: the language first, then the task.
    let r = labelled(json!({"type": "fixed", "label": ["language", "task"]}))?;
    let expected = [vec![(1, 1.0), (2, 1.0)], vec![(1, 1.0), (3, 1.0)], vec![(0, 1.0), (2, 1.0)]];
    assert_eq!(rows(&r), expected);
    let r = labelled(json!({"type": "fixed", "label": ["task", "language"]}))?;
    assert_eq!(rows(&r)[0], [(2, 1.0), (1, 1.0)]);
    let registry = Registry::new().with(modl_route::register)?;
    let config =
        registry.routers.parse(&json!({"type": "fixed", "label": ["language", "task"]}))?;
    assert_eq!(config.to_json()?["label"], json!(["language", "task"]));
    let plain = registry.routers.parse(&json!({"type": "fixed"}))?;
    assert!(plain.to_json()?.get("label").is_none(), "files of tasks stay as they were");
    assert!(labelled(json!({"type": "fixed", "label": []})).is_err());
    let e = labelled(json!({"type": "fixed", "label": ["task", "task"]})).unwrap_err().to_string();
    assert!(e.contains("twice"), "{e}");
    Ok(())
}

#[test]
fn modules_that_are_not_chosen_have_no_gradient_at_all() -> Result<()> {
    use modl_core::testing::{Sum, TinyBackbone, perturb, standins};
    use modl_core::{Modular, Select, Targets};
    let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Float)?, Seed(2))?;
    for name in ["news", "tweets", "reviews"] {
        model.attach(name, Box::new(standins::Scale), &Targets::names(["query", "value"]))?;
    }
    perturb(&model, &Select::new("modules.*"), 0.3, Seed(3))?;
    model.train_only(&Select::new("modules.*"))?;
    model.aggregate(Box::new(Sum::default()))?;
    // DEMix: by domain.
    let label = modl_route::Labels::One("domain".into());
    model.route(Box::new(modl_route::Fixed { label, ..Default::default() }), false)?;
    let cx = Context::train(Seed(0), 0).with_labels("domain", ["news", "reviews", "news"]);
    let y = model.forward(&TinyBackbone::inputs(3, 5, Seed(4))?, &cx)?;
    let all = model.trainable();
    let wanted: Vec<&Tensor> = all.iter().map(|(_, t)| t).collect();
    let gradients = y.need("logits")?.square()?.sum()?.gradients(&wanted, false)?;
    for ((name, _), g) in all.iter().zip(&gradients) {
        assert_eq!(g.is_none(), name.starts_with("modules.tweets."), "{name}");
    }
    Ok(())
}

#[test]
fn a_static_set_needs_no_tasks() -> Result<()> {
    let r = route(json!({"type": "fixed", "modules": {"news": 1.0, "tweets": 1.0}}), &[])?;
    assert!(matches!(r.weights, Weights::Fixed(all) if all == [(1, 1.0), (0, 1.0)]));
    Ok(())
}

#[test]
fn unknown_names_are_refused_with_the_nearest() {
    let near = |config: Value, tasks: &[&str], wanted: &str| {
        let e = route(config, tasks).unwrap_err();
        let Error::Unknown { nearest, .. } = &e else { panic!("{e}") };
        assert_eq!(nearest.as_deref(), Some(wanted));
    };
    near(json!({"type": "fixed"}), &["news", "tweet"], "tweets");
    near(json!({"type": "fixed", "table": {"task": "news"}}), &["taks"], "task");
    near(json!({"type": "fixed", "table": {"task": "reviewz"}}), &["task"], "reviews");
    near(json!({"type": "fixed", "modules": ["newss"]}), &[], "news");
}

#[test]
fn modules_that_stand_elsewhere_are_left_out_on_request() -> Result<()> {
    let config = json!({"type": "fixed", "modules": ["elsewhere", "news"], "skip_absent": true});
    let r = route(config, &[])?;
    assert!(matches!(r.weights, Weights::Fixed(all) if all == [(1, 0.5)]));
    Ok(())
}

#[test]
fn what_contradicts_itself_or_the_batch_is_refused() {
    let both = json!({"type": "fixed", "modules": ["news"], "table": {"a": "news"}});
    assert!(route(both, &[]).is_err());
    let e = route(json!({"type": "fixed"}), &[]).unwrap_err().to_string();
    assert!(e.contains("with_tasks"), "{e}");
    let e = route(json!({"type": "fixed", "modules": 3}), &[]).unwrap_err().to_string();
    assert!(e.contains("name of a module"), "{e}");
}
