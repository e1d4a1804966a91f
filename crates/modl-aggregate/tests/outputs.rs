//! Scalar mix, gates, attention by keys, AdapterSoup, ensembles and the Bayesian mixture against their
//! formulas, written once more with loops or in closed form.
#![allow(clippy::unwrap_used, clippy::panic)]

use modl_aggregate::{
    AdapterSoup, Asks, BayesianMixture, Ensemble, EnsembleOf, Fusion, Gate, Gated, ModuleAttention,
    Prior, ScalarMix, scalar_mix,
};
use modl_core::testing::{Given, TinyBackbone, standins};
use modl_core::{
    AggregatorConfig, Context, Device, Host, Init, Kind, Modular, Seed, Select, Signal, Targets,
    Tensor, Tensors, Weights, no_grad,
};
use proptest::prelude::*;

fn normal(shape: &[i64], seed: u64) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(seed), Kind::Double, Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.detach().unwrap().to_vec().unwrap()
}

const NAMES: [&str; 3] = ["a", "b", "c"];

/// Three modules that scale what `query` gives, under an aggregator, all parameters drawn.
fn scales(config: Box<dyn AggregatorConfig>, alpha: &[f64; 3]) -> Modular {
    let mut model =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Double).unwrap(), Seed(2)).unwrap();
    for name in NAMES {
        model.attach(name, Box::new(standins::Scale), &Targets::names(["query"])).unwrap();
    }
    model.aggregate(config).unwrap();
    for (i, (_, t)) in (7..).zip(model.params().select(&Select::all())) {
        no_grad(|| t.clone().copy_from(&normal(&t.size(), i))).unwrap();
    }
    let weights = alpha.iter().copied().enumerate().collect();
    model.route(Box::new(Given(Weights::Fixed(weights))), false).unwrap();
    model
}

/// x, f_θ(x), hⱼ and y at the modular site, all in rows of tokens.
struct Passed {
    x: Vec<Vec<f64>>,
    h: Vec<Vec<f64>>,
    modules: Vec<Vec<Vec<f64>>>,
    y: Vec<Vec<f64>>,
}

const ROWS: usize = 2;
const SEQ: usize = 3;

fn pass(model: &Modular, cx: &Context) -> Passed {
    let site = model.modular_sites().remove(0);
    let theta = model.backbone().theta(&site).unwrap();
    let f = |theta: &Tensors, s: &Signal, _: &Context| {
        Ok(s.replace(s.x.linear(theta.need("weight")?, theta.get("bias"))?))
    };
    let host = Host::new(&site, &theta, &f);
    let x: Signal = normal(&[ROWS as i64, SEQ as i64, site.input], 5).into();
    let y = model.layer(&site).unwrap().forward(&host, &x, cx).unwrap().x;
    let h = host.call(&x, cx).unwrap().x;
    let tokens = |t: &Tensor| values(t).chunks(8).map(<[f64]>::to_vec).collect::<Vec<_>>();
    let factor = |name: &str| {
        values(model.params().get(&format!("modules.{name}.{}.factor", site.path)).unwrap())
    };
    let scaled = |name: &&str| {
        let by = factor(name);
        tokens(&h).iter().map(|h| h.iter().zip(&by).map(|(h, f)| h * f).collect()).collect()
    };
    Passed {
        x: tokens(&x.x),
        h: tokens(&h),
        modules: NAMES.iter().map(scaled).collect(),
        y: tokens(&y),
    }
}

fn own(model: &Modular, name: &str) -> Vec<f64> {
    let site = model.modular_sites().remove(0).path;
    values(model.params().get(&format!("aggregators.{site}.{name}")).unwrap())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn prior_softmax(s: &[f64], alpha: &[f64]) -> Vec<f64> {
    let e: Vec<f64> = s.iter().zip(alpha).map(|(s, a)| a * s.exp()).collect();
    let total: f64 = e.iter().sum();
    e.iter().map(|e| e / total).collect()
}

/// h + Σ pⱼ (hⱼ − h) of one token.
fn mixed(passed: &Passed, token: usize, p: &[f64]) -> Vec<f64> {
    let h = &passed.h[token];
    let change = |i: usize| -> f64 {
        p.iter().zip(&passed.modules).map(|(p, m)| p * (m[token][i] - h[i])).sum()
    };
    (0..h.len()).map(|i| h[i] + change(i)).collect()
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9 * (1.0 + b.abs())), "{a:?} {b:?}");
}

