//! LoRA beyond a plain linear change: convolutions, tables of embeddings, a bias of its own, and
//! starts that are taken off again.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use modl_compute::{Lora, LoraInit, peft, register};
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::{Given, Identity, ModuleClaims, Sum, TinyBackbone, check_module, perturb};
use modl_core::{
    Attachment, Context, Device, Error, Host, Init, Kind, Modular, Module, ModuleConfig,
    ParamStore, Registry, Result, Scope, Seed, Select, Signal, Site, SiteKind, Targets, Tensor,
    Tensors, no_grad,
};

fn lora() -> Lora {
    Lora { r: 3, alpha: 5.0, ..Lora::default() }
}

fn check(config: &Lora, targets: &[&str], identity: Identity, parameters: usize) {
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims { identity, parameters, merges: true, smooth: true, task_vector: 0 };
    let make = || Box::new(config.clone()) as Box<dyn ModuleConfig>;
    check_module(&make, &Targets::names(targets.iter().copied()), &claims, &registry);
}

#[test]
fn the_contract_holds_at_every_kind_of_site_and_for_every_start() {
    // Kernels of 1 × 3 over 8 channels; 16 words of width 8.
    check(&lora(), &["conv"], Identity::Exact, 3 * (8 * 3 + 8));
    check(&lora(), &["embeddings.words"], Identity::Exact, 3 * (16 + 8));
    let bias = Lora { lora_bias: true, ..lora() };
    check(&bias, &["query", "conv"], Identity::Exact, 3 * (8 + 8) + 3 * (24 + 8) + 2 * 8);
    for init in [LoraInit::Pissa, LoraInit::Olora] {
        // A₀ and B₀ are buffers and do not count.
        let config = Lora { init, ..lora() };
        check(&config, &["query", "head"], Identity::Within(1e-5), 3 * (8 + 8) + 3 * (8 + 5));
    }
}

