//! Extraction against changes whose singular values are known.
#![allow(clippy::unwrap_used)]

use modl_compute::low_rank::{Extraction, extract, extract_difference, truncate};
use modl_compute::{Lora, LoraInit};
use modl_core::testing::{Given, Sum, TinyBackbone};
use modl_core::{Backbone, Context, Device, Kind, Modular, Seed, Targets, Tensor, no_grad};

/// Orthonormal columns: of the identity, rotated in pairs.
fn rotation(n: usize) -> Tensor {
    let (sin, cos) = 0.6f64.sin_cos();
    let mut r = vec![0.0; n * n];
    for i in (0..n - 1).step_by(2) {
        r[i * n + i] = cos;
        r[i * n + i + 1] = -sin;
        r[(i + 1) * n + i] = sin;
        r[(i + 1) * n + i + 1] = cos;
    }
    Tensor::from_slice(&r, &[n as i64, n as i64], Device::Cpu).unwrap()
}

#[test]
fn what_is_lost_is_the_tail_of_the_singular_values() {
    let values = [4.0, 3.0, 2.0, 1.0];
    let diagonal: Vec<f64> =
        (0..16).map(|i| if i % 5 == 0 { values[i / 5] } else { 0.0 }).collect();
    let diagonal = Tensor::from_slice(&diagonal, &[4, 4], Device::Cpu).unwrap();
    let delta = rotation(4).matmul(&diagonal).unwrap().matmul(&rotation(4)).unwrap();
    for rank in 1..=5 {
        let found = truncate("w", &delta, rank).unwrap();
        let kept = (rank as usize).min(4);
        let square = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>();
        let wanted = (square(&values[kept..]) / square(&values)).sqrt();
        assert!((found.lost - wanted).abs() < 1e-12, "{rank}: {} and {wanted}", found.lost);
        assert!((found.norm - square(&values).sqrt()).abs() < 1e-12);
        assert_eq!(found.factors.down.len_of(0), kept as i64);
    }
    assert!(truncate("w", &delta, 0).is_err());
}

fn tiny(seed: u64) -> Modular {
    Modular::new(TinyBackbone::new(Seed(7), Kind::Float).unwrap(), Seed(seed)).unwrap()
}

fn run(model: &mut Modular) -> Tensor {
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    let inputs = TinyBackbone::inputs(3, 6, Seed(2)).unwrap();
    model.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().clone()
}

#[test]
fn a_lora_comes_back_as_itself_and_a_smaller_one_says_what_it_lost() {
    let mut model = tiny(1);
    let lora = Lora { r: 3, init: LoraInit::Random, ..Lora::default() };
    model.attach("a", Box::new(lora), &Targets::names(["query", "value", "head"])).unwrap();
    let wanted = run(&mut model);
    let found = extract(&model, "a", 3).unwrap();
    assert!(found.left_out.is_empty() && found.sites.len() == 3);
    assert!(found.sites.iter().all(|e| e.lost < 1e-6));
    let mut again = tiny(2);
    found.attach(&mut again, "b").unwrap();
    assert!(run(&mut again).all_close(&wanted, 1e-5, 1e-5).unwrap());
    let smaller = extract(&model, "a", 1).unwrap();
    assert!(smaller.sites.iter().all(|e| e.lost > 0.01 && e.lost < 1.0));
    // Full rank for all of them: `head` has five outputs only, and gets a rank of its own.
    let full = extract(&model, "a", 8).unwrap();
    let mut again = tiny(3);
    full.attach(&mut again, "b").unwrap();
    assert!(run(&mut again).all_close(&wanted, 1e-5, 1e-5).unwrap());
}

#[test]
fn a_fine_tuned_model_minus_its_base_is_an_adapter_and_a_list_of_what_is_not_in_it() {
    let base = TinyBackbone::new(Seed(7), Kind::Float).unwrap();
    let tuned = TinyBackbone::new(Seed(7), Kind::Float).unwrap();
    let shift = |name: &str| {
        let mut t = tuned.params().get(name).unwrap().clone();
        let by = Tensor::ones(&t.size(), Kind::Float, Device::Cpu).unwrap();
        no_grad(|| t.add_in_place(&by.mul_scalar(0.5).unwrap())).unwrap();
    };
    ["layer.0.query.weight", "layer.0.query.bias", "embeddings.positions"]
        .into_iter()
        .for_each(shift);
    let found: Extraction = extract_difference(&base, &tuned, 2).unwrap();
    let [query] = found.sites.as_slice() else { unreachable!("{found:?}") };
    // A constant matrix has rank 1 and norm 0.5 · √64.
    assert_eq!(query.path, "layer.0.query");
    assert!((query.norm - 4.0).abs() < 1e-5 && query.lost < 1e-6, "{query:?}");
    let left: Vec<&str> = found.left_out.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(left, ["embeddings.positions", "layer.0.query.bias"]);
    let nothing = extract_difference(&base, &base, 2).unwrap();
    assert!(nothing.attach(&mut tiny(1), "a").is_err());
}
