//! A call that is refused has changed nothing: outputs, parameters, modules and routers are those
//! of before, bit for bit.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::standins::{self, BalancedHalves, Scale, WeightMask};
use modl_core::testing::{Given, Sum, TinyBackbone, perturb};
use modl_core::{
    Aggregator, AggregatorConfig, Attachment, Bank, Context, Device, Error, Init, Kind, Modular,
    Module, ModuleConfig, ParamStore, Registry, Residents, Result, Router, RouterConfig, Routing,
    Scope, Seed, Select, Signal, Site, Targets, Tensor, Tensors, Weights,
};
use serde_json::{Value, json};

const SEED: Seed = Seed(11);
const SITES: [&str; 3] = ["query", "value", "output.dense"];

fn registry() -> Registry {
    Registry::new().with(standins::register).unwrap()
}

/// All that a caller can see of a model.
#[derive(Debug, PartialEq)]
struct Seen {
    logits: Result<Vec<u8>, String>,
    base: Vec<u8>,
    /// Name, bytes, whether it is trainable, whether it is a buffer.
    params: Vec<(String, Vec<u8>, bool, bool)>,
    modules: Vec<String>,
    layers: Vec<(String, Vec<String>, &'static str, &'static str)>,
}

fn seen(m: &Modular) -> Seen {
    let inputs = TinyBackbone::inputs(4, 6, SEED).unwrap();
    let bytes = |y: &Tensors| y.need("logits").unwrap().to_bytes().unwrap();
    let cx = Context::eval();
    let layer = |site: Site| {
        let l = m.layer(&site).unwrap();
        (site.path.clone(), l.bank.names().to_vec(), l.router().kind(), l.aggregator().kind())
    };
    let all = m.backbone().params().iter().chain(m.params().iter());
    Seen {
        logits: m.forward(&inputs, &cx).map(|y| bytes(&y)).map_err(|e| e.to_string()),
        base: bytes(&m.forward_base(&inputs, &cx).unwrap()),
        params: all
            .map(|(n, p)| {
                (n.to_owned(), p.tensor().to_bytes().unwrap(), p.trainable(), p.is_buffer())
            })
            .collect(),
        modules: m.modules().into_iter().map(str::to_owned).collect(),
        layers: m.modular_sites().into_iter().map(layer).collect(),
    }
}

/// Makes what is asked for at the first sites and refuses at the last one; where it can, after it
/// has made its parameters.
#[derive(Debug, Clone, Copy)]
struct RefusesAtLast;

fn refusal<T>(site: &Site) -> Result<T> {
    Err(Error::invalid(&site.path, "is refused by the test"))
}

impl ModuleConfig for RefusesAtLast {
    fn kind(&self) -> &'static str {
        "refuses_at_last"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        scope.common().shared("common", &[3], Init::Ones)?;
        let module = Scale.build(at, scope)?;
        if at.sites.last().is_some_and(|s| s.index == at.site.index) {
            return refusal(at.site);
        }
        Ok(module)
    }
}

impl AggregatorConfig for RefusesAtLast {
    fn kind(&self) -> &'static str {
        "refuses_at_last"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, site: &Site, scope: &mut Scope) -> Result<Box<dyn Aggregator>> {
        scope.param("gamma", &[1], Init::Ones)?;
        if site.path.ends_with("output.dense") {
            return refusal(site);
        }
        Ok(Box::new(Sum::default()))
    }
}

impl RouterConfig for RefusesAtLast {
    fn kind(&self) -> &'static str {
        "refuses_at_last"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, site: &Site, _: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        scope.param("rho", &[2], Init::Ones)?;
        if site.path.ends_with("output.dense") {
            return refusal(site);
        }
        Ok(Box::new(Given(Weights::Fixed(vec![(0, 1.0)]))))
    }
}

/// A learned α for all rows, that can grow; at the last site only where it is told to.
#[derive(Debug, Clone)]
struct Growing {
    everywhere: bool,
}

