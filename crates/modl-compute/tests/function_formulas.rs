//! Methods of function composition against formulas written out in other operations, in f64.
#![allow(clippy::unwrap_used)]

use modl_compute::function::unified;
use modl_compute::{
    AdapterDrop, Bottleneck, Compacter, ConditionalNorm, Film, Gated, Invertible, InvertibleBlock,
    Lora, LoraInit, Nested, Part, Reft, ResidualAdapter, ResidualPlacement, Union, register,
};
use modl_core::{
    Activation, Attachment, Context, Device, Host, Init, Kind, Module, ModuleConfig, ParamStore,
    Registry, Result, Scope, Seed, Signal, Site, SiteKind, Step, Targets, Tensor, Tensors, no_grad,
};

const D: i64 = 8;

fn numbers(shape: &[i64], name: &str) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(5).child(name), Kind::Double, Device::Cpu).unwrap()
}

fn site(kind: SiteKind, path: &str) -> Site {
    Site { path: path.to_owned(), kind, input: D, output: D, index: 0 }
}

/// Builds at one site, every parameter away from its start.
fn module(config: &dyn ModuleConfig, site: &Site, theta: &Tensors) -> Box<dyn Module> {
    in_store(config, site, theta).0
}

/// [`module`] with the store that it keeps its parameters in.
fn in_store(
    config: &dyn ModuleConfig,
    site: &Site,
    theta: &Tensors,
) -> (Box<dyn Module>, ParamStore) {
    let mut store = ParamStore::new();
    let mut scope = Scope::at(&mut store, "modules.a", Seed(4)).on(Kind::Double, Device::Cpu);
    let at = Attachment::alone(site, theta);
    let module = config.build(&at, &mut scope.sub(&site.path)).unwrap();
    for (name, t) in module.phi().iter() {
        let noise = numbers(&t.size(), name).mul_scalar(0.4).unwrap();
        no_grad(|| t.clone().add_in_place(&noise)).unwrap();
    }
    (module, store)
}

fn fresh(config: &dyn ModuleConfig, site: &Site, theta: &Tensors) -> Result<Box<dyn Module>> {
    let mut store = ParamStore::new();
    let mut scope = Scope::at(&mut store, "modules.a", Seed(4)).on(Kind::Double, Device::Cpu);
    config.build(&Attachment::alone(site, theta), &mut scope.sub(&site.path))
}

#[track_caller]
fn same(found: &Tensor, expected: &Tensor) {
    let far = found.max_abs_diff(expected).unwrap();
    assert!(found.all_close(expected, 1e-11, 1e-11).unwrap(), "{far}");
}

/// f = 2x, with the companions kept.
fn twice(_: &Tensors, x: &Signal, _: &Context) -> Result<Signal> {
    Ok(x.replace(x.x.mul_scalar(2.0)?))
}

fn run_twice(module: &dyn Module, site: &Site, x: &Signal, cx: &Context) -> Tensor {
    module.forward(&Host::new(site, &Tensors::new(), &twice), x, cx).unwrap().x
}

/// Σᵢ Aᵢ ⊗ (Lᵢ Rᵢ), entry by entry.
fn kronecker_sum(rule: &Tensor, left: &Tensor, right: &Tensor) -> Tensor {
    let v = |t: &Tensor| t.to_vec::<f64>().unwrap();
    let (n, i, r, o) = (rule.len_of(0), left.len_of(1), left.len_of(2), right.len_of(2));
    let (a, l, g) = (v(rule), v(left), v(right));
    let mut w = Vec::new();
    for row in 0..n * i {
        for column in 0..n * o {
            let mut sum = 0.0;
            for k in 0..n {
                let rule = a[((k * n + row / i) * n + column / o) as usize];
                let inner = |q: i64| {
                    l[((k * i + row % i) * r + q) as usize]
                        * g[((k * r + q) * o + column % o) as usize]
                };
                sum += rule * (0..r).map(inner).sum::<f64>();
            }
            w.push(sum);
        }
    }
    Tensor::from_slice(&w, &[n * i, n * o], Device::Cpu).unwrap()
}

