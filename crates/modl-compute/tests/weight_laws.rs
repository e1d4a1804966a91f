//! Laws of changes of a weight, whatever the numbers: merged and taken back is the weight, a batch
//! is its rows, the order of modules does not matter, rotations are rotations, projections are
//! linear.
#![allow(clippy::unwrap_used)]

use modl_compute::low_rank::{Boft, Fastfood, FourierFt, Loha, Lokr, LokrInit, Oft, Vera};
use modl_compute::{Dora, Ia3, Lora, LoraInit};
use modl_core::testing::{Given, Sum, TinyBackbone, perturb};
use modl_core::{
    Attachment, Context, Device, Host, Init, Kind, Modular, Module, ModuleConfig, ParamStore,
    Scope, Seed, Select, Signal, Site, SiteKind, Targets, Tensor, Tensors, Weights, no_grad,
};
use proptest::prelude::*;

type Make = fn() -> Box<dyn ModuleConfig>;

/// Methods that change a weight of width 8.
const METHODS: [(&str, Make); 9] = [
    ("lora", || Box::new(Lora { r: 2, ..Lora::default() })),
    ("dora", || Box::new(Dora(Lora { r: 2, ..Lora::default() }))),
    ("loha", || Box::new(Loha { r: 2, ..Loha::default() })),
    ("lokr", || Box::new(Lokr { r: 1, ..Lokr::default() })),
    ("oft", || Box::new(Oft { oft_block_size: 4, ..Oft::default() })),
    ("boft", || Box::new(Boft { boft_n_butterfly_factor: 2, ..Boft::default() })),
    ("fourierft", || Box::new(FourierFt { n_frequency: 20, ..FourierFt::default() })),
    ("vera", || Box::new(Vera { r: 3, ..Vera::default() })),
    ("ia3", || Box::new(Ia3::default())),
];

fn method() -> impl Strategy<Value = (&'static str, Make)> {
    prop::sample::select(METHODS.to_vec())
}

/// Modules at `query` and `value` whose values do not depend on the order in which they come.
fn model(kind: Kind, modules: &[(&str, Make)], seed: u64) -> Modular {
    let mut m = Modular::new(TinyBackbone::new(Seed(seed), kind).unwrap(), Seed(seed)).unwrap();
    for (name, make) in modules {
        m.attach(name, make(), &Targets::names(["query", "value"])).unwrap();
    }
    perturb(&m, &Select::all(), 0.3, Seed(seed).child("perturb")).unwrap();
    m.aggregate(Box::new(Sum::default())).unwrap();
    m
}

fn logits(m: &Modular, inputs: &Tensors) -> Tensor {
    m.forward(inputs, &Context::eval()).unwrap().need("logits").unwrap().clone()
}

