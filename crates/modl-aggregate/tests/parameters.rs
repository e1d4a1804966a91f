//! Averaging and concatenation of parameters against arithmetic in f64.

#![allow(clippy::unwrap_used, clippy::panic)]

mod low_rank;

use low_rank::Lora;
use modl_aggregate::{Average, Concat, merge_low_rank};
use modl_core::testing::{TinyBackbone, standins};
use modl_core::{
    Aggregator, Bank, Context, Device, Host, Init, Kind, LowRank, Modular, Module, Result, Routing,
    Seed, Signal, Site, SiteKind, Targets, Tensor, Tensors, Weights,
};
use proptest::prelude::*;

const IN: i64 = 5;
const OUT: i64 = 4;

fn module(name: &str, rank: i64, scale: f64) -> LowRank {
    let draw = |part: &str, shape: &[i64]| {
        let seed = Seed(4).child(name).child(part);
        Init::Normal(1.0).tensor(shape, seed, Kind::Double, Device::Cpu).unwrap()
    };
    LowRank { down: draw("down", &[rank, IN]), up: draw("up", &[OUT, rank]), scale }
}

fn bank(modules: &[LowRank]) -> Bank {
    let mut bank = Bank::new();
    for (j, m) in modules.iter().enumerate() {
        bank.insert(format!("m{j}"), Box::new(m.clone())).unwrap();
    }
    bank
}

fn merge(aggregator: &dyn Aggregator, bank: &Bank, weights: Weights) -> Result<Box<dyn Module>> {
    let active = bank.select(&Routing::new(weights, bank.len()), 1)?;
    aggregator.parameters(&active, &Tensors::new())
}

fn fixed(weights: &[f64]) -> Weights {
    Weights::Fixed(weights.iter().copied().enumerate().collect())
}

fn low_rank(module: &dyn Module) -> LowRank {
    module.low_rank(&Context::eval()).unwrap()
}

/// Σ wⱼ · s · up · down in plain numbers, row-major `[OUT, IN]`.
fn product(up: &[f64], down: &[f64], scale: f64) -> Vec<f64> {
    let rank = down.len() / IN as usize;
    let (i, o) = (IN as usize, OUT as usize);
    let element = |r: usize, c: usize| {
        (0..rank).map(|k| up[r * rank + k] * down[k * i + c]).sum::<f64>() * scale
    };
    (0..o).flat_map(|r| (0..i).map(move |c| (r, c))).map(|(r, c)| element(r, c)).collect()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    t.to_vec().unwrap()
}

fn assert_close(found: &Tensor, expected: &[f64], tolerance: f64) {
    let found = numbers(found);
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-300, |m: f64, e| m.max(e.abs()));
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= tolerance * largest, "{f} is not {e}");
    }
}

/// Ranks, scales and weights of a few modules.
fn some() -> impl Strategy<Value = Vec<(i64, f64, f64)>> {
    prop::collection::vec((1i64..4, 0.1f64..3.0, prop_oneof![-1.5f64..-0.1, 0.1f64..1.5]), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn concat_is_the_weighted_sum_of_the_changes(some in some()) {
        let modules: Vec<LowRank> =
            some.iter().enumerate().map(|(j, (r, s, _))| module(&format!("{j}"), *r, *s)).collect();
        let mut expected = vec![0.0; (IN * OUT) as usize];
        for (m, (_, s, w)) in modules.iter().zip(&some) {
            let change = product(&numbers(&m.up), &numbers(&m.down), *s);
            expected.iter_mut().zip(change).for_each(|(e, c)| *e += w * c);
        }
        let weights: Vec<f64> = some.iter().map(|(.., w)| *w).collect();
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-6)] {
            let cast = |m: &LowRank| LowRank {
                down: m.down.to_kind(kind).unwrap(),
                up: m.up.to_kind(kind).unwrap(),
                scale: m.scale,
            };
            let bank = bank(&modules.iter().map(cast).collect::<Vec<_>>());
            let merged = low_rank(merge(&Concat {}, &bank, fixed(&weights)).unwrap().as_ref());
            prop_assert_eq!(merged.down.len_of(0), some.iter().map(|(r, ..)| r).sum::<i64>());
            prop_assert_eq!(merged.down.kind(), kind);
            let exact = LowRank {
                down: merged.down.to_kind(Kind::Double).unwrap(),
                up: merged.up.to_kind(Kind::Double).unwrap(),
                scale: merged.scale,
            };
            assert_close(&exact.weight().unwrap(), &expected, tolerance);
        }
    }

    #[test]
    fn average_is_the_mean_of_each_factor(weights in prop::collection::vec(0.1f64..2.0, 1..5)) {
        let modules: Vec<LowRank> =
            (0..weights.len()).map(|j| module(&format!("{j}"), 2, 0.5)).collect();
        let bank = bank(&modules);
        for normalise in [true, false] {
            let total = if normalise { weights.iter().sum() } else { 1.0 };
            let mean = |part: &dyn Fn(&LowRank) -> Vec<f64>| {
                let mut sum = vec![0.0; part(&modules[0]).len()];
                for (m, w) in modules.iter().zip(&weights) {
                    sum.iter_mut().zip(part(m)).for_each(|(s, v)| *s += w * v / total);
                }
                sum
            };
            let merged = merge(&Average { normalise }, &bank, fixed(&weights)).unwrap();
            let merged = low_rank(merged.as_ref());
            prop_assert_eq!(merged.scale, 0.5);
            assert_close(&merged.down, &mean(&|m| numbers(&m.down)), 1e-12);
            assert_close(&merged.up, &mean(&|m| numbers(&m.up)), 1e-12);
        }
    }
}

