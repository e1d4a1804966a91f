//! Merging adapters: PEFT's own results, and the laws that a merge is to keep.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use modl_aggregate::adapters::{
    Change, Delta, MergedSite, SiteChanges, Way, average, effective_rank, joined_prompts, merge,
    product_of_scalings, report, scalings_around_one, truncate_product, truncate_whole,
    weighted_sum,
};
use modl_aggregate::merge::{Elements, Group, Input, MergeMethods, Settings, merge_group};
use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Init, Kind, LowRank, Result, Seed, Tensor};
use proptest::prelude::*;

const SITE: &str = "model.layers.1.self_attn.q_proj";

fn normal(shape: &[i64], seed: Seed) -> Tensor {
    Init::Normal(1.0).tensor(shape, seed, Kind::Double, Device::Cpu).unwrap()
}

fn product(up: Tensor, down: Tensor, scale: f64) -> Change {
    Change { weight: Delta::Product(LowRank { down, up, scale }), bias: None }
}

/// A product `[out, in]` of this rank in f64.
fn drawn(seed: u64, rank: i64, scale: f64) -> Change {
    let seed = Seed(seed);
    product(normal(&[OUT, rank], seed.child("B")), normal(&[rank, IN], seed.child("A")), scale)
}

const OUT: i64 = 7;
const IN: i64 = 6;

fn at(changes: Vec<Option<Change>>) -> Vec<SiteChanges> {
    vec![SiteChanges { path: SITE.into(), changes }]
}

fn names(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("{}", ('a'..).nth(i).unwrap())).collect()
}

fn merged(changes: Vec<Option<Change>>, weights: &[f64], way: &Way) -> Result<MergedSite> {
    let names = names(weights.len());
    Ok(merge(at(changes), &names, weights, way, Seed(0))?.remove(0))
}

/// Σ wⱼ sⱼ BⱼAⱼ in plain numbers.
fn by_hand(changes: &[Change], weights: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; (OUT * IN) as usize];
    for (change, w) in changes.iter().zip(weights) {
        let Delta::Product(p) = &change.weight else { panic!("is whole") };
        let (up, down): (Vec<f64>, Vec<f64>) = (p.up.to_vec().unwrap(), p.down.to_vec().unwrap());
        let rank = p.down.len_of(0) as usize;
        for o in 0..OUT as usize {
            for i in 0..IN as usize {
                let dot: f64 =
                    (0..rank).map(|r| up[o * rank + r] * down[r * IN as usize + i]).sum();
                sum[o * IN as usize + i] += w * p.scale * dot;
            }
        }
    }
    sum
}

