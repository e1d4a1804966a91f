//! Bottleneck adapters against formulas written out in plain tensor operations, in f64.
#![allow(clippy::unwrap_used, clippy::panic)]

use modl_compute::{Bottleneck, BottleneckInit, Residual, Scaling, register};
use modl_core::Activation;
use modl_core::testing::{Identity, ModuleClaims, TinyBackbone, check_module};
use modl_core::{
    Attachment, Backbone, Context, Device, Error, Host, Init, Kind, Module, ModuleConfig,
    ParamStore, Registry, Result, Scope, Seed, Signal, Site, SiteKind, Targets, Tensor, Tensors,
    no_grad,
};

const D: i64 = 6;
const IN: i64 = 10;

fn numbers(shape: &[i64], name: &str) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(5).child(name), Kind::Double, Device::Cpu).unwrap()
}

fn site() -> Site {
    let path = "encoder.layer.0.output".to_owned();
    Site { path, kind: SiteKind::Sublayer, input: IN, output: D, index: 0 }
}

/// A sub-layer h = x Vᵀ with the norm behind it, the input and the residual.
struct Sub {
    v: Tensor,
    norm: (Tensor, Tensor),
    x: Signal,
}

impl Sub {
    fn new() -> Self {
        let with = Tensors::new().with("residual", numbers(&[2, 3, D], "residual"));
        Sub {
            v: numbers(&[D, IN], "v"),
            norm: (numbers(&[D], "gain"), numbers(&[D], "shift")),
            x: Signal { x: numbers(&[2, 3, IN], "x"), with },
        }
    }

    fn h(&self) -> Tensor {
        self.x.x.matmul(&self.v.t().unwrap()).unwrap()
    }

    fn residual(&self) -> Tensor {
        self.x.with.need("residual").unwrap().clone()
    }

    fn ln(&self, x: &Tensor) -> Tensor {
        let mean = x.mean_dims(&[-1], true).unwrap();
        let centred = x.sub(&mean).unwrap();
        let var = centred.square().unwrap().mean_dims(&[-1], true).unwrap();
        let unit = centred.div(&var.add_scalar(1e-12).unwrap().sqrt().unwrap()).unwrap();
        unit.mul(&self.norm.0).unwrap().add(&self.norm.1).unwrap()
    }

    fn run(&self, module: &dyn Module, cx: &Context) -> Tensor {
        let f = |_: &Tensors, x: &Signal, _: &Context| x.x.linear(&self.v, None).map(Signal::from);
        let norm = |_: &Tensors, x: &Signal, _: &Context| {
            let sum = x.x.add(x.with.need("residual")?)?;
            sum.layer_norm(&self.norm.0, &self.norm.1, 1e-12).map(Signal::from)
        };
        let (site, theta) = (site(), Tensors::new());
        let stages: [(&str, &modl_core::HostFn); 1] = [("norm", &norm)];
        module.forward(&Host::new(&site, &theta, &f).with_stages(&stages), &self.x, cx).unwrap().x
    }
}

/// The module with every parameter, biases and scalings too, away from its start.
fn module(config: &Bottleneck) -> Box<dyn Module> {
    let module = fresh(config).unwrap();
    for (name, t) in module.phi().iter() {
        no_grad(|| t.clone().add_in_place(&numbers(&t.size(), name))).unwrap();
    }
    module
}

fn fresh(config: &Bottleneck) -> Result<Box<dyn Module>> {
    let mut store = ParamStore::new();
    let mut scope = Scope::at(&mut store, "modules.a", Seed(4)).on(Kind::Double, Device::Cpu);
    config.build(&Attachment::alone(&site(), &Tensors::new()), &mut scope)
}

/// W_up σ(W_down z + b_down) + b_up.
fn network(m: &dyn Module, z: &Tensor, sigma: fn(&Tensor) -> Tensor) -> Tensor {
    let phi = m.phi();
    let p = |n: &str| phi.need(n).unwrap().clone();
    let down = z.matmul(&p("adapter_down.0.weight").t().unwrap()).unwrap();
    let down = sigma(&down.add(&p("adapter_down.0.bias")).unwrap());
    let up = down.matmul(&p("adapter_up.weight").t().unwrap()).unwrap();
    up.add(&p("adapter_up.bias")).unwrap()
}

