//! The fast ways of the weighted sum against the formula, written out once more: values, and
//! gradients to α and φ, for every form of α.

#![allow(clippy::unwrap_used, clippy::panic)]

use modl_aggregate::WeightedSum;
use modl_core::{
    Aggregator, AggregatorConfig, Bank, Base, Context, Device, Host, Init, Kind, LowRank, Module,
    ParamStore, Result, Routing, Scope, Seed, Signal, Site, SiteKind, Tensor, Tensors, Weights,
};

const ROWS: i64 = 4;
const LEN: i64 = 3;
const IN: i64 = 5;
const OUT: i64 = 6;
const MODULES: i64 = 4;

fn draw(name: &str, shape: &[i64]) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(8).child(name), Kind::Double, Device::Cpu).unwrap()
}

fn leaf(name: &str, shape: &[i64]) -> Tensor {
    let t = draw(name, shape);
    t.set_requires_grad(true).unwrap();
    t
}

/// h = tanh(f_θ(x) ⊙ φ): nothing about it can be known without running it.
#[derive(Debug)]
struct Opaque {
    phi: Tensor,
}

impl Module for Opaque {
    fn kind(&self) -> &'static str {
        "opaque"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = f.call(x, cx)?;
        Ok(y.replace(y.x.mul(&self.phi)?.tanh()?))
    }
}

/// The modules, and their parameters.
fn bank(low_rank: bool) -> (Bank, Vec<Tensor>) {
    let mut bank = Bank::new();
    let mut leaves = Vec::new();
    for j in 0..MODULES {
        let module: Box<dyn Module> = if low_rank {
            let rank = 1 + j % 3;
            let down = leaf(&format!("down{j}"), &[rank, IN]);
            let up = leaf(&format!("up{j}"), &[OUT, rank]);
            leaves.extend([down.clone(), up.clone()]);
            Box::new(LowRank { down, up, scale: 0.5 + j as f64 })
        } else {
            let phi = leaf(&format!("phi{j}"), &[OUT]);
            leaves.push(phi.clone());
            Box::new(Opaque { phi })
        };
        bank.insert(format!("m{j}"), module).unwrap();
    }
    (bank, leaves)
}

fn indices(values: &[i64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values, shape, Device::Cpu).unwrap()
}

/// Every form of α with the leaf that its gradient belongs to.
fn forms() -> Vec<(&'static str, Weights, Option<Tensor>)> {
    let fixed = |name, all: &[(usize, f64)]| (name, Weights::Fixed(all.to_vec()), None);
    let rows = |name, all: [Vec<(usize, f64)>; 4]| (name, Weights::Rows(all.to_vec()), None);
    let dense = |name, shape: &[i64]| {
        let alpha = leaf(name, shape);
        (name, Weights::Dense(alpha.clone()), Some(alpha))
    };
    let sparse = |name, values: &[i64], shape: &[i64]| {
        let weight = leaf(name, shape);
        let index = indices(values, shape);
        (name, Weights::Sparse { index, weight: weight.clone() }, Some(weight))
    };
    let tokens: Vec<i64> = (0..ROWS * LEN).flat_map(|u| [u % 3, 3 - u % 2]).collect();
    let dropped: Vec<i64> = (0..ROWS * LEN).flat_map(|u| [u % 5 - 1, -(u % 3)]).collect();
    let dropped: Vec<i64> = dropped.into_iter().map(|j| j.max(-1)).collect();
    vec![
        fixed("no module", &[]),
        fixed("one module", &[(2, 1.0)]),
        fixed("one module, weighed", &[(2, -0.5)]),
        fixed("several", &[(0, 0.3), (3, 0.7)]),
        fixed("sum", &[(0, 1.0), (1, 1.0)]),
        rows("hard rows", [vec![(1, 1.0)], vec![(3, 1.0)], vec![(1, 1.0)], vec![(0, 1.0)]]),
        rows("a row without module", [vec![(1, 1.0)], vec![], vec![(2, 1.0)], vec![]]),
        rows("no row with a module", [vec![], vec![], vec![], vec![]]),
        rows("subsets", [vec![(0, 0.5), (2, 0.5)], vec![(1, 1.0)], vec![], vec![(3, 0.2)]]),
        rows(
            "convex subsets",
            [
                vec![(0, 0.5), (2, 0.5)],
                vec![(1, 1.0)],
                vec![(2, 0.25), (3, 0.75)],
                vec![(0, 0.5), (3, 0.5)],
            ],
        ),
        dense("static", &[MODULES]),
        dense("rows", &[ROWS, MODULES]),
        dense("tokens", &[ROWS, LEN, MODULES]),
        sparse("sparse rows", &[0, 1, 1, 3, 3, 0, 1, 0], &[ROWS, 2]),
        sparse("sparse tokens", &tokens, &[ROWS, LEN, 2]),
        sparse("rows without a choice", &[0, -1, -1, -1, 3, 0, -1, 2], &[ROWS, 2]),
        sparse("dropped tokens", &dropped, &[ROWS, LEN, 2]),
    ]
}