fn largest_difference(t: &Tensor, expected: &[f64]) -> f64 {
    let found: Vec<f64> = t.to_kind(Kind::Double).unwrap().to_vec().unwrap();
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn golden(file: &str, key: &str) -> Tensor {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft/adapters");
    Checkpoint::open(dir.join(file)).unwrap().tensor(key, Device::Cpu).unwrap()
}

/// One of the two adapters that PEFT merged: r = 4, α = 8.
fn of_peft(name: &str) -> Option<Change> {
    let part = |p: &str| {
        golden(&format!("{name}.safetensors"), &format!("base_model.model.{SITE}.{p}.weight"))
    };
    Some(product(part("lora_B"), part("lora_A"), 2.0))
}

const PEFT_WEIGHTS: [f64; 2] = [0.7, -0.3];

#[test]
fn the_convention_of_peft_gives_what_peft_gives() {
    let methods = MergeMethods::default();
    let half = || Settings::default().set_each("density", [0.5; 2]);
    let none = Settings::default;
    let cases = [
        ("linear", "linear", none()),
        ("cat", "cat", none()),
        ("svd", "svd", none()),
        ("ties", "ties", half()),
        ("ties", "ties_freq", half().set("majority_sign_method", "frequency")),
        ("ties_svd", "ties_svd", half()),
        ("magnitude_prune", "magnitude_prune", half()),
        ("magnitude_prune_svd", "magnitude_prune_svd", half()),
    ];
    let of_delta = |way: &Way| {
        let made = merged(vec![of_peft("a"), of_peft("b")], &PEFT_WEIGHTS, way).unwrap();
        made.factors.weight().unwrap().to_kind(Kind::Double).unwrap()
    };
    for (name, theirs, settings) in cases {
        // PEFT's usual rank is the largest of the adapters'.
        let rank = (name == "svd").then_some(4);
        let way = Way::named(name, Some("peft"), &methods, settings, rank).unwrap();
        let theirs: Vec<f64> = {
            let t = golden("merged.safetensors", &format!("delta.{theirs}"));
            t.to_kind(Kind::Double).unwrap().to_vec().unwrap()
        };
        let off = largest_difference(&of_delta(&way), &theirs);
        assert!(off <= 1e-6, "{name}: {off}");
    }
}

#[test]
fn without_it_linear_is_the_sum_that_pefts_is_not() {
    let methods = MergeMethods::default();
    let way = Way::named("linear", None, &methods, Settings::default(), None).unwrap();
    let ours = merged(vec![of_peft("a"), of_peft("b")], &PEFT_WEIGHTS, &way).unwrap();
    let wide = |t: Tensor| t.to_kind(Kind::Double).unwrap();
    let delta = |name: &str| wide(golden("merged.safetensors", &format!("delta.{name}")));
    let sum = delta("a").mul_scalar(0.7).unwrap().sub(&delta("b").mul_scalar(0.3).unwrap());
    let sum = sum.unwrap();
    let size = sum.norm().unwrap().item().unwrap();
    let off = |t: Tensor| t.sub(&sum).unwrap().norm().unwrap().item().unwrap() / size;
    let (ours, theirs) = (off(wide(ours.factors.weight().unwrap())), off(delta("linear")));
    assert!(ours < 1e-6, "{ours}");
    assert!((theirs - 0.165).abs() < 1e-3, "PEFT's cross terms: {theirs}");

    // And the report says so.
    let peft = Way::named("linear", Some("peft"), &methods, Settings::default(), None).unwrap();
    let made =
        merge(at(vec![of_peft("a"), of_peft("b")]), &names(2), &PEFT_WEIGHTS, &peft, Seed(0));
    let found =
        report(at(vec![of_peft("a"), of_peft("b")]), &PEFT_WEIGHTS, &made.unwrap()).unwrap();
    assert!((found[0].from_sum - theirs).abs() < 1e-5, "{}", found[0].from_sum);
}

/// Ranks, scales and weights of a few adapters.
fn some() -> impl Strategy<Value = Vec<(i64, f64, f64)>> {
    let weight = prop_oneof![-1.5f64..-0.1, 0.1f64..1.5];
    prop::collection::vec((1i64..4, 0.1f64..3.0, weight), 1..5)
}

fn changes(some: &[(i64, f64, f64)]) -> (Vec<Change>, Vec<f64>) {
    let all = some.iter().enumerate().map(|(j, (r, s, _))| drawn(j as u64, *r, *s)).collect();
    (all, some.iter().map(|(.., w)| *w).collect())
}

fn present(all: &[Change]) -> Vec<Option<Change>> {
    all.iter().cloned().map(Some).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_sum_is_exact(some in some()) {
        let (all, weights) = changes(&some);
        let made = merged(present(&all), &weights, &Way::Sum { rank: None }).unwrap();
        let off = largest_difference(&made.factors.weight().unwrap(), &by_hand(&all, &weights));
        prop_assert!(off <= 1e-10, "{}", off);
        prop_assert_eq!(made.lost, 0.0);
        prop_assert_eq!(made.factors.down.len_of(0), some.iter().map(|(r, ..)| r).sum::<i64>());
    }

    #[test]
    fn the_order_of_adapters_changes_nothing(some in some(), rank in 1i64..6) {
        let (all, weights) = changes(&some);
        for way in [Way::Sum { rank: None }, Way::Sum { rank: Some(rank) }] {
            let there = merged(present(&all), &weights, &way).unwrap();
            let turned: Vec<Change> = all.iter().rev().cloned().collect();
            let back: Vec<f64> = weights.iter().rev().copied().collect();
            let back = merged(present(&turned), &back, &way).unwrap();
            let there: Vec<f64> = there.factors.weight().unwrap().to_vec().unwrap();
            let off = largest_difference(&back.factors.weight().unwrap(), &there);
            prop_assert!(off <= 1e-9, "{}", off);
        }
    }

    /// What is lost is the root of the squares of the singular values that are cut.
    #[test]
    fn truncation_keeps_the_law_of_eckart_and_young(some in some(), rank in 1i64..6) {
        let (all, weights) = changes(&some);
        let sum = by_hand(&all, &weights);
        let sum = Tensor::from_slice(&sum, &[OUT, IN], Device::Cpu).unwrap();
        let values: Vec<f64> = sum.svd().unwrap().1.to_vec().unwrap();
        let norm = values.iter().map(|s| s * s).sum::<f64>().sqrt();
        let cut = values.iter().skip(rank as usize).map(|s| s * s).sum::<f64>().sqrt() / norm;
        let made = merged(present(&all), &weights, &Way::Sum { rank: Some(rank) }).unwrap();
        let off = made.factors.weight().unwrap().sub(&sum).unwrap().norm().unwrap().item().unwrap();
        prop_assert!((off / norm - cut).abs() <= 1e-9, "{} {}", off / norm, cut);
        prop_assert!((made.lost - cut).abs() <= 1e-9, "{} {}", made.lost, cut);
    }

    /// x (ΔW)ᵀ of the merge is the sum of what the adapters add by themselves, biases included.
    #[test]
    fn what_the_merge_adds_is_what_its_adapters_add(some in some()) {
        let (mut all, weights) = changes(&some);
        for (j, change) in all.iter_mut().enumerate() {
            change.bias = (j % 2 == 0).then(|| normal(&[OUT], Seed(j as u64).child("bias")));
        }
        let x = normal(&[3, IN], Seed(99));
        let mut sum = Tensor::zeros(&[3, OUT], Kind::Double, Device::Cpu).unwrap();
        for (change, w) in all.iter().zip(&weights) {
            let Delta::Product(p) = &change.weight else { panic!("is whole") };
            let mut y = p.apply(&x).unwrap();
            if let Some(bias) = &change.bias {
                y = y.add(bias).unwrap();
            }
            sum = sum.add(&y.mul_scalar(*w).unwrap()).unwrap();
        }
        let made = merged(present(&all), &weights, &Way::Sum { rank: None }).unwrap();
        let y = made.factors.apply(&x).unwrap().add(made.bias.as_ref().unwrap()).unwrap();
        prop_assert!(y.all_close(&sum, 1e-10, 1e-10).unwrap());
    }
}

#[test]
fn one_adapter_of_weight_one_is_itself_bit_for_bit() {
    let all = [drawn(0, 3, 16.0 / 12f64.sqrt()), drawn(1, 2, 2.0)];
    let made = merged(present(&all), &[1.0, 0.0], &Way::Sum { rank: None }).unwrap();
    let Delta::Product(own) = &all[0].weight else { panic!("is whole") };
    assert!(made.factors.up.bit_equal(&own.up).unwrap());
    assert!(made.factors.down.bit_equal(&own.down).unwrap());
    assert_eq!(made.factors.scale, own.scale);
}

#[test]
fn an_adapter_that_does_not_stand_at_a_site_changes_nothing_there() {
    let methods = MergeMethods::default();
    let one = || vec![Some(drawn(0, 2, 1.0)), None];
    let exact = by_hand(&[drawn(0, 2, 1.0)], &[0.5]);
    let made = merged(one(), &[0.5, 3.0], &Way::Sum { rank: None }).unwrap();
    assert!(largest_difference(&made.factors.weight().unwrap(), &exact) <= 1e-12);
    for method in ["ties", "magnitude_prune_svd"] {
        let peft = Way::named(method, Some("peft"), &methods, Settings::default(), None).unwrap();
        let made = merged(one(), &[0.5, 3.0], &peft).unwrap();
        assert!(largest_difference(&made.factors.weight().unwrap(), &exact) <= 1e-6, "{method}");
    }
}

/// Every method that takes two changes and a zero as the base.
#[test]
fn every_method_of_the_registry_works_on_changes() {
    let methods = MergeMethods::default();
    let mut worked = 0;
    for spec in methods.iter().map(|m| m.spec()) {
        let settings = match spec.name {
            "slerp" | "nearswap" => Settings::default().set("t", 0.5),
            _ => Settings::default(),
        };
        let both = || vec![Some(drawn(0, 2, 1.0)), Some(drawn(1, 1, 2.0))];
        let Ok(way) = Way::named(spec.name, None, &methods, settings, Some(6)) else { continue };
        let Ok(made) = merged(both(), &[1.0, 1.0], &way) else { continue };
        assert!(made.factors.down.len_of(0) <= 6 && made.lost < 1e-6, "{}", spec.name);
        assert!(
            made.factors.weight().unwrap().is_finite().unwrap().all().unwrap().item().unwrap()
                == 1.0
        );
        worked += 1;
    }
    assert!(worked >= 15, "{worked}");
}

#[test]
fn a_whole_change_joins_products_and_is_cut_like_them() {
    let whole = normal(&[OUT, IN], Seed(5));
    let all = || {
        let own = Change { weight: Delta::Whole(whole.clone()), bias: None };
        vec![Some(own), Some(drawn(1, 2, 2.0))]
    };
    let mut exact = by_hand(&[drawn(1, 2, 2.0)], &[-0.3]);
    let own: Vec<f64> = whole.to_vec().unwrap();
    exact.iter_mut().zip(&own).for_each(|(e, o)| *e += 0.7 * o);
    let made = merged(all(), &[0.7, -0.3], &Way::Sum { rank: None }).unwrap();
    assert!(largest_difference(&made.factors.weight().unwrap(), &exact) <= 1e-12);
    assert_eq!(made.factors.down.len_of(0), IN);
    let cut = merged(all(), &[0.7, -0.3], &Way::Sum { rank: Some(3) }).unwrap();
    assert!(cut.factors.down.len_of(0) == 3 && cut.lost > 0.01);
    let methods = MergeMethods::default();
    let peft = Way::named("ties", Some("peft"), &methods, Settings::default(), None);
    let e = merged(all(), &[0.7, -0.3], &peft.unwrap()).unwrap_err().to_string();
    assert!(e.contains("DoRA") && e.contains(SITE), "{e}");
}

/// The largest singular values of a matrix that is not small, also where some are equal.
#[test]
fn the_best_product_of_a_large_matrix_is_found_without_all_singular_values() {
    let (rows, columns, rank) = (160, 200, 4i64);
    let (u, _) = normal(&[rows, rows], Seed(1)).qr().unwrap();
    let (v, _) = normal(&[columns, rows], Seed(2)).qr().unwrap();
    let fading = |i: i64| 0.9f64.powi(i as i32);
    let twins = |i: i64| if i < 6 { 1.0 } else { 0.5 };
    for values in [&fading as &dyn Fn(i64) -> f64, &twins] {
        let s: Vec<f64> = (0..rows).map(values).collect();
        let diagonal = Tensor::from_slice(&s, &[rows], Device::Cpu).unwrap();
        let m = u.mul(&diagonal).unwrap().matmul(&v.t().unwrap()).unwrap();
        let found = truncate_whole(&m, rank).unwrap();
        let square = |s: &[f64]| s.iter().map(|s| s * s).sum::<f64>();
        let cut = (square(&s[rank as usize..]) / square(&s)).sqrt();
        assert!((found.lost - cut).abs() < 1e-9, "{} {cut}", found.lost);
        let off = m.sub(&found.factors.weight().unwrap()).unwrap().norm().unwrap().item().unwrap();
        assert!((off / square(&s).sqrt() - cut).abs() < 1e-9);
    }
    // A product of lower rank than asked loses nothing.
    let (b, a) = (normal(&[rows, 2], Seed(3)), normal(&[2, columns], Seed(4)));
    let found = truncate_whole(&b.matmul(&a).unwrap(), 5).unwrap();
    assert!(found.lost < 1e-12, "{}", found.lost);
    assert!(truncate_product(&b, &a, 2).unwrap().lost < 1e-12);
}

/// What TIES leaves of eight products: a spectrum that hardly falls where it is cut. All singular values
/// in f64 are the reference.
#[test]
fn the_best_product_of_what_ties_leaves_is_that_of_the_whole_decomposition() {
    let methods = MergeMethods::default();
    for (seed, rank) in [(5, 8i64), (6, 3)] {
        let sum = (0..8).map(|j| {
            let part = |n, shape: &[i64]| normal(shape, Seed(seed).nth(j).child(n));
            part("up", &[320, 8]).matmul(&part("down", &[8, 288])).unwrap()
        });
        let sum: Vec<Vec<f32>> = sum.map(|t| t.to_vec().unwrap()).collect();
        let nothing = vec![0f32; 320 * 288];
        let inputs = sum
            .iter()
            .map(|t| Input::new("m", t as &dyn Elements))
            .chain([Input::new("base", &nothing)]);
        let shape = [320, 288];
        let group = Group::new("t", &shape, inputs.collect(), Seed(0)).with_base(8);
        let settings =
            Settings::default().set_each("density", [0.5; 8]).set_each("weight", [0.1; 8]);
        let merged = merge_group(methods.find("ties").unwrap(), group, settings).unwrap();
        let m = Tensor::from_slice(&merged, &[320, 288], Device::Cpu).unwrap();
        for m in [m.to_kind(Kind::Double).unwrap(), m.t().unwrap().to_kind(Kind::Double).unwrap()] {
            let (u, s, vt) = m.svd().unwrap();
            let values: Vec<f64> = s.to_vec().unwrap();
            let u = u.narrow(1, 0, rank).unwrap().mul(&s.narrow(0, 0, rank).unwrap()).unwrap();
            let best = u.matmul(&vt.narrow(0, 0, rank).unwrap()).unwrap();
            let found = truncate_whole(&m, rank).unwrap();
            let off = found.factors.weight().unwrap().sub(&best).unwrap().norm().unwrap();
            let off = off.item().unwrap() / best.norm().unwrap().item().unwrap();
            assert!(off < 1e-6, "{off}");
            let square = |s: &[f64]| s.iter().map(|s| s * s).sum::<f64>();
            let cut = (square(&values[rank as usize..]) / square(&values)).sqrt();
            assert!((found.lost - cut).abs() < 1e-12, "{} {cut}", found.lost);
        }
    }
}

/// One site or several, where libtorch has one thread or two.
#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let methods = MergeMethods::default();
    let site = |i: u64| {
        let change = |j: u64| {
            let part = |n: &str, shape: &[i64]| normal(shape, Seed(i).nth(j).child(n));
            Some(product(part("up", &[256, 4]), part("down", &[4, 224]), 1.0))
        };
        SiteChanges { path: i.to_string(), changes: (0..3).map(change).collect() }
    };
    for n in [1, 3] {
        for name in ["ties_svd", "svd"] {
            let run = |threads: i32| {
                modl_core::set_threads(threads);
                let way = Way::named(name, None, &methods, Settings::default(), Some(4)).unwrap();
                let sites = (0..n).map(site).collect();
                merge(sites, &names(3), &[1.0, 0.5, -0.5], &way, Seed(0)).unwrap()
            };
            for (a, b) in run(1).iter().zip(&run(2)) {
                assert!(a.factors.down.bit_equal(&b.factors.down).unwrap(), "{name} {n}");
                assert!(a.factors.up.bit_equal(&b.factors.up).unwrap(), "{name} {n}");
            }
        }
    }
}

