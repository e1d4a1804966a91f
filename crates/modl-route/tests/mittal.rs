//! Mittal et al.'s metrics, against closed forms, definitions and integrals.

#![allow(clippy::unwrap_used, clippy::panic)]

use modl_core::{Device, Init, Kind, Seed};
use modl_route::Mittal;
use modl_route::stats::assignment;

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-12
}

fn numbers(n: i64, seed: u64) -> Vec<f64> {
    let t = Init::Uniform(0.5).tensor(&[n], Seed(seed), Kind::Double, Device::Cpu).unwrap();
    t.to_vec::<f64>().unwrap().iter().map(|v| v + 0.5).collect()
}

/// One-hot rows, the module of rule r being `of(r)`.
fn hard(rules: usize, modules: usize, of: impl Fn(usize) -> usize) -> Vec<Vec<f64>> {
    let row = |r| (0..modules).map(|m| f64::from(u8::from(m == of(r)))).collect();
    (0..rules).map(row).collect()
}

#[test]
fn a_module_for_each_rule_is_perfect_in_any_order() {
    for n in [2, 4, 8, 16] {
        for shift in 0..n {
            let m = Mittal::of(&hard(n, n, |r| (r + shift) % n), Seed(1)).unwrap();
            assert!(close(m.collapse_average, 0.0) && close(m.collapse_worst, 0.0));
            assert!(close(m.mutual_information, (n as f64).ln()), "I = ln R");
            assert!(close(m.specialisation, 1.0) && close(m.inverse_mutual_information, 0.0));
            assert!(close(m.alignment, 0.0) && close(m.adaptation, 0.0), "{m:?}");
            assert_eq!(m.assignment, (0..n).map(|r| Some((r + shift) % n)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn one_module_for_all_is_collapse() {
    for n in [2usize, 4, 8] {
        let m = Mittal::of(&hard(n, n, |_| 1), Seed(2)).unwrap();
        assert!(close(m.collapse_average, 1.0) && close(m.collapse_worst, 1.0), "{m:?}");
        assert!(close(m.mutual_information, 0.0) && close(m.inverse_mutual_information, 1.0));
        assert!(close(m.alignment, (n as f64 - 1.0) / n as f64));
        // ½ Σ |sort(p) − (1, 0, …)| = 1 − max p, whose mean is 1 − (1 + ½ + … + 1⁄R) ⁄ R.
        let harmonic: f64 = (1..=n).map(|k| 1.0 / k as f64).sum();
        assert!((m.adaptation - (1.0 - harmonic / n as f64)).abs() < 0.02, "{m:?}");
    }
}

#[test]
fn uniform_use_has_no_collapse_and_no_specialisation() {
    for n in [2usize, 4, 8] {
        let r = n as f64;
        let m = Mittal::of(&vec![vec![1.0 / r; n]; n], Seed(3)).unwrap();
        assert!(close(m.collapse_average, 0.0) && close(m.collapse_worst, 0.0), "{m:?}");
        assert!(close(m.mutual_information, 0.0) && close(m.specialisation, 0.0));
        assert!(close(m.alignment, (r - 1.0) / r));
        // ½ Σ E|pᵢ − 1⁄R| with pᵢ ~ Beta(1, R − 1) is (1 − 1⁄R)^R.
        assert!((m.adaptation - (1.0 - 1.0 / r).powf(r)).abs() < 0.02, "{m:?}");
    }
}

/// All orders of 0 … n − 1.
fn permutations(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![vec![]];
    }
    let shorter = permutations(n - 1);
    let insert = |p: &Vec<usize>, at: usize| {
        let mut p = p.clone();
        p.insert(at, n - 1);
        p
    };
    shorter.iter().flat_map(|p| (0..n).map(move |at| insert(p, at))).collect()
}

#[test]
fn any_use_has_the_numbers_of_the_definitions() {
    for n in 2..=5usize {
        for seed in 0..10 {
            let raw = numbers((n * n) as i64, 100 * n as u64 + seed);
            let a: Vec<Vec<f64>> = raw
                .chunks(n)
                .map(|row| {
                    row.iter()
                        .map(|v| v.powi(3) / row.iter().map(|v| v.powi(3)).sum::<f64>())
                        .collect()
                })
                .collect();
            let found = Mittal::of(&a, Seed(seed)).unwrap();
            let r = n as f64;
            let p: Vec<f64> = (0..n).map(|m| a.iter().map(|row| row[m]).sum::<f64>() / r).collect();
            let average = r / (r - 1.0) * p.iter().map(|p| (1.0 / r - p).max(0.0)).sum::<f64>();
            let worst = 1.0 - r * p.iter().copied().fold(1.0, f64::min);
            // I = H(module) + H(rule) − H(both).
            let h = |x: f64| -x * x.ln();
            let both: f64 = a.iter().flatten().map(|v| h(v / r)).sum();
            let information = p.iter().map(|p| h(*p)).sum::<f64>() + r.ln() - both;
            let distance = |order: &Vec<usize>| {
                let cell = |(row, m): (usize, usize)| {
                    (f64::from(u8::from(order[row] == m)) - a[row][m]).abs()
                };
                let cells = (0..n).flat_map(|row| (0..n).map(move |m| (row, m)));
                cells.map(cell).sum::<f64>() / (2.0 * r)
            };
            let alignment = permutations(n).iter().map(distance).fold(2.0, f64::min);
            for (name, own, wanted) in [
                ("collapse-average", found.collapse_average, average),
                ("collapse-worst", found.collapse_worst, worst),
                ("information", found.mutual_information, information),
                ("alignment", found.alignment, alignment),
            ] {
                assert!((own - wanted).abs() < 1e-10, "{name} of {a:?}: {own}, not {wanted}");
            }
            // What modules and rules are called changes nothing.
            let mut turned: Vec<Vec<f64>> = a.clone();
            turned.iter_mut().for_each(|row| row.rotate_left(1));
            let again = Mittal::of(&turned, Seed(seed)).unwrap();
            assert!((again.adaptation - found.adaptation).abs() < 1e-12);
            assert!((again.alignment - found.alignment).abs() < 1e-12);
        }
    }
}

#[test]
fn adaptation_is_the_integral_over_frequencies() {
    // With two rules p is uniform on a line, and the distance is |max p − max q|.
    for (x, y) in [(0.9, 0.3), (0.6, 0.5), (1.0, 0.4), (0.2, 0.7)] {
        let a = vec![vec![x, 1.0 - x], vec![y, 1.0 - y]];
        let steps = 100_000;
        let distance = |i: i32| {
            let p = (f64::from(i) + 0.5) / f64::from(steps);
            let q = p * x + (1.0 - p) * y;
            (p.max(1.0 - p) - q.max(1.0 - q)).abs()
        };
        let wanted = (0..steps).map(distance).sum::<f64>() / f64::from(steps);
        let found = Mittal::of(&a, Seed(5)).unwrap().adaptation;
        assert!((found - wanted).abs() < 0.02, "{a:?}: {found}, not {wanted}");
    }
}

#[test]
fn other_numbers_of_modules_than_rules_are_measured_too() {
    // Four rules on two modules: as informative as two modules can be; two rules have no module.
    let few = Mittal::of(&hard(4, 2, |r| r % 2), Seed(0)).unwrap();
    assert!(close(few.specialisation, 1.0) && close(few.alignment, 0.5));
    assert_eq!(few.assignment.iter().flatten().count(), 2);
    // Two rules on four modules: perfect, and two modules are dead.
    let many = Mittal::of(&hard(2, 4, |r| 3 * r), Seed(0)).unwrap();
    assert!(close(many.specialisation, 1.0) && close(many.alignment, 0.0));
    assert!(close(many.collapse_worst, 1.0) && close(many.adaptation, 0.0));
    assert!(close(many.collapse_average, 4.0 / 3.0 * 0.5));
    let one = Mittal::of(&[vec![1.0], vec![1.0]], Seed(0)).unwrap();
    assert!(close(one.collapse_average, 0.0) && close(one.specialisation, 0.0));
    for wrong in
        [vec![], vec![vec![]], vec![vec![0.5, 0.4]], vec![vec![1.5, -0.5]], vec![vec![f64::NAN]]]
    {
        assert!(Mittal::of(&wrong, Seed(0)).is_err(), "{wrong:?}");
    }
    assert!(Mittal::of(&[vec![1.0], vec![0.5, 0.5]], Seed(0)).is_err());
    assert_eq!(assignment(&[vec![3.0, 1.0], vec![1.0, 0.0]]).unwrap(), [Some(1), Some(0)]);
}