/// α `[ROWS, LEN, MODULES]` from its definition.
fn spelled_out(weights: &Weights) -> Result<Tensor> {
    let constant = |row: &[(usize, f64)]| {
        let mut flat = vec![0f64; MODULES as usize];
        row.iter().for_each(|(j, w)| flat[*j] += w);
        Tensor::from_slice(&flat, &[1, 1, MODULES], Device::Cpu)
    };
    let alpha = match weights {
        Weights::Fixed(all) => constant(all)?,
        Weights::Rows(all) => {
            Tensor::cat(&all.iter().map(|r| constant(r)).collect::<Result<Vec<_>>>()?, 0)?
        }
        Weights::Dense(w) => match w.dim() {
            1 => w.reshape(&[1, 1, MODULES])?,
            2 => w.reshape(&[ROWS, 1, MODULES])?,
            _ => w.clone(),
        },
        Weights::Sparse { index, weight } => {
            // A place before the first for −1, which is nobody.
            let hot = index.shift(1)?.one_hot(MODULES + 1)?.narrow(-1, 1, MODULES)?;
            let hot = hot.to_kind(Kind::Double)?;
            let dense = hot.mul(&weight.unsqueeze(-1)?)?.sum_dims(&[-2], false)?;
            dense.reshape(&[ROWS, if index.dim() == 2 { 1 } else { LEN }, MODULES])?
        }
        Weights::Slots { .. } => panic!("mixtures of tokens have a test of their own"),
    };
    alpha.expand(&[ROWS, LEN, MODULES])
}

/// y = f(x) + Σ αⱼ (hⱼ − f(x)), or Σ αⱼ hⱼ.
fn formula(alpha: &Tensor, h: &[Tensor], y: &Tensor, base: Base) -> Result<Tensor> {
    let start = if base == Base::Kept { y.clone() } else { y.zeros_like()? };
    (0..).zip(h).try_fold(start, |sum, (j, h)| {
        let change = if base == Base::Kept { h.sub(y)? } else { h.clone() };
        sum.add(&change.mul(&alpha.narrow(-1, j, 1)?)?)
    })
}

fn linear(theta: &Tensors, x: &Signal, _: &Context) -> Result<Signal> {
    Ok(x.replace(x.x.linear(theta.need("weight")?, theta.get("bias"))?))
}

fn site(kind: SiteKind) -> Site {
    Site { path: "site".into(), kind, input: IN, output: OUT, index: 0 }
}

fn theta() -> Tensors {
    Tensors::new().with("weight", draw("weight", &[OUT, IN])).with("bias", draw("bias", &[OUT]))
}

fn assert_same_gradients(a: &Tensor, b: &Tensor, leaves: &[&Tensor], what: &str) -> Result<()> {
    let probe = draw("probe", &a.size());
    let of = |t: &Tensor| match t.requires_grad() {
        true => t.mul(&probe)?.sum()?.gradients(leaves, true),
        false => Ok(vec![None; leaves.len()]),
    };
    for (a, b) in of(a)?.iter().zip(of(b)?) {
        // What is not run has no gradient; in the formula it is weighed by 0.
        let same = match (a, &b) {
            (Some(a), Some(b)) => a.all_close(b, 1e-12, 1e-12)?,
            (None, Some(zero)) | (Some(zero), None) => zero.abs()?.sum()?.item()? == 0.0,
            (None, None) => true,
        };
        assert!(same, "{what}: {a:?} {b:?}");
    }
    Ok(())
}

#[test]
fn every_form_of_alpha_gives_what_the_formula_gives() -> Result<()> {
    let (site, theta) = (site(SiteKind::Linear), theta());
    let x = Signal::from(draw("x", &[ROWS, LEN, IN]));
    let cx = Context::eval();
    for low_rank in [true, false] {
        let (bank, leaves) = bank(low_rank);
        let host = Host::new(&site, &theta, &linear);
        let h: Vec<Tensor> = (0..MODULES as usize)
            .map(|j| Ok(bank.module(j).unwrap().forward(&host, &x, &cx)?.x))
            .collect::<Result<_>>()?;
        let y = host.call(&x, &Context::eval())?.x;
        for (name, weights, alpha) in forms() {
            for base in [Base::Kept, Base::Replaced] {
                let what = format!("{name}, {base:?}, low-rank {low_rank}");
                let expected = formula(&spelled_out(&weights)?, &h, &y, base)?;
                let routing = Routing::new(weights.clone(), MODULES as usize);
                let active = bank.select(&routing, ROWS)?;
                let outputs = active.compute(&host, &x, &cx);
                let fast = WeightedSum { base }.outputs(&routing, &outputs)?.x;
                assert!(fast.all_close(&expected, 1e-12, 1e-12)?, "{what}");
                let plain = outputs.plain_sum(base)?.x;
                assert!(plain.all_close(&expected, 1e-12, 1e-12)?, "{what}, plain");
                let wanted: Vec<&Tensor> = leaves.iter().chain(&alpha).collect();
                assert_same_gradients(&fast, &expected, &wanted, &what)?;
            }
        }
    }
    Ok(())
}