#[test]
fn the_report_counts_what_pulls_apart() {
    let t = |v: &[f64], shape: &[i64]| Tensor::from_slice(v, shape, Device::Cpu).unwrap();
    let row = |v: &[f64]| Some(product(t(&[1.0], &[1, 1]), t(v, &[1, 4]), 1.0));
    let all = || at(vec![row(&[1.0, 1.0, 1.0, 0.0]), row(&[1.0, -1.0, 0.0, 0.0])]);
    let weights = [1.0, 2.0];
    let made = merge(all(), &names(2), &weights, &Way::Sum { rank: None }, Seed(0)).unwrap();
    let found = report(all(), &weights, &made).unwrap().remove(0);
    // Two numbers are moved by both, of one of them the signs differ.
    let compared = &found.compared;
    assert!((compared.conflicts - 1.0 / 2.0).abs() < 1e-12);
    // The result is (3, −1, 1, 0), which has the one singular value √11.
    assert_eq!(compared.gram, [[3.0, 0.0, 3.0], [0.0, 2.0, 4.0], [3.0, 4.0, 11.0]]);
    assert!((found.norm() - 11f64.sqrt()).abs() < 1e-12 && found.from_sum < 1e-12);
    assert!((found.effective_rank - 1.0).abs() < 1e-6 && found.rank == 2);
    assert!(compared.ranks.as_ref().unwrap().iter().all(|r| (r - 1.0).abs() < 1e-6));
    assert_eq!((compared.cosine(0, 1), compared.kept(1)), (0.0, 2.0));
    assert!((effective_rank(&[1.0, 1.0]) - 2.0).abs() < 1e-12);
}

