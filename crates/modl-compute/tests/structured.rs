//! Changes of a weight with a structure: the contract of every module, and laws.
#![allow(clippy::unwrap_used)]

use modl_compute::low_rank::{
    Boft, Fastfood, FourierFt, Intrinsic, Loha, Lokr, Oft, walsh_hadamard,
};
use modl_compute::register;
use modl_core::testing::{Identity, ModuleClaims, check_module};
use modl_core::{Device, Init, Kind, ModuleConfig, Registry, Seed, Targets, Tensor};
use proptest::prelude::*;

/// At two linear sites of width 8.
fn check(make: &dyn Fn() -> Box<dyn ModuleConfig>, identity: Identity, parameters: usize) {
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims { identity, parameters, merges: true, smooth: true, task_vector: 0 };
    check_module(make, &Targets::names(["query", "value"]), &claims, &registry);
}

#[test]
fn loha() {
    let make = || Box::new(Loha { r: 3, ..Loha::default() }) as Box<dyn ModuleConfig>;
    check(&make, Identity::Exact, 2 * 2 * 3 * 16);
}

#[test]
fn lokr() {
    // 8 = 2 · 4: W₁ is 2 × 2, W₂ 4 × 4 and not thin at rank 8, or of rank 1.
    check(&|| Box::new(Lokr::default()), Identity::Exact, 2 * (4 + 16));
    let thin = || Box::new(Lokr { r: 1, ..Lokr::default() }) as Box<dyn ModuleConfig>;
    check(&thin, Identity::Exact, 2 * (4 + 2 * 4));
}

#[test]
fn oft() {
    let make = || Box::new(Oft { oft_block_size: 4, ..Oft::default() }) as Box<dyn ModuleConfig>;
    check(&make, Identity::Within(1e-6), 2 * 2 * 6);
}

#[test]
fn boft() {
    check(&|| Box::new(Boft::default()), Identity::Within(1e-6), 2 * (2 * 16 + 8));
    let two = || {
        Box::new(Boft { boft_n_butterfly_factor: 2, ..Boft::default() }) as Box<dyn ModuleConfig>
    };
    check(&two, Identity::Within(1e-6), 2 * (2 * 2 * 16 + 8));
}

#[test]
fn fourierft() {
    let make = || {
        Box::new(FourierFt { n_frequency: 10, init_weights: true, ..FourierFt::default() })
            as Box<dyn ModuleConfig>
    };
    check(&make, Identity::Exact, 2 * 10);
}

#[test]
fn intrinsic_dimension() {
    for said in [false, true] {
        let make = || {
            Box::new(Intrinsic { dimension: 20, said, ..Intrinsic::default() })
                as Box<dyn ModuleConfig>
        };
        check(&make, Identity::Exact, 20);
    }
}

#[test]
fn a_fastfood_projection_is_linear_and_keeps_lengths_in_the_mean() {
    let draw = |n: i64, seed| {
        Init::Normal(1.0).tensor(&[n], Seed(seed), Kind::Double, Device::Cpu).unwrap()
    };
    let square = |t: &Tensor| t.square().unwrap().sum().unwrap().item().unwrap();
    let mut ratio = 0.0;
    for seed in 0..40 {
        let p = Fastfood::new(4096, Seed(seed), Kind::Double, Device::Cpu).unwrap();
        let (x, y) = (draw(64, 100 + seed), draw(64, 200 + seed));
        let (px, py) = (p.project(&x).unwrap(), p.project(&y).unwrap());
        let both = p.project(&x.add(&y.mul_scalar(2.0).unwrap()).unwrap()).unwrap();
        let wanted = px.add(&py.mul_scalar(2.0).unwrap()).unwrap();
        assert!(both.all_close(&wanted, 1e-9, 1e-9).unwrap());
        ratio += square(&px) / square(&x) / 40.0;
    }
    assert!((ratio - 1.0).abs() < 0.05, "{ratio}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_walsh_hadamard_transform_twice_is_n_times_the_identity(log in 0u32..8, seed: u64) {
        let n = 2i64.pow(log);
        let x = Init::Normal(1.0).tensor(&[n], Seed(seed), Kind::Double, Device::Cpu).unwrap();
        let twice = walsh_hadamard(&walsh_hadamard(&x).unwrap()).unwrap();
        let wanted = x.mul_scalar(n as f64).unwrap();
        prop_assert!(twice.all_close(&wanted, 1e-9, 1e-9).unwrap());
    }
}
