//! Product keys against a search through all modules; groups against their product.

use modl_core::Context;
use proptest::prelude::*;
use serde_json::json;

use super::support::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn product_keys_find_the_best_of_all(
        x in prop::collection::vec(-2.0f64..2.0, 4 * 5),
        k in 1..=6usize,
        heads in 1..=3usize,
        shared_keys in any::<bool>(),
        (a, b) in prop::sample::select(vec![(3usize, 3usize), (3, 4), (1, 7), (4, 4)]),
    ) {
        let query = 6;
        let config = json!({"type": "product_key", "k": k, "heads": heads, "query": query,
            "shared_keys": shared_keys});
        let made = Made::new(config, a * b, 5).unwrap();
        let (w, bias) = (rows(&made.param("router.weight")), made.param("router.bias").to_vec::<f64>().unwrap());
        let keys = [rows(&made.param("router.row_keys")), rows(&made.param("router.column_keys"))];
        let routing = made.routed(&t(&x, &[4, 5]), &Context::eval());
        let (index, weight) = sparse(&routing);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for (r, x) in x.chunks(5).enumerate() {
            let mut seen = 0;
            for h in 0..heads {
                let q: Vec<f64> =
                    (h * query..(h + 1) * query).map(|i| dot(&w[i], x) + bias[i]).collect();
                let of = if shared_keys { 0 } else { h };
                let scores: Vec<f64> = (0..a * b)
                    .map(|j| {
                        dot(&q[..query / 2], &keys[0][of * a + j / b])
                            + dot(&q[query / 2..], &keys[1][of * b + j % b])
                    })
                    .collect();
                let best = top(&scores, k);
                let p = softmax(&best.iter().map(|j| scores[*j]).collect::<Vec<_>>());
                let found = &index[r][seen..seen + k];
                prop_assert_eq!(found, best.iter().map(|j| *j as i64).collect::<Vec<_>>());
                close(&weight[r][seen..seen + k], &p, 1e-10);
                seen += k;
            }
            prop_assert_eq!(seen, index[r].len());
        }
        prop_assert_eq!(routing.normalised, heads == 1);
    }

    #[test]
    fn groups_then_modules_within_them(
        x in prop::collection::vec(-2.0f64..2.0, 5 * 3),
        w in prop::collection::vec(-2.0f64..2.0, (4 + 12) * 3),
        k_groups in 1..=4usize,
        k in 1..=3usize,
        renormalise in any::<bool>(),
    ) {
        let config = json!({"type": "hierarchical", "groups": 4, "k_groups": k_groups, "k": k,
            "renormalise": renormalise, "bias": false});
        let made = Made::new(config, 12, 3).unwrap();
        made.set("router.weight", &w);
        let routing = made.routed(&t(&x, &[5, 3]), &training(0));
        let found = made.alphas(&t(&x, &[5, 3]), &Context::eval());
        let (mut f, mut mean) = (vec![0.0; 12], vec![0.0; 12]);
        for (x, found) in x.chunks(3).zip(&found) {
            let l: Vec<f64> =
                w.chunks(3).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
            let p = softmax(&l[..4]);
            let q: Vec<Vec<f64>> = l[4..].chunks(3).map(softmax).collect();
            let open = top(&p, k_groups);
            let whole = |of: &[f64], kept: &[usize]| {
                if renormalise { kept.iter().map(|j| of[*j]).sum() } else { 1.0 }
            };
            let mut expected = vec![0.0; 12];
            for g in &open {
                let best = top(&q[*g], k);
                for j in &best {
                    expected[g * 3 + j] =
                        p[*g] / whole(&p, &open) * q[*g][*j] / whole(&q[*g], &best);
                    f[g * 3 + j] += 1.0 / (5 * k_groups * k) as f64;
                }
            }
            (0..12).for_each(|j| mean[j] += p[j / 3] * q[j / 3][j % 3] / 5.0);
            close(found, &expected, 1e-12);
        }
        prop_assert_eq!(routing.normalised, renormalise);
        let balance = 12.0 * f.iter().zip(&mean).map(|(f, p)| f * p).sum::<f64>();
        prop_assert!((loss(&routing, "balance").item().unwrap() - balance).abs() < 1e-10);
    }
}

#[test]
fn equal_scores_of_groups_are_spread_over_them() {
    let config = json!({"type": "hierarchical", "groups": 2});
    let made = Made::new(config, 4, 8).unwrap();
    let (index, _) = sparse(&made.routed(&normal(&[200, 8], 6), &Context::eval()));
    for j in 0..4 {
        let load = index.iter().filter(|i| i[0] == j).count();
        assert!(load > 20, "module {j} gets {load} of 200");
    }
}
