//! Compositions as AdapterHub computes them, as recipes write them, graphs against functions written
//! by hand, and trees in batches against trees one by one.
#![allow(clippy::unwrap_used, clippy::panic)]

mod hub;

use hub::{Named, apart, fixture, inputs, json_of, model, outputs, tensors};
use modl_aggregate::{
    Compose, Composition, Fusion, Graph, Join, Node, QuerySource, Tree, run_trees,
};
use modl_core::testing::{TinyBackbone, standins};
use modl_core::{
    AggregatorConfig, Context, Device, Init, Kind, Modular, Registry, Seed, Select, Targets,
    Tensor, no_grad,
};
use serde_json::json;

fn composed(composition: Composition) -> Modular {
    let mut names = composition.modules();
    names.sort_unstable();
    names.dedup();
    let mut model = model(&names);
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    model.aggregate(Box::new(Compose { composition })).unwrap();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    model.route(Named::all(&names), false).unwrap();
    model
}

#[test]
fn outputs_are_those_of_adapterhub() {
    let c = |value| Composition::try_from(value).unwrap();
    for (recorded, composition) in [
        ("a", json!("a")),
        ("stack", json!({"stack": ["a", "b"]})),
        ("stack_houlsby", json!({"stack": ["h1", "h2"]})),
        ("batch_split", json!({"batch_split": {"parts": ["a", "b"], "batch_sizes": [1, 2]}})),
        (
            "batch_split_nested",
            json!({"batch_split": {"parts": [{"stack": ["h1", "h2"]}, "h2"], "batch_sizes": [2, 1]}}),
        ),
        ("split", json!({"split": {"parts": ["a", "b"], "splits": [3, 7]}})),
    ] {
        let d = apart(&composed(c(composition)), recorded);
        assert!(d < 1e-5, "{recorded}: {d}");
    }
}

#[test]
fn setups_of_adapterhub_are_read() {
    let setups = json_of(&fixture("setups.json"));
    let read = |name: &str| Composition::from_adapterhub(&setups[name]).unwrap();
    for (name, written) in [
        ("stack", json!({"stack": ["a", "b"]})),
        ("stack_fuse", json!({"stack": ["c", {"fuse": ["a", "b"]}]})),
        (
            "average_weighted",
            json!({"average": {"parts": ["a", "b", "c"], "weights": [0.125, 0.25, 0.625]}}),
        ),
        ("split", json!({"split": {"parts": ["a", "b"], "splits": [3, 7]}})),
        (
            "batch_split_nested",
            json!({"batch_split": {"parts": [{"stack": ["h1", "h2"]}, "h2"], "batch_sizes": [2, 1]}}),
        ),
        ("parallel", json!({"parallel": ["a", "b", "c"]})),
    ] {
        assert_eq!(serde_json::to_value(read(name)).unwrap(), written, "{name}");
    }
    assert_eq!(setups.as_object().unwrap().len(), 10);
    assert!(setups.as_object().unwrap().keys().all(|name| !read(name).modules().is_empty()));
    for (setup, says) in [
        (json!({"type": "MultiTask", "children": []}), "MultiTask"),
        (json!({"type": "Split", "children": []}), "splits"),
        (json!({"type": "single", "children": []}), "one name"),
        (json!({"children": []}), "type"),
        (json!({"type": "Stack", "children": [], "kwargs": {"x": 1}}), "`x`"),
    ] {
        let e = Composition::from_adapterhub(&setup).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
}

#[test]
fn parallel_parts_run_on_a_batch_that_is_repeated_for_each() {
    for (recorded, composition) in [
        ("parallel", Composition::parallel(["a", "b", "c"])),
        ("parallel_nested", Composition::parallel([Composition::stack(["h1", "h2"]), "h1".into()])),
    ] {
        let model = composed(composition.clone());
        let repeated = composition.repeat(&inputs()).unwrap();
        let found = model.forward(&repeated, &Context::eval()).unwrap();
        let wanted = outputs();
        let (found, wanted) =
            (found.need("last_hidden_state").unwrap(), wanted.need(recorded).unwrap());
        assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{recorded}");
        // Once is too little for two or three parts, unless the rows can be shared out.
        if composition.channels() == 2 {
            let e = model.forward(&inputs(), &Context::eval()).unwrap_err().to_string();
            assert!(e.contains("Composition::repeat"), "{e}");
        }
    }
}

/// In adapters 1.3.0 a mean of k parts, whose weights sum to 1 already, is divided by k once more.
#[test]
fn an_average_is_a_mean_and_that_of_adapterhub_is_a_kth_of_it() {
    for (recorded, parts, weights) in [
        ("average", &["a", "b"][..], vec![0.5, 0.5]),
        ("average_weighted", &["a", "b", "c"][..], vec![0.125, 0.25, 0.625]),
    ] {
        let k = parts.len() as f64;
        let mut theirs = model(parts);
        theirs.aggregate(Box::new(Kth { weights: weights.clone(), k })).unwrap();
        theirs.route(Named::all(parts), false).unwrap();
        let theirs = apart(&theirs, recorded);
        assert!(theirs < 1e-5, "{recorded}: {theirs}");
        let all = parts.iter().map(|p| Composition::from(*p)).collect();
        let ours = apart(&composed(Composition::Average(all, Some(weights))), recorded);
        assert!(ours > 0.05, "{recorded}: {ours}");
    }
}

/// Σ wⱼ hⱼ ⁄ k.
#[derive(Debug, Clone)]
struct Kth {
    weights: Vec<f64>,
    k: f64,
}

impl AggregatorConfig for Kth {
    fn kind(&self) -> &'static str {
        "kth"
    }

    fn to_json(&self) -> modl_core::Result<serde_json::Value> {
        Ok(json!({}))
    }

    fn build(
        &self,
        _: &modl_core::Site,
        _: &mut modl_core::Scope,
    ) -> modl_core::Result<Box<dyn modl_core::Aggregator>> {
        Ok(Box::new(self.clone()))
    }
}

