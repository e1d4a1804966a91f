//! EfficientNet-Lite against PyTorch: a tiny one with sides and strides of every kind, and the
//! published Lite0.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::Checkpoint;
use modl_core::{
    Backbone, Context, Device, Error, Kind, Layers, Seed, SiteKind, Tensor, Tensors, no_grad,
};
use modl_models::{EfficientNet, EfficientNetConfig, LoadOptions, open};
use serde_json::json;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn golden(name: &str) -> Tensors {
    let file = Checkpoint::open(fixture(name).join("golden.safetensors")).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn run(net: &dyn Backbone, pixels: &Tensor) -> Result<Tensors, Error> {
    let inputs = Tensors::new().with("pixel_values", pixels.clone());
    no_grad(|| net.forward(&inputs, &Layers::none(net.sites().len()), &Context::eval()))
}

#[track_caller]
fn same_as_pytorch(net: &dyn Backbone, golden: &Tensors) {
    let found = run(net, golden.need("pixels").unwrap()).unwrap();
    for name in ["features", "logits"] {
        let (found, wanted) = (found.need(name).unwrap(), golden.need(name).unwrap());
        let apart = found.max_abs_diff(wanted).unwrap();
        eprintln!("{name}: {apart:.1e} apart");
        assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}: {apart}");
    }
}

#[test]
fn a_tiny_one_is_pytorchs() {
    let net = open(fixture("efficientnet"), &LoadOptions::default()).unwrap();
    same_as_pytorch(net.as_ref(), &golden("efficientnet"));
    let kinds = |kind| net.sites().iter().filter(|s| s.kind == kind).count();
    // Of the six blocks the first has no expansion.
    let all = [SiteKind::Conv, SiteKind::BatchNorm, SiteKind::ConvBlock, SiteKind::Linear];
    assert_eq!(all.map(kinds), [19, 19, 6, 1]);
    for site in net.sites().iter().filter(|s| s.kind == SiteKind::BatchNorm) {
        let theta = net.theta(site).unwrap();
        assert_eq!(theta.names().count(), 4, "{}", site.path);
        assert_eq!(theta.need("running_var").unwrap().size(), [site.output], "{}", site.path);
    }
}

#[test]
#[ignore = "needs: cargo xtask assets efficientnet-lite0"]
fn lite0_is_pytorchs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../assets/efficientnet-lite0/efficientnet-lite0.pth");
    if !path.exists() {
        // An optional asset, which the run of all tests does not fetch.
        eprintln!("skipped: `cargo xtask assets efficientnet-lite0` fetches the model");
        return;
    }
    let net = open(path, &LoadOptions::default()).unwrap();
    same_as_pytorch(net.as_ref(), &golden("real_efficientnet_lite0"));
}

#[test]
fn an_untrained_one_keeps_the_shapes_that_it_says() {
    let settings = EfficientNetConfig { stem: 8, features: 24, classes: 3, ..Default::default() };
    let net = EfficientNet::untrained(settings, Seed(1), Kind::Float, Device::Cpu).unwrap();
    let pixels = Tensor::ones(&[2, 3, 33, 20], Kind::Float, Device::Cpu).unwrap();
    let found = run(&net, &pixels).unwrap();
    assert_eq!(found.need("features").unwrap().size(), [2, 24]);
    assert_eq!(found.need("logits").unwrap().size(), [2, 3]);
    assert!(
        found.need("logits").unwrap().is_finite().unwrap().all().unwrap().item().unwrap() > 0.0
    );
    let e = run(&net, &pixels.narrow(1, 0, 2).unwrap()).unwrap_err().to_string();
    assert!(e.contains("pixel_values: is [2, 2, 33, 20]"), "{e}");
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let stage = json!({"repeats": 1, "kernel": 3, "stride": 1, "expand": 1, "output": 8});
    for (setting, value, words) in [
        ("stem", json!(0), "stem: 0 is to be positive"),
        ("classes", json!(i64::MAX), "classes: 9223372036854775807 is too large"),
        ("dropout", json!(1.0), "dropout"),
        ("squeeze", json!(0.25), "unknown field `squeeze`"),
        ("kernel", json!(4), "kernel: 4 is to be odd"),
        ("stride", json!(0), "stride: 0 is to be positive"),
        ("repeats", json!(1_000_000), "1000000 blocks are too many"),
    ] {
        let mut config = json!({"stages": [stage]});
        match config["stages"][0].get_mut(setting) {
            Some(own) => *own = value,
            None => config[setting] = value,
        }
        let e = EfficientNetConfig::read(&config).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}