const ALPHA: [f64; 3] = [0.2, 0.3, 0.5];

#[test]
fn a_scalar_mix_is_elmos_formula_over_modules() {
    let model = scales(Box::<ScalarMix>::default(), &ALPHA);
    let passed = pass(&model, &Context::eval());
    let s = NAMES.map(|n| own(&model, &format!("scores.{n}"))[0]);
    let p = prior_softmax(&s, &ALPHA);
    let gamma = own(&model, "gamma")[0];
    for token in 0..ROWS * SEQ {
        let wanted: Vec<f64> = (0..8)
            .map(|i| gamma * (0..3).map(|j| p[j] * passed.modules[j][token][i]).sum::<f64>())
            .collect();
        close(&passed.y[token], &wanted);
    }
    // Of layers: the function itself.
    let states: Vec<Tensor> = (0..3).map(|i| normal(&[2, 4], 50 + i)).collect();
    let scores = Tensor::from_slice(&s, &[3], Device::Cpu).unwrap();
    let found =
        scalar_mix(&states, &scores, &Tensor::full(&[1], 1.5, Kind::Double, Device::Cpu).unwrap());
    let p = prior_softmax(&s, &[1.0; 3]);
    let all: Vec<Vec<f64>> = states.iter().map(values).collect();
    let wanted: Vec<f64> =
        (0..8).map(|i| 1.5 * (0..3).map(|j| p[j] * all[j][i]).sum::<f64>()).collect();
    close(&values(&found.unwrap()), &wanted);
    assert!(scalar_mix(&states[..2], &scores, &scores).is_err());
}

#[test]
fn gates_are_what_their_formulas_say() {
    for gate in [Gate::Softmax, Gate::Sigmoid] {
        let model = scales(Box::new(Gated { gate }), &ALPHA);
        let passed = pass(&model, &Context::eval());
        for token in 0..ROWS * SEQ {
            let l: Vec<f64> = NAMES
                .iter()
                .enumerate()
                .map(|(j, n)| {
                    let h = &passed.h[token];
                    let z: Vec<f64> =
                        passed.modules[j][token].iter().zip(h).map(|(m, h)| m - h).collect();
                    dot(&own(&model, &format!("base.{n}")), h)
                        + dot(&own(&model, &format!("change.{n}")), &z)
                        + own(&model, &format!("bias.{n}"))[0]
                })
                .collect();
            let p = match gate {
                Gate::Softmax => prior_softmax(&l, &ALPHA),
                Gate::Sigmoid => {
                    l.iter().zip(&ALPHA).map(|(l, a)| a / (1.0 + (-l).exp())).collect()
                }
            };
            close(&passed.y[token], &mixed(&passed, token, &p));
        }
    }
}

#[test]
fn attention_by_keys_reads_the_mean_of_the_real_tokens() {
    let config = ModuleAttention { rank: 4, ..ModuleAttention::default() };
    let model = scales(Box::new(config), &ALPHA);
    let mask = Tensor::from_slice(&[1f32, 1., 0., 1., 1., 1.], &[2, 3], Device::Cpu).unwrap();
    let passed = pass(&model, &Context::eval().with_feature("mask", mask));
    let w = own(&model, "query.weight");
    for row in 0..ROWS {
        let real: Vec<&Vec<f64>> =
            (0..if row == 0 { 2 } else { 3 }).map(|t| &passed.x[row * SEQ + t]).collect();
        let mean: Vec<f64> =
            (0..8).map(|i| real.iter().map(|x| x[i]).sum::<f64>() / real.len() as f64).collect();
        let q: Vec<f64> = w.chunks(8).map(|w| dot(w, &mean)).collect();
        let s: Vec<f64> =
            NAMES.iter().map(|n| dot(&q, &own(&model, &format!("keys.{n}"))) / 2.0).collect();
        let p = prior_softmax(&s, &ALPHA);
        for t in 0..SEQ {
            close(&passed.y[row * SEQ + t], &mixed(&passed, row * SEQ + t, &p));
        }
    }
}