#[test]
fn slots_are_mixtures_of_tokens_and_tokens_of_slots() -> Result<()> {
    let (site, theta) = (site(SiteKind::Linear), theta());
    let x = Signal::from(draw("x", &[ROWS, LEN, IN]));
    let cx = Context::eval();
    const SLOTS: i64 = 3;
    let shape = [ROWS, LEN, MODULES, SLOTS];
    let (dispatch, combine) = (leaf("dispatch", &shape), leaf("combine", &shape));
    let slots = Weights::Slots { dispatch: dispatch.clone(), combine: combine.clone() };
    for low_rank in [true, false] {
        let (bank, leaves) = bank(low_rank);
        let host = Host::new(&site, &theta, &linear);
        let routing = Routing::new(slots.clone(), MODULES as usize);
        let active = bank.select(&routing, ROWS)?;
        // y[b, t] = Σⱼ Σₛ C[b, t, j, s] hⱼ(Σᵤ D[b, u, j, s] x[b, u]), and what α leaves to f.
        let mixed = Tensor::einsum("bujs,bui->bjsi", &[&dispatch, &x.x])?;
        let mut replaced = Tensor::zeros(&[ROWS, LEN, OUT], Kind::Double, Device::Cpu)?;
        for j in 0..MODULES {
            let x = Signal::from(mixed.select(1, j)?);
            let h = bank.module(j as usize).unwrap().forward(&host, &x, &cx)?.x;
            let own = Tensor::einsum("bts,bso->bto", &[&combine.select(2, j)?, &h])?;
            replaced = replaced.add(&own)?;
        }
        let left = combine.sum_dims(&[-1, -2], false)?.neg()?.add_scalar(1.0)?.unsqueeze(-1)?;
        let kept = replaced.add(&host.call(&x, &cx)?.x.mul(&left)?)?;
        let wanted: Vec<&Tensor> = leaves.iter().chain([&dispatch, &combine]).collect();
        for (base, expected) in [(Base::Replaced, replaced), (Base::Kept, kept)] {
            let y = active.compute(&host, &x, &cx).weighted_sum(base)?.x;
            assert!(y.all_close(&expected, 1e-12, 1e-12)?, "{base:?}");
            assert_same_gradients(&y, &expected, &wanted, &format!("slots, {base:?}"))?;
        }
    }
    let (bank, _) = bank(false);
    let fewer = Routing::new(slots, MODULES as usize).select_rows(&[2, 0])?;
    assert!(bank.select(&fewer, 2).is_ok() && bank.select(&fewer, ROWS).is_err());
    Ok(())
}

#[test]
fn an_alpha_that_sums_to_one_needs_no_base() -> Result<()> {
    let (site, theta) = (site(SiteKind::Linear), theta());
    let x = Signal::from(draw("x", &[ROWS, LEN, IN]));
    let cx = Context::eval();
    for low_rank in [true, false] {
        let (bank, _) = bank(low_rank);
        let host = Host::new(&site, &theta, &linear);
        let alpha = draw("alpha", &[ROWS, LEN, 2]).softmax(-1)?;
        let index: Vec<i64> = (0..ROWS * LEN).flat_map(|u| [u % 2, 2 + u % 2]).collect();
        let index = indices(&index, &[ROWS, LEN, 2]);
        let routing = Routing::new(Weights::Sparse { index, weight: alpha }, 4);
        let sum = |routing: &Routing, base| {
            let active = bank.select(routing, ROWS)?;
            active.compute(&host, &x, &cx).weighted_sum(base).map(|y| y.x)
        };
        let expected = sum(&routing, Base::Kept)?;
        let declared = routing.clone().normalised();
        for base in [Base::Kept, Base::Replaced] {
            assert!(sum(&declared, base)?.all_close(&expected, 1e-12, 1e-12)?);
        }
    }
    Ok(())
}