#[test]
fn one_module_of_weight_one_is_itself_bit_for_bit() -> Result<()> {
    let alone = module("a", 3, 16.0 / 12.0);
    for aggregator in [&Concat {} as &dyn Aggregator, &Average::default()] {
        let merged = merge(aggregator, &bank(std::slice::from_ref(&alone)), fixed(&[1.0]))?;
        let merged = low_rank(merged.as_ref());
        assert!(merged.down.bit_equal(&alone.down)? && merged.up.bit_equal(&alone.up)?);
        assert!(merged.weight()?.bit_equal(&alone.weight()?)?);
    }
    Ok(())
}

#[test]
fn the_average_of_factors_has_cross_terms_and_concat_has_none() -> Result<()> {
    let (a, b) = (module("a", 2, 1.0), module("b", 2, 1.0));
    let bank = bank(&[a.clone(), b.clone()]);
    let average = low_rank(merge(&Average::default(), &bank, fixed(&[0.5, 0.5]))?.as_ref());
    let concat = low_rank(merge(&Concat {}, &bank, fixed(&[0.5, 0.5]))?.as_ref());
    // (B₁+B₂)(A₁+A₂)/4 = (B₁A₁+B₂A₂)/2 − (B₁−B₂)(A₁−A₂)/4.
    let cross = b.up.sub(&a.up)?.matmul(&b.down.sub(&a.down)?)?.mul_scalar(0.25)?;
    assert!(average.weight()?.add(&cross)?.all_close(&concat.weight()?, 1e-12, 1e-12)?);
    assert!(cross.abs()?.sum()?.item()? > 0.1);
    Ok(())
}

/// A module whose parameters can be averaged and whose change is no product: y = f_θ(x) + φ.
#[derive(Debug)]
struct Shift(Tensor);

impl Module for Shift {
    fn kind(&self) -> &'static str {
        "shift"
    }

    fn delta(&self, _: &Host, _: &Signal, _: &Context) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with("shift", self.0.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Shift(phi.need("shift")?.clone())))
    }
}

#[test]
fn gradients_of_the_average_are_those_of_its_formula() -> Result<()> {
    let (a, b) = ([1.0, 2.0], [3.0, 5.0]);
    let leaf = |v: &[f64]| -> Result<Tensor> {
        let t = Tensor::from_slice(v, &[v.len() as i64], Device::Cpu)?;
        t.set_requires_grad(true)?;
        Ok(t)
    };
    let (pa, pb, alpha) = (leaf(&a)?, leaf(&b)?, leaf(&[0.5, 1.5])?);
    let mut bank = Bank::new();
    bank.insert("a", Box::new(Shift(pa.clone())))?;
    bank.insert("b", Box::new(Shift(pb.clone())))?;
    let merged = merge(&Average::default(), &bank, Weights::Dense(alpha.clone()))?;
    let loss = merged.phi().need("shift")?.sum()?;
    let g = loss.gradients(&[&pa, &pb, &alpha], false)?;
    let g: Vec<Vec<f64>> = g.iter().map(|g| numbers(g.as_ref().unwrap())).collect();
    assert_eq!(g[..2], [[0.25, 0.25], [0.75, 0.75]]);
    // ∂/∂αⱼ Σ(φ̄) = (Σφⱼ − Σφ̄) ⁄ Σα with Σφ̄ = (0.5·3 + 1.5·8) ⁄ 2 = 6.75.
    assert_eq!(g[2], [(3.0 - 6.75) / 2.0, (8.0 - 6.75) / 2.0]);
    Ok(())
}

#[test]
fn without_an_active_module_the_base_function_is_left() -> Result<()> {
    let site = Site { path: "s".into(), kind: SiteKind::Linear, input: IN, output: OUT, index: 0 };
    let theta = Tensors::new().with("weight", module("w", OUT, 1.0).down);
    let f = |theta: &Tensors, x: &Signal, _: &Context| {
        Ok(x.x.linear(theta.need("weight")?, None)?.into())
    };
    let host = Host::new(&site, &theta, &f);
    let x = Signal::from(module("x", 3, 1.0).down);
    let bank = bank(&[module("a", 2, 1.0)]);
    for aggregator in [&Concat {} as &dyn Aggregator, &Average::default()] {
        let merged = merge(aggregator, &bank, Weights::Fixed(Vec::new()))?;
        let y = merged.forward(&host, &x, &Context::eval())?;
        assert!(y.x.bit_equal(&host.call(&x, &Context::eval())?.x)?);
    }
    Ok(())
}