fn fixture(name: &str) -> Tensors {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

/// A site and its module, whose parameters can be set.
struct Place {
    site: Site,
    theta: Tensors,
    store: ParamStore,
    module: Box<dyn Module>,
}

impl Place {
    fn new(kind: SiteKind, theta: Tensors, config: &Lora) -> Result<Self> {
        let w = theta.need("weight").unwrap();
        let (input, output) = match kind {
            SiteKind::Embedding => (w.len_of(0), w.len_of(1)),
            _ => (w.len_of(1), w.len_of(0)),
        };
        let site = Site { path: "l".into(), kind, input, output, index: 0 };
        let mut store = ParamStore::new();
        let mut scope = Scope::new(&mut store, Seed(3)).on(w.kind(), Device::Cpu);
        let module = config.build(&Attachment::alone(&site, &theta), &mut scope)?;
        Ok(Place { site, theta, store, module })
    }

    /// Stride and padding are the convolution's own business.
    fn on_host<T>(&self, work: impl FnOnce(&Host) -> Result<T>) -> T {
        let f = |theta: &Tensors, x: &Signal, _: &Context| {
            let (w, b) = (theta.need("weight")?, theta.get("bias"));
            let y = match self.site.kind {
                SiteKind::Conv => x.x.conv2d(w, b, &[2, 2], &[1, 1], 1)?,
                SiteKind::Embedding => w.embedding(&x.x)?,
                _ => x.x.linear(w, b)?,
            };
            Ok(x.replace(y))
        };
        work(&Host::new(&self.site, &self.theta, &f)).unwrap()
    }

    fn forward(&self, x: &Tensor, cx: &Context) -> Tensor {
        self.on_host(|f| self.module.forward(f, &x.clone().into(), cx)).x
    }

    fn base(&self, x: &Tensor) -> Tensor {
        self.on_host(|f| f.call(&x.clone().into(), &Context::eval())).x
    }

    fn param(&self, name: &str) -> Tensor {
        self.store.get(name).unwrap().clone()
    }
}

#[test]
fn single_layers_compute_what_peft_computes() {
    let all = fixture("lora_layers.safetensors");
    let plain = Lora { r: 3, alpha: 4.0, ..Lora::default() };
    let cases = [
        ("conv", SiteKind::Conv, Lora { r: 2, alpha: 3.0, lora_bias: true, ..Lora::default() }),
        ("pissa", SiteKind::Linear, Lora { init: LoraInit::Pissa, ..plain.clone() }),
        ("olora", SiteKind::Linear, Lora { init: LoraInit::Olora, ..plain }),
    ];
    for (name, kind, config) in cases {
        let get = |key: &str| all.get(&format!("{name}.{key}"));
        let need = |key: &str| get(key).unwrap().clone();
        let theta = Tensors::new().with("weight", need("weight")).with("bias", need("bias"));
        let place = Place::new(kind, theta, &config).unwrap();
        if config.init != LoraInit::Kaiming {
            // Singular vectors are unique up to their sign, so that the products are compared.
            let product = |a: Tensor, b: Tensor| b.matmul(&a).unwrap();
            let theirs = product(need("start_A"), need("start_B"));
            for [a, b] in [["start_A", "start_B"], ["lora_A.weight", "lora_B.weight"]] {
                let ours = product(place.param(a), place.param(b));
                assert!(ours.all_close(&theirs, 1e-5, 1e-5).unwrap(), "{name}: {a}");
            }
        }
        for (key, p) in place.store.iter().filter(|(_, p)| !p.is_buffer()) {
            no_grad(|| p.tensor().clone().copy_from(get(key).unwrap())).unwrap();
        }
        let (x, y) = (need("x"), need("y"));
        let found = place.forward(&x, &Context::eval());
        assert!(found.all_close(&y, 1e-5, 1e-5).unwrap(), "{name}: {:?}", found.max_abs_diff(&y));
        assert!(found.max_abs_diff(&place.base(&x)).unwrap() > 1e-2, "{name}");
        let delta = place.on_host(|f| place.module.delta(f, &x.clone().into(), &Context::eval()));
        let sum = place.base(&x).add(&delta.unwrap()).unwrap();
        assert!(sum.all_close(&y, 1e-5, 1e-5).unwrap(), "{name}: delta");
        let theta = place.module.compose(&place.theta).unwrap().unwrap();
        let merged = place.on_host(|f| f.call_with(&theta, &x.clone().into(), &Context::eval())).x;
        assert!(merged.all_close(&y, 1e-5, 1e-5).unwrap(), "{name}: merged");
    }
}

fn numbers(shape: &[i64], name: &str) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(5).child(name), Kind::Double, Device::Cpu).unwrap()
}

#[test]
fn pissa_starts_with_the_best_approximation_of_its_rank() {
    let theta = Tensors::new().with("weight", numbers(&[6, 9], "w"));
    let config = Lora { r: 2, alpha: 6.0, init: LoraInit::Pissa, ..Lora::default() };
    let place = Place::new(SiteKind::Linear, theta, &config).unwrap();
    let w = place.theta.need("weight").unwrap();
    let product = place.param("start_B").matmul(&place.param("start_A")).unwrap();
    let rest = w.sub(&product.mul_scalar(3.0).unwrap()).unwrap();
    // Eckart and Young: what is left has the smaller singular values.
    let square = |v: f64| v * v;
    let tail: f64 =
        w.svd().unwrap().1.to_vec::<f64>().unwrap()[2..].iter().map(|s| square(*s)).sum();
    assert!((square(rest.norm().unwrap().item().unwrap()) - tail).abs() < 1e-10);
    let norm = |t: Tensor| t.norm().unwrap().item().unwrap();
    assert!((norm(place.param("start_A")) - norm(place.param("start_B"))).abs() < 1e-12);
}

