//! Merging 4 and 8 low-rank modules of rank 8 at 12 sites 384 × 384, `query` and `value` of
//! MiniLM, into one: by exact concatenation and by the average of their parameters. This is the
//! arithmetic of `merge_low_rank`.
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-aggregate`
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use modl_aggregate::{Average, Concat};
use modl_core::{
    Aggregator, Bank, Context, Device, Init, Kind, LowRank, Routing, Seed, Tensor, Tensors,
    Weights, keep_freed_memory, no_grad,
};

const WIDTH: i64 = 384;
const SITES: usize = 12;

fn tensor(shape: &[i64], seed: Seed) -> Tensor {
    Init::Normal(0.05).tensor(shape, seed, Kind::Float, Device::Cpu).unwrap()
}

fn bank(site: usize, modules: usize) -> Bank {
    let mut bank = Bank::new();
    for j in 0..modules {
        let seed = Seed(site as u64).nth(j as u64);
        let down = tensor(&[8, WIDTH], seed.child("down"));
        let up = tensor(&[WIDTH, 8], seed.child("up"));
        bank.insert(format!("{j}"), Box::new(LowRank { down, up, scale: 2.0 })).unwrap();
    }
    bank
}

/// The merged change at every site.
fn merge(banks: &[Bank], routing: &Routing, aggregator: &dyn Aggregator) -> Vec<LowRank> {
    let at = |bank: &Bank| {
        let active = bank.select(routing, 0).unwrap();
        let module = aggregator.parameters(&active, &Tensors::new()).unwrap();
        module.low_rank(&Context::eval()).unwrap()
    };
    no_grad(|| banks.iter().map(at).collect())
}

fn bench(c: &mut Criterion) {
    keep_freed_memory(); // as the modl binary does; else times depend on the heap's layout
    let mut group = c.benchmark_group("merge 12 sites 384 x 384");
    for modules in [4, 8] {
        let banks: Vec<Bank> = (0..SITES).map(|site| bank(site, modules)).collect();
        let weights = (0..modules).map(|j| (j, 1.0 / (j + 1) as f64)).collect();
        let routing = Routing::new(Weights::Fixed(weights), modules);
        let aggregators: [&dyn Aggregator; 2] = [&Concat::default(), &Average::default()];
        for aggregator in aggregators {
            group.bench_function(format!("{}, {modules} modules", aggregator.kind()), |b| {
                b.iter(|| merge(&banks, &routing, aggregator));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