#[test]
fn scalings_and_prompts_merge_by_their_formulas() {
    let t = |v: &[f64]| Some(Tensor::from_slice(v, &[1, v.len() as i64], Device::Cpu).unwrap());
    let numbers = |t: Tensor| -> Vec<f64> { t.to_vec().unwrap() };
    let close = |t: Tensor, expected: &[f64]| {
        let found = numbers(t);
        found.iter().zip(expected).for_each(|(f, e)| assert!((f - e).abs() < 1e-12, "{found:?}"));
    };
    let l = [t(&[1.5, 0.5]), t(&[2.0, 1.0]), None];
    close(scalings_around_one(&l, &[0.5, 1.0, 9.0]).unwrap(), &[2.25, 0.75]);
    close(product_of_scalings(&l, &[1.0, 2.0, 1.0]).unwrap(), &[6.0, 0.5]);
    close(weighted_sum(&l, &[0.5, 1.0, 1.0]).unwrap(), &[2.75, 1.25]);
    close(average(&l[..2], &[1.0, 3.0]).unwrap(), &[1.875, 0.875]);
    let own = scalings_around_one(&l[..1], &[1.0]).unwrap();
    assert!(own.bit_equal(l[0].as_ref().unwrap()).unwrap());
    assert!(average(&l, &[1.0; 3]).unwrap_err().to_string().contains("not all"));
    assert!(average(&l[..2], &[1.0, -1.0]).unwrap_err().to_string().contains("sum to 0"));
    assert!(product_of_scalings(&[t(&[-1.0, 1.0])], &[0.5]).is_err());
    let prompt = |v: &[f64]| Tensor::from_slice(v, &[v.len() as i64, 1], Device::Cpu).unwrap();
    let prompts = [prompt(&[1.0, 2.0]), prompt(&[3.0, 4.0, 5.0, 6.0])];
    close(joined_prompts(&prompts, &[1.0; 2], 1).unwrap(), &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    close(joined_prompts(&prompts, &[1.0; 2], 2).unwrap(), &[1.0, 3.0, 4.0, 2.0, 5.0, 6.0]);
    assert!(joined_prompts(&prompts, &[0.5, 1.0], 1).unwrap_err().to_string().contains("average"));
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    let methods = MergeMethods::default();
    let named = |name: &str, convention: Option<&str>, rank: Option<i64>| {
        Way::named(name, convention, &methods, Settings::default(), rank)
    };
    let refused = |r: Result<Way>, part: &str| {
        let e = r.unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    };
    refused(named("tise", None, None), "ties");
    refused(named("ties", Some("pfet"), None), "peft");
    refused(named("karcher", Some("peft"), None), "PEFT");
    refused(named("ties", Some("peft"), Some(4)), "ties_svd");
    refused(named("svd", None, Some(0)), "at least 1");
    let stray = Settings::default().set("lambda", 2.0);
    refused(Way::named("concat", None, &methods, stray, None), "lambda");

    let all = || vec![Some(drawn(0, 2, 1.0)), Some(drawn(1, 3, 1.0))];
    let sum = Way::Sum { rank: None };
    let e = merge(at(all()), &names(2), &[1.0], &sum, Seed(0)).unwrap_err().to_string();
    assert!(e.contains("1 for 2 adapters"), "{e}");
    assert!(merged(all(), &[0.0, 0.0], &sum).unwrap_err().to_string().contains("all 0"));
    assert!(merged(all(), &[f64::NAN, 1.0], &sum).is_err());
    let peft = named("linear", Some("peft"), None).unwrap();
    let e = merged(all(), &[1.0, 1.0], &peft).unwrap_err().to_string();
    assert!(e.contains("ranks 2 and 3") && e.contains("_svd"), "{e}");
    let wider = product(normal(&[OUT, 1], Seed(0)), normal(&[1, IN + 1], Seed(1)), 1.0);
    let e = merged(vec![Some(drawn(0, 2, 1.0)), Some(wider)], &[1.0; 2], &sum).unwrap_err();
    assert!(e.to_string().contains("`b`") && e.to_string().contains("[7, 7]"), "{e}");
    let model_stock = named("karcher", None, None).unwrap();
    assert!(merged(all(), &[0.5, 1.0], &model_stock).unwrap_err().to_string().contains("has none"));
}