#[test]
fn a_table_changes_by_the_rows_that_are_looked_up() {
    let theta = Tensors::new().with("weight", numbers(&[7, 4], "table"));
    let config = Lora { init: LoraInit::Random, dropout: 0.5, ..lora() };
    let place = Place::new(SiteKind::Embedding, theta, &config).unwrap();
    let (a, b) = (place.param("lora_embedding_A"), place.param("lora_embedding_B"));
    assert_eq!((a.size(), b.size()), (vec![3, 7], vec![4, 3]));
    let ids = [6i64, 0, 3, 3, 1, 6];
    let x = Tensor::from_slice(&ids, &[2, 3], Device::Cpu).unwrap();
    let v = |t: &Tensor| t.to_vec::<f64>().unwrap();
    let (w, a, b) = (v(place.theta.need("weight").unwrap()), v(&a), v(&b));
    let mut expected = Vec::new();
    for id in ids.map(|i| i as usize) {
        for d in 0..4 {
            let change: f64 = (0..3).map(|k| b[d * 3 + k] * a[k * 7 + id]).sum();
            expected.push(w[id * 4 + d] + 5.0 / 3.0 * change);
        }
    }
    // Ids cannot be dropped, so that training and evaluation agree.
    for cx in [Context::eval(), Context::train(Seed(1), 0)] {
        let y = v(&place.forward(&x, &cx));
        assert!(y.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-12), "{y:?}");
    }
}

#[test]
fn dropout_at_a_convolution_is_on_the_change_alone() {
    let theta =
        Tensors::new().with("weight", numbers(&[4, 3, 3, 3], "w")).with("bias", numbers(&[4], "b"));
    let config = Lora { init: LoraInit::Random, lora_bias: true, dropout: 0.5, ..lora() };
    let place = Place::new(SiteKind::Conv, theta, &config).unwrap();
    let (x, cx) = (numbers(&[2, 3, 6, 6], "x"), Context::train(Seed(2), 1));
    let y = place.forward(&x, &cx);
    // Outside of a model the module's place has no name.
    let dropped = modl_core::dropout(&x, 0.5, cx.draw("")).unwrap();
    let (a, b) = (place.param("lora_A.weight"), place.param("lora_B.weight"));
    let change = dropped.conv2d(&a, None, &[2, 2], &[1, 1], 1).unwrap();
    let bias = place.param("lora_B.bias");
    let change = change.conv2d(&b, Some(&bias), &[1, 1], &[0, 0], 1).unwrap();
    let expected = place.base(&x).add(&change.mul_scalar(5.0 / 3.0).unwrap()).unwrap();
    assert!(y.all_close(&expected, 1e-12, 1e-12).unwrap());
    assert!(y.max_abs_diff(&place.forward(&x, &Context::eval())).unwrap() > 1e-2);
}

fn tiny() -> Modular {
    Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap()
}

fn logits(model: &mut Modular) -> Tensor {
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    let inputs = TinyBackbone::inputs(2, 5, Seed(6)).unwrap();
    model.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().clone()
}