#[derive(Debug, Clone)]
struct GrowingRouter {
    alpha: Tensor,
    refuses: bool,
}

impl RouterConfig for Growing {
    fn kind(&self) -> &'static str {
        "growing"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let alpha = scope.param("alpha", &[bank.len() as i64], Init::Normal(1.0))?;
        let refuses = !self.everywhere && site.path.ends_with("output.dense");
        Ok(Box::new(GrowingRouter { alpha, refuses }))
    }
}

impl Router for GrowingRouter {
    fn kind(&self) -> &'static str {
        "growing"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        Ok(Routing::new(Weights::Dense(self.alpha.clone()), bank.len()))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let zeros = Tensor::zeros(&[1], Kind::Float, Device::Cpu)?;
        assert_eq!(self.alpha.len_of(0) + 1, modules as i64);
        let longer = Tensor::cat(&[self.alpha.detach()?, zeros], 0)?;
        let alpha = scope.replace("alpha", &longer)?;
        if self.refuses {
            return Err(Error::invalid("growing", "is refused by the test"));
        }
        Ok(Box::new(GrowingRouter { alpha, ..self.clone() }))
    }
}

/// Modules `a` and `b` at three sites, moved away from their start.
fn model() -> Modular {
    let mut m = Modular::new(TinyBackbone::new(SEED, Kind::Float).unwrap(), SEED).unwrap();
    for name in ["a", "b"] {
        m.attach(name, Box::new(WeightMask), &targets()).unwrap();
    }
    m.aggregate(Box::new(Sum::default())).unwrap();
    perturb(&m, &Select::all(), 0.5, SEED).unwrap();
    m
}

fn routed(router: Box<dyn RouterConfig>) -> Modular {
    let mut m = model();
    m.route(router, false).unwrap();
    perturb(&m, &Select::new("routers.*"), 0.5, SEED).unwrap();
    m
}

fn targets() -> Targets {
    Targets::names(["query", "value"])
}

fn all_sites() -> Targets {
    Targets::names(SITES)
}

type Work<'a> = Box<dyn Fn(&mut Modular) -> Result<()> + 'a>;
type Call<'a> = (&'a str, Work<'a>);

/// Makes each call, which has to be refused with the words in front of it.
fn all_refused(start: &dyn Fn() -> Modular, calls: &[Call]) {
    let mut m = start();
    for (words, call) in calls {
        let before = seen(&m);
        let Err(e) = call(&mut m) else { panic!("{words}: was not refused") };
        assert!(e.to_string().contains(words), "wanted {words}: {e}");
        let after = seen(&m);
        assert_eq!(before.modules, after.modules, "{e}");
        assert_eq!(before.layers, after.layers, "{e}");
        let names = |s: &Seen| s.params.iter().map(|p| p.0.clone()).collect::<Vec<_>>();
        assert_eq!(names(&before), names(&after), "{e}");
        assert!(before == after, "{words}: values have changed");
    }
}