impl modl_core::Aggregator for Kth {
    fn kind(&self) -> &'static str {
        "kth"
    }

    fn order(&self) -> modl_core::Order {
        modl_core::Order::Outputs
    }

    fn outputs(
        &self,
        _: &modl_core::Routing,
        h: &modl_core::Outputs,
    ) -> modl_core::Result<modl_core::Signal> {
        let all = h.each()?;
        let mut sum = all[0].1.x.zeros_like()?;
        for ((_, h), w) in all.iter().zip(&self.weights) {
            sum = sum.add(&h.x.mul_scalar(w / self.k)?)?;
        }
        Ok(all[0].1.replace(sum))
    }
}

#[test]
fn a_fusion_in_a_stack_is_that_of_adapterhub() {
    let fusion = Fusion { query_source: QuerySource::Norm, ..Fusion::default() };
    let fused = Composition::Fuse(vec!["a".into(), "b".into()], fusion);
    let model = composed(Composition::Stack(vec!["c".into(), fused]));
    let file = tensors(fixture("fuse").join("model_adapter_fusion.safetensors"));
    let mut filled = 0;
    for (name, p) in model.params().iter().filter(|(n, _)| n.starts_with("aggregators.")) {
        let key = name
            .strip_prefix("aggregators.")
            .unwrap()
            .replace(".a,b.", ".adapter_fusion_layer.a,b.");
        no_grad(|| p.tensor().clone().copy_from(file.need(&key).unwrap())).unwrap();
        filled += 1;
    }
    assert_eq!(filled, file.len());
    let d = apart(&model, "stack_fuse");
    assert!(d < 1e-5, "{d}");
    // It is held to the identity like one that stands alone.
    model.train_only(&Select::new("aggregators.*")).unwrap();
    assert!(model.penalty(&Context::train(Seed(1), 0)).unwrap().unwrap().item().unwrap() > 0.0);
}

