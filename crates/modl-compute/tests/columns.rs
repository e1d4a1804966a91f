//! Task heads, cross-stitch units and sluice networks against networks of their own, sums written
//! out in f64, and the contract of every module.
#![allow(clippy::unwrap_used)]

use modl_compute::{CrossStitch, Lora, LoraInit, Sluice, TaskHeads, register};
use modl_core::testing::{Given, Identity, ModuleClaims, Sum, check_module, perturb};
use modl_core::{
    Attachment, Context, Device, Host, Init, Kind, Modular, Module, ModuleConfig, ParamStore,
    Registry, Result, Scope, Seed, Select, Signal, Site, SiteKind, Targets, Tensor, Tensors,
    no_grad,
};
use modl_models::Bert;
use serde_json::json;

const DIM: i64 = 8;
const LAYERS: i64 = 3;

use by_task::Each;

/// A router by task, as `modl-route`'s `fixed` with a table, which this crate does not know.
mod by_task {
    use modl_core::{
        Bank, Context, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Weights,
    };

    /// Each row to the module of its task's name and to `also`, where they stand.
    #[derive(Debug, Clone, Copy)]
    pub struct Each(pub &'static str);

    impl Router for Each {
        fn kind(&self) -> &'static str {
            "each"
        }

        fn route(&self, _: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
            let row = |task: &std::sync::Arc<str>| {
                let names = [task.as_ref(), self.0];
                names.iter().filter_map(|n| Some((bank.position(n).ok()?, 1.0))).collect()
            };
            Ok(Routing::new(Weights::Rows(cx.tasks()?.iter().map(row).collect()), bank.len()))
        }
    }

    impl RouterConfig for Each {
        fn kind(&self) -> &'static str {
            "each"
        }

        fn to_json(&self) -> Result<serde_json::Value> {
            Ok(serde_json::json!({}))
        }

        fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
            Ok(Box::new(*self))
        }
    }
}

fn names(tasks: &[&str]) -> Vec<String> {
    tasks.iter().map(|t| t.to_string()).collect()
}

/// A BERT of 3 layers with LoRA away from its start for each task.
fn with_columns(kind: Kind, tasks: &[&str]) -> Modular {
    let config = json!({
        "model_type": "bert", "vocab_size": 20, "hidden_size": DIM, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "intermediate_size": 12, "hidden_act": "gelu",
        "max_position_embeddings": 16, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0
    });
    let bert = Bert::untrained(config, Seed(3), kind, Device::Cpu).unwrap();
    let mut model = Modular::new(bert, Seed(4)).unwrap();
    for task in tasks {
        let lora = Lora { r: 2, init: LoraInit::Random, ..Lora::default() };
        let sites = Targets::names(["query", "intermediate.dense"]);
        model.attach(task, Box::new(lora), &sites).unwrap();
    }
    perturb(&model, &Select::new("modules.*"), 0.5, Seed(5)).unwrap();
    model
}

fn attach(model: &mut Modular, name: &str, config: impl ModuleConfig + 'static) {
    let targets = config.usual_targets();
    model.attach(name, Box::new(config), &targets).unwrap();
    decide(model);
}

fn decide(model: &mut Modular) {
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Box::new(Each("stitch")), false).unwrap();
}

/// Rows of different length.
fn inputs(rows: i64) -> Tensors {
    let ids: Vec<i64> = (0..rows * 5).map(|i| 1 + (i * 7 + i * i) % 19).collect();
    let mask: Vec<i64> = (0..rows * 5).map(|i| i64::from(i % 5 < 5 - (i / 5) % 3)).collect();
    let tensor = |v: &[i64]| Tensor::from_slice(v, &[rows, 5], Device::Cpu).unwrap();
    Tensors::new().with("input_ids", tensor(&ids)).with("attention_mask", tensor(&mask))
}