#[test]
fn attaching() {
    let scale = || Box::new(Scale) as Box<dyn ModuleConfig>;
    let calls: Vec<Call> = vec![
        ("`a` exists", Box::new(|m| m.attach("a", scale(), &targets()))),
        ("`a.b`", Box::new(|m| m.attach("a.b", scale(), &targets()))),
        ("`../a`", Box::new(|m| m.attach("../a", scale(), &targets()))),
        ("``", Box::new(|m| m.attach("", scale(), &targets()))),
        ("`qurey`", Box::new(|m| m.attach("c", scale(), &Targets::names(["query", "qurey"])))),
        ("[", Box::new(|m| m.attach("c", scale(), &Targets::pattern("[")))),
        ("layer.0.value", Box::new(|m| m.attach("c", Box::new(RefusesAtLast), &targets()))),
    ];
    all_refused(&|| routed(Given::only(0)), &calls);
    all_refused(&model, &calls);

    let call: Call = ("`given`", Box::new(|m| m.attach("c", scale(), &targets())));
    all_refused(&|| routed(Given::only(1)), &[call]);
    let call: Call =
        ("at a site that had none", Box::new(|m| m.attach("c", scale(), &all_sites())));
    all_refused(&|| routed(Box::new(Growing { everywhere: true })), &[call]);
    all_refused(
        &|| routed(Box::new(BalancedHalves)),
        &[("`balanced_halves`", Box::new(|m| m.attach("c", scale(), &targets())))],
    );

    // The first two routers could grow.
    let three = || {
        let mut m = Modular::new(TinyBackbone::new(SEED, Kind::Float).unwrap(), SEED).unwrap();
        m.attach("a", scale(), &all_sites()).unwrap();
        m.aggregate(Box::new(Sum::default())).unwrap();
        m.route(Box::new(Growing { everywhere: false }), false).unwrap();
        m
    };
    all_refused(&three, &[("output.dense", Box::new(|m| m.attach("c", scale(), &all_sites())))]);
    let taken = || {
        let mut m = model();
        m.scope("modules.c.layer.0.query").param("factor", &[2], Init::Ones).unwrap();
        m
    };
    let path = "modules.c.layer.0.query.factor";
    all_refused(&taken, &[(path, Box::new(|m| m.attach("c", scale(), &targets())))]);
    // A site that had no module gets an aggregator.
    let aggregated = || {
        let mut m = model();
        m.aggregate(Box::new(RefusesAtLast)).unwrap();
        m
    };
    let call: Call = ("output.dense", Box::new(|m| m.attach("c", scale(), &all_sites())));
    all_refused(&aggregated, &[call]);
}

#[test]
fn routers_grow_where_all_of_them_can() {
    let mut m = routed(Box::new(Growing { everywhere: true }));
    let before = seen(&m);
    m.attach("c", Box::new(Scale), &targets()).unwrap();
    let after = seen(&m);
    // The new module has α = 0.
    assert_eq!(before.logits, after.logits);
    let alpha = m.params().get("routers.layer.0.query.alpha").unwrap();
    assert_eq!(alpha.size(), [3]);
    assert!(alpha.requires_grad());
    let global = |m: &mut Modular| m.route(Box::new(Growing { everywhere: true }), true);
    global(&mut m).unwrap();
    m.attach("d", Box::new(Scale), &targets()).unwrap();
    assert_eq!(m.params().get("routers.global.alpha").unwrap().size(), [4]);
    seen(&m).logits.unwrap();
}

#[test]
fn what_was_learned_by_other_aggregators_stays_when_a_site_is_added() {
    let mut m = model();
    m.aggregate(Box::new(RefusesAtLast)).unwrap();
    perturb(&m, &Select::new("aggregators.*"), 0.5, SEED).unwrap();
    let gamma = |m: &Modular| m.params().get("aggregators.layer.0.query.gamma").unwrap().clone();
    let before = gamma(&m);
    m.attach("c", Box::new(Scale), &Targets::names(["key"])).unwrap();
    assert!(gamma(&m).bit_equal(&before).unwrap());
    assert!(m.params().get("aggregators.layer.0.key.gamma").is_ok());
}