#[test]
fn compacter_is_a_bottleneck_of_dense_kronecker_sums() {
    let site = site(SiteKind::Sublayer, "encoder.layer.0.output");
    for (n, rank) in [(1, 1), (2, 3), (4, 1)] {
        let config = Compacter {
            reduction_factor: 2.0,
            phm_dim: n,
            phm_rank: rank,
            non_linearity: Activation::Tanh,
            ..Compacter::default()
        };
        let m = module(&config, &site, &Tensors::new());
        let phi = m.phi();
        let p = |name: &str| phi.need(name).unwrap();
        let layer = |x: &Tensor, name: &str| {
            let part = |what: &str| p(&format!("{name}.{what}"));
            let w = kronecker_sum(p("phm_rule"), part("W_left"), part("W_right"));
            x.matmul(&w).unwrap().add(part("b")).unwrap()
        };
        let x = numbers(&[2, 3, D], "x");
        let h = x.mul_scalar(2.0).unwrap();
        let inner = layer(&h, "adapter_down.0").tanh().unwrap();
        let expected = h.add(&layer(&inner, "adapter_up")).unwrap();
        same(&run_twice(m.as_ref(), &site, &x.into(), &Context::eval()), &expected);
        assert!(expected.max_abs_diff(&h).unwrap() > 0.1, "the test can fail");
    }
}

#[test]
fn compacter_refuses_what_does_not_divide() {
    let site = site(SiteKind::Sublayer, "encoder.layer.0.output");
    let refused =
        |config: Compacter| fresh(&config, &site, &Tensors::new()).unwrap_err().to_string();
    let e = refused(Compacter::default());
    assert!(e.contains("phm_dim") && e.contains("the bottleneck 0"), "{e}");
    let three = Compacter { phm_dim: 3, reduction_factor: 2.0, ..Compacter::default() };
    assert!(refused(three).contains("3 does not divide"));
    assert!(refused(Compacter { phm_dim: 0, ..Compacter::default() }).contains("phm_dim 0"));
}

#[test]
fn couplings_are_undone_by_their_inverse_also_for_odd_widths() {
    for block in [InvertibleBlock::Nice, InvertibleBlock::Glow] {
        for width in [2, 7, 8] {
            let site = Site { output: width, ..site(SiteKind::Tokens, "embeddings") };
            let config = Invertible { block, ..Invertible::default() };
            let coupling = config.coupling(module(&config, &site, &Tensors::new()).phi());
            let x = numbers(&[2, 3, width], "x");
            let y = coupling.apply(&x).unwrap();
            assert!(y.max_abs_diff(&x).unwrap() > 0.1, "the test can fail");
            assert!(coupling.inverse(&y).unwrap().all_close(&x, 1e-12, 1e-12).unwrap());
            // The contract in f32, as issues state it.
            let f32 = y.to_kind(Kind::Float).unwrap();
            let there = coupling.apply(&coupling.inverse(&f32).unwrap()).unwrap();
            assert!(there.all_close(&f32, 1e-6, 1e-6).unwrap());
        }
    }
}

#[test]
fn couplings_are_their_formulas() {
    let site = site(SiteKind::Tokens, "embeddings");
    let x = numbers(&[2, 3, D], "x");
    let halves = |t: &Tensor| [0, 4].map(|at| t.narrow(-1, at, 4).unwrap());
    for block in [InvertibleBlock::Nice, InvertibleBlock::Glow] {
        let config = Invertible { block, ..Invertible::default() };
        let m = module(&config, &site, &Tensors::new());
        let phi = m.phi();
        let net = |name: &str, x: &Tensor| {
            let layer = |x: &Tensor, i: i64| {
                let p = |what| phi.need(&format!("{name}.{i}.{what}")).unwrap();
                x.matmul(&p("weight").t().unwrap()).unwrap().add(p("bias")).unwrap()
            };
            layer(&layer(x, 0).clamp(0.0, f64::INFINITY).unwrap(), 2)
        };
        let change = |name: &str, half: &Tensor, other: &Tensor| {
            let r = net(name, other);
            if block == InvertibleBlock::Nice {
                return half.add(&r).unwrap();
            }
            let (s, t) = (halves(&r)[0].to_vec::<f64>().unwrap(), halves(&r)[1].clone());
            let e: Vec<f64> = s.iter().map(|s| (5.0 * 0.636 * (s / 5.0).atan()).exp()).collect();
            let e = Tensor::from_slice(&e, &half.size(), Device::Cpu).unwrap();
            half.mul(&e).unwrap().add(&t).unwrap()
        };
        let [one, two] = if block == InvertibleBlock::Nice { ["F", "G"] } else { ["s2", "s1"] };
        let [x1, x2] = halves(&x.mul_scalar(2.0).unwrap());
        let y1 = change(one, &x1, &x2);
        let y2 = change(two, &x2, &y1);
        let expected = Tensor::cat(&[y1, y2], -1).unwrap();
        let found = run_twice(m.as_ref(), &site, &x.clone().into(), &Context::eval());
        same(&found, &expected);
    }
}