#[test]
fn an_empty_batch_stays_empty() -> Result<()> {
    let (site, theta) = (site(SiteKind::Linear), theta());
    let x = Signal::from(draw("x", &[0, LEN, IN]));
    let (bank, _) = bank(false);
    let host = Host::new(&site, &theta, &linear);
    let empty = |shape: &[i64]| Tensor::zeros(shape, Kind::Double, Device::Cpu);
    let index = indices(&[], &[0, LEN, 2]);
    for weights in [
        Weights::Rows(Vec::new()),
        Weights::Dense(empty(&[0, MODULES])?),
        Weights::Sparse { index, weight: empty(&[0, LEN, 2])? },
    ] {
        for base in [Base::Kept, Base::Replaced] {
            let routing = Routing::new(weights.clone(), MODULES as usize);
            let active = bank.select(&routing, 0)?;
            let y = active.compute(&host, &x, &Context::eval()).weighted_sum(base)?;
            assert_eq!(y.x.size(), [0, LEN, OUT]);
        }
    }
    Ok(())
}

/// Token ids are integers; their weights are not.
#[test]
fn fractions_weigh_modules_of_an_embedding() -> Result<()> {
    let (site, table) = (site(SiteKind::Embedding), draw("table", &[IN, OUT]));
    let theta = Tensors::new().with("weight", table);
    let f = |theta: &Tensors, x: &Signal, _: &Context| {
        Ok(theta.need("weight")?.embedding(&x.x)?.into())
    };
    let host = Host::new(&site, &theta, &f);
    let x = Signal::from(indices(&[0, 1, 2, 3, 4, 0], &[2, 3]));
    let (bank, _) = bank(false);
    let cx = Context::eval();
    let h = |j: usize| -> Result<Tensor> { Ok(bank.module(j).unwrap().forward(&host, &x, &cx)?.x) };
    let expected = h(0)?.mul_scalar(0.25)?.add(&h(1)?.mul_scalar(0.75)?)?;
    let alpha = vec![(0, 0.25), (1, 0.75)];
    for weights in [Weights::Fixed(alpha.clone()), Weights::Rows(vec![alpha; 2])] {
        let active = bank.select(&Routing::new(weights, 4), 2)?;
        let y = active.compute(&host, &x, &cx).weighted_sum(Base::Kept)?;
        assert!(y.x.all_close(&expected, 1e-12, 1e-12)?);
    }
    Ok(())
}

/// A sequence-changing module hands on its mask, also where several of them are weighed.
#[test]
fn companions_survive_the_sum() -> Result<()> {
    let (site, theta) = (site(SiteKind::Tokens), Tensors::new());
    let f = |_: &Tensors, x: &Signal, _: &Context| Ok(x.replace(x.x.mul_scalar(2.0)?));
    let host = Host::new(&site, &theta, &f);
    let mask = Tensor::from_slice(&[1f64, 1., 0., 1., 0., 0.], &[2, 3], Device::Cpu)?;
    let with = Tensors::new().with("mask", mask.clone());
    let x = Signal { x: draw("x", &[2, 3, OUT]), with };
    let (bank, _) = bank(false);
    let rows = vec![vec![(0, 0.5), (1, 0.5)], vec![(2, 0.9), (3, 0.1)]];
    let active = bank.select(&Routing::new(Weights::Rows(rows), 4), 2)?;
    let y = active.compute(&host, &x, &Context::eval()).weighted_sum(Base::Kept)?;
    assert!(y.with.need("mask")?.bit_equal(&mask)?);
    Ok(())
}

/// One router for many sites may have looked at tokens where another site has none.
#[test]
fn an_alpha_for_tokens_that_are_not_there_is_refused() -> Result<()> {
    let (site, theta) = (site(SiteKind::Linear), theta());
    let host = Host::new(&site, &theta, &linear);
    let x = Signal::from(draw("pooled", &[LEN, IN]));
    let alpha = draw("alpha", &[LEN, LEN, MODULES]);
    for low_rank in [true, false] {
        let (bank, _) = bank(low_rank);
        let active = bank.select(&Routing::new(Weights::Dense(alpha.clone()), 4), LEN)?;
        let e = active.compute(&host, &x, &Context::eval()).weighted_sum(Base::Kept).unwrap_err();
        assert!(e.to_string().contains("route per example"), "{e}");
    }
    Ok(())
}

#[test]
fn the_configuration_makes_the_aggregator() -> Result<()> {
    let mut store = ParamStore::new();
    let mut scope = Scope::new(&mut store, Seed(0));
    let config = WeightedSum { base: Base::Replaced };
    let made = AggregatorConfig::build(&config, &site(SiteKind::Linear), &mut scope)?;
    assert_eq!(made.order(), modl_core::Order::Outputs);
    assert_eq!(store.iter().count(), 0);
    Ok(())
}