fn relu(x: &Tensor) -> Tensor {
    x.add(&x.abs().unwrap()).unwrap().mul_scalar(0.5).unwrap()
}

fn swish(x: &Tensor) -> Tensor {
    x.div(&x.neg().unwrap().exp().unwrap().add_scalar(1.0).unwrap()).unwrap()
}

fn reduced(config: Bottleneck) -> Bottleneck {
    Bottleneck { reduction_factor: 2.0, ..config }
}

#[track_caller]
fn same(found: &Tensor, expected: &Tensor) {
    assert!(
        found.all_close(expected, 1e-11, 1e-11).unwrap(),
        "{}",
        found.max_abs_diff(expected).unwrap()
    );
}

#[test]
fn each_placement_is_its_formula() {
    let sub = Sub::new();
    let (h, x) = (sub.h(), sub.residual());
    let sum = h.add(&x).unwrap();
    let normed = sub.ln(&sum);
    let run = |m: &dyn Module| sub.run(m, &Context::eval());

    let m = module(&reduced(Bottleneck::houlsby()));
    let houlsby = h.add(&network(m.as_ref(), &h, swish)).unwrap();
    same(&run(m.as_ref()), &houlsby);

    let m = module(&reduced(Bottleneck::pfeiffer()));
    let pfeiffer = h.add(&network(m.as_ref(), &normed, relu)).unwrap();
    same(&run(m.as_ref()), &pfeiffer);

    let m = module(&reduced(Bottleneck::parallel()));
    let parallel = network(m.as_ref(), &x, relu).mul_scalar(4.0).unwrap().add(&h).unwrap();
    same(&run(m.as_ref()), &parallel);

    let after = Bottleneck { residual_before_ln: Residual::AfterLn, ..Bottleneck::pfeiffer() };
    let m = module(&reduced(after));
    same(&run(m.as_ref()), &normed.add(&network(m.as_ref(), &normed, relu)).unwrap());

    let post_add = Bottleneck { residual_before_ln: Residual::PostAdd, ..Bottleneck::pfeiffer() };
    let m = module(&reduced(post_add));
    same(&run(m.as_ref()), &sum.add(&network(m.as_ref(), &normed, relu)).unwrap());

    // The placements are different functions, or the comparison would prove nothing.
    assert!(houlsby.max_abs_diff(&pfeiffer).unwrap() > 0.1);
    assert!(pfeiffer.max_abs_diff(&parallel).unwrap() > 0.1);
}

#[test]
fn the_factor_may_be_learned_for_all_or_for_each_channel() {
    let sub = Sub::new();
    for (scaling, numbers) in [(Scaling::Learned, 1), (Scaling::Channel, D)] {
        let config = Bottleneck { scaling, ..reduced(Bottleneck::houlsby()) };
        let start = fresh(&config).unwrap().phi().need("scaling").unwrap().to_vec::<f64>().unwrap();
        assert_eq!(start, vec![1.0; numbers as usize]);
        let m = module(&config);
        let s = m.phi().need("scaling").unwrap().clone();
        let u = network(m.as_ref(), &sub.h(), swish).mul(&s).unwrap();
        same(&sub.run(m.as_ref(), &Context::eval()), &sub.h().add(&u).unwrap());
    }
}

