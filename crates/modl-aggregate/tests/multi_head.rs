//! Averages part by part and stacks, against plain arithmetic in f64.

#![allow(clippy::unwrap_used, clippy::panic)]

mod low_rank;

use low_rank::Lora;
use modl_aggregate::{Average, Factors, MultiHead, Stack};
use modl_core::testing::{Given, TinyBackbone, perturb, standins};
use modl_core::{
    Aggregator, AggregatorConfig, Bank, Context, Device, Init, Kind, LowRank, Modular, Result,
    Router, RouterConfig, Routing, Scope, Seed, Select, Signal, Site, Targets, Tensor, Tensors,
    Weights,
};
use serde_json::{Value, json};

const IN: usize = 6;
const OUT: usize = 4;
const RANK: usize = 2;

fn module(name: &str) -> LowRank {
    let draw = |part: &str, shape: [usize; 2]| {
        let seed = Seed(4).child(name).child(part);
        let shape = shape.map(|n| n as i64);
        Init::Normal(1.0).tensor(&shape, seed, Kind::Double, Device::Cpu).unwrap()
    };
    LowRank { down: draw("down", [RANK, IN]), up: draw("up", [OUT, RANK]), scale: 0.5 }
}

fn bank(names: &[&str]) -> Bank {
    let mut bank = Bank::new();
    names.iter().for_each(|n| bank.insert(*n, Box::new(module(n))).unwrap());
    bank
}

fn t(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values, shape, Device::Cpu).unwrap()
}

fn merged(aggregator: &dyn Aggregator, bank: &Bank, routing: &Routing) -> Result<LowRank> {
    let module = aggregator.parameters(&bank.select(routing, 1)?, &Tensors::new())?;
    Ok(module.low_rank(&Context::eval()).unwrap())
}

fn assert_close(found: &Tensor, expected: &[f64]) {
    let found = found.to_vec::<f64>().unwrap();
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() < 1e-12, "{f} is not {e}");
    }
}

/// α of three modules for two heads, each of sum 1.
const HEADS: [f64; 6] = [0.2, 0.5, 0.3, 0.7, 0.0, 0.3];

fn means() -> Vec<f64> {
    (0..3).map(|j| (HEADS[j] + HEADS[3 + j]) / 2.0).collect()
}

#[test]
fn each_part_is_the_average_by_its_own_head() -> Result<()> {
    let names = ["a", "b", "c"];
    let modules = names.map(module);
    let numbers = |part: &dyn Fn(&LowRank) -> Tensor| -> Vec<Vec<f64>> {
        modules.iter().map(|m| part(m).to_vec::<f64>().unwrap()).collect()
    };
    let (downs, ups) = (numbers(&|m| m.down.clone()), numbers(&|m| m.up.clone()));
    // Input i belongs to head 0 where it is one of the first half, and so does output o.
    let mut down = vec![0.0; RANK * IN];
    for r in 0..RANK {
        for i in 0..IN {
            let q = i / (IN / 2);
            down[r * IN + i] = (0..3).map(|j| HEADS[3 * q + j] * downs[j][r * IN + i]).sum();
        }
    }
    let mut up = vec![0.0; OUT * RANK];
    for o in 0..OUT {
        for r in 0..RANK {
            let q = o / (OUT / 2);
            up[o * RANK + r] = (0..3).map(|j| HEADS[3 * q + j] * ups[j][o * RANK + r]).sum();
        }
    }
    let routing = Routing::new(Weights::Dense(t(&means(), &[3])), 3).normalised();
    let found = merged(&MultiHead {}, &bank(&names), &routing.with_heads(t(&HEADS, &[2, 3])))?;
    assert_close(&found.down, &down);
    assert_close(&found.up, &up);
    assert_eq!(found.scale, 0.5);
    Ok(())
}

#[test]
fn equal_heads_or_none_give_the_average() -> Result<()> {
    let names = ["a", "b", "c"];
    let alpha = t(&[0.2, 0.5, 0.3], &[3]);
    let routing = || Routing::new(Weights::Dense(alpha.clone()), 3).normalised();
    let average = merged(&Average::default(), &bank(&names), &routing())?;
    let twice = alpha.unsqueeze(0)?.expand(&[2, 3])?;
    for routing in [routing(), routing().with_heads(twice)] {
        let found = merged(&MultiHead {}, &bank(&names), &routing)?;
        assert!(found.down.all_close(&average.down, 1e-14, 1e-14)?);
        assert!(found.up.all_close(&average.up, 1e-14, 1e-14)?);
    }
    // Only some are active, and weights do not sum to 1.
    let some = Routing::new(Weights::Fixed(vec![(2, 0.6), (0, 0.2)]), 3);
    let average = merged(&Average::default(), &bank(&names), &some)?;
    let found = merged(&MultiHead {}, &bank(&names), &some)?;
    assert!(found.weight()?.all_close(&average.weight()?, 1e-14, 1e-14)?);
    Ok(())
}