fn theta(m: &Modular) -> Vec<Vec<u8>> {
    m.backbone().params().iter().map(|(_, p)| p.tensor().to_bytes().unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn merging_and_taking_back_any_number_of_times_is_nothing(
        one in method(),
        other in method(),
        bf16: bool,
        times in prop::collection::vec(any::<bool>(), 1..5),
        seed in 0u64..1000,
    ) {
        let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
        let mut m = model(kind, &[("a", one.1), ("b", other.1)], seed);
        let before = theta(&m);
        for first in times {
            m.merge(if first { "a" } else { "b" }).unwrap();
            prop_assert_ne!(&theta(&m), &before, "{} {}", one.0, other.0);
            m.unmerge().unwrap();
            prop_assert_eq!(&theta(&m), &before, "{} {}", one.0, other.0);
        }
        m.unmerge().unwrap();
        prop_assert_eq!(theta(&m), before);
    }

    #[test]
    fn a_batch_is_its_rows(
        methods in prop::collection::vec(method(), 3),
        table in prop::collection::vec(prop::option::of(0usize..3), 1..7),
        seed in 0u64..1000,
    ) {
        let named: Vec<(&str, Make)> =
            ["a", "b", "c"].into_iter().zip(&methods).map(|(n, m)| (n, m.1)).collect();
        let mut m = model(Kind::Float, &named, seed);
        let rows = table.len() as i64;
        let inputs = TinyBackbone::inputs(rows, 5, Seed(seed)).unwrap();
        m.route(Given::rows(&table), false).unwrap();
        let batched = logits(&m, &inputs);
        for (r, choice) in table.iter().enumerate() {
            let alone = inputs.map(|_, t| t.narrow(0, r as i64, 1)).unwrap();
            m.route(Given::rows(&[*choice]), false).unwrap();
            let row = batched.narrow(0, r as i64, 1).unwrap();
            prop_assert!(row.all_close(&logits(&m, &alone), 1e-5, 1e-5).unwrap(), "row {}", r);
        }
    }

    #[test]
    fn the_order_of_a_bank_does_not_matter_and_changes_commute(
        methods in prop::collection::vec(method(), 4),
        alpha in prop::collection::vec(-1.0f64..1.0, 4),
        order in Just([0usize, 1, 2, 3]).prop_shuffle(),
        seed in 0u64..1000,
    ) {
        let names = ["a", "b", "c", "d"];
        let inputs = TinyBackbone::inputs(3, 5, Seed(seed)).unwrap();
        let out = |order: &[usize]| {
            let named: Vec<(&str, Make)> = order.iter().map(|i| (names[*i], methods[*i].1)).collect();
            let mut m = model(Kind::Float, &named, seed);
            let weights = order.iter().enumerate().map(|(j, i)| (j, alpha[*i])).collect();
            m.route(Box::new(Given(Weights::Fixed(weights))), false).unwrap();
            logits(&m, &inputs)
        };
        let (plain, shuffled) = (out(&[0, 1, 2, 3]), out(&order));
        let apart = plain.max_abs_diff(&shuffled).unwrap();
        prop_assert!(plain.all_close(&shuffled, 1e-5, 1e-5).unwrap(), "{}: {:?}", apart, methods);
    }
}

fn draw(shape: &[i64], seed: u64, name: &str) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(seed).child(name), Kind::Double, Device::Cpu).unwrap()
}

/// A module at a linear layer in f64, with θ and the parameters that it has.
struct Place {
    site: Site,
    theta: Tensors,
    store: ParamStore,
    module: Box<dyn Module>,
}

impl Place {
    fn new(config: &dyn ModuleConfig, weight: Tensor) -> Self {
        let (input, output) = (weight.len_of(1), weight.len_of(0));
        let site = Site { path: "l".into(), kind: SiteKind::Linear, input, output, index: 0 };
        let theta = Tensors::new().with("weight", weight);
        let mut store = ParamStore::new();
        let mut scope = Scope::new(&mut store, Seed(3)).on(Kind::Double, Device::Cpu);
        let module = config.build(&Attachment::alone(&site, &theta), &mut scope).unwrap();
        Place { site, theta, store, module }
    }

    fn set(&self, name: &str, value: &Tensor) {
        no_grad(|| self.store.get(name).unwrap().clone().copy_from(value)).unwrap();
    }

    fn merged(&self) -> Tensor {
        self.module.compose(&self.theta).unwrap().unwrap().need("weight").unwrap().detach().unwrap()
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let f = |theta: &Tensors, x: &Signal, _: &Context| {
            Ok(x.replace(x.x.linear(theta.need("weight")?, None)?))
        };
        let host = Host::new(&self.site, &self.theta, &f);
        self.module.forward(&host, &x.clone().into(), &Context::eval()).unwrap().x
    }
}

fn identity(n: i64) -> Tensor {
    Tensor::eye(n, Kind::Double, Device::Cpu).unwrap()
}