#[test]
fn film_scales_and_shifts_each_row_by_its_task() {
    let z = numbers(&[2, 3], "z");
    let cx = Context::eval().with_feature("task_vector", z.clone());
    for (kind, shape) in [(SiteKind::Linear, vec![2, 4, D]), (SiteKind::Conv, vec![2, D, 3, 5])] {
        let site = site(kind, "a");
        let m = module(&Film { task_vector: 3 }, &site, &Tensors::new());
        let x = numbers(&shape, "x");
        let found = run_twice(m.as_ref(), &site, &x.clone().into(), &cx);
        let phi = m.phi();
        for row in 0..2 {
            let z = z.select(0, row).unwrap().unsqueeze(-1).unwrap();
            let part = |constant: &str, head: &str| {
                let generated = phi.need(head).unwrap().matmul(&z).unwrap().squeeze(-1).unwrap();
                generated.add(phi.need(constant).unwrap()).unwrap()
            };
            let (delta, shift) = (part("delta", "delta_head"), part("shift", "shift_head"));
            for c in 0..D {
                let channel = |t: &Tensor| {
                    let t = t.select(0, row).unwrap();
                    if kind == SiteKind::Conv { t.select(0, c) } else { t.select(-1, c) }.unwrap()
                };
                let number = |t: &Tensor| t.select(0, c).unwrap().item().unwrap();
                let h = channel(&x).mul_scalar(2.0).unwrap();
                let expected = h.mul_scalar(1.0 + number(&delta)).unwrap();
                same(&channel(&found), &expected.add_scalar(number(&shift)).unwrap());
            }
        }
    }
    let m = module(&Film { task_vector: 3 }, &site(SiteKind::Linear, "a"), &Tensors::new());
    let e = m
        .forward(
            &Host::new(&site(SiteKind::Linear, "a"), &Tensors::new(), &twice),
            &numbers(&[2, 4, D], "x").into(),
            &Context::eval(),
        )
        .unwrap_err();
    assert!(e.to_string().contains("task_vector"), "{e}");
    assert!(
        fresh(&Film { task_vector: -1 }, &site(SiteKind::Linear, "a"), &Tensors::new()).is_err()
    );
}

