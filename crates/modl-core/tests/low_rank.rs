//! Low-rank modules by few products, against every module on everything: values and gradients.
#![allow(clippy::unwrap_used)]

use modl_core::testing::{Given, PlainSum, Sum};
use modl_core::{
    Aggregator, Bank, Context, Device, Host, Init, Kind, LowRank, ModularLayer, Result, Seed,
    Signal, Site, SiteKind, Tensor, Tensors, Weights,
};

const IN: i64 = 5;
const OUT: i64 = 6;

fn leaf(name: &str, shape: &[i64]) -> Tensor {
    let t = Init::Normal(1.0).tensor(shape, Seed(8).child(name), Kind::Double, Device::Cpu);
    let t = t.unwrap();
    t.set_requires_grad(true).unwrap();
    t
}

/// y and the gradients of all factors and of x, for rows `[5, 3, in]`.
fn run(aggregator: impl Aggregator + 'static, rows: &[Vec<(usize, f64)>]) -> Vec<Tensor> {
    let mut bank = Bank::new();
    let mut leaves = Vec::new();
    for j in 0..9i64 {
        let rank = 1 + j % 3;
        let (down, up) =
            (leaf(&format!("down{j}"), &[rank, IN]), leaf(&format!("up{j}"), &[OUT, rank]));
        leaves.extend([down.clone(), up.clone()]);
        bank.insert(format!("m{j}"), Box::new(LowRank { down, up, scale: 0.5 + j as f64 }))
            .unwrap();
    }
    let layer = ModularLayer::new(bank, Given(Weights::Rows(rows.to_vec())), aggregator);
    let site = Site { path: "a".into(), kind: SiteKind::Linear, input: IN, output: OUT, index: 0 };
    let theta = Tensors::new().with("weight", leaf("w", &[OUT, IN]));
    let f = |theta: &Tensors, x: &Signal, _: &Context| -> Result<Signal> {
        Ok(x.replace(x.x.linear(theta.need("weight")?, None)?))
    };
    let x = leaf("x", &[rows.len() as i64, 3, IN]);
    leaves.push(x.clone());
    let host = Host::new(&site, &theta, &f);
    let y = layer.forward(&host, &Signal::from(x), &Context::eval()).unwrap().x;
    let loss = y.mul(&leaf("loss", &y.size())).unwrap().sum().unwrap();
    let leaves: Vec<&Tensor> = leaves.iter().collect();
    let grads = loss.gradients(&leaves, false).unwrap();
    let zeros = |(g, t): (Option<Tensor>, &&Tensor)| g.unwrap_or_else(|| t.zeros_like().unwrap());
    std::iter::once(y).chain(grads.into_iter().zip(&leaves).map(zeros)).collect()
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
        let (fast, plain) = (run(Sum::default(), &rows), run(PlainSum::default(), &rows));
        for (i, (a, b)) in fast.iter().zip(&plain).enumerate() {
            assert!(a.all_close(b, 1e-10, 1e-10).unwrap(), "{rows:?}: tensor {i}");
        }
    }
}
