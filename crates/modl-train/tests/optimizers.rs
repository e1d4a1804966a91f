//! The optimisers against those of libtorch's C++ frontend.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use modl_core::{Modular, Seed, Targets, Tensor};
use modl_train::optim::{AdafactorConfig, AdamWConfig, LionConfig, RmsPropConfig, SgdConfig};
use modl_train::{Optimizer, OptimizerConfig};
use tch::nn;

/// Weight `[4, 3]` and bias `[4]` by closed formula, in f64.
fn start() -> [tch::Tensor; 2] {
    let of = |n: i64| (tch::Tensor::arange(n, (tch::Kind::Double, tch::Device::Cpu)) * 0.7).sin();
    [of(12).reshape([4, 3]), of(4) + 0.1]
}

/// A loss that leaves the bias out in every third step, as a router does with a module.
fn loss(weight: &tch::Tensor, bias: &tch::Tensor, step: i64) -> tch::Tensor {
    let x = (tch::Tensor::arange(15, (tch::Kind::Double, tch::Device::Cpu)) + step).cos();
    let y = x.reshape([5, 3]).matmul(&weight.tr());
    let y = if step % 3 == 1 { y } else { y + bias };
    (&y * &y * &y + y.sin()).mean(tch::Kind::Double)
}

fn theirs<C: nn::OptimizerConfig>(config: C, lr: f64) -> [tch::Tensor; 2] {
    let mut vs = nn::VarStore::new(tch::Device::Cpu);
    vs.set_kind(tch::Kind::Double);
    let [w, b] = start();
    let (w, b) = (vs.root().var_copy("w", &w), vs.root().var_copy("b", &b));
    let mut optimizer = config.build(&vs, lr).unwrap();
    for step in 0..20 {
        optimizer.backward_step(&loss(&w, &b, step));
    }
    [w.detach(), b.detach()]
}

fn steps(
    optimizer: &mut dyn Optimizer,
    params: &[(String, Tensor)],
    lr: f64,
    range: std::ops::Range<i64>,
) {
    let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
    for step in range {
        let loss = Tensor::from(loss(leaves[0].as_ref(), leaves[1].as_ref(), step));
        let grads = loss.gradients(&leaves, false).unwrap();
        assert_eq!(grads[1].is_none(), step % 3 == 1);
        optimizer.step(params, &grads, &|_| lr).unwrap();
    }
}

fn params() -> Vec<(String, Tensor)> {
    let named = |(name, t): (&str, tch::Tensor)| {
        let t = Tensor::from(t);
        t.set_requires_grad(true).unwrap();
        (name.to_owned(), t)
    };
    ["w", "b"].into_iter().zip(start()).map(named).collect()
}

fn check<C: nn::OptimizerConfig>(config: OptimizerConfig, other: C, lr: f64) {
    let theirs = theirs(other, lr);
    let straight = params();
    steps(config.build().unwrap().as_mut(), &straight, lr, 0..20);
    for ((name, ours), theirs) in straight.iter().zip(theirs) {
        let diff = ours.max_abs_diff(&theirs.into()).unwrap();
        assert!(diff < 1e-6, "{config:?} {name}: {diff}");
    }
    assert!(straight[0].1.max_abs_diff(&start()[0].shallow_clone().into()).unwrap() > 1e-2);

    // The same by way of a saved state.
    let resumed = params();
    let mut first = config.build().unwrap();
    steps(first.as_mut(), &resumed, lr, 0..7);
    let state = first.state().unwrap().into_iter().map(|(n, t)| (n, t.copy().unwrap())).collect();
    let mut second = config.build().unwrap();
    second.load_state(&resumed, state).unwrap();
    steps(second.as_mut(), &resumed, lr, 7..20);
    for (a, b) in straight.iter().zip(&resumed) {
        assert!(a.1.bit_equal(&b.1).unwrap(), "{config:?} {}", a.0);
    }
}

#[test]
fn adamw_is_libtorchs() {
    let config = AdamWConfig { betas: (0.8, 0.95), eps: 1e-6, weight_decay: 0.1, no_decay: vec![] };
    let other = nn::AdamW { beta1: 0.8, beta2: 0.95, wd: 0.1, eps: 1e-6, amsgrad: false };
    check(OptimizerConfig::AdamW(config), other, 0.02);
}

#[test]
fn sgd_is_libtorchs() {
    for (momentum, nesterov, wd) in
        [(0.0, false, 0.0), (0.0, false, 0.1), (0.9, false, 0.1), (0.9, true, 0.1)]
    {
        let config = SgdConfig { momentum, nesterov, weight_decay: wd };
        check(
            OptimizerConfig::Sgd(config),
            nn::Sgd { momentum, dampening: 0.0, wd, nesterov },
            0.02,
        );
    }
}

#[test]
fn rmsprop_is_libtorchs() {
    for (momentum, centered, wd) in [(0.0, false, 0.0), (0.0, true, 0.1), (0.9, true, 0.1)] {
        let (alpha, eps) = (0.9, 1e-3);
        let config = RmsPropConfig { alpha, eps, momentum, centered, weight_decay: wd };
        let other = nn::RmsProp { alpha, eps, wd, momentum, centered };
        check(OptimizerConfig::RmsProp(config), other, 0.02);
    }
}

