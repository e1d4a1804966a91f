//! The fast ways of the weighted sum against the formula, written out once more: values, and
//! gradients to α and φ, for every form of α.

#![allow(clippy::unwrap_used, clippy::panic)]

use modl_aggregate::WeightedSum;
use modl_core::{
    Aggregator, AggregatorConfig, Bank, Base, Context, Device, Host, Init, Kind, LowRank, Module,
    ParamStore, Result, Routing, Scope, Seed, Signal, Site, SiteKind, Tensor, Tensors, Weights,
    set_threads,
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

/// A network of two matrices for each token: tanh(x Aᵀ) Bᵀ.
#[derive(Debug)]
struct Expert {
    a: Tensor,
    b: Tensor,
    alone: bool,
}

impl Module for Expert {
    fn kind(&self) -> &'static str {
        "expert"
    }

    fn forward(&self, _: &Host, x: &Signal, _: &Context) -> Result<Signal> {
        Ok(x.replace(x.x.linear(&self.a, None)?.tanh()?.linear(&self.b, None)?))
    }

    fn stands_alone(&self) -> bool {
        self.alone
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with("a", self.a.clone()).with("b", self.b.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let (a, b) = (phi.need("a")?.clone(), phi.need("b")?.clone());
        Ok(Box::new(Expert { a, b, alone: self.alone }))
    }
}

/// What experts are made of, which decides the way that they are computed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Made {
    LowRank,
    /// One after the other.
    Network,
    /// Side by side where loads are even.
    Alone,
}

/// `count` experts and their parameters.
fn experts(count: i64, made: Made, kind: Kind) -> (Bank, Vec<Tensor>) {
    let low_rank = made == Made::LowRank;
    let (mut bank, mut leaves) = (Bank::new(), Vec::new());
    for j in 0..count {
        let of = |name: &str, shape: &[i64]| {
            let t = draw(&format!("{name}{j}"), shape).mul_scalar(0.4).unwrap();
            let t = t.to_kind(kind).unwrap();
            t.set_requires_grad(true).unwrap();
            t
        };
        let rank = if low_rank { 1 + j % 2 } else { 3 };
        let (a, b) = (of("a", &[rank, IN]), of("b", &[OUT, rank]));
        leaves.extend([a.clone(), b.clone()]);
        let module: Box<dyn Module> = match low_rank {
            true => Box::new(LowRank { down: a, up: b, scale: 1.0 / (1 + j % 3) as f64 }),
            false => Box::new(Expert { a, b, alone: made == Made::Alone }),
        };
        bank.insert(format!("m{j}"), module).unwrap();
    }
    (bank, leaves)
}

/// Values and gradients (to x, α and all parameters) of the fast way and of the plain one.
fn both_ways(
    (bank, leaves): (&Bank, &[Tensor]),
    index: &Tensor,
    x: &Tensor,
    base: Base,
    tolerance: f64,
    what: &str,
) -> Result<()> {
    let kind = x.kind();
    let theta = theta().map(|_, t| t.to_kind(kind))?;
    let site = site(SiteKind::Linear);
    let host = Host::new(&site, &theta, &linear);
    let weight = draw("weight", &index.size()).to_kind(kind)?;
    weight.set_requires_grad(true)?;
    let sparse = Weights::Sparse { index: index.clone(), weight: weight.clone() };
    let active = bank.select(&Routing::new(sparse, bank.len()), x.len_of(0))?;
    let (x, cx) = (Signal::from(x.clone()), Context::eval());
    let outputs = active.compute(&host, &x, &cx);
    let fast = outputs.weighted_sum(base)?.x;
    let plain = outputs.plain_sum(base)?.x;
    assert!(fast.all_close(&plain, tolerance, tolerance)?, "{what}");
    if !plain.requires_grad() {
        return Ok(());
    }
    let wanted: Vec<&Tensor> = leaves.iter().chain([&weight, &x.x]).collect();
    let probe = draw("probe", &fast.size()).to_kind(kind)?;
    let of = |t: &Tensor| t.mul(&probe)?.sum()?.gradients(&wanted, false);
    for (a, b) in of(&fast)?.iter().zip(of(&plain)?) {
        let same = match (a, &b) {
            (Some(a), Some(b)) => a.all_close(b, tolerance, tolerance)?,
            (None, Some(zero)) | (Some(zero), None) => zero.abs()?.sum()?.item()? == 0.0,
            (None, None) => true,
        };
        assert!(same, "{what}: {a:?} {b:?}");
    }
    Ok(())
}