#[test]
fn a_conditional_norm_has_another_gain_and_bias() {
    let theta = Tensors::new().with("weight", numbers(&[D], "w")).with("bias", numbers(&[D], "b"));
    let layer_norm = |theta: &Tensors, x: &Signal, _: &Context| {
        Ok(x.replace(x.x.layer_norm(theta.need("weight")?, theta.need("bias")?, 1e-5)?))
    };
    let batch_norm = |theta: &Tensors, x: &Signal, _: &Context| {
        let channels = |n: &str| theta.need(n)?.reshape(&[-1, 1, 1]);
        let centred = x.x.sub(&channels("running_mean")?)?;
        let unit = centred.div(&channels("running_var")?.add_scalar(1e-5)?.sqrt()?)?;
        Ok(x.replace(unit.mul(&channels("weight")?)?.add(&channels("bias")?)?))
    };
    let moments = theta
        .clone()
        .with("running_mean", numbers(&[D], "mean"))
        .with("running_var", numbers(&[D], "var").square().unwrap());
    let z = numbers(&[2, 3], "z");
    let cx = Context::eval().with_feature("task_vector", z.clone());
    type F = dyn Fn(&Tensors, &Signal, &Context) -> Result<Signal>;
    let cases: [(SiteKind, &Tensors, &F, Vec<i64>); 2] = [
        (SiteKind::Norm, &theta, &layer_norm, vec![2, 4, D]),
        (SiteKind::BatchNorm, &moments, &batch_norm, vec![2, D, 3, 3]),
    ];
    for (kind, theta, f, shape) in cases {
        let site = site(kind, "norm");
        let x: Signal = numbers(&shape, "x").into();
        let host = Host::new(&site, theta, f);
        for task_vector in [0, 3] {
            let m = module(&ConditionalNorm { task_vector }, &site, theta);
            let found = m.forward(&host, &x, &cx).unwrap().x;
            let phi = m.phi();
            for row in 0..2 {
                let part = |constant: &str, head: &str| {
                    let c = phi.need(constant).unwrap();
                    let Some(head) = phi.get(head) else { return c.clone() };
                    let z = z.select(0, row).unwrap().unsqueeze(-1).unwrap();
                    head.matmul(&z).unwrap().squeeze(-1).unwrap().add(c).unwrap()
                };
                let add = |n: &str, by: Tensor| theta.need(n).unwrap().add(&by).unwrap();
                let own = theta
                    .clone()
                    .with("weight", add("weight", part("delta", "delta_head")))
                    .with("bias", add("bias", part("shift", "shift_head")));
                let alone = x.x.narrow(0, row, 1).unwrap().into();
                let expected = host.call_with(&own, &alone, &cx).unwrap().x;
                same(&found.narrow(0, row, 1).unwrap(), &expected);
            }
        }
    }
    // A norm without a bias, as RMS norm is, keeps none.
    let rms = Tensors::new().with("weight", numbers(&[D], "w"));
    let m = module(&ConditionalNorm::default(), &site(SiteKind::Norm, "norm"), &rms);
    assert_eq!(m.phi().len(), 1);
    assert_eq!(m.compose(&rms).unwrap().unwrap().len(), 1);
}

#[test]
fn loreft_replaces_what_lies_in_its_subspace_at_its_positions() {
    let site = site(SiteKind::Block, "encoder.layer.0");
    let x = numbers(&[3, 5, D], "x");
    // All real; padding at the end; padding at the front.
    let mask = [1., 1., 1., 1., 1., 1., 1., 1., 0., 0., 0., 1., 1., 1., 1.];
    let mask = Tensor::from_slice(&mask, &[3, 5], Device::Cpu).unwrap();
    let signal = Signal { x: x.clone(), with: Tensors::new().with("mask", mask) };
    let config = Reft {
        r: 3,
        prefix_positions: 1,
        suffix_positions: 2,
        tied_weights: true,
        ..Reft::loreft()
    };
    let m = module(&config, &site, &Tensors::new());
    let found = run_twice(m.as_ref(), &site, &signal, &Context::eval());
    let h = x.mul_scalar(2.0).unwrap();
    let changed: Vec<bool> = (0..15)
        .map(|i| {
            let at = |t: &Tensor| t.select(0, i / 5).unwrap().select(0, i % 5).unwrap();
            at(&found).max_abs_diff(&at(&h)).unwrap() > 1e-6
        })
        .collect();
    let expected = [1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1].map(|n| n == 1);
    assert_eq!(changed, expected);

    // By Gram and Schmidt: R's rows are an orthonormal basis of the free matrix' rows, and in that
    // subspace h becomes Wh + b. The signs of R matter to what W says: only QR's own may be used,
    // so the law is tested: R y = W h + b, and what is orthogonal to R stays.
    let phi = m.phi();
    let p = |n: &str| phi.need(&format!("units.0.{n}")).unwrap();
    let raw = p("projection.weight");
    let gram = raw.matmul(&raw.t().unwrap()).unwrap();
    let span = raw.t().unwrap().matmul(&gram.solve(raw).unwrap()).unwrap(); // onto rows of R
    let first = |t: &Tensor| t.narrow(1, 0, 1).unwrap().narrow(0, 0, 1).unwrap();
    let (y, h) = (first(&found), first(&h));
    let rest = |t: &Tensor| t.sub(&t.matmul(&span).unwrap()).unwrap();
    same(&rest(&y), &rest(&h));
    let source = h.matmul(&p("learned_source.weight").t().unwrap()).unwrap();
    let source = source.add(p("learned_source.bias")).unwrap();
    // An orthonormal R keeps lengths, whatever its signs.
    let length = |t: &Tensor| t.norm().unwrap().item().unwrap();
    assert!((length(&y.matmul(&span).unwrap()) - length(&source)).abs() < 1e-11);
}

