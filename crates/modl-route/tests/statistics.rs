//! What is reported of routers, against closed forms and sums that are made here by hand.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;

use modl_core::checkpoint;
use modl_core::{Device, Init, Kind, Routing, Seed, Tensor, Trace, Weights};
use modl_route::RoutingStats;
use modl_route::stats::{
    Recorder, RoutingReport, RoutingTrace, Sign, SiteUse, Thresholds, Units, overfitting, signs,
};

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-12
}

fn numbers(n: i64, seed: u64) -> Vec<f64> {
    let t = Init::Uniform(0.5).tensor(&[n], Seed(seed), Kind::Double, Device::Cpu).unwrap();
    t.to_vec::<f64>().unwrap().iter().map(|v| v + 0.5).collect()
}

fn t(v: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(v, shape, Device::Cpu).unwrap()
}

fn whole(v: &[i64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(v, shape, Device::Cpu).unwrap()
}

fn trace(routing: Routing) -> Trace {
    Trace::of(vec![("site".into(), routing)])
}

fn rows(all: &[&[(usize, f64)]], modules: usize) -> Routing {
    Routing::new(Weights::Rows(all.iter().map(|r| r.to_vec()).collect()), modules)
}

#[test]
fn each_real_token_counts_under_the_label_of_its_row() {
    let (batch, seq, m) = (3usize, 4usize, 3usize);
    let alpha = numbers((batch * seq * m) as i64, 7);
    let mask = [1., 1., 0., 0., 1., 1., 1., 1., 1., 0., 0., 0.];
    let labels = ["a", "b", "a"];
    let mut report = RoutingReport::default();
    let routing = Routing::new(Weights::Dense(t(&alpha, &[3, 4, 3])), m);
    report.add(&trace(routing), &labels, Some(&t(&mask, &[3, 4]))).unwrap();
    let site = &report.sites()[0];
    let mut table = vec![vec![0.0; m]; 2];
    for (label, name) in ["a", "b"].iter().enumerate() {
        let (mut n, mut sum) = (0u64, vec![0.0; m]);
        for row in (0..batch).filter(|r| labels[*r] == *name) {
            for s in (0..seq).filter(|s| mask[row * seq + s] == 1.0) {
                n += 1;
                let own = &alpha[(row * seq + s) * m..][..m];
                let total: f64 = own.iter().sum();
                for j in 0..m {
                    sum[j] += own[j];
                    table[label][j] += own[j] / total;
                }
            }
        }
        let stats = site.by_label[*name].stats();
        assert_eq!(stats.units, n);
        let means: Vec<f64> = sum.iter().map(|s| s / n as f64).collect();
        assert!(stats.importance.iter().zip(&means).all(|(a, b)| close(*a, *b)), "{name}");
    }
    assert_eq!(site.stats().units, 7);
    let n: f64 = table.iter().flatten().sum();
    let mut wanted = 0.0;
    for l in 0..2 {
        for j in 0..m {
            let (row, column) = (table[l].iter().sum::<f64>(), table[0][j] + table[1][j]);
            wanted += table[l][j] / n * (table[l][j] / n / (row / n * (column / n))).ln();
        }
    }
    assert!(close(site.mutual_information(), wanted) && wanted > 1e-4);
}

#[test]
fn batches_add_up_whatever_the_form_of_the_routing() {
    let fixed = Routing::new(Weights::Fixed(vec![(0, 0.25), (2, 0.75)]), 3);
    let by_row = rows(&[&[(1, 1.0)], &[]], 3);
    let index = whole(&[2, 0, 1, -1], &[2, 2]);
    let sparse = Weights::Sparse { index, weight: t(&[0.5, 0.5, 1.0, 9.0], &[2, 2]) };
    // A module that is named twice has the sum of its weights.
    let index = whole(&[1, 1, 0, 0], &[2, 1, 2]);
    let tokens = Weights::Sparse { index, weight: t(&[0.25, 0.5, 0.5, -0.5], &[2, 1, 2]) };
    let combine = t(&[0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0., 0., 0., 0., 1., 0.], &[2, 1, 3, 2]);
    let slots = Weights::Slots { dispatch: combine.clone(), combine };
    let all =
        [fixed, by_row, Routing::new(sparse, 3), Routing::new(tokens, 3), Routing::new(slots, 3)];
    let dense = [
        [[0.25, 0.0, 0.75], [0.25, 0.0, 0.75]],
        [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
        [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]],
        [[0.0, 0.75, 0.0], [0.0, 0.0, 0.0]],
        [[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]],
    ];
    let mut report = RoutingReport::default();
    let (mut sum, mut count, mut unrouted) = ([0.0; 3], [0.0; 3], 0.0);
    for (routing, units) in all.iter().zip(dense) {
        report.add(&trace(routing.clone()), &["a", "b"], None).unwrap();
        for unit in units {
            for j in 0..3 {
                sum[j] += unit[j] / 10.0;
                count[j] += f64::from(u8::from(unit[j] != 0.0));
            }
            unrouted += if unit == [0.0; 3] { 0.1 } else { 0.0 };
        }
    }
    let stats = report.sites()[0].stats();
    assert_eq!(stats.units, 10);
    let choices: f64 = count.iter().sum();
    for j in 0..3 {
        assert!(close(stats.importance[j], sum[j]), "{stats:?}");
        assert!(close(stats.load[j], count[j] / choices), "{stats:?}");
    }
    assert!(close(stats.unrouted, unrouted));
    // Other modules, another batch, or no number is refused.
    assert!(report.add(&trace(rows(&[&[], &[]], 4)), &["a", "b"], None).is_err());
    assert!(report.add(&trace(rows(&[&[], &[]], 3)), &["a"], None).is_err());
    let nan = rows(&[&[(0, f64::NAN)]], 3);
    let e = report.add(&trace(nan), &["a"], None).unwrap_err().to_string();
    assert!(e.contains("site") && e.contains("NaN"), "{e}");
    let beyond = Weights::Sparse { index: whole(&[3], &[1, 1]), weight: t(&[1.0], &[1, 1]) };
    assert!(Units::of(&Routing::new(beyond, 3), 1, None).is_err());
}

#[test]
fn what_was_dropped_is_what_the_router_notes() {
    // Eight places: five choices were kept; of the other three some were dropped, some not made.
    let index = whole(&[0, -1, 1, 0, -1, -1, 2, 1], &[4, 2]);
    let sparse = Weights::Sparse { index, weight: t(&[0.5; 8], &[4, 2]) };
    let routing = Routing::new(sparse, 3);
    let stats = RoutingStats::of(&routing).unwrap();
    assert!(close(stats.overflow, 0.0) && close(stats.unrouted, 0.25));
    assert!(close(stats.load[0], 2.0 / 5.0));
    let all = routing.clone().note("overflow", t(&[3.0], &[]));
    assert!(close(RoutingStats::of(&all).unwrap().overflow, 3.0 / 8.0));
    let by_row = routing.clone().note("overflow", t(&[0.0, 0.0, 2.0, 0.0], &[4]));
    assert!(close(RoutingStats::of(&by_row).unwrap().overflow, 2.0 / 7.0));
    let mut report = RoutingReport::default();
    for noted in [all, by_row] {
        report.add(&trace(noted), &["a", "b", "c", "d"], None).unwrap();
    }
    let site = &report.sites()[0];
    assert!(close(site.stats().overflow, 5.0 / 15.0), "3 and 2 of 8 and 7");
    assert!(close(site.by_label["c"].stats().overflow, 1.0), "3⁄4 and 2, and nothing kept");
    for odd in [t(&[0.0; 3], &[3]), t(&[-1.0], &[]), t(&[f64::NAN], &[])] {
        let e = RoutingStats::of(&routing.clone().note("overflow", odd)).unwrap_err();
        assert!(e.to_string().contains("overflow"), "{e}");
    }
}

#[test]
fn a_trace_comes_back_from_its_file_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("routing/trace.safetensors");
    let mut test = Recorder::default();
    for seed in 0..3 {
        let weight: Vec<f64> = numbers(8, seed).iter().map(|w| f64::from(*w as f32)).collect();
        let index = whole(&[0, 1, 2, -1, 1, 0, 2, 2], &[2, 2, 2]);
        let by_token = Weights::Sparse { index, weight: t(&weight, &[2, 2, 2]) };
        let third = rows(&[&[(0, 1.0 / 3.0)], &[]], 3).note("overflow", t(&[0.0, 1.0], &[2]));
        let routings =
            [("first", Routing::new(by_token, 3)), ("second", third.clone()), ("third", third)];
        let routings = routings.map(|(site, r)| (site.to_owned(), r)).into();
        let mask = t(&[1.0, 0.0, 1.0, 1.0], &[2, 2]);
        test.add(&Trace::of(routings), &["b", ["a", "c"][seed as usize % 2]], Some(&mask)).unwrap();
    }
    let split = test.finish();
    assert_eq!(split.rows(), 6);
    let wanted = split.report().unwrap();
    // Two sites that chose the same are one entry.
    assert_eq!(wanted.sites()[1].paths, ["second", "third"]);
    let trace = RoutingTrace { splits: vec![split] };
    trace.save(&path).unwrap();
    let back = RoutingTrace::open(&path).unwrap();
    assert!(back == trace);
    for (a, b) in wanted.sites().iter().zip(back.splits[0].report().unwrap().sites()) {
        assert_eq!(a.by_label, b.by_label);
    }
    assert_eq!(wanted.sites()[0].stats().units, 9);
    // What is no trace, or a trace whose numbers do not fit, is refused.
    let file = checkpoint::Checkpoint::open(&path).unwrap();
    let metadata = file.metadata();
    let mut tensors: Vec<(String, Tensor)> = file.tensors(Device::Cpu).unwrap();
    let other = dir.path().join("other.safetensors");
    let save = |tensors: &[(String, Tensor)], metadata: HashMap<String, String>| {
        checkpoint::save(&other, tensors.iter().map(|(n, t)| (n.as_str(), t)), metadata).unwrap();
        RoutingTrace::open(&other).map(|_| ()).unwrap_err().to_string()
    };
    assert!(save(&tensors, HashMap::new()).contains("no routing trace"));
    for (name, value) in [("0.0.module", 3i32), ("0.0.row", 6), ("0.0.length", -1), ("0.label", 9)]
    {
        let place = tensors.iter().position(|(n, _)| n == name).unwrap();
        let sound = tensors[place].1.clone();
        let mut values = sound.to_kind(Kind::Int).unwrap().to_vec::<i32>().unwrap();
        values[0] = value;
        tensors[place].1 = Tensor::from_slice(&values, &sound.size(), Device::Cpu).unwrap();
        let e = save(&tensors, metadata.clone());
        assert!(e.contains("damaged"), "{name}: {e}");
        tensors[place].1 = sound;
    }
}