/// Each row so many times.
fn repeated(inputs: &Tensors, times: i64) -> Tensors {
    let rows = inputs.need("input_ids").unwrap().len_of(0);
    let index: Vec<i64> = (0..rows * times).map(|r| r / times).collect();
    let index = Tensor::from_slice(&index, &[rows * times], Device::Cpu).unwrap();
    inputs.map(|_, t| t.index_select(0, &index)).unwrap()
}

fn hidden(model: &Modular, inputs: &Tensors, tasks: &[&str]) -> Tensor {
    let cx = Context::eval().with_tasks(tasks);
    no_grad(|| model.forward(inputs, &cx)).unwrap().need("last_hidden_state").unwrap().clone()
}

/// The last hidden states of every row by the network of each task, `[rows, tasks, seq, dim]`.
fn independent(kind: Kind, rows: i64, tasks: &[&str]) -> Tensor {
    let mut model = with_columns(kind, tasks);
    decide(&mut model);
    let n = tasks.len() as i64;
    let of: Vec<&str> = tasks.iter().copied().cycle().take((rows * n) as usize).collect();
    let y = hidden(&model, &repeated(&inputs(rows), n), &of);
    y.reshape(&[rows, n, 5, DIM]).unwrap()
}

const THREE: [&str; 3] = ["a", "b", "c"];
const OF: [&str; 4] = ["c", "a", "b", "a"];

fn own(all: &Tensor) -> Tensor {
    let at = |t: &&str| THREE.iter().position(|n| n == t).unwrap() as i64;
    let rows: Vec<Tensor> = OF
        .iter()
        .enumerate()
        .map(|(r, t)| all.select(0, r as i64).unwrap().select(0, at(t)).unwrap())
        .collect();
    Tensor::stack(&rows, 0).unwrap()
}

fn three() -> CrossStitch {
    CrossStitch { tasks: names(&THREE), ..CrossStitch::default() }
}

fn sluice() -> Sluice {
    Sluice { tasks: names(&THREE), ..Sluice::default() }
}

#[test]
fn with_the_identity_columns_are_independent_networks_bit_for_bit() {
    let expected = own(&independent(Kind::Float, 4, &THREE));
    for per_channel in [false, true] {
        let mut model = with_columns(Kind::Float, &THREE);
        attach(&mut model, "stitch", CrossStitch { same: 1.0, per_channel, ..three() });
        let found = hidden(&model, &inputs(4), &OF);
        assert!(found.bit_equal(&expected).unwrap(), "{}", found.max_abs_diff(&expected).unwrap());
    }
    let mut model = with_columns(Kind::Float, &THREE);
    attach(&mut model, "stitch", Sluice { same: 1.0, ..sluice() });
    assert!(hidden(&model, &inputs(4), &OF).bit_equal(&expected).unwrap());
    // The networks do differ.
    let all = independent(Kind::Float, 4, &THREE);
    let apart = all.select(1, 0).unwrap().max_abs_diff(&all.select(1, 1).unwrap()).unwrap();
    assert!(apart > 1e-3, "{apart}");
}

fn numbers(shape: &[i64], name: &str) -> Tensor {
    Init::Normal(0.7).tensor(shape, Seed(6).child(name), Kind::Double, Device::Cpu).unwrap()
}

/// f_θ of a row of task t: tanh(x W_t + mask), W by layer.
fn f(theta: &Tensors, x: &Signal, cx: &Context) -> Result<Signal> {
    let rows: Vec<Tensor> = (0..)
        .zip(cx.tasks()?)
        .map(|(r, task)| {
            let w = theta.need(task)?;
            let mask = x.with.need("mask")?.select(0, r)?.unsqueeze(-1)?;
            x.x.select(0, r)?.matmul(w)?.add(&mask)?.tanh()
        })
        .collect::<Result<_>>()?;
    Ok(x.replace(Tensor::stack(&rows, 0)?))
}

/// A run of blocks with a module at each, every parameter away from its start.
struct Net {
    at: Vec<(Site, Tensors, Box<dyn Module>)>,
}

const DEPTH: i64 = 3;

