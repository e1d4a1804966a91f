//! Laws of merging, for every method of the registry that they are true of.

#![allow(clippy::unwrap_used, clippy::panic)]

use modl_aggregate::merge::{
    Base, Elements, Group, Input, MergeMethods, Of, Settings, Spec, Statistics, merge_group,
};
use modl_core::Seed;
use proptest::prelude::*;

/// Tensors of a merge, the base last where the method has one.
type Models = Vec<Vec<f32>>;

fn spec(method: &str) -> Spec {
    MergeMethods::default().find(method).unwrap().spec()
}

fn has_base(method: &str) -> bool {
    spec(method).base != Base::Input
}

/// Merges rows of 8 numbers; `settings` are filled up with what the method cannot do without.
fn merge(method: &str, models: &Models, settings: Settings) -> Vec<f32> {
    let names: Vec<String> = (0..models.len()).map(|n| format!("m{n}")).collect();
    named(
        method,
        &models.iter().zip(&names).map(|(m, n)| (n.as_str(), m)).collect::<Vec<_>>(),
        settings,
    )
}

fn named(method: &str, models: &[(&str, &Vec<f32>)], settings: Settings) -> Vec<f32> {
    let methods = MergeMethods::default();
    let shape = [models[0].1.len() / 8, 8];
    // As much information about each number, and inputs that are alike and independent.
    let statistics = match spec(method).statistics {
        Some(Statistics::Fisher) => Some(vec![0.5f32; models[0].1.len()]),
        Some(Statistics::Gram) => Some((0..64).map(|n| f32::from(u8::from(n % 9 == 0))).collect()),
        None => None,
    };
    let statistics = statistics.as_ref().map(|s| s as &dyn Elements);
    let inputs =
        models.iter().map(|(n, m)| Input::new(n, *m).with_statistics(statistics)).collect();
    let group = Group::new("t", &shape, inputs, Seed(0));
    let group = if has_base(method) { group.with_base(models.len() - 1) } else { group };
    merge_group(methods.find(method).unwrap(), group, settings).unwrap()
}

/// What has no default: weights of 1, t of ½, and as few drops as can be.
fn plain(method: &str, models: usize) -> Settings {
    let others = models - usize::from(has_base(method));
    let mut settings = Settings::default();
    for s in spec(method).settings {
        settings = match (s.of, s.name, s.default) {
            (Of::Each, name, None) => settings.set_each(name, vec![1.0; others]),
            (Of::All, "t", None) => settings.set("t", 0.5),
            _ => settings,
        };
    }
    settings
}

fn how_many(method: &str) -> usize {
    let (least, most) = spec(method).models;
    3.clamp(least, most) + usize::from(has_base(method))
}

fn names() -> Vec<&'static str> {
    MergeMethods::default().iter().map(|m| m.spec().name).collect()
}

fn close(a: &[f32], b: &[f32], tolerance: f32) -> Result<(), TestCaseError> {
    for (n, (a, b)) in a.iter().zip(b).enumerate() {
        prop_assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{}: {} is not {}", n, a, b);
    }
    Ok(())
}

/// Rows of 8 numbers of each of 5 models.
fn tensors() -> impl Strategy<Value = Models> {
    (1usize..6).prop_flat_map(|rows| {
        prop::collection::vec(prop::collection::vec(-2.0f32..2.0, 8 * rows), 5)
    })
}

