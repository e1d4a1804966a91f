#![allow(clippy::unwrap_used, missing_docs)]
use modl_core::testing::{Given, Sum};
use modl_core::*;
use std::time::Instant;
fn t(s: &[i64], std: f64, n: &str) -> Tensor { let t = Init::Normal(std).tensor(s, Seed(1).child(n), Kind::Float, Device::Cpu).unwrap(); t.set_requires_grad(true).unwrap(); t }
fn main() {
    keep_freed_memory();
    for (rank, dim, tokens, e, k, seq) in [(8i64,384i64,1024i64,64i64,2i64,0i64),(8,384,1024,2,1,0),(8,384,1024,2,2,0),(8,384,1024,8,2,0),(64,384,1024,8,2,0),(64,384,1024,64,2,0),(16,1024,1024,8,1,0),(16,1024,1024,64,2,0),(64,1024,512,64,2,0),(16,4096,256,8,2,0),(64,4096,256,64,2,0),(8,384,1,64,2,0),(64,4096,1,8,2,0),(8,384,16,64,2,0),(8,384,16,4,1,0),(64,4096,16,16,1,0),(8,384,0,16,1,1),(8,384,0,16,1,32),(16,1024,0,16,1,1),(16,4096,0,16,1,1),(16,1024,0,16,1,64)] {
        let site = Site { path: "s".into(), kind: SiteKind::Linear, input: dim, output: dim, index: 0 };
        let w = t(&[dim, dim], 0.02, "w"); w.set_requires_grad(false).unwrap();
        let theta = Tensors::new().with("weight", w);
        let f = |theta: &Tensors, x: &Signal, _: &Context| Ok(x.replace(x.x.linear(theta.need("weight")?, None)?));
        let host = Host::new(&site, &theta, &f);
        let mut bank = Bank::new(); let mut leaves = vec![];
        for j in 0..e { let (down, up) = (t(&[rank, dim], 0.02, &format!("d{j}")), t(&[dim, rank], 0.02, &format!("u{j}"))); leaves.extend([down.clone(), up.clone()]); bank.insert(format!("{j}"), Box::new(LowRank { down, up, scale: 2.0 })).unwrap(); }
        let (weights, x) = if tokens > 0 {
            let index: Vec<i64> = (0..tokens).flat_map(|t| (0..k).map(move |i| (t * 7919 + i * (e / k).max(1)) % e)).collect();
            let weight = t(&[1, tokens, k], 1.0, "a"); leaves.push(weight.clone());
            (Weights::Sparse { index: Tensor::from_slice(&index, &[1, tokens, k], Device::Cpu).unwrap(), weight }, t(&[1, tokens, dim], 1.0, "x"))
        } else { (Weights::Rows((0..16).map(|r| vec![(r % e as usize, 1.0)]).collect()), t(&[16, seq, dim], 1.0, "x")) };
        leaves.push(x.clone());
        let x = Signal::from(x); let cx = Context::eval();
        let layer = ModularLayer::new(bank, Given(weights), Sum(Base::Kept));
        let leaves: Vec<&Tensor> = leaves.iter().collect();
        let time = |work: &mut dyn FnMut()| { let mut all: Vec<f64> = (0..9).map(|_| { let c = Instant::now(); work(); c.elapsed().as_secs_f64() * 1e3 }).collect(); all.remove(0); all.remove(0); all.sort_by(f64::total_cmp); all[3] };
        let base = time(&mut || drop(no_grad(|| host.call(&x, &cx)).unwrap()));
        let inf = time(&mut || drop(no_grad(|| layer.forward(&host, &x, &cx)).unwrap()));
        let back = |y: Tensor, l: &[&Tensor]| drop(y.mul(&y).unwrap().sum().unwrap().gradients(l, false).unwrap());
        let bt = time(&mut || back(host.call(&x, &cx).unwrap().x, &[&x.x]));
        let tr = time(&mut || back(layer.forward(&host, &x, &cx).unwrap().x, &leaves));
        println!("r {rank:3} dim {dim:5} tokens {:5} E {e:3} k {k} rows {seq:3} | base {base:8.3} inf {inf:8.3} {:5.2} | base {bt:8.3} train {tr:8.3} {:5.2}", x.x.numel() as i64 / dim, inf / base, tr / bt);
    }
}