impl Net {
    fn new(config: &dyn ModuleConfig) -> Self {
        let sites: Vec<Site> = (0..DEPTH)
            .map(|i| Site {
                path: format!("layer.{i}"),
                kind: SiteKind::Block,
                input: DIM,
                output: DIM,
                index: i as usize,
            })
            .collect();
        let mut store = ParamStore::new();
        let make = |site: &Site| {
            let theta: Tensors = THREE
                .iter()
                .map(|t| (*t, numbers(&[DIM, DIM], &format!("{t}{}", site.path))))
                .collect();
            let mut scope =
                Scope::at(&mut store, "modules.a", Seed(4)).on(Kind::Double, Device::Cpu);
            let at = Attachment { site, theta: &theta, sites: &sites };
            let module = config.build(&at, &mut scope.sub(&site.path)).unwrap();
            for (name, t) in module.phi().iter() {
                let noise = numbers(&t.size(), &format!("{name}{}", site.path));
                no_grad(|| t.clone().add_in_place(&noise)).unwrap();
            }
            (site.clone(), theta, module)
        };
        Net { at: sites.iter().map(make).collect() }
    }

    fn phi(&self, layer: i64, name: &str) -> Tensor {
        self.at[layer as usize].2.phi().need(name).unwrap().clone()
    }

    fn set(&self, layer: i64, name: &str, value: &[f64]) {
        let t = self.phi(layer, name);
        let value = Tensor::from_slice(value, &t.size(), Device::Cpu).unwrap();
        no_grad(|| t.clone().copy_from(&value)).unwrap();
    }

    /// What the modules make of x `[4, 5, DIM]` for the rows' own tasks.
    fn run(&self) -> Tensor {
        let (mut x, mask) = input();
        let cx = Context::eval().with_tasks(OF);
        for (site, theta, module) in &self.at {
            let signal = Signal { x, with: Tensors::new().with("mask", mask.clone()) };
            x = no_grad(|| module.forward(&Host::new(site, theta, &f), &signal, &cx)).unwrap().x;
        }
        x
    }

    /// f of every column at a layer, `[4, columns, 5, DIM]`, one column at a time.
    fn columns(&self, layer: i64, h: &Tensor) -> Tensor {
        let (_, mask) = input();
        let (_, theta, _) = &self.at[layer as usize];
        let column = |t: i64| {
            let x = h.select(1, t).unwrap();
            let signal = Signal { x, with: Tensors::new().with("mask", mask.clone()) };
            let cx = Context::eval().with_tasks([THREE[t as usize]; 4]);
            f(theta, &signal, &cx).unwrap().x
        };
        Tensor::stack(&(0..3).map(column).collect::<Vec<_>>(), 1).unwrap()
    }
}

fn input() -> (Tensor, Tensor) {
    (numbers(&[4, 5, DIM], "x"), numbers(&[4, 5], "mask"))
}

/// Every column starts from x.
fn start() -> Tensor {
    input().0.unsqueeze(1).unwrap().expand(&[4, 3, 5, DIM]).unwrap()
}

#[track_caller]
fn same(found: &Tensor, expected: &Tensor) {
    let far = found.max_abs_diff(expected).unwrap();
    assert!(found.all_close(expected, 1e-11, 1e-11).unwrap(), "{far}");
}

#[test]
fn cross_stitch_units_are_a_sum_over_tasks() {
    for (per_channel, sum) in [(false, "ts,bsqd->btqd"), (true, "tsd,bsqd->btqd")] {
        let net = Net::new(&CrossStitch { per_channel, ..three() });
        let mut h = start();
        for layer in 0..DEPTH {
            let alpha = net.phi(layer, "alpha");
            h = Tensor::einsum(sum, &[&alpha, &net.columns(layer, &h)]).unwrap();
        }
        same(&net.run(), &own(&h));
    }
}

