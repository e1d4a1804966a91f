//! Ranks, hard concrete gates and straight-through masks against closed forms and brute force.
#![allow(clippy::unwrap_used)]

use modl_compute::sparse::{HardConcrete, Weights, top_k, top_k_across};
use modl_compute::{DiffPruning, EdgePopup, Piggyback};
use modl_core::{
    Attachment, Context, Device, Host, Init, Kind, Module, ModuleConfig, ParamStore, Scope, Seed,
    Signal, Site, SiteKind, Tensor, Tensors, no_grad,
};
use proptest::prelude::*;

fn tensor(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values, shape, Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_vec().unwrap()
}

fn full(n: i64, value: f64) -> Tensor {
    Tensor::full(&[n], value, Kind::Double, Device::Cpu).unwrap()
}

#[test]
fn of_equal_scores_the_lowest_index_wins() {
    let mask = top_k(&tensor(&[1., 3., 1., 3., 1., 0.], &[2, 3]), 3).unwrap();
    assert_eq!((mask.size(), values(&mask)), (vec![2, 3], vec![1., 1., 0., 1., 0., 0.]));
    assert_eq!(values(&top_k(&tensor(&[0.; 500], &[500]), 2).unwrap())[..3], [1., 1., 0.]);
    assert_eq!(values(&top_k(&tensor(&[1., 2.], &[2]), 5).unwrap()), [1., 1.]);
    let both = Tensors::new().with("a", tensor(&[2., 1.], &[2])).with("b", tensor(&[1., 2.], &[2]));
    let masks = top_k_across(&both, 3).unwrap();
    assert_eq!(values(masks.need("a").unwrap()), [1., 1.]);
    assert_eq!(values(masks.need("b").unwrap()), [0., 1.]);
    assert!(top_k(&tensor(&[1., f64::NAN], &[2]), 1).is_err());
}

proptest! {
    #[test]
    fn exactly_k_as_a_stable_sort_has_them(scores in prop::collection::vec(0..4i32, 1..60), k in 0..70usize) {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by_key(|i| -scores[*i]);
        let mut expected = vec![0.0; scores.len()];
        order.iter().take(k).for_each(|i| expected[*i] = 1.0);
        let scores: Vec<f64> = scores.iter().map(|s| f64::from(*s)).collect();
        prop_assert_eq!(values(&top_k(&tensor(&scores, &[-1]), k).unwrap()), expected);
    }
}

const GATES: [HardConcrete; 2] = [HardConcrete::LOUIZOS, HardConcrete::DIFF_PRUNING];

#[test]
fn gates_are_zero_and_one_as_often_as_the_closed_form_says() {
    const N: i64 = 100_000;
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for (i, gate) in (0..).zip(GATES) {
        for (j, alpha) in (0..).zip([-2.0, 0.0, 1.3]) {
            let seed = Seed(7).nth(i).nth(j);
            let z = values(&gate.sample(&full(N, alpha), seed).unwrap());
            assert!(z.iter().all(|z| (0.0..=1.0).contains(z)));
            let HardConcrete { lower: l, upper: r, temperature: beta } = gate;
            let zero = 1.0 - sigmoid(alpha - beta * (-l / r).ln());
            // s ≥ (1 − l) ⁄ (r − l), where the stretched s is cut at 1.
            let cut = (1.0 - l) / (r - l);
            let one = sigmoid(alpha - beta * (cut / (1.0 - cut)).ln());
            for (edge, p) in [(0.0, zero), (1.0, one)] {
                let found = z.iter().filter(|z| **z == edge).count() as f64 / N as f64;
                let sigma = (p * (1.0 - p) / N as f64).sqrt();
                assert!(
                    (found - p).abs() < 3.0 * sigma,
                    "{gate:?} α {alpha} z {edge}: {found} {p}"
                );
            }
            let open = gate.open(&full(1, alpha)).unwrap().item().unwrap();
            assert!((open - (1.0 - zero)).abs() < 1e-12);
        }
    }
}

#[test]
fn a_cut_gate_has_no_gradient_and_an_open_one_that_of_the_formula() {
    for gate in GATES {
        let alpha = tensor(&[-9.0, 0.2, 9.0], &[3]);
        alpha.set_requires_grad(true).unwrap();
        let z = gate.without_noise(&alpha).unwrap();
        let g = z.sum().unwrap().gradients(&[&alpha], false).unwrap().pop().unwrap().unwrap();
        let s = 1.0 / (1.0 + (-0.2f64).exp());
        let expected = (gate.upper - gate.lower) * s * (1.0 - s);
        let g = values(&g);
        assert_eq!((g[0], g[2]), (0.0, 0.0));
        assert!((g[1] - expected).abs() < 1e-12);
        assert_eq!((values(&z)[0], values(&z)[2]), (0.0, 1.0));
    }
}

/// A linear site 6 → 4 with θ, a −0 among it, and a module there.
struct Place {
    site: Site,
    theta: Tensors,
    store: ParamStore,
    module: Box<dyn Module>,
}

impl Place {
    fn new(config: &dyn ModuleConfig) -> Self {
        let (input, output) = (6, 4);
        let mut weight = values(
            &Init::Normal(1.0)
                .tensor(&[output, input], Seed(3), Kind::Double, Device::Cpu)
                .unwrap(),
        );
        weight[5] = -0.0;
        let theta = Tensors::new()
            .with("weight", tensor(&weight, &[output, input]))
            .with("bias", tensor(&[0.5, -1.0, 0.25, 2.0], &[output]));
        let path = "layer.0.query".to_owned();
        let site = Site { path, kind: SiteKind::Linear, input, output, index: 0 };
        let mut store = ParamStore::new();
        let mut scope = Scope::at(&mut store, "m", Seed(9)).on(Kind::Double, Device::Cpu);
        let module = config.build(&Attachment::alone(&site, &theta), &mut scope).unwrap();
        Place { site, theta, store, module }
    }