#[test]
fn noreft_and_direft_are_their_formulas() {
    let site = site(SiteKind::Block, "encoder.layer.0");
    let x = numbers(&[2, 4, D], "x");
    let mask = Tensor::ones(&[2, 4], Kind::Double, Device::Cpu).unwrap();
    let signal = Signal { x: x.clone(), with: Tensors::new().with("mask", mask) };
    let h = x.mul_scalar(2.0).unwrap();
    for (config, subtracts) in [(Reft::noreft(), true), (Reft::direft(), false)] {
        let config =
            Reft { prefix_positions: 4, non_linearity: Some(Activation::Tanh), r: 2, ..config };
        let m = module(&config, &site, &Tensors::new());
        let phi = m.phi();
        let p = |n: &str| phi.need(&format!("units.0.{n}")).unwrap();
        let times = |w: &Tensor| h.matmul(&w.t().unwrap()).unwrap();
        let r = p("projection.weight");
        let source = times(p("learned_source.weight")).add(p("learned_source.bias")).unwrap();
        let source = source.tanh().unwrap();
        let inner = if subtracts { source.sub(&times(r)).unwrap() } else { source };
        let expected = h.add(&inner.matmul(r).unwrap()).unwrap();
        same(&run_twice(m.as_ref(), &site, &signal, &Context::eval()), &expected);
    }
    let none = Reft { prefix_positions: 0, ..Reft::loreft() };
    assert!(fresh(&none, &site, &Tensors::new()).is_err());
    assert!(fresh(&Reft { r: D + 1, ..Reft::loreft() }, &site, &Tensors::new()).is_err());
}

#[test]
fn a_parallel_residual_adapter_is_a_convolution_beside_and_in_the_kernel() {
    let site = site(SiteKind::Conv, "conv");
    let theta = Tensors::new()
        .with("weight", numbers(&[D, D / 2, 3, 3], "w"))
        .with("bias", numbers(&[D], "b"));
    let strided = |theta: &Tensors, x: &Signal, _: &Context| {
        let (w, b) = (theta.need("weight")?, theta.get("bias"));
        Ok(x.replace(x.x.conv2d(w, b, &[2, 2], &[1, 1], 2)?))
    };
    let m = module(&ResidualAdapter::default(), &site, &theta);
    let x = numbers(&[2, D, 5, 7], "x");
    let host = Host::new(&site, &theta, &strided);
    let cx = Context::eval();
    let found = m.forward(&host, &x.clone().into(), &cx).unwrap().x;
    let alpha = m.phi().need("alpha").unwrap().clone();
    assert_eq!(alpha.size(), [D, D / 2, 1, 1]);
    let beside = x.conv2d(&alpha, None, &[2, 2], &[0, 0], 2).unwrap();
    let expected = host.call(&x.into(), &cx).unwrap().x.add(&beside).unwrap();
    same(&found, &expected);
    let even = Tensors::new().with("weight", numbers(&[D, D, 2, 2], "w"));
    let e = fresh(&ResidualAdapter::default(), &site, &even).unwrap_err().to_string();
    assert!(e.contains("2 × 2") && e.contains("series"), "{e}");
}