#[test]
fn a_backbone_of_short_numbers_stays_one() {
    let all: [Box<dyn AggregatorConfig>; 4] = [
        Box::<ScalarMix>::default(),
        Box::<Gated>::default(),
        Box::<ModuleAttention>::default(),
        Box::<Fusion>::default(),
    ];
    for config in all {
        let kind = config.kind();
        let tiny = TinyBackbone::new(Seed(1), Kind::BFloat16).unwrap();
        let mut model = Modular::new(tiny, Seed(2)).unwrap();
        for name in NAMES {
            model.attach(name, Box::new(standins::Scale), &Targets::names(["query"])).unwrap();
        }
        model.aggregate(config).unwrap();
        let equal = Weights::Fixed(vec![(0, 0.5), (2, 0.5)]);
        model.route(Box::new(Given(equal)), false).unwrap();
        let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
        // All factors are 1: whatever the weights, it is the base, and scores are in f32.
        let y = model.forward(&inputs, &Context::eval()).unwrap();
        let (y, base) =
            (y.need("logits").unwrap(), model.forward_base(&inputs, &Context::eval()).unwrap());
        assert_eq!(y.kind(), Kind::BFloat16, "{kind}");
        assert!(y.bit_equal(base.need("logits").unwrap()).unwrap(), "{kind}");
    }
}

#[test]
fn a_module_that_came_later_is_asked_for() {
    let mut model = scales(Box::<Gated>::default(), &ALPHA);
    model.detach("c").unwrap();
    model.attach("d", Box::new(standins::Scale), &Targets::names(["query"])).unwrap();
    model.route(Box::new(Given(Weights::Fixed(vec![(0, 1.0), (2, 1.0)]))), false).unwrap();
    let e =
        model.forward(&TinyBackbone::inputs(2, 4, Seed(1)).unwrap(), &Context::eval()).unwrap_err();
    assert!(e.to_string().contains("`d`") && e.to_string().contains("Modular::aggregate"), "{e}");
}

#[test]
fn a_soup_takes_the_modules_whose_texts_are_the_most_alike() {
    let mut soup = AdapterSoup::new();
    let texts: Vec<(&str, Tensor)> =
        (10..).zip(NAMES).map(|(seed, name)| (name, normal(&[5 + seed as i64, 6], seed))).collect();
    for (name, t) in &texts {
        soup.add(*name, t).unwrap();
    }
    let new = normal(&[4, 6], 99)
        .add(&texts[1].1.mean_dims(&[0], true).unwrap().mul_scalar(3.0).unwrap())
        .unwrap();
    // The mean over all pairs, one by one.
    let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    let mut wanted: Vec<(String, f64)> = texts
        .iter()
        .map(|(name, t)| {
            let (all, new) = (values(t), values(&new));
            let pairs: Vec<f64> =
                all.chunks(6).flat_map(|a| new.chunks(6).map(move |b| cosine(a, b))).collect();
            ((*name).to_owned(), pairs.iter().sum::<f64>() / pairs.len() as f64)
        })
        .collect();
    wanted.sort_by(|a, b| b.1.total_cmp(&a.1));
    let found = soup.similarities(&new).unwrap();
    assert_eq!(found[0].0, "b");
    for ((a, x), (b, y)) in found.iter().zip(&wanted) {
        assert!(a == b && (x - y).abs() < 1e-12, "{found:?} {wanted:?}");
    }
    let names: Vec<String> = wanted.iter().map(|w| w.0.clone()).collect();
    assert_eq!(soup.select(&new, 2).unwrap(), [(names[0].clone(), 0.5), (names[1].clone(), 0.5)]);
    assert!(soup.select(&new, 4).is_err() && soup.select(&new, 0).is_err());
    assert!(soup.add("a", &new).is_err());
    assert!(soup.add("d", &normal(&[3, 5], 1)).unwrap_err().to_string().contains("5 wide"));
    assert!(
        soup.add("e", &new.mul_scalar(0.0).unwrap()).unwrap_err().to_string().contains("direction")
    );
}

