//! A wider module computes what several narrow ones add up to, and has as many parameters.
#![allow(clippy::unwrap_used)]

use modl_compute::{Bottleneck, FeedForward, Ia3, Lora, register};
use modl_core::{
    Attachment, Context, Device, Host, Init, Kind, Module, ModuleConfig, ParamStore, Registry,
    Scope, Seed, Signal, Site, SiteKind, Tensor, Tensors, no_grad,
};

const WIDTH: i64 = 96;

fn site(kind: SiteKind) -> Site {
    Site { path: "l".into(), kind, input: WIDTH, output: WIDTH, index: 0 }
}

/// A module with random parameters.
fn made(config: &dyn ModuleConfig, kind: SiteKind, seed: u64) -> (Box<dyn Module>, ParamStore) {
    let (site, mut store) = (site(kind), ParamStore::new());
    let norm = |v: f64| Tensor::full(&[WIDTH], v, Kind::Double, Device::Cpu).unwrap();
    let theta = Tensors::new().with("weight", norm(1.0)).with("bias", norm(0.0));
    let mut scope = Scope::new(&mut store, Seed(3)).on(Kind::Double, Device::Cpu);
    let module = config.build(&Attachment::alone(&site, &theta), &mut scope).unwrap();
    for (name, p) in store.iter() {
        let seed = Seed(seed).child(name);
        let t = Init::Normal(0.3).tensor(&p.tensor().size(), seed, Kind::Double, Device::Cpu);
        no_grad(|| p.tensor().clone().copy_from(&t.unwrap())).unwrap();
    }
    (module, store)
}

fn numbers(store: &ParamStore) -> usize {
    store.iter().map(|(_, p)| p.tensor().numel()).sum()
}

/// What a module at a site whose function is 0 says of x.
fn said(module: &dyn Module, x: &Tensor) -> Tensor {
    let f = |_: &Tensors, x: &Signal, _: &Context| Ok(x.replace(x.x.zeros_like()?));
    let (site, theta) = (site(SiteKind::Linear), Tensors::new());
    module.forward(&Host::new(&site, &theta, &f), &x.clone().into(), &Context::eval()).unwrap().x
}

#[test]
fn three_modules_added_up_are_one_that_is_three_times_as_wide() {
    let x = Init::Normal(1.0).tensor(&[2, 5, WIDTH], Seed(9), Kind::Double, Device::Cpu).unwrap();
    let lora = Lora { r: 4, alpha: 6.0, ..Lora::default() };
    let ff = FeedForward { inner: Some(7), ..FeedForward::default() };
    let configs: [Box<dyn ModuleConfig>; 4] = [
        Box::new(lora.clone()),
        Box::new(Lora { use_rslora: true, ..lora }),
        Box::new(ff.clone()),
        Box::new(FeedForward { gated: false, bias: true, ..ff }),
    ];
    for config in configs {
        let narrow: Vec<_> = (0..3).map(|i| made(config.as_ref(), SiteKind::Linear, i)).collect();
        let wide = config.widened(3.0).unwrap();
        let (wide, store) = made(wide.as_ref(), SiteKind::Linear, 7);
        // Side by side where the wide one is wider, and added up where it is not.
        for (name, p) in store.iter() {
            let parts: Vec<Tensor> =
                narrow.iter().map(|(_, s)| s.get(name).unwrap().clone()).collect();
            let (whole, part) = (p.tensor().size(), parts[0].size());
            let new = match (0..whole.len()).find(|d| whole[*d] != part[*d]) {
                Some(dim) => Tensor::cat(&parts, dim as i64).unwrap(),
                None => parts[0].add(&parts[1]).unwrap().add(&parts[2]).unwrap(),
            };
            no_grad(|| p.tensor().clone().copy_from(&new)).unwrap();
        }
        let sum = narrow.iter().map(|(module, _)| said(module.as_ref(), &x));
        let sum = sum.reduce(|a, b| a.add(&b).unwrap()).unwrap();
        let off = said(wide.as_ref(), &x).max_abs_diff(&sum).unwrap();
        assert!(off < 1e-11, "{config:?}: {off}");
        let biases = narrow[0].1.iter().filter(|(n, _)| n.ends_with("down_proj.bias"));
        let shared: usize = biases.map(|(_, p)| p.tensor().numel()).sum();
        assert_eq!(numbers(&store) + 2 * shared, 3 * numbers(&narrow[0].1), "{config:?}");
    }
}

#[test]
fn a_bottleneck_times_any_factor_has_the_width_of_the_product() {
    for reduction in [16.0, 8.0, 3.0, 2.0] {
        let config = Bottleneck { reduction_factor: reduction, ..Bottleneck::houlsby() };
        let b = (WIDTH as f64 / reduction).floor();
        for factor in [0.5, 1.0, 2.0, 3.0, 5.0, 7.0] {
            let wide = config.widened(factor).unwrap();
            let (_, store) = made(wide.as_ref(), SiteKind::Sublayer, 1);
            let width = (b * factor) as i64;
            // Down with its bias, up with its bias.
            let wanted = width * WIDTH + width + WIDTH * width + WIDTH;
            assert_eq!(numbers(&store) as i64, wanted, "{reduction}, {factor}");
        }
    }
}

#[test]
fn methods_without_a_width_say_so() {
    assert!(Ia3::default().widened(2.0).is_none());
    assert!(FeedForward::default().widened(2.0).is_none());
    let registry = Registry::new().with(register).unwrap();
    let wide = registry.modules.entries().iter().filter(|e| {
        let config = (e.parse)(serde_json::json!({}));
        config.is_ok_and(|c| c.widened(2.0).is_some())
    });
    let wide: Vec<&str> = wide.map(|e| e.name).collect();
    assert_eq!(wide, ["lora", "bottleneck"]);
}