    fn set(&self, name: &str, value: &Tensor) {
        no_grad(|| self.param(name).clone().copy_from(value)).unwrap();
    }

    fn param(&self, name: &str) -> &Tensor {
        self.store.get(&format!("m.{name}")).unwrap()
    }

    fn weight(&self) -> Tensor {
        let all = self.module.compose(&self.theta).unwrap().unwrap();
        all.need("weight").unwrap().clone()
    }

    fn theta(&self) -> &Tensor {
        self.theta.need("weight").unwrap()
    }

    fn forward(&self, cx: &Context) -> Tensor {
        let x = Signal::from(tensor(&[1., -2., 3., 0.5, 0.1, -1.], &[1, 6]));
        let f = |theta: &Tensors, x: &Signal, _: &Context| {
            Ok(x.replace(x.x.linear(theta.need("weight")?, theta.get("bias"))?))
        };
        self.module.forward(&Host::new(&self.site, &self.theta, &f), &x, cx).unwrap().x
    }
}

#[test]
fn closed_gates_leave_theta_bit_for_bit_and_noise_is_for_training_only() {
    for structured in [false, true] {
        let place = Place::new(&DiffPruning { structured, start: 0.4, ..DiffPruning::default() });
        place.set(
            "delta.weight",
            &Init::Normal(1.0).tensor(&[4, 6], Seed(4), Kind::Double, Device::Cpu).unwrap(),
        );
        let eval = place.forward(&Context::eval());
        assert!(place.forward(&Context::eval()).bit_equal(&eval).unwrap());
        let step = |n| place.forward(&Context::train(Seed(1), n));
        assert!(step(1).bit_equal(&step(1)).unwrap());
        assert!(!step(1).bit_equal(&step(2)).unwrap() && !step(1).bit_equal(&eval).unwrap());
        place.set("alpha.weight", &tensor(&[-1e3; 24], &[4, 6]));
        assert_eq!(values(&place.weight()), values(place.theta()));
        assert!(
            place
                .weight()
                .sub(place.theta())
                .unwrap()
                .abs()
                .unwrap()
                .sum()
                .unwrap()
                .item()
                .unwrap()
                == 0.0
        );
    }
}

#[test]
fn the_penalty_is_the_expected_number_of_open_gates() {
    let p = |alpha: f64| 1.0 / (1.0 + (-alpha).exp());
    let config = DiffPruning { start: 0.4, l0: 0.01, ..DiffPruning::default() };
    let penalty = |c: &DiffPruning| {
        let place = Place::new(c);
        place.module.penalty(&Context::eval()).unwrap().unwrap().item().unwrap()
    };
    // 24 weights and 4 biases; −l ⁄ r = 1, so that α needs no shift.
    let structured = penalty(&config);
    assert!((structured - 0.01 * 28.0 * p(0.4) * p(0.4)).abs() < 1e-12);
    let plain = DiffPruning { structured: false, ..config };
    assert!((penalty(&plain) - 0.01 * 28.0 * p(0.4)).abs() < 1e-12);
    let rising: Vec<f64> =
        [-3.0, -1.0, 0.0, 2.0].map(|start| penalty(&DiffPruning { start, ..plain.clone() })).into();
    assert!(rising.windows(2).all(|w| w[0] < w[1]), "{rising:?}");
}

#[test]
fn a_mask_is_binary_forward_and_transparent_backward() {
    let place = Place::new(&Piggyback::default());
    let scores: Vec<f64> = (0..24).map(|i| if i % 3 == 0 { 5e-3 } else { 5.1e-3 }).collect();
    place.set("scores", &tensor(&scores, &[4, 6]));
    let theta = values(place.theta());
    let masked = values(&place.weight());
    for (i, (m, t)) in masked.iter().zip(&theta).enumerate() {
        assert_eq!(*m, if i % 3 == 0 { 0.0 } else { *t });
    }
    let g: Vec<f64> = (0..24).map(|i| f64::from(i) - 7.5).collect();
    let loss = place.weight().mul(&tensor(&g, &[4, 6])).unwrap().sum().unwrap();
    let found = loss.gradients(&[place.param("scores")], false).unwrap().pop().unwrap().unwrap();
    let expected: Vec<f64> = theta.iter().zip(&g).map(|(t, g)| t * g).collect();
    assert_eq!(values(&found), expected, "∂θ' ⁄ ∂s = θ, also where the mask is 0");
}

#[test]
fn edge_popup_keeps_exactly_its_share_of_signed_constants() {
    for (density, kept) in [(0.5, 12), (0.1, 2), (1.0, 24)] {
        let place = Place::new(&EdgePopup { density, weights: Weights::SignedConstant });
        // All scores equal: the first ones are taken.
        place.set("scores", &tensor(&[-0.3; 24], &[4, 6]));
        let theta = values(place.theta());
        let size = (2.0f64 / 6.0).sqrt();
        for (i, w) in values(&place.weight()).iter().enumerate() {
            let sign = if theta[i] == 0.0 { 0.0 } else { theta[i].signum() };
            let expected = if i < kept { sign * size } else { 0.0 };
            assert!((w - expected).abs() < 1e-15, "{density} {i}: {w} {expected}");
        }
    }
}