#[test]
fn an_ensemble_is_the_arithmetic_or_the_geometric_mean_of_probabilities() {
    let logits: Vec<Tensor> = (0..3).map(|i| normal(&[2, 4], 30 + i)).collect();
    let weights = [1.0, 0.0, 3.0];
    let softmax = |l: &[f64]| prior_softmax(l, &vec![1.0; l.len()]);
    for of in [EnsembleOf::Probabilities, EnsembleOf::Logits] {
        let members = NAMES.iter().zip(weights).map(|(n, w)| ((*n).to_owned(), w)).collect();
        let ensemble = Ensemble { of, members };
        let mut asked = Vec::new();
        let found = ensemble.log_probabilities(|name| {
            asked.push(name.to_owned());
            Ok(logits[NAMES.iter().position(|n| *n == name).unwrap()].clone())
        });
        assert_eq!(asked, ["a", "c"], "a member of weight 0 is not passed");
        let found: Vec<f64> = values(&found.unwrap()).iter().map(|l| l.exp()).collect();
        for row in 0..2 {
            let p: Vec<Vec<f64>> =
                logits.iter().map(|l| softmax(&values(l)[row * 4..row * 4 + 4])).collect();
            let mean = |i: usize| match of {
                EnsembleOf::Probabilities => 0.25 * p[0][i] + 0.75 * p[2][i],
                EnsembleOf::Logits => p[0][i].powf(0.25) * p[2][i].powf(0.75),
            };
            let wanted: Vec<f64> = (0..4).map(mean).collect();
            let total: f64 = wanted.iter().sum();
            let wanted: Vec<f64> = wanted.iter().map(|w| w / total).collect();
            close(&found[row * 4..row * 4 + 4], &wanted);
        }
    }
    let refused = |members: Vec<(String, f64)>, shape: &[i64]| {
        let mut next = 0;
        let ensemble = Ensemble { of: EnsembleOf::Logits, members };
        ensemble
            .log_probabilities(|_| {
                next += 1;
                Ok(normal(if next == 1 { &[2, 4] } else { shape }, 1))
            })
            .unwrap_err()
            .to_string()
    };
    assert!(refused(vec![], &[2, 4]).contains("above 0"));
    assert!(refused(vec![("a".into(), -1.0), ("b".into(), 2.0)], &[2, 4]).contains("`a`"));
    assert!(refused(vec![("a".into(), 1.0), ("b".into(), 2.0)], &[2, 5]).contains("`b`"));
}

/// The posterior after some tokens by Bayes' rule, in probabilities.
fn brute_force(prior: &[f64], tokens: &[Vec<f64>]) -> Vec<f64> {
    let joint: Vec<f64> = prior
        .iter()
        .enumerate()
        .map(|(j, p)| p * tokens.iter().map(|t| t[j].exp()).product::<f64>())
        .collect();
    let total: f64 = joint.iter().sum();
    joint.iter().map(|p| p / total).collect()
}