#[test]
fn a_series_residual_adapter_normalises_by_the_batch_and_remembers() {
    let site = site(SiteKind::Conv, "conv");
    let series = ResidualAdapter { placement: ResidualPlacement::Series };
    let (m, store) = in_store(&series, &site, &Tensors::new());
    let params = store.below("modules.a.");
    let step = |done| series.after_step(&params, &Step::new(done, 9, Tensors::new()));
    let phi = m.phi();
    let p = |n: &str| phi.need(n).unwrap();
    let x = numbers(&[3, D, 2, 4], "x");
    let h = x.mul_scalar(2.0).unwrap();
    let alpha = p("alpha").reshape(&[D, D]).unwrap();
    let inner = Tensor::einsum("oc,bchw->bohw", &[&alpha, &h]).unwrap();
    let rows = inner.transpose(0, 1).unwrap().reshape(&[D, -1]).unwrap();
    let mean = rows.mean_dims(&[1], true).unwrap();
    let squares = rows.sub(&mean).unwrap().square().unwrap().sum_dims(&[1], false).unwrap();
    let mean = mean.squeeze(1).unwrap();
    let channels = |t: &Tensor| t.reshape(&[1, D, 1, 1]).unwrap();
    let by = |mean: &Tensor, var: &Tensor| {
        let scale = channels(var).add_scalar(1e-5).unwrap().sqrt().unwrap();
        let unit = inner.sub(&channels(mean)).unwrap().div(&scale).unwrap();
        let gained = unit.mul(&channels(p("norm.weight"))).unwrap();
        h.add(&gained.add(&channels(p("norm.bias"))).unwrap()).unwrap()
    };
    let signal = Signal::from(x);
    let train = || run_twice(m.as_ref(), &site, &signal, &Context::train(Seed(1), 0));
    let fresh = run_twice(m.as_ref(), &site, &signal, &Context::eval());
    same(&train(), &by(&mean, &squares.mul_scalar(1.0 / 24.0).unwrap()));
    // Computed again for its gradients, it is still one step; and no step moves nothing.
    assert!(train().bit_equal(&train()).unwrap());
    assert!(run_twice(m.as_ref(), &site, &signal, &Context::eval()).bit_equal(&fresh).unwrap());
    no_grad(|| step(1)).unwrap();
    no_grad(|| step(2)).unwrap();
    // One batch of 24 moves the averages by a tenth from 0 and 1.
    let running_var = squares.mul_scalar(0.1 / 23.0).unwrap().add_scalar(0.9).unwrap();
    let eval = run_twice(m.as_ref(), &site, &signal, &Context::eval());
    same(&eval, &by(&mean.mul_scalar(0.1).unwrap(), &running_var));
    assert!(run_twice(m.as_ref(), &site, &signal, &Context::eval()).bit_equal(&eval).unwrap());
}

#[test]
fn adapter_drop_leaves_out_the_same_layers_at_all_sites() {
    let random = Lora { init: LoraInit::Random, ..Lora::default() };
    let theta = Tensors::new().with("weight", numbers(&[D, D], "w"));
    let config = AdapterDrop { config: Nested::new(random), first: 1, random: 4 };
    let x = Signal::from(numbers(&[2, 3, D], "x"));
    let all: Vec<(Site, Box<dyn Module>)> = (0..6)
        .map(|layer| site(SiteKind::Linear, &format!("encoder.layer.{layer}.query")))
        .map(|site| (site.clone(), fresh(&config, &site, &theta).unwrap()))
        .collect();
    let base = x.x.mul_scalar(2.0).unwrap();
    let present = |cx: &Context| -> Vec<bool> {
        let there = |(site, m): &(Site, Box<dyn Module>)| {
            !run_twice(m.as_ref(), site, &x, cx).bit_equal(&base).unwrap()
        };
        all.iter().map(there).collect()
    };
    assert!(all[0].1.phi().is_empty(), "a dropped module has no parameters");
    assert_eq!(present(&Context::eval()), [false, true, true, true, true, true]);
    let mut seen = [0; 6];
    for step in 0..200 {
        let there = present(&Context::train(Seed(3), step));
        let first = there.iter().position(|t| *t).unwrap();
        assert!(there[first..].iter().all(|t| *t), "layers are dropped from below");
        seen[first] += 1;
    }
    // n = 0 and 1 both leave layer 0 out only; 2, 3 and 4 as often each as one of them.
    assert_eq!(seen[0] + seen[5], 0);
    assert!(seen[1] > 55 && seen[1] < 105, "{seen:?}");
    assert!(seen[2..5].iter().all(|n| *n > 20 && *n < 60), "{seen:?}");
}