fn with_decay_and_momentum() -> [OptimizerConfig; 5] {
    let (momentum, weight_decay) = (0.9, 0.5);
    [
        OptimizerConfig::AdamW(AdamWConfig { weight_decay, ..AdamWConfig::default() }),
        OptimizerConfig::Sgd(SgdConfig { momentum, ..SgdConfig::default() }),
        OptimizerConfig::Lion(LionConfig { weight_decay, ..LionConfig::default() }),
        OptimizerConfig::RmsProp(RmsPropConfig {
            momentum,
            weight_decay,
            ..RmsPropConfig::default()
        }),
        OptimizerConfig::Adafactor(AdafactorConfig {
            beta1: Some(0.9),
            weight_decay,
            ..AdafactorConfig::default()
        }),
    ]
}

#[test]
fn without_a_gradient_nothing_moves_and_nothing_is_kept() {
    for config in with_decay_and_momentum() {
        let params = params();
        let mut optimizer = config.build().unwrap();
        let grad = params[0].1.ones_like().unwrap();
        optimizer.step(&params, &[Some(grad), None], &|_| 0.1).unwrap();
        let [w, b] = start();
        assert!(params[0].1.max_abs_diff(&w.into()).unwrap() > 0.0);
        assert!(params[1].1.bit_equal(&b.into()).unwrap());
        assert!(optimizer.state().unwrap().iter().all(|(n, _)| n.ends_with(".w")));
    }
}

#[test]
fn what_has_momentum_and_no_gradient_stays_where_it_is() {
    for config in with_decay_and_momentum() {
        let params = params();
        let mut optimizer = config.build().unwrap();
        let ones = |i: usize| Some(params[i].1.ones_like().unwrap());
        optimizer.step(&params, &[ones(0), ones(1)], &|_| 0.1).unwrap();
        let kept = |optimizer: &dyn modl_train::Optimizer| -> Vec<(String, modl_core::Tensor)> {
            let state = optimizer.state().unwrap();
            let own = state.iter().filter(|(n, _)| n.ends_with(".b"));
            own.map(|(n, t)| (n.to_owned(), t.copy().unwrap())).collect()
        };
        let (momentum, value) = (kept(&*optimizer), params[1].1.copy().unwrap());
        assert!(!momentum.is_empty());
        optimizer.step(&params, &[ones(0), None], &|_| 0.1).unwrap();
        assert!(params[1].1.bit_equal(&value).unwrap());
        for ((name, old), (_, new)) in momentum.iter().zip(kept(&*optimizer)) {
            assert!(old.bit_equal(&new).unwrap(), "{name}");
        }
    }
}

#[test]
fn decay_spares_what_is_named() {
    let (weight_decay, no_decay) = (0.5, vec!["b".to_owned()]);
    for config in [
        OptimizerConfig::AdamW(AdamWConfig {
            weight_decay,
            no_decay: no_decay.clone(),
            ..AdamWConfig::default()
        }),
        OptimizerConfig::Lion(LionConfig {
            weight_decay,
            no_decay: no_decay.clone(),
            ..LionConfig::default()
        }),
        OptimizerConfig::Adafactor(AdafactorConfig {
            weight_decay,
            no_decay,
            ..AdafactorConfig::default()
        }),
    ] {
        let params = params();
        let zeros = |i: usize| Some(params[i].1.zeros_like().unwrap());
        let mut optimizer = config.build().unwrap();
        optimizer.step(&params, &[zeros(0), zeros(1)], &|_| 0.1).unwrap();
        let [w, b] = start();
        assert!(params[0].1.max_abs_diff(&(w * 0.95).into()).unwrap() < 1e-12, "{config:?}");
        assert!(params[1].1.bit_equal(&b.into()).unwrap(), "{config:?}");
    }
}

#[test]
fn a_foreign_or_partial_state_is_refused() {
    let params = params();
    let one = || Tensor::ones_like(&params[0].1).unwrap();
    let mut adamw = OptimizerConfig::default().build().unwrap();
    let mut load = |state: &[(&str, Tensor)]| {
        let state = state.iter().map(|(n, t)| (n.to_string(), t.clone())).collect();
        adamw.load_state(&params, state).unwrap_err().to_string()
    };
    assert!(load(&[("momentum.w", one())]).contains("unknown part"));
    assert!(load(&[("mean.x", one())]).contains("unknown trained parameter `x`"));
    assert!(load(&[("mean.w", one())]).contains("not whole"));
    let steps = one().select(0, 0).unwrap().narrow(0, 0, 1).unwrap();
    let flat = one().reshape(&[12]).unwrap();
    let e = load(&[("mean.w", flat), ("square.w", one()), ("steps.w", steps)]);
    assert!(e.contains("has shape [12]"), "{e}");
}

