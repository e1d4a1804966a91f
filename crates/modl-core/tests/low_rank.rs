//! Low-rank modules by few products, against every module on everything: values and gradients.
#![allow(clippy::unwrap_used)]

use modl_core::testing::{Given, PlainSum, Sum};
use modl_core::{
    Aggregator, Bank, Context, Device, Host, Init, Kind, LowRank, ModularLayer, Result, Seed,
    Signal, Site, SiteKind, Tensor, Tensors, Weights,
};

const IN: i64 = 5;
const OUT: i64 = 6;

/// Numbers that `through` has, in another kind.
fn leaf(name: &str, shape: &[i64], through: Kind, kind: Kind) -> Tensor {
    let t = Init::Normal(1.0).tensor(shape, Seed(8).child(name), Kind::Double, Device::Cpu);
    let t = t.unwrap().to_kind(through).unwrap().to_kind(kind).unwrap();
    t.set_requires_grad(true).unwrap();
    t
}

/// Who has which of nine modules of ranks from `rank` on, for rows of `seq` tokens.
struct World {
    weights: Weights,
    rows: i64,
    seq: i64,
    rank: i64,
}

/// y and the gradients of all factors and of x, in f64.
fn run(aggregator: impl Aggregator + 'static, w: &World, through: Kind, kind: Kind) -> Vec<Tensor> {
    let leaf = |name: &str, shape: &[i64]| leaf(name, shape, through, kind);
    let mut bank = Bank::new();
    let mut leaves = Vec::new();
    for j in 0..9i64 {
        let rank = w.rank + j % 3;
        let (down, up) =
            (leaf(&format!("down{j}"), &[rank, IN]), leaf(&format!("up{j}"), &[OUT, rank]));
        leaves.extend([down.clone(), up.clone()]);
        bank.insert(format!("m{j}"), Box::new(LowRank { down, up, scale: 0.5 + j as f64 }))
            .unwrap();
    }
    let layer = ModularLayer::new(bank, Given(w.weights.clone()), aggregator);
    let site = Site { path: "a".into(), kind: SiteKind::Linear, input: IN, output: OUT, index: 0 };
    let theta = Tensors::new().with("weight", leaf("w", &[OUT, IN]));
    let f = |theta: &Tensors, x: &Signal, _: &Context| -> Result<Signal> {
        Ok(x.replace(x.x.linear(theta.need("weight")?, None)?))
    };
    let x = leaf("x", &[w.rows, w.seq, IN]);
    leaves.push(x.clone());
    let host = Host::new(&site, &theta, &f);
    let y = layer.forward(&host, &Signal::from(x), &Context::eval()).unwrap().x;
    let loss = y.mul(&leaf("loss", &y.size())).unwrap().sum().unwrap();
    let leaves: Vec<&Tensor> = leaves.iter().collect();
    let grads = loss.gradients(&leaves, false).unwrap();
    let zeros = |(g, t): (Option<Tensor>, &&Tensor)| g.unwrap_or_else(|| t.zeros_like().unwrap());
    let all = std::iter::once(y).chain(grads.into_iter().zip(&leaves).map(zeros));
    all.map(|t| t.detach().unwrap().to_kind(Kind::Double).unwrap()).collect()
}

#[test]
fn rows_with_few_of_many_modules() {
    let one = |j: usize, a: f64| vec![(j, a)];
    for rows in [
        vec![one(8, 1.0), one(0, 1.0), one(4, 1.0), one(7, 1.0), one(2, 1.0)],
        vec![
            one(8, 0.5),
            vec![],
            one(4, -1.0),
            vec![(7, 0.25), (1, 2.0)],
            vec![(5, 1.0), (3, 1.0)],
        ],
        vec![one(6, 1.0), one(8, 1.0), one(5, 1.0), one(3, 1.0), one(6, 0.1)],
    ] {
        let w = World { weights: Weights::Rows(rows.clone()), rows: 5, seq: 3, rank: 1 };
        let fast = run(Sum::default(), &w, Kind::Double, Kind::Double);
        let plain = run(PlainSum::default(), &w, Kind::Double, Kind::Double);
        for (i, (a, b)) in fast.iter().zip(&plain).enumerate() {
            assert!(a.all_close(b, 1e-10, 1e-10).unwrap(), "{rows:?}: tensor {i}");
        }
    }
}

/// Batched products of rows that are long, and of sorted tokens: every step is rounded once.
#[test]
fn half_precision_is_that_of_its_roundings() {
    let rows =
        vec![vec![(8, 0.5)], vec![], vec![(4, -1.0)], vec![(7, 0.25), (1, 2.0)], vec![(5, 1.0)]];
    let rows = World { weights: Weights::Rows(rows), rows: 5, seq: 130, rank: 9 };
    let index: Vec<i64> = (0..80).map(|s| if s % 7 == 3 { -1 } else { s * 5 % 9 }).collect();
    let index = Tensor::from_slice(&index, &[1, 40, 2], Device::Cpu).unwrap();
    let weight = Init::Uniform(1.0).tensor(&[1, 40, 2], Seed(8), Kind::Half, Device::Cpu);
    let weight = weight.unwrap().to_kind(Kind::Double).unwrap();
    let tokens = World { weights: Weights::Sparse { index, weight }, rows: 1, seq: 40, rank: 9 };
    for (kind, unit, w) in [
        (Kind::BFloat16, 2f64.powi(-8), &rows),
        (Kind::Half, 2f64.powi(-11), &rows),
        (Kind::Half, 2f64.powi(-11), &tokens),
    ] {
        let fast = run(Sum::default(), w, kind, kind);
        let plain = run(PlainSum::default(), w, kind, Kind::Double);
        for (i, (a, b)) in fast.iter().zip(&plain).enumerate() {
            let largest = b.to_vec::<f64>().unwrap().into_iter().fold(0f64, |m, v| m.max(v.abs()));
            assert!(a.all_close(b, 8.0 * unit * largest, 0.0).unwrap(), "{kind:?}: tensor {i}");
        }
    }
}