#[test]
fn a_gate_passes_its_share_of_the_change() {
    let site = site(SiteKind::Linear, "query");
    let theta = Tensors::new().with("weight", numbers(&[D, D], "w"));
    let m = module(&Gated::new(Lora { r: 2, ..Lora::default() }), &site, &theta);
    let x = numbers(&[2, 3, D], "x");
    let phi = m.phi();
    let p = |n: &str| phi.need(n).unwrap();
    let found = run_twice(m.as_ref(), &site, &x.clone().into(), &Context::eval());
    let h = x.mul_scalar(2.0).unwrap();
    let low = x.matmul(&p("lora_A.weight").t().unwrap()).unwrap();
    let low = low.matmul(&p("lora_B.weight").t().unwrap()).unwrap().mul_scalar(4.0).unwrap();
    let open = x.matmul(&p("gate.weight").t().unwrap()).unwrap().add(p("gate.bias")).unwrap();
    let open = open.neg().unwrap().exp().unwrap().add_scalar(1.0).unwrap().pow(-1.0).unwrap();
    let gate = open.mean_dims(&[1], true).unwrap();
    same(&found, &h.add(&low.mul(&gate).unwrap()).unwrap());
    // A closed gate is no module.
    let mut bias = p("gate.bias").clone();
    no_grad(|| bias.add_scalar_in_place(-1e9)).unwrap();
    let closed = run_twice(m.as_ref(), &site, &x.into(), &Context::eval());
    assert!(closed.bit_equal(&h).unwrap());
}

#[test]
fn queries_of_all_heads_open_a_gate_at_attention() {
    let site = site(SiteKind::Attention, "attention");
    let m = module(&Gated::new(Doubling), &site, &Tensors::new());
    let x = numbers(&[2, 2, 3, D / 2], "x");
    let phi = m.phi();
    let side_by_side = |row: i64, token: i64| {
        let row = x.select(0, row).unwrap();
        Tensor::cat(&[0, 1].map(|h| row.select(0, h).unwrap().select(0, token).unwrap()), 0)
            .unwrap()
    };
    let found = run_twice(m.as_ref(), &site, &x.clone().into(), &Context::eval());
    for row in 0..2 {
        let gate: f64 = (0..3)
            .map(|token| {
                let dot = side_by_side(row, token)
                    .mul(&phi.need("gate.weight").unwrap().select(0, 0).unwrap());
                let s = dot.unwrap().sum().unwrap().item().unwrap();
                let s = s + phi.need("gate.bias").unwrap().item().unwrap();
                1.0 / (1.0 + (-s).exp()) / 3.0
            })
            .sum();
        // f = 2x, f' = 4x.
        let expected = x.select(0, row).unwrap().mul_scalar(2.0 + 2.0 * gate).unwrap();
        same(&found.select(0, row).unwrap(), &expected);
    }
}

/// f' = 2f, with no parameters: for what stands around it.
#[derive(Debug)]
struct Doubling;

impl ModuleConfig for Doubling {
    fn kind(&self) -> &'static str {
        "doubling"
    }

    fn to_json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-attention")
    }

    fn build(&self, _: &Attachment, _: &mut Scope) -> Result<Box<dyn Module>> {
        Ok(Box::new(Doubling))
    }
}

impl Module for Doubling {
    fn kind(&self) -> &'static str {
        "doubling"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = f.call(x, cx)?;
        Ok(y.replace(y.x.mul_scalar(2.0)?))
    }
}

#[test]
fn nested_recipes_are_strict_and_survive_a_round_trip() {
    let registry = Registry::new().with(register).unwrap();
    let parse = |v: serde_json::Value| registry.modules.parse(&v);
    let recipe = serde_json::json!({
        "type": "union",
        "parts": [
            { "targets": {"names": ["query"], "exclude": null, "layers": null, "layers_pattern": []},
              "config": {"type": "gated", "config": {"type": "lora", "r": 3}} },
            { "targets": {"names": "all-sublayer", "exclude": null, "layers": null, "layers_pattern": []},
              "config": {"type": "adapter_drop", "first": 2} },
        ],
    });
    let json = parse(recipe).unwrap().to_json().unwrap();
    assert_eq!(json["parts"][0]["config"]["config"]["r"], 3);
    assert_eq!(json["parts"][1]["config"]["config"]["type"], "bottleneck");
    let mut again = json.clone();
    again["type"] = "union".into();
    assert_eq!(parse(again).unwrap().to_json().unwrap(), json);
    let wrong = serde_json::json!({"type": "gated", "config": {"type": "lora", "rank": 3}});
    assert!(parse(wrong).unwrap_err().to_string().contains("rank"));
    let unknown = serde_json::json!({"type": "gated", "config": {"type": "lorra"}});
    assert!(parse(unknown).unwrap_err().to_string().contains("lorra"));
}