/// A sluice by its formulas, one subspace at a time.
fn by_formula(net: &Net, subspaces: i64) -> Tensor {
    let width = DIM / subspaces;
    let (mut h, mut mixture) = (start(), start().zeros_like().unwrap());
    for layer in 0..DEPTH {
        let (alpha, beta) = (net.phi(layer, "alpha"), net.phi(layer, "beta"));
        let own = net.phi(layer, "map").add(&Tensor::eye(DIM, Kind::Double, Device::Cpu).unwrap());
        let mapped =
            Tensor::einsum("toi,btqi->btqo", &[&own.unwrap(), &net.columns(layer, &h)]).unwrap();
        let part =
            |t: i64, g: i64| mapped.select(1, t).unwrap().narrow(2, g * width, width).unwrap();
        let alpha: Vec<f64> = alpha.to_vec().unwrap();
        let row = |t: i64, g: i64| {
            let mut sum = part(0, 0).zeros_like().unwrap();
            for (s, k) in (0..3).flat_map(|s| (0..subspaces).map(move |k| (s, k))) {
                let n = 3 * subspaces;
                let weight = alpha[((t * subspaces + g) * n + s * subspaces + k) as usize];
                sum = sum.add(&part(s, k).mul_scalar(weight).unwrap()).unwrap();
            }
            sum
        };
        let column =
            |t| Tensor::cat(&(0..subspaces).map(|g| row(t, g)).collect::<Vec<_>>(), 2).unwrap();
        h = Tensor::stack(&(0..3).map(column).collect::<Vec<_>>(), 1).unwrap();
        let share = Tensor::einsum("t,btqd->btqd", &[&beta, &h]).unwrap();
        mixture = mixture.add(&share).unwrap();
    }
    own(&mixture)
}

#[test]
fn a_sluice_mixes_subspaces_and_layers() {
    for subspaces in [1, 2, 4] {
        let net = Net::new(&Sluice { subspaces, ..sluice() });
        same(&net.run(), &by_formula(&net, subspaces));
    }
}

#[test]
fn cross_stitch_hard_sharing_and_low_supervision_are_values_of_a_sluice() {
    let (stitch, net) = (Net::new(&three()), Net::new(&sluice()));
    let zeros = [0.0; 3 * 64];
    let only = |layer: i64, at: i64| [f64::from(u8::from(layer == at)); 3];
    // α_(t,g)(s,k) = α_ts where g = k; β reads the last layer.
    for layer in 0..DEPTH {
        let alpha: Vec<f64> = stitch.phi(layer, "alpha").to_vec().unwrap();
        let of = |i: usize, j: usize| if i % 2 == j % 2 { alpha[i / 2 * 3 + j / 2] } else { 0.0 };
        let alpha: Vec<f64> = (0..36).map(|n| of(n / 6, n % 6)).collect();
        net.set(layer, "alpha", &alpha);
        net.set(layer, "beta", &only(layer, DEPTH - 1));
        net.set(layer, "map", &zeros);
    }
    same(&net.run(), &stitch.run());
    // Every column goes on with what the first one has: one network for all tasks.
    let shared: Vec<f64> = (0..36).map(|n| f64::from(u8::from(n % 6 == n / 6 % 2))).collect();
    (0..DEPTH).for_each(|layer| net.set(layer, "alpha", &shared));
    let mut h = start();
    for layer in 0..DEPTH {
        h = net.columns(layer, &h);
    }
    let first = h.select(1, 0).unwrap();
    assert!(net.run().bit_equal(&first).unwrap());
    // Supervision at the first layer: what comes behind it does not matter.
    (0..DEPTH).for_each(|layer| net.set(layer, "beta", &only(layer, 0)));
    assert!(net.run().bit_equal(&net.columns(0, &start()).select(1, 0).unwrap()).unwrap());
}