#[test]
fn aggregating_with_parameters() {
    let start = || {
        let mut m = model();
        m.aggregate(Box::new(RefusesAtLast)).unwrap();
        perturb(&m, &Select::new("aggregators.*"), 0.5, SEED).unwrap();
        m
    };
    let m = start();
    let given = m.aggregator_parameters_of(&RefusesAtLast).unwrap();
    assert!(
        given.iter().count() > 0 && m.params().find("aggregators.layer.0.query.gamma").is_some()
    );
    let values = |edit: &dyn Fn(&str) -> Option<(String, f64)>| {
        let mut store = ParamStore::new();
        for (name, _) in given.iter() {
            let Some((name, v)) = edit(name) else { continue };
            store.insert(name, Tensor::full(&[1], v, Kind::Float, Device::Cpu).unwrap()).unwrap();
        }
        store
    };
    let good = values(&|n| Some((n.to_owned(), 7.0)));
    let renamed = values(&|n| Some((format!("{n}s"), 7.0)));
    let broken = values(&|n| Some((n.to_owned(), f64::NAN)));
    let calls: Vec<Call> = vec![
        ("gammas", Box::new(|m| m.aggregate_with(Box::new(RefusesAtLast), &renamed))),
        ("not a number", Box::new(|m| m.aggregate_with(Box::new(RefusesAtLast), &broken))),
        ("layer.0.query.gamma", Box::new(|m| m.aggregate_with(Box::new(Sum::default()), &good))),
    ];
    all_refused(&start, &calls);
    let mut m = start();
    m.aggregate_with(Box::new(RefusesAtLast), &good).unwrap();
    for (_, t) in m.params().select(&Select::new("aggregators.*")) {
        assert_eq!(t.to_vec::<f32>().unwrap(), [7.0]);
    }
    assert_eq!(m.aggregator_recipe().unwrap().kind(), "refuses_at_last");
}

#[test]
fn attaching_with_parameters() {
    let good = || {
        let m = model();
        let params = m.parameters_of(&Scale, &targets()).unwrap();
        let ones = Tensor::ones(&[8], Kind::Float, Device::Cpu).unwrap();
        let all: Vec<_> = params.iter().map(|(n, _)| (n.to_owned(), ones.clone())).collect();
        params.load("test", all.iter().map(|(n, t)| (n.as_str(), t)), &Select::all()).unwrap();
        params
    };
    let with = |edit: &dyn Fn(&mut ParamStore)| {
        let mut params = good();
        edit(&mut params);
        params
    };
    let name = "layer.0.value.factor";
    let missing = with(&|p| assert_eq!(p.remove_below(name), 1));
    let more = with(&|p| {
        p.insert("more", Tensor::ones(&[8], Kind::Float, Device::Cpu).unwrap()).unwrap();
    });
    let set = |p: &mut ParamStore, t: Tensor| {
        p.remove_below(name);
        p.insert(name, t).unwrap();
    };
    let shape = with(&|p| set(p, Tensor::ones(&[7], Kind::Float, Device::Cpu).unwrap()));
    let of = |v: f32| {
        let mut values = [1f32; 8];
        values[5] = v;
        with(&|p| set(p, Tensor::from_slice(&values, &[8], Device::Cpu).unwrap()))
    };
    let (nan, infinite) = (of(f32::NAN), of(f32::INFINITY));
    let put = |name: &'static str, params: &'static ParamStore| -> Work<'static> {
        Box::new(move |m| m.attach_with(name, Box::new(Scale), &targets(), params))
    };
    // Tests end before this matters.
    let keep = |p: ParamStore| -> &'static ParamStore { Box::leak(Box::new(p)) };
    let calls: Vec<Call> = vec![
        ("`a` exists", put("a", keep(good()))),
        ("1 missing", put("c", keep(missing))),
        ("1 unexpected", put("c", keep(more))),
        ("1 of another shape", put("c", keep(shape))),
        (name, put("c", keep(nan))),
        (name, put("c", keep(infinite))),
    ];
    all_refused(&model, &calls);
    let mut m = model();
    m.attach_with("c", Box::new(Scale), &targets(), &good()).unwrap();
    assert_eq!(m.modules(), ["a", "b", "c"]);
}