#[test]
fn recipes_say_what_values_say() {
    let all = [
        (Composition::from("en"), json!("en")),
        (
            Composition::stack([Composition::from("en"), Composition::fuse(["a", "b"])]),
            json!({"stack": ["en", {"fuse": ["a", "b"]}]}),
        ),
        (
            Composition::Average(
                vec!["a".into(), Composition::split(["b", "c"], [1, 2])],
                Some(vec![1.0, 3.0]),
            ),
            json!({"average": {
                "parts": ["a", {"split": {"parts": ["b", "c"], "splits": [1, 2]}}],
                "weights": [1.0, 3.0],
            }}),
        ),
        (
            Composition::parallel([
                Composition::batch_split(["a", "b"], [1, 1]),
                Composition::average(["c"]),
            ]),
            json!({"parallel": [
                {"batch_split": {"parts": ["a", "b"], "batch_sizes": [1, 1]}}, {"average": ["c"]},
            ]}),
        ),
    ];
    let registry = Registry::new().with(modl_aggregate::register).unwrap();
    for (value, written) in all {
        assert_eq!(serde_json::to_value(&value).unwrap(), written);
        assert_eq!(serde_json::from_value::<Composition>(written.clone()).unwrap(), value);
        let config = json!({"type": "compose", "composition": written});
        let read = registry.aggregators.parse(&config).unwrap();
        assert_eq!(read.to_json().unwrap()["composition"], config["composition"]);
    }
    let fuse = json!({"fuse": {"parts": ["a", "b"], "value": "identity", "query": false}});
    let Composition::Fuse(_, config) = Composition::try_from(fuse.clone()).unwrap() else {
        panic!()
    };
    assert!(!config.query && config.key);
    assert_eq!(
        Composition::try_from(serde_json::to_value(Composition::try_from(fuse).unwrap()).unwrap())
            .unwrap()
            .modules(),
        ["a", "b"]
    );
    for (wrong, says) in [
        (json!({"stak": ["a"]}), "`stack`"),
        (json!(3), "name of a module"),
        (json!({"stack": "a"}), "instead of parts"),
        (json!({"split": ["a"]}), "splits"),
        (json!({"stack": {"parts": ["a"], "weights": [1]}}), "weights"),
        (json!({"fuse": {"parts": ["a"], "valeu": "none"}}), "valeu"),
        (json!({"average": {"parts": ["a"], "weights": ["x"]}}), "weights"),
    ] {
        let e = Composition::try_from(wrong).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
}

#[test]
fn compositions_that_fit_nowhere_are_refused() {
    let refused = |composition: Composition| {
        let model = composed(composition);
        model.forward(&inputs(), &Context::eval()).unwrap_err().to_string()
    };
    assert!(refused(Composition::split(["a", "b"], [3, 3])).contains("10 tokens"));
    assert!(refused(Composition::batch_split(["a", "b"], [3, 3])).contains("3 rows"));
    let mut model = model(&["a", "b"]);
    for (composition, says) in [
        (Composition::split(["a", "b"], [1]), "2 parts"),
        (Composition::batch_split(["a"], [-1]), "batch_sizes"),
        (Composition::Average(vec!["a".into()], Some(vec![0.0])), "weights"),
        (Composition::Parallel(vec![]), "without parts"),
        (
            Composition::stack([
                Composition::fuse(["a", "b"]),
                Composition::Fuse(
                    vec!["a".into(), "b".into()],
                    Fusion { key: false, ..Fusion::default() },
                ),
            ]),
            "twice",
        ),
    ] {
        let e = model.aggregate(Box::new(Compose { composition })).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
    // A module that is active and has no place would be lost in silence.
    model.aggregate(Box::new(Compose { composition: "a".into() })).unwrap();
    model.route(Named::all(&["a", "b"]), false).unwrap();
    let e = model.forward(&inputs(), &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("active module `b`"), "{e}");
}

#[test]
fn stacks_are_associative() {
    let of = |c: Composition| {
        let model = composed(c);
        model
            .forward(&inputs(), &Context::eval())
            .unwrap()
            .need("last_hidden_state")
            .unwrap()
            .clone()
    };
    let flat = of(Composition::stack(["a", "b", "c"]));
    let left = of(Composition::stack([Composition::stack(["a", "b"]), "c".into()]));
    let right = of(Composition::stack([Composition::from("a"), Composition::stack(["b", "c"])]));
    assert!(flat.bit_equal(&left).unwrap() && flat.bit_equal(&right).unwrap());
}

/// Modules that scale, on the tiny backbone's `query`.
fn scaling(graph: Graph, names: &[&str]) -> modl_core::Result<Modular> {
    let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Float)?, Seed(2))?;
    for (i, name) in (1..).zip(names) {
        model.attach(name, Box::new(standins::Scale), &Targets::names(["query"]))?;
        for (_, t) in model.params().select(&Select::new(format!("modules.{name}.*"))) {
            let drawn = Init::Normal(1.0).tensor(&t.size(), Seed(i), Kind::Float, Device::Cpu)?;
            no_grad(|| t.clone().copy_from(&drawn))?;
        }
    }
    model.aggregate(Box::new(graph))?;
    model.route(Named::all(names), false)?;
    Ok(model)
}