#[test]
fn the_penalty_measures_how_alike_subspaces_are() {
    let config = Sluice { subspaces: 4, orthogonality: 0.3, ..sluice() };
    let net = Net::new(&config);
    let penalty = |net: &Net| net.at[1].2.penalty(&Context::eval()).unwrap();
    let map: Vec<f64> = net.phi(1, "map").to_vec().unwrap();
    let d = DIM as usize;
    let w = |t: usize, o: usize, i: usize| map[(t * d + o) * d + i] + f64::from(u8::from(o == i));
    let mut expected = 0.0;
    for (t, o, p) in (0..3).flat_map(|t| (0..d).flat_map(move |o| (0..d).map(move |p| (t, o, p)))) {
        if o / 2 < p / 2 {
            expected += (0..d).map(|i| w(t, o, i) * w(t, p, i)).sum::<f64>().powi(2);
        }
    }
    let found = penalty(&net).unwrap().item().unwrap();
    assert!((found - 0.3 * expected).abs() < 1e-10 * expected, "{found} {expected}");
    // At the start subspaces are orthogonal.
    net.set(1, "map", &[0.0; 3 * 64]);
    assert_eq!(penalty(&net).unwrap().item().unwrap(), 0.0);
    assert!(penalty(&Net::new(&sluice())).is_none());
}

#[test]
fn alpha_starts_with_rows_that_sum_to_one() {
    let mut model = with_columns(Kind::Float, &THREE);
    attach(&mut model, "stitch", three());
    let alpha = |model: &Modular| -> Vec<f32> {
        model.params().get("modules.stitch.encoder.layer.1.alpha").unwrap().to_vec().unwrap()
    };
    let (same, other) = (0.9, 0.1 / 2.0);
    assert_eq!(alpha(&model), [same, other, other, other, same, other, other, other, same]);
    model.detach("stitch").unwrap();
    attach(&mut model, "stitch", sluice());
    let alpha = alpha(&model);
    let expected = |i: usize, j: usize| match (i == j, i % 2 == j % 2) {
        (true, _) => same,
        (_, true) => other,
        _ => 0.0,
    };
    for (n, a) in alpha.iter().enumerate() {
        assert_eq!(*a, expected(n / 6, n % 6), "{n}");
    }
}

#[test]
fn each_row_goes_through_the_head_of_its_task_and_only_that_one_learns() {
    let mut model = with_columns(Kind::Double, &THREE);
    let site = Targets::pattern(r"encoder\.layer\.2");
    let heads = |outputs| TaskHeads { tasks: names(&THREE), outputs, default_task: None };
    decide(&mut model);
    let trunk = hidden(&model, &inputs(4), &OF);
    let mut model = with_columns(Kind::Double, &THREE);
    model.attach("stitch", Box::new(heads(None)), &site).unwrap();
    decide(&mut model);
    assert!(hidden(&model, &inputs(4), &OF).bit_equal(&trunk).unwrap(), "the identity at first");
    perturb(&model, &Select::new("modules.stitch.*"), 0.5, Seed(9)).unwrap();
    let y = hidden(&model, &inputs(4), &OF);
    for (row, task) in OF.iter().enumerate() {
        let p = |name: &str| {
            let name = format!("modules.stitch.encoder.layer.2.{task}.{name}");
            model.params().get(&name).unwrap().detach().unwrap()
        };
        let h = trunk.select(0, row as i64).unwrap();
        let expected = h.matmul(&p("weight").t().unwrap()).unwrap().add(&p("bias")).unwrap();
        same(&y.select(0, row as i64).unwrap(), &expected);
    }
    model.train_only(&Select::new("modules.stitch.*")).unwrap();
    let phi = model.trainable();
    let leaves: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
    let cx = Context::eval().with_tasks(["a", "c"]);
    let y = model.forward(&inputs(2), &cx).unwrap().need("last_hidden_state").unwrap().clone();
    let grads = y.sum().unwrap().gradients(&leaves, false).unwrap();
    for ((name, _), g) in phi.iter().zip(grads) {
        assert_eq!(g.is_none(), name.contains(".b."), "{name}");
    }
    // As wide as one likes where nothing of the network follows.
    let mut model = with_columns(Kind::Double, &THREE);
    attach(&mut model, "stitch", heads(Some(3)));
    let cx = Context::eval().with_tasks(OF);
    let outputs = no_grad(|| model.forward(&inputs(4), &cx)).unwrap();
    assert_eq!(outputs.need("pooler_output").unwrap().size(), [4, 3]);
}