type Row<'a> = &'a [(usize, f64)];

/// A site at which each label has these rows of α.
fn site(modules: usize, by_label: &[(&str, &[Row])]) -> SiteUse {
    let names = (0..modules).map(|j| format!("m{j}")).collect();
    let mut site = SiteUse::new(vec!["site".into()], names);
    for (label, all) in by_label {
        let units = Units::of(&rows(all, modules), all.len(), None).unwrap();
        site.add(&units, &vec![*label; all.len()]).unwrap();
    }
    site
}

#[test]
fn collapse_is_seen_and_a_router_that_works_is_left_alone() {
    let limits = Thresholds::default();
    let [m0, m1, m2]: [Row; 3] = [&[(0, 1.0)], &[(1, 1.0)], &[(2, 1.0)]];
    let even = &[(0, 1.0 / 3.0), (1, 1.0 / 3.0), (2, 1.0 / 3.0)][..];
    let good = site(3, &[("a", &[m0, m0]), ("b", &[m1, m1]), ("c", &[m2, m2])]);
    assert_eq!(signs(&good, &limits), []);
    let dead = site(3, &[("a", &[m0, m0]), ("b", &[m1, m1])]);
    assert_eq!(signs(&dead, &limits), [Sign::Dead { modules: vec!["m2".into()] }]);
    let one = signs(&site(3, &[("a", &[m1]), ("b", &[m1])]), &limits);
    assert_eq!(
        one,
        [
            Sign::Dead { modules: vec!["m0".into(), "m2".into()] },
            Sign::Dominant { module: "m1".into(), share: 1.0 },
            Sign::Indifferent { information: 0.0 },
        ]
    );
    let soft = site(3, &[("a", &[even]), ("b", &[even])]);
    let found = signs(&soft, &limits);
    assert!(matches!(found[..], [Sign::Undecided { .. }, Sign::Indifferent { .. }]), "{found:?}");
    // One label says nothing of indifference, one module nothing of collapse.
    assert_eq!(signs(&site(3, &[("a", &[m0, m1, m2])]), &limits), []);
    assert_eq!(signs(&site(1, &[("a", &[m0]), ("b", &[m0])]), &limits), []);
    assert_eq!(signs(&site(3, &[("a", &[&[]])]), &limits), []);
    // Sure in training, undecided in test; not the other way round.
    let sign = overfitting(&good, &soft, &limits);
    assert!(matches!(sign, Some(Sign::Overfitted { gap }) if close(gap, 1.0)), "{sign:?}");
    assert_eq!(overfitting(&soft, &good, &limits), None);
    let index = whole(&[0, -1, 1, -1], &[2, 2]);
    let weight = t(&[1.0, 0.0, 1.0, 0.0], &[2, 2]);
    let mut full = SiteUse::new(vec!["site".into()], vec!["m0".into(), "m1".into()]);
    let routing = Routing::new(Weights::Sparse { index, weight }, 2);
    let routing = routing.note("overflow", t(&[2.0], &[]));
    full.add(&Units::of(&routing, 2, None).unwrap(), &["a", "b"]).unwrap();
    assert_eq!(signs(&full, &limits), [Sign::Dropping { share: 0.5 }]);
}