#[test]
fn detaching_routing_aggregating_merging_and_training() {
    let merged = || {
        let mut m = routed(Given::only(0));
        m.merge("a").unwrap();
        m
    };
    all_refused(&merged, &[("merged already", Box::new(|m| m.merge("b")))]);
    let calls: Vec<Call> = vec![
        ("unknown module `c`", Box::new(|m| m.detach("c"))),
        ("unknown module `c`", Box::new(|m| m.recipe("c").map(|_| ()))),
        ("unknown module `c`", Box::new(|m| m.merge("c"))),
        ("it does not change parameters", Box::new(|m| m.merge("s"))),
        ("output.dense", Box::new(|m| m.route(Box::new(RefusesAtLast), false))),
        ("output.dense", Box::new(|m| m.aggregate(Box::new(RefusesAtLast)))),
    ];
    for learned in [false, true] {
        let start = || {
            let mut m = model();
            m.attach("s", Box::new(Scale), &all_sites()).unwrap();
            match learned {
                true => m.route(Box::new(BalancedHalves), true).unwrap(),
                false => m.route(Given::only(0), false).unwrap(),
            }
            m
        };
        all_refused(&start, &calls);
    }
    let empty = || Modular::new(TinyBackbone::new(SEED, Kind::Float).unwrap(), SEED).unwrap();
    let calls: Vec<Call> = vec![
        ("attach one first", Box::new(|m| m.route(Given::only(0), false))),
        ("attach one first", Box::new(|m| m.aggregate(Box::new(Sum::default())))),
    ];
    all_refused(&empty, &calls);
}

fn rewrite(path: &Path, edit: impl FnOnce(&mut Vec<(String, Tensor)>, &mut Value)) {
    let file = Checkpoint::open(path).unwrap();
    let mut tensors = file.tensors(Device::Cpu).unwrap();
    let mut metadata = file.metadata();
    let mut header: Value = serde_json::from_str(&metadata["modl"]).unwrap();
    edit(&mut tensors, &mut header);
    metadata.insert("modl".to_owned(), header.to_string());
    checkpoint::save(path, tensors.iter().map(|(n, t)| (n.as_str(), t)), metadata).unwrap();
}

fn nan_in(t: &Tensor) -> Tensor {
    t.mul_scalar(f64::NAN).unwrap()
}

#[test]
fn loading_modules_and_routing() {
    let dir = tempfile::tempdir().unwrap();
    let (module, routing) = (dir.path().join("a.safetensors"), dir.path().join("r.safetensors"));
    let halves = || routed(Box::new(BalancedHalves));
    type Edit = fn(&mut Vec<(String, Tensor)>, &mut Value);
    let modules: [(&str, Edit); 9] = [
        ("1 missing", |t, _| drop(t.pop())),
        ("1 unexpected", |t, _| t.push(("more".to_owned(), t[0].1.clone()))),
        ("1 of another shape", |t, _| t[1].1 = t[1].1.narrow(0, 0, 3).unwrap()),
        ("layer.0.value.scores", |t, _| t[1].1 = nan_in(&t[1].1)),
        ("was made for", |_, h| h["base"] = json!("0123")),
        ("weight_mosk", |_, h| h["config"]["type"] = json!("weight_mosk")),
        ("qurey", |_, h| h["targets"]["names"] = json!(["qurey"])),
        ("format", |_, h| h["format"] = json!(9)),
        ("`../c`", |_, h| h["name"] = json!("../c")),
    ];
    let registry = registry();
    for (words, edit) in modules {
        model().save_module("a", &module).unwrap();
        rewrite(&module, |t, h| {
            h["name"] = json!("c");
            edit(t, h);
        });
        let load = |m: &mut Modular| m.load_module(&module, None, &registry).map(drop);
        all_refused(&model, &[(words, Box::new(load))]);
        all_refused(&|| routed(Given::only(0)), &[(words, Box::new(load))]);
    }
    // Good but for its name, or for the router that is there.
    model().save_module("a", &module).unwrap();
    let load = |name: &'static str| {
        let (module, registry) = (&module, &registry);
        move |m: &mut Modular| m.load_module(module, Some(name), registry).map(drop)
    };
    all_refused(&halves, &[("`a` exists", Box::new(load("a"))), ("balanced", Box::new(load("c")))]);
    load("c")(&mut model()).unwrap();

    let routings: [(&str, Edit); 6] = [
        ("1 missing", |t, _| drop(t.pop())),
        ("1 unexpected", |t, _| t.push(("routers.more".to_owned(), t[0].1.clone()))),
        ("1 of another shape", |t, _| t[0].1 = t[0].1.narrow(0, 0, 3).unwrap()),
        ("attached are a, b", |_, h| h["modules"] = json!(["b", "a"])),
        ("balanced_haves", |_, h| h["router"]["type"] = json!("balanced_haves")),
        ("aggregator", |_, h| h["aggregator"] = json!({"type": "median"})),
    ];
    for (words, edit) in routings {
        let mut other = routed(Box::new(BalancedHalves));
        perturb(&other, &Select::new("routers.*"), 1.0, Seed(3)).unwrap();
        other.route(Box::new(BalancedHalves), false).unwrap();
        other.save_routing(&routing).unwrap();
        rewrite(&routing, |t, h| {
            h["aggregator"] = Value::Null;
            edit(t, h);
        });
        let load = |m: &mut Modular| m.load_routing(&routing, &registry);
        all_refused(&halves, &[(words, Box::new(load))]);
        all_refused(&|| routed(Given::only(1)), &[(words, Box::new(load))]);
    }
}