proptest! {
    #[test]
    fn the_posterior_is_that_of_bayes_rule(
        tokens in prop::collection::vec(prop::collection::vec(-3.0..0.0f64, 3), 1..8),
        prior in prop::collection::vec(0.05..1.0f64, 3),
    ) {
        let total: f64 = prior.iter().sum();
        let prior: Vec<f64> = prior.iter().map(|p| p / total).collect();
        let mut mixture = BayesianMixture::new(3, Prior::Cached(prior.clone())).unwrap();
        for n in 0..tokens.len() {
            let before = brute_force(&prior, &tokens[..n]);
            let wanted: f64 = before.iter().zip(&tokens[n]).map(|(p, l)| p * l.exp()).sum();
            let found = mixture.observe(&tokens[n]).unwrap();
            prop_assert!((found - wanted.ln()).abs() < 1e-10);
            let (found, wanted) = (mixture.posterior(), brute_force(&prior, &tokens[..=n]));
            prop_assert!((found.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            prop_assert!(found.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-10));
        }
    }

    /// Exact Bayes with a uniform prior loses ln(n) ⁄ T for each token against the best expert at most.
    #[test]
    fn a_mixture_is_as_good_as_its_best_expert_but_for_ln_n(
        tokens in prop::collection::vec(prop::collection::vec(-9.0..0.0f64, 4), 1..60),
    ) {
        let mut mixture = BayesianMixture::new(4, Prior::Uniform).unwrap();
        let mut nll = 0.0;
        for t in &tokens {
            nll -= mixture.observe(t).unwrap();
        }
        let best = (0..4).map(|j| -tokens.iter().map(|t| t[j]).sum::<f64>()).fold(f64::MAX, f64::min);
        prop_assert!(nll <= best + 4f64.ln() + 1e-9, "{nll} {best}");
    }
}

#[test]
fn the_one_true_expert_is_found_where_probabilities_underflow() {
    let mut mixture = BayesianMixture::new(3, Prior::Uniform).unwrap();
    // e^(−3 · 1000) is 0 in f64, and the logarithm is not.
    for _ in 0..1000 {
        mixture.observe(&[-3.0, -2.0, -4.0]).unwrap();
    }
    let p = mixture.posterior();
    assert!(p[1] > 1.0 - 1e-12 && p.iter().all(|p| p.is_finite()), "{p:?}");
    // An expert that cannot say a token is out for good.
    mixture.observe(&[-1.0, f64::NEG_INFINITY, -1.0]).unwrap();
    assert!((mixture.posterior()[0] - 1.0).abs() < 1e-12);
    let before = mixture.posterior();
    let e = mixture.observe(&[f64::NEG_INFINITY, -1.0, f64::NEG_INFINITY]).unwrap_err();
    assert!(e.to_string().contains("no expert"), "{e}");
    assert!(mixture.observe(&[f64::NAN, 0.0, 0.0]).is_err() && mixture.observe(&[0.0]).is_err());
    assert_eq!(mixture.posterior(), before, "a refused token changes nothing");
}

#[test]
fn an_updating_prior_is_a_moving_average_of_posteriors_and_can_be_kept() {
    let rate = 0.3;
    let mut mixture = BayesianMixture::new(2, Prior::Updating(rate)).unwrap();
    let mut wanted = vec![0.5, 0.5];
    for text in 0..5 {
        let tokens: Vec<Vec<f64>> =
            (0..3).map(|t| vec![-0.1 * f64::from(text + t), -0.5]).collect();
        for t in &tokens {
            mixture.observe(t).unwrap();
        }
        let posterior = brute_force(&wanted, &tokens);
        close(&mixture.posterior(), &posterior);
        mixture.end_of_text();
        wanted = wanted.iter().zip(&posterior).map(|(p, q)| (1.0 - rate) * p + rate * q).collect();
        close(mixture.prior(), &wanted);
        close(&mixture.posterior(), &wanted);
    }
    let mut kept = BayesianMixture::new(2, mixture.cache()).unwrap();
    kept.observe(&[-1.0, -3.0]).unwrap();
    kept.end_of_text();
    close(kept.prior(), &wanted);
    // The next token's distribution, before it is known.
    let experts = normal(&[2, 5], 3).log_softmax(-1).unwrap();
    let next = kept.next(&experts).unwrap();
    let l = values(&experts);
    let mixed: Vec<f64> =
        (0..5).map(|v| (wanted[0] * l[v].exp() + wanted[1] * l[5 + v].exp()).ln()).collect();
    close(&values(&next), &mixed);
    for (m, prior) in [
        (0, Prior::Uniform),
        (2, Prior::Updating(0.0)),
        (2, Prior::Updating(f64::NAN)),
        (2, Prior::Cached(vec![0.5, 0.6])),
        (2, Prior::Cached(vec![1.5, -0.5])),
        (3, Prior::Cached(vec![0.5, 0.5])),
    ] {
        assert!(BayesianMixture::new(m, prior).is_err());
    }
}

#[test]
fn what_looks_at_later_tokens_is_refused_in_a_decoder() {
    let llama = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../modl-models/tests/fixtures/base_llama");
    let llama = modl_models::open(llama, &modl_models::LoadOptions::default()).unwrap();
    let mut model = Modular::from_box(llama, Seed(1)).unwrap();
    model.attach("a", Box::new(standins::Scale), &Targets::names(["q_proj"])).unwrap();
    model.aggregate(Box::<Fusion>::default()).unwrap();
    let before = model.params().iter().count();
    let e = model.aggregate(Box::<ModuleAttention>::default()).unwrap_err().to_string();
    assert!(e.contains("later tokens") && e.contains("`fusion`"), "{e}");
    assert_eq!(model.aggregator_recipe().unwrap().kind(), "fusion");
    assert_eq!(model.params().iter().count(), before);
    let token = ModuleAttention { asks: Asks::Token, ..ModuleAttention::default() };
    model.aggregate(Box::new(token)).unwrap();
}