fn node(name: &str, module: Option<&str>, from: &[&str], join: Join) -> Node {
    let from = from.iter().map(|f| (*f).to_owned()).collect();
    Node { name: name.into(), module: module.map(Into::into), from, join }
}

/// y at the site for an input of its own.
fn at_site(model: &Modular, x: &Tensor) -> modl_core::Result<Tensor> {
    let site = model.modular_sites().remove(0);
    let theta = model.backbone().theta(&site)?;
    let f = |theta: &modl_core::Tensors, s: &modl_core::Signal, _: &Context| {
        Ok(s.replace(s.x.linear(theta.need("weight")?, theta.get("bias"))?))
    };
    let host = modl_core::Host::new(&site, &theta, &f);
    Ok(model.layer(&site).unwrap().forward(&host, &x.clone().into(), &Context::eval())?.x)
}

#[test]
fn a_graph_is_the_function_written_by_hand_and_shares_its_modules() {
    // Not in order: c = a(base) + b(a(base)); out = a(mean(c, base)).
    let nodes = vec![
        node("out", Some("a"), &["c", "base"], Join::Mean),
        node("c", None, &["first", "second"], Join::Sum),
        node("second", Some("b"), &["first"], Join::Mean),
        node("first", Some("a"), &["base"], Join::Mean),
    ];
    let model = scaling(Graph { nodes, output: "out".into() }, &["a", "b"]).unwrap();
    let x = Init::Normal(1.0).tensor(&[2, 3, 8], Seed(9), Kind::Float, Device::Cpu).unwrap();
    let site = model.modular_sites().remove(0);
    let factor =
        |n: &str| model.params().get(&format!("modules.{n}.{}.factor", site.path)).unwrap();
    let (a, b) = (factor("a"), factor("b"));
    let theta = model.backbone().theta(&site).unwrap();
    let by_hand = || {
        let base = x.linear(theta.need("weight")?, theta.get("bias"))?;
        let first = base.mul(a)?;
        let c = first.add(&first.mul(b)?)?;
        c.add(&base)?.mul_scalar(0.5)?.mul(a)
    };
    let by_hand = by_hand().unwrap();
    let found = at_site(&model, &x).unwrap();
    assert!(found.bit_equal(&by_hand).unwrap());
    // a stands at two nodes: its gradient is the sum of both.
    let grad = |y: &Tensor| y.square().unwrap().sum().unwrap().gradients(&[a, b], false).unwrap();
    for (ours, hand) in grad(&found).iter().zip(grad(&by_hand)) {
        assert!(ours.as_ref().unwrap().all_close(&hand.unwrap(), 1e-6, 1e-6).unwrap());
    }
}