#[test]
fn stores_and_scopes() {
    let mut store = ParamStore::new();
    let mut scope = Scope::new(&mut store, SEED);
    scope.param("a", &[2, 3], Init::Normal(1.0)).unwrap();
    scope.param("b", &[2], Init::Normal(1.0)).unwrap();
    scope.buffer("c", &Tensor::ones(&[2], Kind::Float, Device::Cpu).unwrap()).unwrap();
    let ids = Tensor::from_slice(&[1i64, 2], &[2], Device::Cpu).unwrap();
    store.insert("ids", ids.clone()).unwrap();
    store.train_only(&Select::any(["b"])).unwrap();
    let ones = Tensor::ones(&[2], Kind::Float, Device::Cpu).unwrap();
    let (a, b, c) = (&Tensor::ones(&[2, 3], Kind::Float, Device::Cpu).unwrap(), &ones, &ones);
    type StoreCall<'a> = (&'a str, Box<dyn Fn(&mut ParamStore) -> Result<()> + 'a>);
    let calls: Vec<StoreCall> = vec![
        ("`a` exists", Box::new(|s| s.insert("a", ones.clone()))),
        ("unknown parameter `d`", Box::new(|s| s.get("d").map(|_| ()))),
        ("ids", Box::new(|s| s.train_only(&Select::all()))),
        (
            "1 missing",
            Box::new(|s| s.load("t", [("a", a), ("b", b)], &Select::any(["a", "b", "c"]))),
        ),
        ("1 unexpected", Box::new(|s| s.load("t", [("a", a), ("b", b)], &Select::new("a")))),
        (
            "another shape",
            Box::new(|s| s.load("t", [("a", a), ("b", a)], &Select::any(["a", "b"]))),
        ),
        ("once: b", Box::new(|s| s.load("t", [("b", b), ("b", c)], &Select::new("b")))),
        ("`b` exists", Box::new(|s| Scope::new(s, SEED).param("b", &[2], Init::Ones).map(drop))),
        ("`b` exists", Box::new(|s| Scope::new(s, SEED).param_from("b", a).map(drop))),
        ("`b` exists", Box::new(|s| Scope::new(s, SEED).buffer("b", a).map(drop))),
        ("shape [2]", Box::new(|s| Scope::new(s, SEED).shared("b", &[3], Init::Ones).map(drop))),
        ("`d`", Box::new(|s| Scope::new(s, SEED).replace("d", a).map(drop))),
    ];
    let state = |s: &ParamStore| -> Vec<_> {
        let one = |(n, p): (&str, &modl_core::Param)| {
            (n.to_owned(), p.tensor().to_bytes().unwrap(), p.trainable(), p.is_buffer())
        };
        s.iter().map(one).collect()
    };
    for (words, call) in calls {
        let before = state(&store);
        let e = call(&mut store).unwrap_err().to_string();
        assert!(e.contains(words), "wanted {words}: {e}");
        assert_eq!(state(&store), before, "{e}");
    }
}