#[test]
fn a_norm_of_its_own_is_the_last_that_the_adapter_does() {
    let sub = Sub::new();
    let normed = Bottleneck {
        ln_after: true,
        residual_before_ln: Residual::AfterLn,
        ..reduced(Bottleneck::houlsby())
    };
    let m = module(&normed);
    let u = network(m.as_ref(), &sub.h(), swish);
    let mean = u.mean_dims(&[-1], true).unwrap();
    let centred = u.sub(&mean).unwrap();
    let var = centred.square().unwrap().mean_dims(&[-1], true).unwrap();
    let unit = centred.div(&var.add_scalar(1e-5).unwrap().sqrt().unwrap()).unwrap();
    let phi = m.phi();
    let p = |n: &str| phi.need(n).unwrap().clone();
    let u = unit.mul(&p("adapter_norm_after.weight")).unwrap();
    let u = u.add(&p("adapter_norm_after.bias")).unwrap();
    same(&sub.run(m.as_ref(), &Context::eval()), &sub.h().add(&u).unwrap());
    // Without change at the start it is the gain that is zero, and gradients reach it.
    let start = Bottleneck { init_weights: BottleneckInit::MamAdapter, ..normed.clone() };
    let m = fresh(&start).unwrap();
    let y = sub.run(m.as_ref(), &Context::eval());
    assert!(y.bit_equal(&sub.h()).unwrap());
    let gain = m.phi().need("adapter_norm_after.weight").unwrap().clone();
    let loss = y.mul(&numbers(&y.size(), "g")).unwrap().sum().unwrap();
    let g = loss.gradients(&[&gain], false).unwrap().remove(0).unwrap();
    assert!(g.norm().unwrap().item().unwrap() > 0.1);
    let before = Bottleneck { residual_before_ln: Residual::BeforeLn, ..normed };
    assert!(fresh(&before).unwrap_err().to_string().contains("residual_before_ln"));
}

#[test]
fn dropout_is_on_the_change_alone() {
    let sub = Sub::new();
    let m = module(&Bottleneck { dropout: 0.5, ..reduced(Bottleneck::parallel()) });
    let cx = Context::train(Seed(8), 2);
    let u = sub.run(m.as_ref(), &Context::eval()).sub(&sub.h()).unwrap();
    let dropped = modl_core::dropout(&u, 0.5, cx.draw("modules.a")).unwrap();
    same(&sub.run(m.as_ref(), &cx), &sub.h().add(&dropped).unwrap());
}

