//! Merging 4 and 8 low-rank modules of rank 8 at 12 sites 384 × 384, `query` and `value` of
//! MiniLM, into one: by exact concatenation and by the average of their parameters. This is the
//! arithmetic of `merge_low_rank`. And 8 such adapters as `modl merge` does it: their exact sum, cut to
//! rank 8 (`svd`), and TIES over A and B or over ΔW, as PEFT's `add_weighted_adapter` does it.
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-aggregate`
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use modl_aggregate::adapters::{Change, Delta, SiteChanges, Way, merge as merge_adapters};
use modl_aggregate::merge::{MergeMethods, Settings};
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

    let mut group = c.benchmark_group("8 adapters, 12 sites 384 x 384");
    group.sample_size(10);
    let sites: Vec<SiteChanges> = (0..SITES).map(|site| changes(site, 8)).collect();
    let names: Vec<String> = (0..8).map(|j| j.to_string()).collect();
    let (methods, weights) = (MergeMethods::default(), [1.0 / 8.0; 8]);
    for (name, rank) in [("concat", None), ("svd", Some(8)), ("ties", None), ("ties_svd", Some(8))]
    {
        let dense = name.starts_with("ties");
        let settings = Settings::default();
        let settings = if dense { settings.set_each("density", [0.5; 8]) } else { settings };
        let convention = dense.then_some("peft");
        let way = Way::named(name, convention, &methods, settings, rank).unwrap();
        group.bench_function(name, |b| {
            b.iter(|| merge_adapters(sites.clone(), &names, &weights, &way, Seed(0)).unwrap());
        });
    }
    group.finish();
}

/// What so many adapters change at a site.
fn changes(site: usize, adapters: usize) -> SiteChanges {
    let change = |j: usize| {
        let seed = Seed(site as u64).nth(j as u64);
        let down = tensor(&[8, WIDTH], seed.child("down"));
        let up = tensor(&[WIDTH, 8], seed.child("up"));
        let weight = Delta::Product(LowRank { down, up, scale: 2.0 });
        Some(Change { weight, bias: None })
    };
    SiteChanges { path: format!("{site}"), changes: (0..adapters).map(change).collect() }
}

criterion_group!(benches, bench);
criterion_main!(benches);