/// Balanced, skewed, to one alone, and to fewer than there are, with and without dropped tokens,
/// where there are few experts and where there are more than tokens.
#[test]
fn tokens_sent_to_experts_get_what_the_formula_gives() -> Result<()> {
    type Choose = fn(i64, i64) -> i64;
    let loads: [(&str, Choose); 5] = [
        ("even", |slot, count| slot * 7 % count),
        ("skewed", |slot, count| if slot % 2 == 0 { 0 } else { slot % count }),
        ("one alone", |_, count| count - 1),
        ("dropped", |slot, count| if slot % 3 == 0 { -1 } else { slot % count }),
        ("nobody", |_, _| -1),
    ];
    set_threads(3);
    for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
        for count in [1, 4, 36] {
            for made in [Made::LowRank, Made::Network, Made::Alone] {
                let (bank, leaves) = experts(count, made, kind);
                for (name, choose) in loads {
                    let index: Vec<i64> = (0..2 * 17 * 2).map(|s| choose(s, count)).collect();
                    for (x, shape) in [([2, 17, IN], vec![2, 17, 2]), ([34, 2, IN], vec![34, 2])] {
                        let x = draw("tokens", &x).mul_scalar(0.5)?.to_kind(kind)?;
                        x.set_requires_grad(true)?;
                        let index = indices(&index, &shape);
                        for base in [Base::Kept, Base::Replaced] {
                            let what = format!(
                                "{kind:?}, {count} modules, {made:?}, {name}, {shape:?}, {base:?}"
                            );
                            both_ways((&bank, &leaves), &index, &x, base, tolerance, &what)?;
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// h = f_θ(x) + φ, and how often f_θ was computed, on how many tokens.
#[test]
fn the_base_is_computed_once_and_only_where_it_is_wanted() -> Result<()> {
    let (site, theta) = (site(SiteKind::Linear), theta());
    let seen = std::cell::RefCell::new(Vec::new());
    let f = |theta: &Tensors, x: &Signal, cx: &Context| {
        seen.borrow_mut().push(x.x.numel() as i64 / IN);
        linear(theta, x, cx)
    };
    let host = Host::new(&site, &theta, &f);
    let x = Signal::from(draw("x", &[ROWS, LEN, IN]));
    let all = ROWS * LEN;
    let index: Vec<i64> = (0..all * 2).map(|s| s % MODULES).collect();
    let few: Vec<i64> = (0..all * 2).map(|s| if s < 2 { s } else { -1 }).collect();
    let (opaque, _) = bank(false);
    let (own, _) = experts(MODULES, Made::Network, Kind::Double);
    let run = |bank: &Bank, index: &[i64], base| -> Result<Vec<i64>> {
        let index = indices(index, &[ROWS, LEN, 2]);
        let sparse = Weights::Sparse { index, weight: draw("w", &[ROWS, LEN, 2]) };
        let active = bank.select(&Routing::new(sparse, bank.len()), ROWS)?;
        active.compute(&host, &x, &Context::eval()).weighted_sum(base)?;
        Ok(seen.take())
    };
    assert_eq!(run(&opaque, &index, Base::Kept)?, [all]);
    assert_eq!(run(&opaque, &index, Base::Replaced)?, [all]);
    assert_eq!(run(&opaque, &few, Base::Replaced)?, [1, 1]);
    assert_eq!(run(&own, &index, Base::Kept)?, [all]);
    assert!(run(&own, &index, Base::Replaced)?.is_empty());
    assert!(run(&own, &[-1; 24], Base::Replaced)?.is_empty());
    Ok(())
}

/// Modules that pick their factor from the context of their rows.
#[derive(Debug)]
struct ByRow;

impl Module for ByRow {
    fn kind(&self) -> &'static str {
        "by_row"
    }

    fn forward(&self, _: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        assert_eq!(cx.tasks()?.len() as i64, x.rows());
        Ok(x.replace(x.x.mul(cx.feature("factor")?)?))
    }
}

#[test]
fn a_token_has_the_context_of_its_row() -> Result<()> {
    let site = Site { output: IN, ..site(SiteKind::Sublayer) };
    let theta = Tensors::new();
    let f = |_: &Tensors, x: &Signal, _: &Context| Ok(x.clone());
    let host = Host::new(&site, &theta, &f);
    let mut bank = Bank::new();
    for name in ["a", "b", "c"] {
        bank.insert(name, Box::new(ByRow)).unwrap();
    }
    let factor = draw("factor", &[ROWS, 1]);
    let tasks: Vec<String> = (0..ROWS).map(|r| r.to_string()).collect();
    let cx = Context::eval().with_tasks(tasks).with_feature("factor", factor.clone());
    let residual = draw("residual", &[ROWS, LEN, OUT]);
    let with = Tensors::new().with("residual", residual.clone());
    let x = Signal { x: draw("x", &[ROWS, LEN, IN]), with };
    let index: Vec<i64> = (0..ROWS * LEN).map(|t| t * 2 % 3).collect();
    let weight = Tensor::ones(&[ROWS, LEN, 1], Kind::Double, Device::Cpu)?;
    let sparse = Weights::Sparse { index: indices(&index, &[ROWS, LEN, 1]), weight };
    let active = bank.select(&Routing::new(sparse, 3), ROWS)?;
    let y = active.compute(&host, &x, &cx).weighted_sum(Base::Replaced)?;
    assert!(y.x.all_close(&x.x.mul(&factor.unsqueeze(-1)?)?, 1e-12, 0.0)?);
    assert!(y.with.need("residual")?.bit_equal(&residual)?, "companions go through as they are");
    Ok(())
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(48))]

    /// No token is lost or counted twice, and neither the order of tokens nor that of experts
    /// matters.
    #[test]
    fn orders_do_not_matter(
        choices in proptest::collection::vec(-1i64..12, 26),
        shift in 1usize..13,
        turn in 1usize..12,
        low_rank: bool,
        alone: bool,
        kept: bool,
    ) {
        set_threads(3);
        const TOKENS: usize = 13;
        const EXPERTS: usize = 12;
        let base = if kept { Base::Kept } else { Base::Replaced };
        let (site, theta) = (site(SiteKind::Linear), theta());
        let host = Host::new(&site, &theta, &linear);
        let sum = |modules: &[usize], order: &[usize]| {
            let mut bank = Bank::new();
            for j in modules {
                let (a, b) = (draw(&format!("a{j}"), &[2, IN]), draw(&format!("b{j}"), &[OUT, 2]));
                let module: Box<dyn Module> = match low_rank {
                    true => Box::new(LowRank { down: a, up: b, scale: 1.0 }),
                    false => Box::new(Expert { a, b, alone }),
                };
                bank.insert(format!("m{j}"), module).unwrap();
            }
            let of = |j: i64| modules.iter().position(|m| *m as i64 == j).map_or(-1, |p| p as i64);
            let index: Vec<i64> =
                order.iter().flat_map(|t| [of(choices[2 * t]), of(choices[2 * t + 1])]).collect();
            let order: Vec<i64> = order.iter().map(|t| *t as i64).collect();
            let order = indices(&order, &[TOKENS as i64]);
            let pick = |name: &str, width| {
                draw(name, &[1, TOKENS as i64, width]).index_select(1, &order).unwrap()
            };
            let index = indices(&index, &[1, TOKENS as i64, 2]);
            let sparse = Weights::Sparse { index, weight: pick("weight", 2) };
            let active = bank.select(&Routing::new(sparse, EXPERTS), 1).unwrap();
            let x = Signal::from(pick("x", IN));
            let cx = Context::eval();
            active.compute(&host, &x, &cx).weighted_sum(base).unwrap().x
        };
        let as_it_is: Vec<usize> = (0..TOKENS).collect();
        let experts: Vec<usize> = (0..EXPERTS).collect();
        let y = sum(&experts, &as_it_is);
        let turned: Vec<usize> = (0..EXPERTS).map(|j| (j + turn) % EXPERTS).collect();
        let other = sum(&turned, &as_it_is);
        proptest::prop_assert!(other.all_close(&y, 1e-12, 1e-12).unwrap());
        let shifted: Vec<usize> = (0..TOKENS).map(|t| (t + shift) % TOKENS).collect();
        let other = sum(&experts, &shifted);
        let back: Vec<i64> = (0..TOKENS).map(|t| ((t + TOKENS - shift) % TOKENS) as i64).collect();
        let other = other.index_select(1, &indices(&back, &[TOKENS as i64])).unwrap();
        proptest::prop_assert!(other.all_close(&y, 1e-12, 1e-12).unwrap());
    }
}