#[test]
fn tokens_that_are_no_padding_count_under_labels_of_their_own() {
    // Two rows of three tokens, of which the last of the second is padding.
    let index = whole(&[0, 1, 0, 1, 1, 0], &[2, 3, 1]);
    let weight = t(&[1.0; 6], &[2, 3, 1]);
    let by_token = Routing::new(Weights::Sparse { index, weight }, 2);
    let by_row = rows(&[&[(0, 1.0)], &[(1, 1.0)]], 2);
    let both = Trace::of(vec![("token".into(), by_token), ("row".into(), by_row)]);
    let mask = t(&[1.0, 1.0, 1.0, 1.0, 1.0, 0.0], &[2, 3]);
    let labels = ["word", "stop", "word", "stop", "stop", "none"];
    let mut recorder = Recorder::default();
    recorder.add_tokens(&both, &labels, &mask).unwrap();
    recorder.add_tokens(&both, &labels, &mask).unwrap();
    assert!(recorder.add_tokens(&both, &labels[..5], &mask).is_err());
    let split = recorder.finish();
    assert_eq!(split.rows(), 10);
    let report = split.report().unwrap();
    let [site] = report.sites() else { panic!("{report:?}") };
    assert_eq!(site.paths, ["token"]);
    let of = |label: &str| (site.by_label[label].units(), site.by_label[label].mean_shares());
    assert_eq!((of("word"), of("stop")), ((4, vec![1.0, 0.0]), (6, vec![0.0, 1.0])));
    assert!(!site.by_label.contains_key("none"));
}