#[test]
fn numbers_out_of_range_are_refused() {
    let betas = AdamWConfig { betas: (1.0, 0.9), ..AdamWConfig::default() };
    assert!(OptimizerConfig::AdamW(betas).build().is_err());
    let nesterov = SgdConfig { nesterov: true, ..SgdConfig::default() };
    assert!(OptimizerConfig::Sgd(nesterov).build().is_err());
    for (config, key) in [
        (r#"{"type": "lion", "betas": [0.9, 1.0]}"#, "lion.betas"),
        (r#"{"type": "lion", "weight_decay": -1}"#, "lion.weight_decay"),
        (r#"{"type": "rmsprop", "alpha": 1}"#, "rmsprop.alpha"),
        (r#"{"type": "rmsprop", "eps": -1}"#, "rmsprop.eps"),
        (r#"{"type": "rmsprop", "momentum": 1.5}"#, "rmsprop.momentum"),
        (r#"{"type": "adafactor", "eps": [1e-30, -1]}"#, "adafactor.eps"),
        (r#"{"type": "adafactor", "eps": [0, 1e-3]}"#, "adafactor.eps"),
        (r#"{"type": "adafactor", "clip_threshold": 0}"#, "adafactor.clip_threshold"),
        (r#"{"type": "adafactor", "decay_rate": 0.8}"#, "adafactor.decay_rate"),
        (r#"{"type": "adafactor", "beta1": 1}"#, "adafactor.beta1"),
        (r#"{"type": "adafactor", "warmup_init": true}"#, "adafactor.warmup_init"),
    ] {
        let config: OptimizerConfig = serde_json::from_str(config).unwrap();
        let e = config.build().unwrap_err().to_string();
        assert!(e.contains(key), "{e}");
    }
}

/// Decay pulls a change to nothing, and leaves alone what does nothing elsewhere than at 0.
#[test]
fn gates_scales_and_gains_do_not_decay() {
    use modl_compute::{Boft, Bottleneck, Dora, Gated, Ia3, LnTuning, Lora, Residual, Scaling};

    let mut model = Modular::new(toy::backbone(), Seed(1)).unwrap();
    let learned = || Bottleneck {
        scaling: Scaling::Learned,
        ln_after: true,
        residual_before_ln: Residual::AfterLn,
        ..Bottleneck::pfeiffer()
    };
    let channel = Bottleneck { scaling: Scaling::Channel, ..Bottleneck::houlsby() };
    model.attach("ia3", Box::new(Ia3::default()), &Targets::names(["query"])).unwrap();
    model.attach("lora", Box::new(Lora::default()), &Targets::names(["query"])).unwrap();
    model.attach("dora", Box::new(Dora::default()), &Targets::names(["query"])).unwrap();
    let boft = Boft { boft_block_size: 4, ..Boft::default() };
    model.attach("boft", Box::new(boft), &Targets::names(["query"])).unwrap();
    model.attach("norms", Box::new(LnTuning::default()), &Targets::pattern("all-norm")).unwrap();
    let output = Targets::names(["layer.0.output"]);
    model.attach("adapter", Box::new(learned()), &output).unwrap();
    model.attach("channel", Box::new(channel), &output).unwrap();
    model.attach("gated", Box::new(Gated::new(learned())), &output).unwrap();

    let params: Vec<(String, Tensor)> = model
        .params()
        .iter()
        .filter(|(_, p)| !p.is_buffer())
        .map(|(n, p)| (n.to_owned(), p.tensor().clone()))
        .collect();
    let before: Vec<Tensor> = params.iter().map(|(_, t)| t.copy().unwrap()).collect();
    let grads: Vec<Option<Tensor>> =
        params.iter().map(|(_, t)| Some(t.zeros_like().unwrap())).collect();
    let config = AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() };
    let mut adamw = OptimizerConfig::AdamW(config).build().unwrap();
    adamw.step(&params, &grads, &|_| 0.1).unwrap();
    let mut stayed: Vec<&str> = Vec::new();
    for ((name, t), before) in params.iter().zip(&before) {
        let zero = before.abs().unwrap().sum().unwrap().item().unwrap() == 0.0;
        match t.bit_equal(before).unwrap() {
            true if !zero && !name.ends_with("bias") => stayed.push(name),
            _ => {}
        }
    }
    let query = "layer.0.query";
    let mut wanted = vec![
        format!("modules.ia3.{query}.ia3_l"),
        format!("modules.dora.{query}.lora_magnitude_vector"),
        format!("modules.boft.{query}.boft_s"),
        "modules.norms.layer.0.output.norm.ln_tuning_layers.weight".to_owned(),
        "modules.channel.layer.0.output.scaling".to_owned(),
    ];
    for name in ["adapter", "gated"] {
        for own in ["scaling", "adapter_norm_after.weight"] {
            wanted.push(format!("modules.{name}.layer.0.output.{own}"));
        }
    }
    wanted.push("modules.gated.layer.0.output.gate.weight".to_owned());
    wanted.sort();
    stayed.sort_unstable();
    assert_eq!(stayed, wanted);
}