fn bert_like() -> Vec<Site> {
    let table = [
        ("encoder.layer.0.attention.self", SiteKind::Attention),
        ("encoder.layer.0.attention.self.query", SiteKind::Linear),
        ("encoder.layer.0.attention.self.value", SiteKind::Linear),
        ("encoder.layer.0.output", SiteKind::Sublayer),
        ("encoder.layer.0.output.dense", SiteKind::Linear),
    ];
    let all = (0..).zip(table);
    all.map(|(index, (path, kind))| Site { index, ..site(kind, path) }).collect()
}

#[test]
fn the_mixtures_stand_where_their_papers_say() {
    let sites = bert_like();
    let stands = |union: &Union| -> Vec<&'static str> {
        let first = &sites[0];
        let weight = Tensor::zeros(&[first.output, first.input], Kind::Float, Device::Cpu).unwrap();
        let theta = Tensors::new().with("weight", weight);
        let mut store = ParamStore::new();
        let at = |site| Attachment { site, theta: &theta, sites: &sites };
        let mut scope = Scope::at(&mut store, "modules.a", Seed(4));
        sites.iter().map(|s| union.build(&at(s), &mut scope.sub(&s.path)).unwrap().kind()).collect()
    };
    let mam = unified::mam(Doubling, 1024);
    assert_eq!(mam.to_json().unwrap()["parts"][1]["config"]["reduction_factor"], 2.0);
    assert_eq!(stands(&mam), ["doubling", "absent", "absent", "bottleneck", "absent"]);
    let unipelt = unified::unipelt(Doubling);
    assert_eq!(stands(&unipelt), ["gated", "gated", "gated", "gated", "absent"]);
    // Nothing stands where no part does.
    let stands = |union: &Union| -> Vec<usize> {
        union.usual_targets().select(&sites).unwrap().iter().map(|s| s.index).collect()
    };
    assert_eq!(stands(&unipelt), [0, 1, 2, 3]);
    assert_eq!(stands(&mam), [0, 3]);
    assert_eq!(unified::FORMS.len(), 6);
}

#[test]
fn parts_of_a_union_do_not_share_and_do_not_overlap() {
    let sites: Vec<Site> = [0, 1]
        .map(|i| Site {
            index: i as usize,
            ..site(SiteKind::Sublayer, &format!("layer.{i}.output"))
        })
        .to_vec();
    let theta = Tensors::new();
    let part = |name: &str, n: i64| {
        let config = Compacter { phm_dim: n, reduction_factor: 2.0, ..Compacter::default() };
        Part::new(Targets::names([name]), config)
    };
    let build = |union: &Union| {
        let mut store = ParamStore::new();
        let mut scope = Scope::at(&mut store, "modules.a", Seed(4));
        for site in &sites {
            let at = Attachment { site, theta: &theta, sites: &sites };
            union.build(&at, &mut scope.sub(&site.path))?;
        }
        Ok::<_, modl_core::Error>(store)
    };
    let store = build(&Union::new([part("0.output", 4), part("1.output", 2)])).unwrap();
    assert_eq!(store.get("modules.a.part0.phm_rule").unwrap().size(), [4, 4, 4]);
    assert_eq!(store.get("modules.a.part1.phm_rule").unwrap().size(), [2, 2, 2]);
    assert!(store.get("modules.a.layer.1.output.part1.adapter_up.b").is_ok());
    let e = build(&Union::new([part("output", 4), part("1.output", 2)])).unwrap_err().to_string();
    assert!(e.contains("parts[1]") && e.contains("exclude"), "{e}");
    assert!(build(&Union::default()).is_err());
    let e = build(&Union::new([part("0.output", 4), part("outptu", 4)])).unwrap_err().to_string();
    assert!(e.contains("outptu"), "{e}");
    // Bottlenecks stand where they stood.
    assert_eq!(AdapterDrop::default().usual_targets(), Bottleneck::houlsby().usual_targets());
}