/// The distance between an f32 and the next.
fn ulp(x: f32) -> f32 {
    let x = x.abs().max(f32::MIN_POSITIVE);
    f32::from_bits(x.to_bits() + 1) - x
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// All models the same: every method gives that model back, except those that drop at random.
    #[test]
    fn identical_models_become_themselves(models in tensors()) {
        for method in names() {
            let n = how_many(method);
            let same = vec![models[0].clone(); n];
            close(&merge(method, &same, plain(method, n)), &models[0], 3e-6)
                .map_err(|e| TestCaseError::fail(format!("{method}: {e}")))?;
        }
    }

    /// The models in another order give the same, with their weights: random drops go by name.
    #[test]
    fn the_order_of_models_does_not_matter(models in tensors(), turn in 1usize..3) {
        let mut done = 0;
        for method in names() {
            let n = how_many(method);
            let others = n - usize::from(has_base(method));
            if others < 3 {
                continue; // one model or a pair with parts of their own
            }
            let weights = [0.5, 0.8, 1.1];
            let with = |order: &[usize]| {
                let labels = ["x", "y", "z"];
                let mut all: Vec<(&str, &Vec<f32>)> =
                    order.iter().map(|m| (labels[*m], &models[*m])).collect();
                if has_base(method) {
                    all.push(("base", &models[4]));
                }
                let mut settings = plain(method, n);
                if spec(method).settings.iter().any(|s| s.name == "weight") {
                    settings = settings.set_each("weight", order.iter().map(|m| weights[*m]));
                }
                named(method, &all, settings)
            };
            let turned: Vec<usize> = (0..3).map(|m| (m + turn) % 3).collect();
            close(&with(&turned), &with(&[0, 1, 2]), 2e-5)
                .map_err(|e| TestCaseError::fail(format!("{method}: {e}")))?;
            done += 1;
        }
        prop_assert!(done >= 12, "{}", done);
    }

    #[test]
    fn ends_of_a_line_and_of_an_arc_are_the_models_bit_for_bit(models in tensors()) {
        let (a, b) = (&models[0], &models[1]);
        for (weights, end) in [([1.0, 0.0], a), ([0.0, 1.0], b)] {
            let settings = Settings::default().set_each("weight", weights);
            prop_assert_eq!(&merge("linear", &vec![a.clone(), b.clone()], settings), end);
        }
        for (t, end) in [(0.0, b), (1.0, a)] {
            let settings = Settings::default().set("t", t);
            prop_assert_eq!(&merge("slerp", &vec![a.clone(), b.clone()], settings), end);
        }
    }

    #[test]
    fn an_arc_between_equal_norms_keeps_them(models in tensors(), t in 0.0f64..1.0) {
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let size = norm(&models[0]);
        let scale = (size / norm(&models[1])) as f32;
        let other: Vec<f32> = models[1].iter().map(|x| x * scale).collect();
        let dot: f64 = models[0].iter().zip(&other).map(|(a, b)| f64::from(a * b)).sum();
        prop_assume!((dot / size / size).abs() < 0.999);
        let out = merge("slerp", &vec![models[0].clone(), other], Settings::default().set("t", t));
        prop_assert!((norm(&out) / size - 1.0).abs() < 1e-5);
    }

    /// θ₀ + (θ₁ − θ₀) is θ₁ up to the rounding of two operations.
    #[test]
    fn one_task_of_weight_one_is_its_model(models in tensors()) {
        let (task, base) = (&models[0], &models[1]);
        for method in ["task_arithmetic", "ties", "dare_linear", "breadcrumbs", "magnitude_prune"] {
            let mut settings = plain(method, 2);
            if method == "breadcrumbs" {
                settings = settings.set_each("gamma", [0.0]);
            }
            let out = merge(method, &vec![task.clone(), base.clone()], settings);
            for ((o, t), b) in out.iter().zip(task).zip(base) {
                let rounding = ulp(t.abs().max((t - b).abs()));
                prop_assert!((o - t).abs() <= rounding, "{}: {} {} {}", method, o, t, b);
            }
        }
    }

    /// No number moves against the sign that the sum of the trimmed task vectors has.
    #[test]
    fn ties_never_goes_against_the_elected_sign(
        models in tensors(), density in 0.1f64..1.0, weights in prop::collection::vec(0.1f64..2.0, 4),
    ) {
        let base = &models[4];
        let n = base.len();
        let settings =
            Settings::default().set_each("weight", weights.clone()).set_each("density", [density; 4]);
        let out = merge("ties", &models, settings);
        let kept = (density * n as f64) as usize;
        let mut votes = vec![0f64; n];
        for (model, w) in models.iter().take(4).zip(&weights) {
            let tau: Vec<f32> = model.iter().zip(base).map(|(m, b)| m - b).collect();
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|x, y| tau[*y].abs().total_cmp(&tau[*x].abs()));
            for place in &order[..kept] {
                votes[*place] += w * f64::from(tau[*place]);
            }
        }
        for ((o, b), vote) in out.iter().zip(base).zip(&votes) {
            let moved = f64::from(*o) - f64::from(*b);
            // A sum that is 0 but for rounding has no sign.
            if vote.abs() > 1e-5 {
                prop_assert!(moved * vote >= -1e-6, "{} {}", moved, vote);
            }
        }
    }

    #[test]
    fn nearswap_moves_no_number_further_than_it_says(models in tensors(), t in 0.001f64..1.0) {
        let out = merge("nearswap", &models[..2].to_vec(), Settings::default().set("t", t));
        for ((o, base), other) in out.iter().zip(&models[1]).zip(&models[0]) {
            let moved = f64::from((o - base).abs());
            prop_assert!(moved <= t + 1e-6);
            // And all the way where that is near enough.
            prop_assert!(f64::from((other - base).abs()) > t || (o - other).abs() <= 1e-6);
        }
    }

    /// Averages with weights above 0 lie between the smallest and the largest number.
    #[test]
    fn averages_lie_between_the_models(
        models in tensors(), weights in prop::collection::vec(0.01f64..3.0, 3),
    ) {
        for method in ["linear", "fisher", "reg_mean"] {
            let three = models[..3].to_vec();
            let out = merge(method, &three, Settings::default().set_each("weight", weights.clone()));
            for (n, o) in out.iter().enumerate() {
                let lo = three.iter().map(|m| m[n]).fold(f32::INFINITY, f32::min);
                let hi = three.iter().map(|m| m[n]).fold(f32::NEG_INFINITY, f32::max);
                prop_assert!(lo - 1e-5 <= *o && *o <= hi + 1e-5, "{}: {} {} {}", method, lo, o, hi);
            }
        }
    }
}

/// Tensors of several pieces: one thread and several give the same bits.
#[test]
fn threads_change_nothing() {
    let n = 3 * (1 << 15) + 8;
    let model = |k: u64| -> Vec<f32> {
        let mut x = k.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    };
    let models: Models = (1..=5).map(model).collect();
    let with = |threads: usize, method: &str| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let count = how_many(method);
        let mut some: Models = models[..count].to_vec();
        if has_base(method) {
            some[count - 1].clone_from(&models[4]);
        }
        let others = count - usize::from(has_base(method));
        let mut settings = plain(method, count);
        if spec(method).settings.iter().any(|s| s.name == "density") {
            settings = settings.set_each("density", vec![0.4; others]);
        }
        pool.install(|| merge(method, &some, settings))
    };
    for method in names() {
        let (one, four) = (with(1, method), with(4, method));
        assert!(one.iter().zip(&four).all(|(a, b)| a.to_bits() == b.to_bits()), "{method}");
    }
}
