//! Modules at the sites of a convolutional backbone: where they start, what they change, and that
//! they can be trained there.
#![allow(clippy::unwrap_used, clippy::panic)]

use modl_compute::{ConditionalNorm, Film, Lora, ResidualAdapter, ResidualPlacement};
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Context, Device, Init, Kind, Layers, Modular, ModuleConfig, Seed, Select, Targets,
    Tensor, Tensors, no_grad,
};
use modl_models::{EfficientNet, EfficientNetConfig, Stage};

fn net() -> EfficientNet {
    let stage =
        |kernel, stride, expand, output| Stage { repeats: 2, kernel, stride, expand, output };
    let settings = EfficientNetConfig {
        stem: 6,
        stages: vec![stage(3, 1, 1, 6), stage(5, 2, 3, 8)],
        features: 10,
        classes: 10,
        ..EfficientNetConfig::default()
    };
    EfficientNet::untrained(settings, Seed(7), Kind::Float, Device::Cpu).unwrap()
}

fn model(module: Box<dyn ModuleConfig>, targets: &str) -> Modular {
    let mut model = Modular::new(net(), Seed(1)).unwrap();
    model.attach("a", module, &Targets::pattern(targets)).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

fn inputs() -> Tensors {
    let pixels = Init::Normal(1.0).tensor(&[2, 3, 12, 9], Seed(3), Kind::Float, Device::Cpu);
    Tensors::new().with("pixel_values", pixels.unwrap())
}

fn output(model: &Modular, name: &str) -> Tensor {
    model.forward(&inputs(), &Context::eval()).unwrap().need(name).unwrap().clone()
}

#[test]
fn modules_for_images_start_as_nothing_and_learn_at_every_site() {
    let series = ResidualAdapter { placement: ResidualPlacement::Series };
    let all: [(Box<dyn ModuleConfig>, &str); 7] = [
        (Box::new(ResidualAdapter::default()), "all-conv"),
        (Box::new(series), "all-conv"),
        (Box::new(Lora::default()), "all-conv"),
        (Box::new(Film::default()), "all-conv"),
        (Box::new(Film::default()), "all-batch-norm"),
        (Box::new(Film::default()), "all-conv-block"),
        (Box::new(ConditionalNorm::default()), "all-batch-norm"),
    ];
    let (net, cx) = (net(), Context::eval());
    let base = net.forward(&inputs(), &Layers::none(net.sites().len()), &cx).unwrap();
    let base = base.need("logits").unwrap();
    for (module, targets) in all {
        let kind = module.kind();
        let model = model(module, targets);
        let adapted = output(&model, "logits");
        let select = Select::new("modules.a.*");
        assert!(adapted.all_close(base, 1e-6, 1e-5).unwrap(), "{kind} at {targets}");
        no_grad(|| {
            for (name, t) in model.params().select(&select).filter(|(_, t)| t.requires_grad()) {
                let noise = Init::Normal(0.3).tensor(
                    &t.size(),
                    Seed(5).child(name),
                    Kind::Float,
                    Device::Cpu,
                );
                t.clone().copy_from(&t.add(&noise.unwrap()).unwrap()).unwrap();
            }
        });
        let changed = output(&model, "logits");
        assert!(changed.max_abs_diff(base).unwrap() > 1e-3, "{kind} at {targets}");
        let own: Vec<(&str, &Tensor)> = model.params().trainable().collect();
        let leaves: Vec<&Tensor> = own.iter().map(|(_, t)| *t).collect();
        let gradients = changed.square().unwrap().sum().unwrap().gradients(&leaves, false).unwrap();
        for ((name, _), gradient) in own.iter().zip(gradients) {
            let gradient = gradient.unwrap_or_else(|| panic!("{name} has no gradient"));
            let finite = gradient.is_finite().unwrap().all().unwrap().item().unwrap();
            assert!(finite > 0.0, "{name}");
        }
    }
}

#[test]
fn film_at_a_batch_norm_works_channel_by_channel() {
    let model = model(Box::new(Film::default()), r"_bn1");
    let shift: Vec<f32> = (0..10).map(|c| 0.5 * c as f32).collect();
    no_grad(|| {
        let delta = model.params().get("modules.a._bn1.delta").unwrap().clone();
        delta.clone().copy_from(&delta.ones_like().unwrap().neg().unwrap()).unwrap();
        let mut own = model.params().get("modules.a._bn1.shift").unwrap().clone();
        own.copy_from(&Tensor::from_slice(&shift, &[10], Device::Cpu).unwrap()).unwrap();
    });
    // With Δ = −1 all that is left is β, which ReLU6 and the mean over positions keep.
    let features = output(&model, "features").to_vec::<f32>().unwrap();
    assert_eq!(features, [shift.clone(), shift].concat());
}

/// The first 40 scans of handwritten digits of the UCI repository (Alpaydin & Kaynak 1998): 64 grey
/// values from 0 to 16 and the digit in each line.
fn digits() -> (Tensor, Tensor) {
    let text = include_str!("fixtures/digits.csv");
    let lines = text.lines().map(|l| l.split(',').map(|v| v.parse::<i64>().unwrap()));
    let lines: Vec<Vec<i64>> = lines.map(Iterator::collect).collect();
    let grey: Vec<f32> =
        lines.iter().flat_map(|l| &l[..64]).map(|v| *v as f32 / 8.0 - 1.0).collect();
    let classes: Vec<i64> = lines.iter().map(|l| l[64]).collect();
    let n = lines.len() as i64;
    let grey = Tensor::from_slice(&grey, &[n, 1, 8, 8], Device::Cpu).unwrap();
    let classes = Tensor::from_slice(&classes, &[n], Device::Cpu).unwrap();
    (grey.expand(&[n, 3, 8, 8]).unwrap().contiguous().unwrap(), classes)
}

#[test]
fn residual_adapters_learn_real_digits_in_a_frozen_backbone() {
    let (pixels, classes) = digits();
    let inputs = Tensors::new().with("pixel_values", pixels);
    for placement in [ResidualPlacement::Parallel, ResidualPlacement::Series] {
        let model = model(Box::new(ResidualAdapter { placement }), "all-conv");
        model.train_only(&Select::new("modules.a.*")).unwrap();
        let named = model.trainable();
        let leaves: Vec<&Tensor> = named.iter().map(|(_, t)| t).collect();
        let loss = |cx: &Context| {
            let outputs = model.forward(&inputs, cx).unwrap();
            outputs.need("logits").unwrap().cross_entropy(&classes).unwrap()
        };
        let of_base = |model: &Modular| -> Vec<Tensor> {
            model.backbone().params().iter().map(|(_, p)| p.tensor().copy().unwrap()).collect()
        };
        let (theta, steps) = (of_base(&model), 400);
        let before = no_grad(|| loss(&Context::eval())).item().unwrap();
        for step in 0..steps {
            let gradients = loss(&Context::train(Seed(4), step)).gradients(&leaves, false).unwrap();
            let mut of_step = Tensors::new();
            no_grad(|| {
                for ((name, t), g) in named.iter().zip(gradients) {
                    let g = g.unwrap();
                    t.clone().add_in_place(&g.mul_scalar(-1.0).unwrap()).unwrap();
                    of_step.set(name.clone(), g);
                }
            });
            model.after_step(&of_step, step + 1, steps).unwrap();
        }
        let after = no_grad(|| loss(&Context::eval())).item().unwrap();
        eprintln!("{placement:?}: the loss goes from {before:.3} to {after:.3}");
        assert!(after < 0.8 * before, "{placement:?}");
        for (then, now) in theta.iter().zip(of_base(&model)) {
            assert!(then.bit_equal(&now).unwrap(), "{placement:?} has changed the backbone");
        }
    }
}