/// Refuses a bank without `a`.
#[derive(Debug, Clone)]
struct NeedsA;

impl RouterConfig for NeedsA {
    fn kind(&self) -> &'static str {
        "needs_a"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, _: &Site, bank: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(Given(Weights::Fixed(vec![(bank.position("a")?, 1.0)]))))
    }
}

#[test]
fn residents() {
    let load = |m: &mut Modular, name: &str| -> Result<()> {
        m.attach(name, Box::new(Scale), &Targets::names(["query", "key"]))?;
        perturb(m, &Select::new(format!("modules.{name}.*")), 0.5, SEED.child(name))
    };
    let mut m = Modular::new(TinyBackbone::new(SEED, Kind::Float).unwrap(), SEED).unwrap();
    m.aggregate(Box::new(Sum::default())).unwrap_err();
    // Two sites, 8 numbers each: 64 bytes for each module.
    let mut residents = Residents::new(128);
    residents.need(&mut m, &["a", "b"], load).unwrap();
    m.aggregate(Box::new(Sum::default())).unwrap();
    m.route(Box::new(NeedsA), false).unwrap();
    type Load<'a> = Box<dyn Fn(&mut Modular, &str) -> Result<()> + 'a>;
    let cases: Vec<(&str, Vec<&str>, Load)> = vec![
        ("was not attached", vec!["c"], Box::new(|_, _| Ok(()))),
        ("no such file", vec!["c"], Box::new(|_, n| Err(Error::file(n, "no such file")))),
        ("the limit is 128", vec!["c", "d", "e"], Box::new(load)),
        // Attaches before it fails, and one that nobody asked for.
        (
            "halfway",
            vec!["c"],
            Box::new(|m, n| {
                load(m, n)?;
                load(m, "other")?;
                Err(Error::file(n, "halfway"))
            }),
        ),
        ("`a` exists", vec!["c"], Box::new(|m, _| load(m, "a"))),
        // Both would leave, and then there is nothing for the router.
        ("unknown module `a`", vec!["c", "d"], Box::new(load)),
        // Only `a` would.
        ("unknown module `a`", vec!["c"], Box::new(load)),
    ];
    for (words, names, load) in cases {
        let before = (seen(&m), residents.names().map(str::to_owned).collect::<Vec<_>>());
        let e = residents.need(&mut m, &names, load).unwrap_err().to_string();
        assert!(e.contains(words), "wanted {words}: {e}");
        let after = (seen(&m), residents.names().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!((&before.0.modules, &before.1), (&after.0.modules, &after.1), "{e}");
        assert!(before == after, "{e}");
    }
    residents.need(&mut m, &["a"], load).unwrap();
    residents.need(&mut m, &["c"], load).unwrap();
    assert_eq!(m.modules(), ["a", "c"]);
    seen(&m).logits.unwrap();
}

#[test]
fn gradients_of_what_was_not_recorded_are_refused() {
    let x = Tensor::zeros(&[3], Kind::Float, Device::Cpu).unwrap();
    x.set_requires_grad(true).unwrap();
    let constant = Tensor::full(&[], 1.0, Kind::Float, Device::Cpu).unwrap();
    let e = constant.gradients(&[&x], false).unwrap_err().to_string();
    assert!(e.contains("without recording"), "{e}");
    assert!(x.sum().unwrap().gradients(&[&x], false).unwrap()[0].is_some());
}