#[test]
fn the_starts_are_adapterhubs() {
    let wide = Site { input: 400, output: 400, ..site() };
    let start = |init_weights| {
        let mut store = ParamStore::new();
        let none = Tensors::new();
        let config = Bottleneck { init_weights, ..Bottleneck::parallel() };
        let at = Attachment::alone(&wide, &none);
        config.build(&at, &mut Scope::new(&mut store, Seed(2))).unwrap();
        let v = |n: &str| store.get(n).unwrap().to_vec::<f64>().unwrap();
        assert!(v("adapter_down.0.bias").iter().chain(&v("adapter_up.bias")).all(|b| *b == 0.0));
        (v("adapter_down.0.weight"), v("adapter_up.weight"))
    };
    let largest = |v: &[f64]| v.iter().fold(0f64, |m, x| m.max(x.abs()));
    let std = |v: &[f64]| (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt();
    let (down, up) = start(BottleneckInit::Bert);
    assert!((std(&down) - 0.02).abs() < 5e-4 && (std(&up) - 0.02).abs() < 5e-4);
    assert!(largest(&down) > 0.06);
    let (down, up) = start(BottleneckInit::MamAdapter);
    assert!(largest(&down) <= 0.05 && largest(&down) > 0.0499 && largest(&up) == 0.0);
    // A normal cut at two standard deviations has 0.8796 of the spread.
    let (down, up) = start(BottleneckInit::Houlsby);
    for v in [&down, &up] {
        assert!((std(v) - 0.008796).abs() < 1e-4 && largest(v) <= 0.02 && largest(v) > 0.0199);
    }
}

#[test]
fn the_contract_of_every_module_holds() {
    let registry = Registry::new().with(register).unwrap();
    let targets = Bottleneck::pfeiffer_sites();
    let cases = [
        (Bottleneck::houlsby(), Identity::Within(0.05)),
        (Bottleneck::pfeiffer(), Identity::Within(0.05)),
        (Bottleneck::parallel(), Identity::Exact),
    ];
    for (config, identity) in cases {
        // ReLU has a corner, where differences and derivatives part.
        let config = Bottleneck { non_linearity: Activation::Gelu, ..reduced(config) };
        let claims = ModuleClaims {
            identity,
            // 2db + d + b of width 8 and bottleneck 4.
            parameters: 2 * 8 * 4 + 8 + 4,
            merges: false,
            smooth: true,
            task_vector: 0,
        };
        check_module(&|| Box::new(config.clone()), &targets, &claims, &registry);
    }
}

#[test]
fn sites_are_whole_sub_layers() {
    let site = |(index, path): (usize, &&str)| {
        let kind = if path.ends_with("dense") { SiteKind::Linear } else { SiteKind::Sublayer };
        Site { path: path.to_string(), kind, input: 4, output: 4, index }
    };
    let paths = [
        "encoder.layer.0.attention.output",
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.output",
        "encoder.layer.0.output.dense",
        "encoder.layer.11.output",
    ];
    let sites: Vec<Site> = paths.iter().enumerate().map(site).collect();
    let chosen =
        |t: Targets| -> Vec<usize> { t.select(&sites).unwrap().iter().map(|s| s.index).collect() };
    assert_eq!(chosen(Bottleneck::houlsby_sites()), [0, 2, 4]);
    assert_eq!(chosen(Bottleneck::pfeiffer_sites()), [2, 4]);
    assert_eq!(chosen(Bottleneck::parallel_sites()), [2, 4]);
}

#[test]
fn the_bottleneck_is_floored_and_at_least_one() {
    for (reduction_factor, width) in [(4.0, 1), (2.5, 2), (100.0, 1), (0.5, 12)] {
        let m = fresh(&Bottleneck { reduction_factor, ..Bottleneck::houlsby() }).unwrap();
        assert_eq!(m.phi().need("adapter_up.weight").unwrap().size(), [D, width]);
    }
}

#[test]
fn what_cannot_be_is_refused_with_its_name() {
    let houlsby = Bottleneck::houlsby;
    let cases = [
        (Bottleneck { original_ln_after: false, ..houlsby() }, "original_ln_after"),
        (Bottleneck { residual_before_ln: Residual::PostAdd, ..houlsby() }, "residual_before_ln"),
        (Bottleneck { reduction_factor: 0.0, ..houlsby() }, "reduction_factor"),
        (Bottleneck { reduction_factor: f64::NAN, ..houlsby() }, "reduction_factor"),
        (Bottleneck { scaling: Scaling::Fixed(f64::INFINITY), ..houlsby() }, "scaling"),
        (Bottleneck { dropout: 1.0, ..houlsby() }, "dropout"),
    ];
    for (config, named) in cases {
        let e = fresh(&config).unwrap_err().to_string();
        assert!(e.contains(named), "{e}");
    }
    let tiny = TinyBackbone::new(Seed(1), Kind::Float).unwrap();
    let linear = tiny.sites().iter().find(|s| s.kind == SiteKind::Linear).unwrap();
    let mut store = ParamStore::new();
    let scope = &mut Scope::new(&mut store, Seed(1));
    let e = houlsby().build(&Attachment::alone(linear, &Tensors::new()), scope).unwrap_err();
    assert!(matches!(&e, Error::Unsupported { what, .. } if what.contains("Linear")), "{e}");
}

#[test]
fn text_is_as_adapterhub_writes_it() {
    let read = |v: serde_json::Value| serde_json::from_value::<Bottleneck>(v);
    let config = read(serde_json::json!({
        "non_linearity": "gelu_new", "residual_before_ln": "post_add", "scaling": "channel"
    }))
    .unwrap();
    assert_eq!(config.residual_before_ln, Residual::PostAdd);
    assert_eq!(config.scaling, Scaling::Channel);
    assert_eq!(config.non_linearity, Activation::GeluNew);
    assert_eq!(read(serde_json::to_value(&config).unwrap()).unwrap(), config);
    assert!(read(serde_json::json!({"residual_before_ln": "pre"})).is_err());
    assert!(read(serde_json::json!({"scaling": true})).is_err());
    assert!(read(serde_json::json!({"phm_layer": true})).is_err());
}

#[test]
fn modules_of_another_placement_are_not_averaged() {
    let signature = |config: Bottleneck| fresh(&config).unwrap().signature();
    let houlsby = signature(Bottleneck::houlsby());
    assert_eq!(houlsby, signature(Bottleneck { dropout: 0.1, ..Bottleneck::houlsby() }));
    assert_ne!(houlsby, signature(Bottleneck { is_parallel: true, ..Bottleneck::houlsby() }));
    let relu = Activation::Relu;
    assert_ne!(houlsby, signature(Bottleneck { non_linearity: relu, ..Bottleneck::houlsby() }));
}