#[test]
fn what_cannot_be_merged_is_refused_in_words() -> Result<()> {
    let refused = |aggregator: &dyn Aggregator, bank: &Bank, weights: &[f64], words: &[&str]| {
        let e = merge(aggregator, bank, fixed(weights)).err().unwrap().to_string();
        words.iter().for_each(|w| assert!(e.contains(w), "{e}"));
    };
    let ranks = bank(&[module("a", 2, 1.0), module("b", 3, 1.0)]);
    let words = ["`m0`", "down[2, 5]", "`m1`", "down[3, 5]", "concat"];
    refused(&Average::default(), &ranks, &[0.5, 0.5], &words);
    let scales = bank(&[module("a", 2, 1.0), module("b", 2, 2.0)]);
    refused(&Average::default(), &scales, &[0.5, 0.5], &["scale 1", "scale 2"]);
    let same = bank(&[module("a", 2, 1.0), module("b", 2, 1.0)]);
    refused(&Average::default(), &same, &[0.5, -0.5], &["sum to 0", "normalise"]);
    let mut shifts = Bank::new();
    shifts.insert("moved", Box::new(Shift(module("a", 1, 1.0).down)))?;
    refused(&Concat {}, &shifts, &[1.0], &["`moved`", "`shift`", "weighted_sum"]);
    Ok(())
}

fn model(modules: &[(&str, Lora, &str)]) -> Result<Modular> {
    let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Double)?, Seed(2))?;
    for (name, config, target) in modules {
        model.attach(name, Box::new(*config), &Targets::names([*target]))?;
    }
    Ok(model)
}

#[test]
fn attached_modules_merge_at_every_site() -> Result<()> {
    let config = Lora { rank: 2, scale: 0.5 };
    let model = model(&[("a", config, "query"), ("b", config, "query")])?;
    let merged = merge_low_rank(&model, &[("a", 0.3), ("b", -0.8)], &Concat {})?;
    let [(path, merged)] = merged.as_slice() else { panic!("{merged:?}") };
    assert_eq!(path, "layer.0.query");
    assert!(!merged.up.requires_grad() && !merged.down.requires_grad());
    let factor = |name: &str, part: &str| {
        numbers(model.params().get(&format!("modules.{name}.layer.0.query.{part}")).unwrap())
    };
    let change = |name: &str, weight: f64| -> Result<Tensor> {
        let (up, down) = (factor(name, "up"), factor(name, "down"));
        let up = Tensor::from_slice(&up, &[8, 2], Device::Cpu)?;
        up.matmul(&Tensor::from_slice(&down, &[2, 8], Device::Cpu)?)?.mul_scalar(0.5 * weight)
    };
    let expected = change("a", 0.3)?.add(&change("b", -0.8)?)?;
    assert!(merged.weight()?.all_close(&expected, 1e-12, 1e-12)?);
    let average = merge_low_rank(&model, &[("a", 0.3), ("b", 0.7)], &Average::default())?;
    assert_eq!(average[0].1.down.size(), [2, 8]);
    Ok(())
}

#[test]
fn an_absent_module_adds_nothing_to_a_sum_and_is_refused_elsewhere() -> Result<()> {
    let config = Lora { rank: 2, scale: 0.5 };
    let model = model(&[("a", config, "query"), ("b", config, "value")])?;
    let both = [("a", 1.0), ("b", 2.0)];
    let merged = merge_low_rank(&model, &both, &Concat {})?;
    let paths: Vec<&str> = merged.iter().map(|(p, _)| p.as_str()).collect();
    assert_eq!(paths, ["layer.0.query", "layer.0.value"]);
    assert!(merged.iter().all(|(_, m)| m.down.len_of(0) == 2));
    let e = merge_low_rank(&model, &both, &Average::default()).unwrap_err().to_string();
    assert!(e.contains("layer.0.query") && e.contains("`b`") && e.contains("concat"), "{e}");
    Ok(())
}

#[test]
fn merges_that_make_no_sense_are_refused() -> Result<()> {
    let mut model = model(&[("tweets", Lora { rank: 2, scale: 0.5 }, "query")])?;
    let e = merge_low_rank(&model, &[("tweet", 1.0)], &Concat {}).unwrap_err().to_string();
    assert!(e.contains("did you mean `tweets`"), "{e}");
    assert!(merge_low_rank(&model, &[("tweets", 0.0)], &Concat {}).is_err());
    model.attach("scaled", Box::new(standins::Scale), &Targets::names(["value"]))?;
    let e = merge_low_rank(&model, &[("scaled", 1.0)], &Average::default()).unwrap_err();
    assert!(e.to_string().contains("layer.0.value"), "{e}");
    Ok(())
}