#[test]
fn a_chain_is_a_stack_and_nothing_is_the_base() {
    let x = Init::Normal(1.0).tensor(&[2, 3, 8], Seed(9), Kind::Float, Device::Cpu).unwrap();
    let chain =
        vec![node("1", Some("a"), &["base"], Join::Mean), node("2", Some("b"), &["1"], Join::Mean)];
    let names = ["a", "b"];
    let mut model = scaling(Graph { nodes: chain, output: "2".into() }, &names).unwrap();
    let graph = at_site(&model, &x).unwrap();
    model.aggregate(Box::new(Compose { composition: Composition::stack(names) })).unwrap();
    assert!(at_site(&model, &x).unwrap().bit_equal(&graph).unwrap());
    model.aggregate(Box::<Graph>::default()).unwrap();
    model.route(Named::all(&[]), false).unwrap();
    let inputs = TinyBackbone::inputs(2, 4, Seed(3)).unwrap();
    let plain = model.forward_base(&inputs, &Context::eval()).unwrap();
    let found = model.forward(&inputs, &Context::eval()).unwrap();
    assert!(found.need("logits").unwrap().bit_equal(plain.need("logits").unwrap()).unwrap());
}

#[test]
fn graphs_that_are_none_are_refused_with_their_nodes() {
    let join = Join::Mean;
    for (nodes, output, says) in [
        (
            vec![
                node("1", Some("a"), &["3"], join),
                node("2", None, &["1"], join),
                node("3", None, &["2"], join),
            ],
            "1",
            "1 ← 3 ← 2 ← 1",
        ),
        (vec![node("1", None, &["1"], join)], "1", "1 ← 1"),
        (vec![node("1", None, &["bace"], join)], "1", "`base`"),
        (vec![node("1", None, &["base"], join)], "2", "unknown node of a graph `2`"),
        (
            vec![node("1", None, &["base"], join), node("2", None, &["1"], join)],
            "1",
            "leads nowhere",
        ),
        (vec![node("1", None, &["base"], join), node("1", None, &["base"], join)], "1", "`1`"),
        (vec![node("base", None, &["base"], join)], "base", "`base`"),
        (vec![node("1", None, &[], join)], "1", "from no node"),
    ] {
        let e = scaling(Graph { nodes, output: output.into() }, &["a"]).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
    let graph = Graph { nodes: vec![node("1", Some("a"), &["base"], join)], output: "1".into() };
    let model = scaling(graph, &["a", "b"]).unwrap();
    let e =
        model.forward(&TinyBackbone::inputs(2, 4, Seed(3)).unwrap(), &Context::eval()).unwrap_err();
    assert!(e.to_string().contains("`b`"), "{e}");
}

/// Modules of trees: the example times a matrix for leaves, and tanh of matrices of the parts.
struct Parts {
    matrices: std::collections::BTreeMap<&'static str, Tensor>,
    x: Tensor,
}

impl Parts {
    fn new(rows: i64) -> Self {
        let names = ["find", "turn", "and", "or", "say"];
        let draw = |(i, n): (u64, &'static str)| {
            let t = Init::Normal(0.4).tensor(&[6, 6], Seed(i), Kind::Float, Device::Cpu).unwrap();
            t.set_requires_grad(true).unwrap();
            (n, t)
        };
        let x = Init::Normal(1.0).tensor(&[rows, 6], Seed(77), Kind::Float, Device::Cpu).unwrap();
        Parts { matrices: (0..).zip(names).map(draw).collect(), x }
    }

    fn call(
        &self,
        module: &str,
        examples: &[usize],
        parts: &[Tensor],
    ) -> modl_core::Result<Tensor> {
        let w = &self.matrices[module];
        let rows: Vec<i64> = examples.iter().map(|e| *e as i64).collect();
        let x = self
            .x
            .index_select(0, &Tensor::from_slice(&rows, &[rows.len() as i64], Device::Cpu)?)?;
        let mut y = x.linear(w, None)?;
        for (i, part) in parts.iter().enumerate() {
            // The order of the parts matters.
            y = y.add(&part.linear(w, None)?.mul_scalar(1.0 + i as f64)?)?;
        }
        y.tanh()
    }
}

const TREES: [&str; 6] = [
    "find",
    "say(find)",
    "say(and(find, turn(find)))",
    "and(turn(find), find)",
    "or(and(find, turn), say(turn(turn(find))))",
    "say(and(find, turn(find)))",
];

#[test]
fn a_batch_of_trees_is_each_tree_by_itself_in_fewer_calls() {
    let trees: Vec<Tree> = TREES.iter().map(|t| t.parse().unwrap()).collect();
    let parts = Parts::new(trees.len() as i64);
    let (mut calls, mut nodes) = (0, 0);
    let together = run_trees(&trees, |module, examples, of| {
        calls += 1;
        nodes += examples.len();
        parts.call(module, examples, of)
    })
    .unwrap();
    let mut alone = Vec::new();
    let mut calls_alone = 0;
    for (i, tree) in trees.iter().enumerate() {
        alone.push(
            run_trees(std::slice::from_ref(tree), |module, examples, of| {
                calls_alone += 1;
                assert!(examples.iter().all(|e| *e == 0));
                parts.call(module, &vec![i; examples.len()], of)
            })
            .unwrap(),
        );
    }
    let alone = Tensor::cat(&alone, 0).unwrap();
    assert!(together.max_abs_diff(&alone).unwrap() <= 1e-6);
    // The trees have 1 + 2 + 5 + 4 + 8 + 5 nodes.
    assert_eq!(nodes, 25);
    assert!(calls <= 13 && calls < calls_alone, "{calls} {calls_alone}");
    // By hand: say(and(find, turn(find))).
    let w = &parts.matrices;
    let x = parts.x.narrow(0, 2, 1).unwrap();
    let f = |n: &str, of: &[&Tensor]| {
        let mut y = x.linear(&w[n], None).unwrap();
        for (i, p) in (1..).zip(of) {
            y = y.add(&p.linear(&w[n], None).unwrap().mul_scalar(f64::from(i)).unwrap()).unwrap();
        }
        y.tanh().unwrap()
    };
    let find = f("find", &[]);
    let hand = f("say", &[&f("and", &[&find, &f("turn", &[&find])])]);
    assert!(together.narrow(0, 2, 1).unwrap().max_abs_diff(&hand).unwrap() <= 1e-6);
    // Weights are shared: the gradient of the batch is the sum of those of its trees.
    let all: Vec<&Tensor> = w.values().collect();
    let grads = |y: &Tensor| y.square().unwrap().sum().unwrap().gradients(&all, false).unwrap();
    for (a, b) in grads(&together).iter().zip(grads(&alone)) {
        assert!(a.as_ref().unwrap().max_abs_diff(&b.unwrap()).unwrap() <= 1e-5);
    }
}

#[test]
fn trees_are_read_as_they_are_written() {
    for text in TREES {
        let tree: Tree = text.parse().unwrap();
        assert_eq!(tree.to_string(), text);
        assert_eq!(serde_json::from_value::<Tree>(json!(text)).unwrap(), tree);
    }
    let spaced: Tree = " say ( and( find[red] ,find ) ) ".parse().unwrap();
    assert_eq!(
        spaced,
        Tree::of("say", [Tree::of("and", [Tree::leaf("find[red]"), Tree::leaf("find")])])
    );
    let deep = format!("{}x{}", "a(".repeat(300), ")".repeat(300));
    for (text, says) in [
        ("", "missing"),
        ("a(", "missing"),
        ("a(b", "`)` is missing"),
        ("a(b,)", "missing"),
        ("a(b))", "goes on"),
        ("a(b)c", "goes on"),
        (deep.as_str(), "deeper"),
    ] {
        let e = text.parse::<Tree>().unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
    assert!(run_trees(&[], |_, _, _| panic!("nothing to call")).is_err());
    let parts = Parts::new(2);
    let wrong = run_trees(&["find".parse().unwrap()], |_, _, _| Ok(parts.x.clone())).unwrap_err();
    assert!(wrong.to_string().contains("`find`"), "{wrong}");
}