#[test]
fn what_cannot_be_cut_or_averaged_is_refused() -> Result<()> {
    let three = t(&[1.0; 9], &[3, 3]).mul_scalar(1.0 / 3.0)?;
    let routing = || Routing::new(Weights::Dense(t(&means(), &[3])), 3).normalised();
    let names = ["a", "b", "c"];
    let told = |bank: &Bank, routing: &Routing| {
        merged(&MultiHead {}, bank, routing).unwrap_err().to_string()
    };
    let e = told(&bank(&names), &routing().with_heads(three));
    assert!(e.contains("4 outputs cannot be cut into 3"), "{e}");
    let mut other = bank(&["a", "b"]);
    other.insert("c", Box::new(LowRank { scale: 2.0, ..module("c") }))?;
    let e = told(&other, &routing());
    assert!(e.contains("`a`") && e.contains("`c`"), "{e}");
    let e = told(&bank(&names), &routing().with_heads(t(&HEADS, &[3, 2])));
    assert!(e.contains("heads"), "{e}");
    Ok(())
}

#[test]
fn factors_of_different_modules_are_joined_and_the_others_have_no_gradient() -> Result<()> {
    let names = ["a", "b", "c"];
    let (bank, modules) = (bank(&names), names.map(module));
    let half = Weights::Fixed(vec![(2, 0.5), (0, 0.5)]);
    let pair = t(&[0.0, 0.0, 1.0, 1.0, 0.0, 0.0], &[2, 3]);
    let routing = Routing::new(half, 3).with_heads(pair);
    let found = merged(&Factors {}, &bank, &routing)?;
    assert!(found.down.bit_equal(&modules[2].down)? && found.up.bit_equal(&modules[0].up)?);
    let leaves: Vec<Tensor> = bank_tensors(&bank);
    leaves.iter().try_for_each(|t| t.set_requires_grad(true))?;
    let wanted: Vec<&Tensor> = leaves.iter().collect();
    let gradients = merged(&Factors {}, &bank, &routing)?.weight()?.sum()?;
    let reached: Vec<bool> =
        gradients.gradients(&wanted, false)?.iter().map(Option::is_some).collect();
    // a: A, B; b: A, B; c: A, B.
    assert_eq!(reached, [false, true, false, false, true, false]);
    // Weights of both kinds.
    let mixed = t(&HEADS, &[2, 3]);
    let routing = Routing::new(Weights::Dense(t(&means(), &[3])), 3).normalised();
    let found = merged(&Factors {}, &bank, &routing.with_heads(mixed))?;
    let sum = |part: &dyn Fn(&LowRank) -> Tensor, q: usize| -> Vec<f64> {
        let all: Vec<Vec<f64>> = modules.iter().map(|m| part(m).to_vec().unwrap()).collect();
        (0..all[0].len()).map(|i| (0..3).map(|j| HEADS[3 * q + j] * all[j][i]).sum()).collect()
    };
    assert_close(&found.down, &sum(&|m| m.down.clone(), 0));
    assert_close(&found.up, &sum(&|m| m.up.clone(), 1));
    // Without heads it is the average.
    let plain = Routing::new(Weights::Fixed(vec![(0, 0.3), (1, 0.9)]), 3);
    let average = merged(&Average::default(), &bank, &plain)?;
    assert!(merged(&Factors {}, &bank, &plain)?.weight()?.all_close(
        &average.weight()?,
        1e-14,
        1e-14
    )?);
    Ok(())
}

fn bank_tensors(bank: &Bank) -> Vec<Tensor> {
    let phi = (0..bank.len()).map(|j| bank.module(j).unwrap().phi());
    phi.flat_map(|p| p.iter().map(|(_, t)| t.clone()).collect::<Vec<_>>()).collect()
}

/// A router with heads of their own for each row.
#[derive(Debug, Clone)]
struct Heads(Tensor);

impl RouterConfig for Heads {
    fn kind(&self) -> &'static str {
        "heads"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(self.clone()))
    }
}

impl Router for Heads {
    fn kind(&self) -> &'static str {
        "heads"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        let alpha = self.0.mean_dims(&[-2], false)?;
        let routing = Routing::new(Weights::Dense(alpha), bank.len()).normalised();
        Ok(routing.with_heads(self.0.clone()))
    }
}