#[test]
fn a_start_that_is_taken_off_is_saved_as_plain_lora_of_twice_the_rank() {
    let patterns = Lora {
        rank_pattern: [("value", 2)].into_iter().collect(),
        alpha_pattern: [("value", 3.0)].into_iter().collect(),
        ..lora()
    };
    for (init, use_rslora) in [(LoraInit::Pissa, false), (LoraInit::Olora, true)] {
        let mut model = tiny();
        let config = Lora { init, use_rslora, ..patterns.clone() };
        let targets = Targets::names(["query", "value"]);
        model.attach("a", Box::new(config), &targets).unwrap();
        perturb(&model, &Select::new("*lora_*"), 0.3, Seed(3)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        peft::save(&model, "a", dir.path()).unwrap();
        let mut again = tiny();
        peft::load(&mut again, dir.path(), Some("a")).unwrap();
        let config = again.recipe("a").unwrap().0.to_json().unwrap();
        assert_eq!((&config["r"], &config["rank_pattern"]["value"]), (&6.into(), &4.into()));
        assert_eq!(config["init"], "kaiming");
        let base = logits(&mut tiny_with_nothing());
        let (a, b) = (logits(&mut model), logits(&mut again));
        assert!(a.all_close(&b, 1e-5, 1e-5).unwrap(), "{init:?}");
        assert!(a.max_abs_diff(&base).unwrap() > 1e-2);
    }
}

/// A fresh LoRA changes nothing.
fn tiny_with_nothing() -> Modular {
    let mut model = tiny();
    model.attach("a", Box::new(lora()), &Targets::names(["query"])).unwrap();
    model
}

#[test]
fn the_frozen_table_in_a_peft_file_is_let_through() {
    let mut model = tiny();
    let targets = Targets::names(["embeddings.words", "query"]);
    model.attach("a", Box::new(lora()), &targets).unwrap();
    perturb(&model, &Select::all(), 0.3, Seed(3)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    peft::save(&model, "a", dir.path()).unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let mut all = Checkpoint::open(&path).unwrap().tensors(Device::Cpu).unwrap();
    let key = |site: &str| format!("base_model.model.{site}.base_layer.weight");
    all.push((key("embeddings.words"), Tensor::ones(&[16, 8], Kind::Float, Device::Cpu).unwrap()));
    let save = |all: &[(String, Tensor)]| {
        let all = all.iter().map(|(n, t)| (n.as_str(), t));
        checkpoint::save(&path, all, Default::default()).unwrap();
    };
    save(&all);
    let mut again = tiny();
    peft::load(&mut again, dir.path(), Some("a")).unwrap();
    assert!(logits(&mut again).bit_equal(&logits(&mut model)).unwrap());
    // Beside anything but a table it says that the weight was changed.
    all.push((key("layer.0.query"), Tensor::ones(&[8, 8], Kind::Float, Device::Cpu).unwrap()));
    save(&all);
    let e = peft::load(&mut tiny(), dir.path(), None).unwrap_err();
    assert!(matches!(&e, Error::Mismatch(m) if m.unexpected.len() == 1), "{e}");
}

#[test]
fn what_does_not_go_together_is_refused() {
    let linear = || Tensors::new().with("weight", numbers(&[4, 5], "w"));
    let table = || Tensors::new().with("weight", numbers(&[7, 4], "w"));
    let bias = Lora { lora_bias: true, ..lora() };
    let pissa = Lora { init: LoraInit::Pissa, ..lora() };
    let cases = [
        (SiteKind::Embedding, table(), bias.clone(), "lora_bias"),
        (SiteKind::Linear, linear(), Lora { init: LoraInit::Olora, ..bias }, "lora_bias"),
        (SiteKind::Embedding, table(), pissa.clone(), "Pissa"),
        (SiteKind::Linear, linear(), Lora { r: 5, ..pissa.clone() }, "lora.r"),
        (SiteKind::Linear, linear(), Lora { alpha: -1.0, ..pissa }, "lora.alpha"),
    ];
    for (kind, theta, config, named) in cases {
        let e = Place::new(kind, theta, &config).err().unwrap().to_string();
        assert!(e.contains(named), "{e}");
    }
}

#[test]
fn starts_and_biases_are_not_averaged_with_others() {
    let signature = |config: Lora| {
        let theta = Tensors::new().with("weight", numbers(&[4, 5], "w"));
        Place::new(SiteKind::Linear, theta, &config).unwrap().module.signature()
    };
    let all = [
        lora(),
        Lora { lora_bias: true, ..lora() },
        Lora { init: LoraInit::Pissa, ..lora() },
        Lora { init: LoraInit::Olora, ..lora() },
    ];
    let all: std::collections::BTreeSet<String> = all.map(signature).into();
    assert_eq!(all.len(), 4, "{all:?}");
    assert_eq!(signature(lora()), signature(Lora { init: LoraInit::Gaussian, ..lora() }));
}