/// A ⊗ B by its definition: [A ⊗ B][i·b + k, j·d + l] = A[i, j]·B[k, l].
fn kronecker(a: &Tensor, b: &Tensor) -> Tensor {
    let (ra, ca) = (a.len_of(0) as usize, a.len_of(1) as usize);
    let (rb, cb) = (b.len_of(0) as usize, b.len_of(1) as usize);
    let (a, b) = (a.to_vec::<f64>().unwrap(), b.to_vec::<f64>().unwrap());
    let mut all = vec![0.0; ra * ca * rb * cb];
    for (i, j) in (0..ra).flat_map(|i| (0..ca).map(move |j| (i, j))) {
        for (k, l) in (0..rb).flat_map(|k| (0..cb).map(move |l| (k, l))) {
            all[(i * rb + k) * ca * cb + j * cb + l] = a[i * ca + j] * b[k * cb + l];
        }
    }
    Tensor::from_slice(&all, &[(ra * rb) as i64, (ca * cb) as i64], Device::Cpu).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn lokr_is_the_dense_kronecker_product(
        [a, b, c, d] in prop::array::uniform4(1i64..5),
        r in 1i64..3,
        both: bool,
        seed in 0u64..1000,
    ) {
        let config = Lokr {
            r,
            alpha: 3.0,
            decompose_both: both,
            init_weights: LokrInit::Random,
            ..Lokr::default()
        };
        let place = Place::new(&config, draw(&[a * b, c * d], seed, "w"));
        let get = |name: &str| place.store.get(name).ok();
        let side = |whole: &str, [left, right]: [&str; 2]| match get(whole) {
            Some(t) => t.clone(),
            None => get(left).unwrap().matmul(get(right).unwrap()).unwrap(),
        };
        let w1 = side("lokr_w1", ["lokr_w1_a", "lokr_w1_b"]).detach().unwrap();
        let w2 = side("lokr_w2", ["lokr_w2_a", "lokr_w2_b"]).detach().unwrap();
        let dense = kronecker(&w1, &w2).mul_scalar(3.0 / r as f64).unwrap();
        let wanted = place.theta.need("weight").unwrap().add(&dense).unwrap();
        prop_assert!(place.merged().all_close(&wanted, 1e-12, 1e-12).unwrap());
        let x = draw(&[2, 3, c * d], seed, "x");
        let y = x.linear(&wanted, None).unwrap();
        prop_assert!(place.forward(&x).all_close(&y, 1e-11, 1e-11).unwrap());
    }

    #[test]
    fn an_exact_oft_rotates_each_block(
        blocks in 1i64..5,
        size in 2i64..6,
        share: bool,
        seed in 0u64..1000,
        scale in 0.01f64..3.0,
    ) {
        let width = blocks * size;
        let config = Oft {
            oft_block_size: size,
            block_share: share,
            use_cayley_neumann: false,
            ..Oft::default()
        };
        let place = Place::new(&config, identity(width));
        let upper = place.store.get("oft_R.weight").unwrap().size();
        place.set("oft_R.weight", &draw(&upper, seed, "q").mul_scalar(scale).unwrap());
        let r = place.merged();
        let square = r.matmul(&r.t().unwrap()).unwrap();
        prop_assert!(square.all_close(&identity(width), 1e-10, 1e-10).unwrap());
        let values = r.to_vec::<f64>().unwrap();
        for (at, v) in (0i64..).zip(&values) {
            let (i, j) = (at / width, at % width);
            prop_assert!(i / size == j / size || *v == 0.0, "{} {} is {}", i, j, v);
        }
        prop_assert!(r.max_abs_diff(&identity(width)).unwrap() > 1e-3);
    }

    #[test]
    fn boft_is_a_rotation_and_a_scale(
        size in prop::sample::select(vec![2i64, 4, 6]),
        log in 0u32..3,
        factors in 1i64..4,
        seed in 0u64..1000,
    ) {
        let factors = factors.min(i64::from(log) + 1);
        let width = size << log;
        let config = Boft {
            boft_block_size: size,
            boft_n_butterfly_factor: factors,
            ..Boft::default()
        };
        let place = Place::new(&config, identity(width));
        let shape = place.store.get("boft_R").unwrap().size();
        place.set("boft_R", &draw(&shape, seed, "r"));
        let r = place.merged();
        let square = r.matmul(&r.t().unwrap()).unwrap();
        prop_assert!(square.all_close(&identity(width), 1e-10, 1e-10).unwrap());
        // Each number meets `size`·2^(factors − 1) others.
        let met = size << (factors - 1);
        for row in r.to_vec::<f64>().unwrap().chunks(width as usize) {
            prop_assert_eq!(row.iter().filter(|v| **v != 0.0).count() as i64, met);
        }
        let s = draw(&[width, 1], seed, "s");
        place.set("boft_s", &s);
        prop_assert!(place.merged().all_close(&r.mul(&s).unwrap(), 1e-12, 1e-12).unwrap());
    }

    #[test]
    fn fastfood_has_an_adjoint(n in 1i64..70, d in 1i64..20, seed in 0u64..1000) {
        let p = Fastfood::new(n, Seed(seed), Kind::Double, Device::Cpu).unwrap();
        let (z, v, w) = (draw(&[d], seed, "z"), draw(&[n], seed, "v"), draw(&[d], seed, "w"));
        let dot = |a: &Tensor, b: &Tensor| a.mul(b).unwrap().sum().unwrap();
        // ∇⟨P w, v⟩ = Pᵀ v wherever w is.
        w.set_requires_grad(true).unwrap();
        let grads = dot(&p.project(&w).unwrap(), &v).gradients(&[&w], false).unwrap();
        let transposed = grads[0].clone().unwrap();
        let left = dot(&p.project(&z).unwrap(), &v).item().unwrap();
        let right = dot(&z, &transposed).item().unwrap();
        prop_assert!((left - right).abs() < 1e-9 * (1.0 + left.abs()), "{} {}", left, right);
        // And P is its own matrix, column by column.
        let unit = |i: i64| identity(d).select(0, i).unwrap();
        let columns: Vec<Tensor> =
            (0..d).map(|i| p.project(&unit(i)).unwrap().unsqueeze(1).unwrap()).collect();
        let dense = Tensor::cat(&columns, 1).unwrap();
        let by_matrix = dense.matmul(&z.unsqueeze(1).unwrap()).unwrap().squeeze(1).unwrap();
        prop_assert!(p.project(&z).unwrap().all_close(&by_matrix, 1e-9, 1e-9).unwrap());
    }

    #[test]
    fn doras_rows_have_the_norm_of_its_magnitudes(
        r in 1i64..4,
        input in 1i64..9,
        output in 1i64..9,
        seed in 0u64..1000,
    ) {
        let lora = Lora { r, init: LoraInit::Random, ..Lora::default() };
        let place = Place::new(&Dora(lora), draw(&[output, input], seed, "w"));
        let name = "lora_magnitude_vector";
        let m = draw(&[output], seed, "m");
        let names: Vec<String> = place.store.iter().map(|(n, _)| n.to_owned()).collect();
        let full = names.iter().find(|n| n.starts_with(name)).unwrap();
        place.set(full, &m);
        let merged = place.merged().to_vec::<f64>().unwrap();
        for (row, m) in merged.chunks(input as usize).zip(m.to_vec::<f64>().unwrap()) {
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            prop_assert!((norm - m.abs()).abs() < 1e-9 * (1.0 + m.abs()), "{} {}", norm, m);
        }
    }

    #[test]
    fn lohas_change_has_at_most_the_square_of_its_rank(
        r in 1i64..3,
        n in 5i64..10,
        seed in 0u64..1000,
    ) {
        let config = Loha { r, init_weights: false, ..Loha::default() };
        let w = draw(&[n, n], seed, "w");
        let place = Place::new(&config, w.clone());
        let change = place.merged().sub(&w).unwrap();
        let values = change.svd().unwrap().1.to_vec::<f64>().unwrap();
        let (kept, beyond) = values.split_at((r * r) as usize);
        prop_assert!(beyond.iter().all(|s| *s <= 1e-12 * (1.0 + kept[0])), "{:?}", values);
        prop_assert!(kept.iter().all(|s| *s > 1e-9), "{:?}", values);
    }
}