fn claims(identity: Identity, parameters: usize) -> ModuleClaims {
    ModuleClaims { identity, parameters, merges: false, smooth: true, task_vector: 0 }
}

#[test]
fn they_keep_the_contract() {
    let registry = Registry::new().with(register).unwrap();
    // The first two are the tasks of the contract's rows.
    let tasks = names(&["one", "two", "three"]);
    let d = DIM as usize;
    let within = Identity::Within(1e-6);
    let check = |make: &dyn Fn() -> Box<dyn ModuleConfig>, at: &str, claims: ModuleClaims| {
        check_module(make, &Targets::pattern(at), &claims, &registry);
    };
    let unit = CrossStitch { tasks: tasks.clone(), ..three() };
    check(&|| Box::new(unit.clone()), "all-block", claims(within, 9));
    let each = CrossStitch { per_channel: true, ..unit.clone() };
    check(&|| Box::new(each.clone()), "all-block", claims(within, 9 * d));
    let net = Sluice { tasks: tasks.clone(), orthogonality: 0.1, ..sluice() };
    check(&|| Box::new(net.clone()), "all-block", claims(within, 36 + 3 + 3 * d * d));
    let heads = TaskHeads { tasks, ..TaskHeads::default() };
    let n = 3 * (d * d + d);
    check(&|| Box::new(heads.clone()), "all-block", claims(Identity::Exact, n));
    let sites = r"layer\.0\.query|layer\.0\.output\.norm";
    check(&|| Box::new(heads.clone()), sites, claims(Identity::Exact, 2 * n));
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |config: Box<dyn ModuleConfig>, at: &str| {
        let mut model = with_columns(Kind::Float, &THREE);
        model.attach("stitch", config, &Targets::pattern(at)).unwrap_err().to_string()
    };
    let layers = r"encoder\.layer\.(0|2)";
    let e = refused(Box::new(three()), layers);
    assert!(e.contains("[0, 2]"), "{e}");
    assert!(refused(Box::new(three()), ".*query").contains("all-block"));
    let one = CrossStitch { tasks: names(&["a"]), ..CrossStitch::default() };
    assert!(refused(Box::new(one), "all-block").contains("2 at least"));
    let twice = Sluice { tasks: names(&["a", "a"]), ..Sluice::default() };
    assert!(refused(Box::new(twice), "all-block").contains("twice"));
    assert!(
        refused(Box::new(Sluice { subspaces: 3, ..sluice() }), "all-block").contains("width 8")
    );
    let lost = TaskHeads { default_task: Some("d".into()), tasks: names(&THREE), outputs: None };
    assert!(refused(Box::new(lost), "all-block").contains("`d`"));

    let mut model = with_columns(Kind::Float, &THREE);
    attach(&mut model, "stitch", three());
    model.route(Given::only(0), false).unwrap();
    let run =
        |model: &Modular, cx: &Context| model.forward(&inputs(2), cx).unwrap_err().to_string();
    assert!(run(&model, &Context::eval().with_tasks(["a", "e"])).contains("`e`"));
    assert!(run(&model, &Context::eval()).contains("with_tasks"));
}

#[test]
fn where_a_pass_names_no_task_the_default_is_read() {
    let mut model = with_columns(Kind::Float, &THREE);
    attach(&mut model, "stitch", CrossStitch { default_task: Some("b".into()), ..three() });
    let alpha = model.params().get("modules.stitch.encoder.layer.2.alpha").unwrap().clone();
    no_grad(|| alpha.clone().copy_from(&numbers(&[3, 3], "alpha"))).unwrap();
    model.route(Given::only(0), false).unwrap();
    let run = |cx: Context| {
        let y = no_grad(|| model.forward(&inputs(2), &cx)).unwrap();
        y.need("last_hidden_state").unwrap().clone()
    };
    let found = run(Context::eval());
    assert!(found.bit_equal(&run(Context::eval().with_tasks(["b", "b"]))).unwrap());
    assert!(!found.bit_equal(&run(Context::eval().with_tasks(["a", "b"]))).unwrap());
}