fn model(kind: Kind, aggregator: Box<dyn AggregatorConfig>) -> Result<Modular> {
    let mut model = Modular::new(TinyBackbone::new(Seed(1), kind)?, Seed(2))?;
    for name in ["a", "b"] {
        let lora = Box::new(Lora { rank: 2, scale: 0.5 });
        model.attach(name, lora, &Targets::names(["query", "value"]))?;
    }
    model.aggregate(aggregator)?;
    Ok(model)
}

#[test]
fn rows_have_their_own_heads_at_all_sites_of_one_router_too() -> Result<()> {
    let rows = [[0.1, 0.9, 0.6, 0.4], [1.0, 0.0, 0.3, 0.7], [0.5, 0.5, 0.5, 0.5]];
    let inputs = TinyBackbone::inputs(3, 5, Seed(3))?;
    for global in [false, true] {
        let mut model = model(Kind::Double, Box::new(MultiHead {}))?;
        model.route(Box::new(Heads(t(&rows.concat(), &[3, 2, 2]))), global)?;
        let all = model.forward(&inputs, &Context::eval())?.need("logits")?.copy()?;
        for (r, row) in (0..).zip(rows) {
            model.route(Box::new(Heads(t(&row, &[2, 2]))), global)?;
            let alone = model.forward(&inputs, &Context::eval())?.need("logits")?.copy()?;
            assert!(all.select(0, r)?.all_close(&alone.select(0, r)?, 1e-10, 1e-10)?);
        }
    }
    Ok(())
}

fn scales(order: Vec<(usize, f64)>) -> Result<Tensor> {
    let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Double)?, Seed(2))?;
    // One multiplies the output, the other adds to it.
    model.attach("scale", Box::new(standins::Scale), &Targets::names(["query"]))?;
    model.attach("lora", Box::new(Lora { rank: 2, scale: 1.0 }), &Targets::names(["query"]))?;
    perturb(&model, &Select::new("modules.scale.*"), 0.5, Seed(3))?;
    model.aggregate(Box::new(Stack {}))?;
    model.route(Box::new(Given(Weights::Rows(vec![order; 2]))), false)?;
    let inputs = TinyBackbone::inputs(2, 5, Seed(4))?;
    let y = model.forward(&inputs, &Context::eval())?;
    y.need("logits")?.copy()
}

#[test]
fn the_order_of_a_stack_matters() -> Result<()> {
    let (one, other) = (scales(vec![(0, 1.0), (1, 1.0)])?, scales(vec![(1, 1.0), (0, 1.0)])?);
    assert!(!one.all_close(&other, 1e-3, 1e-3)?);
    // A list of two names gives each ½, and the same stack.
    assert!(scales(vec![(1, 0.5), (0, 0.5)])?.bit_equal(&other)?);
    let e = scales(vec![(1, 0.3), (0, 1.0)]).unwrap_err().to_string();
    assert!(e.contains("weight 0.3"), "{e}");
    Ok(())
}

#[test]
fn a_stack_is_one_function_after_the_other() -> Result<()> {
    use modl_core::{Host, Module, SiteKind};
    // y = 3·(x + 1) and y = (3·x) + 1.
    #[derive(Debug)]
    struct Affine(f64, f64);
    impl Module for Affine {
        fn kind(&self) -> &'static str {
            "affine"
        }
        fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
            let y = f.call(x, cx)?;
            Ok(y.replace(y.x.mul_scalar(self.0)?.add_scalar(self.1)?))
        }
    }
    let site = Site { path: "s".into(), kind: SiteKind::Linear, input: 2, output: 2, index: 0 };
    let f = |_: &Tensors, x: &Signal, _: &Context| Ok(x.clone());
    let theta = Tensors::new();
    let host = Host::new(&site, &theta, &f);
    let mut bank = Bank::new();
    bank.insert("plus", Box::new(Affine(1.0, 1.0)))?;
    bank.insert("times", Box::new(Affine(3.0, 0.0)))?;
    let (x, cx) = (Signal::from(t(&[2.0, 5.0], &[1, 2])), Context::eval());
    let through = |order: &[usize]| -> Result<Vec<f64>> {
        let routing = Routing::new(Weights::Fixed(order.iter().map(|j| (*j, 1.0)).collect()), 2);
        let active = bank.select(&routing, 1)?;
        Stack {}.outputs(&routing, &active.compute(&host, &x, &cx))?.x.to_vec()
    };
    assert_eq!(through(&[0, 1])?, [9.0, 18.0]);
    assert_eq!(through(&[1, 0])?, [7.0, 16.0]);
    assert_eq!(through(&[])?, [2.0, 5.0]);
    Ok(())
}
