//! Mixtures of experts against one dense block of equal active FLOPs, by turns in one run: SwiGLU
//! experts of a 512-wide model with 2 of E experts for each token, coarse and fine, trained and not,
//! with even and skewed loads; what routing takes of it; and LoRA experts for each token.
//!
//! Beside each ratio stands the roofline's: the larger of 1 and of what the weights that are touched
//! take to go through memory, over the dense block's time. Then the most memory that a step of the
//! mixture has beside its weights and their gradients, less the dense block's, and what the copies
//! of activations that routing makes take: k rows for each token of what goes into the experts and
//! what comes out, and of their gradients in training. Linux tells it; elsewhere there is a dash.
//!
//! `OMP_NUM_THREADS=1 cargo bench -p modl-compute --bench mixture -- [--quick] [--bf16] [FILTER]`;
//! with `--malloc` freed memory goes back to the system, as libtorch leaves it; with `--cpu` the
//! time is what one thread has had of a processor, for machines where other programs run beside.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Instant;

use modl_compute::FeedForward;
use modl_core::testing::{Given, Sum};
use modl_core::{
    Attachment, Bank, Base, Context, Device, Host, Init, Kind, LowRank, ModularLayer, Module,
    ModuleConfig, ParamStore, Result, Router, RouterConfig, Scope, Seed, Signal, Site, SiteKind,
    Tensor, Tensors, Weights, keep_freed_memory, no_grad, threads,
};
use modl_route::{Input, Scores, TopK};

const WIDTH: i64 = 512;
const K: i64 = 2;

struct Options {
    filter: Option<String>,
    rounds: usize,
    kind: Kind,
    /// Whether only memory is looked at.
    peaks: bool,
    /// Bytes each second that a copy reads and writes.
    bandwidth: f64,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    if !has("--malloc") {
        keep_freed_memory(); // as the modl binary does
    }
    let rounds = args.iter().find_map(|a| a.strip_prefix("--rounds=")?.parse().ok());
    let options = Options {
        filter: args.iter().find(|a| !a.starts_with("--")).cloned(),
        rounds: rounds.unwrap_or(if has("--quick") { 5 } else { 15 }),
        kind: if has("--bf16") { Kind::BFloat16 } else { Kind::Float },
        peaks: has("--peaks"),
        bandwidth: bandwidth(),
    };
    println!(
        "{:?}, {} threads, memory {:.1} GB/s",
        options.kind,
        threads(),
        options.bandwidth / 1e9
    );
    println!(
        "| work | dense, ms | mixture, ms | ratio | fastest | roofline | memory over dense, MiB | \
         routed copies, MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let coarse = Shape { experts: 8, inner: 2048, tokens: 1024, train: true, skewed: false };
    options.mixture("E = 8, ff 2048, 1024 tokens", coarse);
    options.mixture("E = 8, ff 2048, 1024 tokens, half to one", Shape { skewed: true, ..coarse });
    options.mixture("E = 64, ff 2048, 1024 tokens", Shape { experts: 64, ..coarse });
    for train in [true, false] {
        for experts in [8, 64, 256] {
            let tokens = experts * 64 / K;
            let fine = Shape { experts, inner: 256, tokens, train, skewed: false };
            let what = if train { "training" } else { "inference" };
            options.mixture(&format!("E = {experts}, ff 256, 64 tokens each, {what}"), fine);
        }
    }
    options.routing();
    options.loras();
}

/// Bytes that a mixture may need beside the dense block's.
#[derive(Clone, Copy)]
struct Memory {
    /// For what routing copies.
    routed: f64,
    /// For the gradients of more parameters.
    gradients: f64,
}

#[derive(Clone, Copy)]
struct Shape {
    experts: i64,
    inner: i64,
    tokens: i64,
    train: bool,
    skewed: bool,
}

fn draw(shape: &[i64], std: f64, name: &str, kind: Kind) -> Tensor {
    let drawn = Init::Normal(std).tensor(shape, Seed(1).child(name), Kind::Float, Device::Cpu);
    drawn.unwrap().to_kind(kind).unwrap()
}

fn leaf(shape: &[i64], std: f64, name: &str, kind: Kind) -> Tensor {
    let t = draw(shape, std, name, kind);
    t.set_requires_grad(true).unwrap();
    t
}

fn bandwidth() -> f64 {
    let mut to = Tensor::zeros(&[1 << 25], Kind::Float, Device::Cpu).unwrap();
    let from = to.ones_like().unwrap();
    let times = (0..5).map(|_| timed(|| to.copy_from(&from).unwrap()));
    (2u64 << 27) as f64 / times.fold(f64::INFINITY, f64::min)
}

fn timed(work: impl FnOnce()) -> f64 {
    if std::env::args().any(|a| a == "--cpu") {
        let before = on_cpu();
        work();
        return on_cpu() - before;
    }
    let clock = Instant::now();
    work();
    clock.elapsed().as_secs_f64()
}

/// The most memory that `work` has at once beside what there was, in bytes, where Linux tells it.
fn peak(work: &mut dyn FnMut()) -> Option<f64> {
    let of = |name: &str| -> Option<f64> {
        let text = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.parse::<f64>().ok()? * 1024.0)
    };
    work();
    std::fs::write("/proc/self/clear_refs", "5").ok()?; // The peak starts anew.
    let before = of("VmRSS:")?;
    work();
    Some(of("VmHWM:")? - before)
}

/// What the mixture's peak is over the dense block's, from a process in which malloc gives back
/// each large block that is freed.
fn memory_over_dense(name: &str) -> Option<f64> {
    let child = std::process::Command::new(std::env::current_exe().ok()?)
        .args(["--malloc", "--peaks", name])
        .args(std::env::args().filter(|a| a == "--bf16"))
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .output()
        .ok()?;
    let text = String::from_utf8(child.stdout).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('\t'))?;
    line.parse().ok()
}

/// What Linux says that the main thread has had of a processor, in seconds.
fn on_cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9
}

fn site(kind: SiteKind, width: i64) -> Site {
    Site { path: "layer.0.mlp".into(), kind, input: width, output: width, index: 0 }
}

/// A network of this width between its matrices, and its parameters.
fn network(name: &str, inner: i64, kind: Kind) -> (Box<dyn Module>, Vec<Tensor>) {
    let config = FeedForward { inner: Some(inner), ..FeedForward::default() };
    let (site, theta) = (site(SiteKind::Sublayer, WIDTH), Tensors::new());
    let mut store = ParamStore::new();
    let seed = Seed(1).child(name);
    let mut scope = Scope::new(&mut store, seed).on(kind, Device::Cpu);
    let module = config.build(&Attachment::alone(&site, &theta), &mut scope).unwrap();
    let params = store.iter().map(|(_, p)| p.tensor().clone()).collect();
    (module, params)
}

/// 2 experts for each token, all loads equal, or the first one in half of the places.
fn choices(shape: Shape) -> Tensor {
    let Shape { experts, tokens, skewed, .. } = shape;
    let spread = |t: i64| (t * 7919) % experts;
    let index = (0..tokens).flat_map(|t| match skewed {
        false => [spread(t), (spread(t) + experts / 2) % experts],
        true => [0, 1 + t % (experts - 1)],
    });
    let index: Vec<i64> = index.collect();
    Tensor::from_slice(&index, &[1, tokens, K], Device::Cpu).unwrap()
}

/// What comes in is what goes out: what is left of a mixture without its experts.
#[derive(Debug)]
struct Same;

impl Module for Same {
    fn kind(&self) -> &'static str {
        "same"
    }

    fn forward(&self, _: &Host, x: &Signal, _: &Context) -> Result<Signal> {
        Ok(x.clone())
    }
}

fn nothing(_: &Tensors, x: &Signal, _: &Context) -> Result<Signal> {
    Ok(x.clone())
}

fn backward(y: &Tensor, probe: &Tensor, leaves: &[&Tensor]) {
    let loss = y.mul(probe).unwrap().sum().unwrap();
    loss.gradients(leaves, false).unwrap();
}

impl Options {
    fn wanted(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|f| name.contains(f.as_str()))
    }

    /// Runs two ways by turns and prints a line.
    fn compare(
        &self,
        name: &str,
        bytes: f64,
        memory: Option<Memory>,
        mut run_dense: impl FnMut(),
        mut run_mixture: impl FnMut(),
    ) {
        if self.peaks {
            if let Some((m, d)) = peak(&mut run_mixture).zip(peak(&mut run_dense)) {
                println!("{name}\t{}", m - d);
            }
            return;
        }
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..self.rounds + 2 {
            let pair = [timed(&mut run_dense), timed(&mut run_mixture)];
            if round >= 2 {
                times.iter_mut().zip(pair).for_each(|(all, t)| all.push(t * 1e3));
            }
        }
        times.iter_mut().for_each(|all| all.sort_by(f64::total_cmp));
        let [dense, mixture] = &times;
        let median = |all: &[f64]| all[all.len() / 2];
        let (d, m) = (median(dense), median(mixture));
        let roofline = (bytes / self.bandwidth * 1e3 / dense[0]).max(1.0);
        let (ratio, fastest) = (m / d, mixture[0] / dense[0]);
        let mib = |bytes: f64| format!("{:.1}", bytes / (1u64 << 20) as f64);
        let memory = memory.map_or(["–".to_owned(), "–".to_owned()], |memory| {
            let over = memory_over_dense(name).map(|over| mib(over - memory.gradients));
            [over.unwrap_or("–".to_owned()), mib(memory.routed)]
        });
        println!(
            "| {name} | {d:.2} | {m:.2} | {ratio:.2} | {fastest:.2} | {roofline:.2} | {} |",
            memory.join(" | ")
        );
    }

    fn mixture(&self, name: &str, shape: Shape) {
        if !self.wanted(name) {
            return;
        }
        let Shape { experts, inner, tokens, train, .. } = shape;
        let kind = self.kind;
        let (dense, dense_leaves) = network("dense", K * inner, kind);
        let mut bank = Bank::new();
        let mut leaves = Vec::new();
        for j in 0..experts {
            let (module, params) = network(&format!("expert {j}"), inner, kind);
            leaves.extend(params);
            bank.insert(format!("{j}"), module).unwrap();
        }
        let weight = leaf(&[1, tokens, K], 1.0, "weights", Kind::Float);
        let given = Given(Weights::Sparse { index: choices(shape), weight: weight.clone() });
        let layer = ModularLayer::new(bank, given, Sum(Base::Replaced));
        let (site, theta) = (site(SiteKind::Sublayer, WIDTH), Tensors::new());
        let host = Host::new(&site, &theta, &nothing);
        let x = Signal::from(leaf(&[1, tokens, WIDTH], 1.0, "x", kind));
        let probe = draw(&[1, tokens, WIDTH], 1.0, "probe", kind);
        let cx = Context::eval();
        let wanted = |own: &[Tensor]| own.iter().chain([&x.x]).cloned().collect::<Vec<Tensor>>();
        let (of_dense, mut of_layer) = (wanted(&dense_leaves), wanted(&leaves));
        of_layer.push(weight);
        let run = |forward: &dyn Fn() -> Result<Signal>, leaves: &[Tensor]| match train {
            true => {
                let leaves: Vec<&Tensor> = leaves.iter().collect();
                backward(&forward().unwrap().x, &probe, &leaves);
            }
            false => drop(no_grad(forward).unwrap()),
        };
        // Forward and backward each read the weights, and their gradients are written.
        let passes = if train { 3 } else { 1 };
        let bytes = experts * 3 * inner * WIDTH * kind.elt_size_in_bytes() as i64 * passes;
        let size = kind.elt_size_in_bytes() as i64;
        let copies = if train { 4 } else { 2 };
        let gradients = if train { (experts - K) * 3 * inner * WIDTH * size } else { 0 };
        let memory = Some(Memory {
            routed: (copies * K * tokens * WIDTH * size) as f64,
            gradients: gradients as f64,
        });
        self.compare(
            name,
            bytes as f64,
            memory,
            || run(&|| dense.forward(&host, &x, &cx), &of_dense),
            || run(&|| layer.forward(&host, &x, &cx), &of_layer),
        );
    }

    /// What scores, top-k, sorting, gathering and scattering take, against the whole layer.
    fn routing(&self) {
        let name = "routing alone / the layer, E = 64, ff 2048, 1024 tokens";
        if !self.wanted(name) {
            return;
        }
        let (experts, tokens, kind) = (64i64, 1024i64, self.kind);
        let (site, theta) = (site(SiteKind::Sublayer, WIDTH), Tensors::new());
        let host = Host::new(&site, &theta, &nothing);
        let scores = Scores { input: Input::Tokens, init_std: 0.02, ..Scores::default() };
        let config = TopK { k: K as usize, scores, ..TopK::default() };
        let mut store = ParamStore::new();
        let mut router = |bank: &Bank, name: &str| -> Box<dyn Router> {
            let mut scope = Scope::new(&mut store, Seed(1));
            config.build(&site, bank, &mut scope.sub(name)).unwrap()
        };
        let (mut real, mut hollow, mut leaves) = (Bank::new(), Bank::new(), Vec::new());
        for j in 0..experts {
            let (module, params) = network(&format!("expert {j}"), 2048, kind);
            leaves.extend(params);
            real.insert(format!("{j}"), module).unwrap();
            hollow.insert(format!("{j}"), Box::new(Same)).unwrap();
        }
        let sum = || Box::new(Sum(Base::Replaced));
        let (of_real, of_hollow) = (router(&real, "real"), router(&hollow, "hollow"));
        let real = ModularLayer::from_boxes(real, of_real, sum());
        let hollow = ModularLayer::from_boxes(hollow, of_hollow, sum());
        leaves.extend(store.iter().map(|(_, p)| p.tensor().clone()));
        let x = Signal::from(leaf(&[1, tokens, WIDTH], 1.0, "x", kind));
        leaves.push(x.x.clone());
        let leaves: Vec<&Tensor> = leaves.iter().collect();
        let probe = draw(&[1, tokens, WIDTH], 1.0, "probe", kind);
        let run = |layer: &ModularLayer| {
            let y = layer.forward(&host, &x, &Context::eval()).unwrap();
            backward(&y.x, &probe, &leaves);
        };
        self.compare(name, 0.0, None, || run(&real), || run(&hollow));
    }

    /// 64 LoRAs of rank 8, 2 for each token, over a frozen 384 × 384 layer.
    fn loras(&self) {
        const DIM: i64 = 384;
        let (experts, tokens, kind) = (64i64, 1024i64, self.kind);
        let site = site(SiteKind::Linear, DIM);
        let theta = Tensors::new().with("weight", draw(&[DIM, DIM], 0.05, "w", kind));
        let f = |theta: &Tensors, x: &Signal, _: &Context| {
            Ok(x.replace(x.x.linear(theta.need("weight")?, None)?))
        };
        let host = Host::new(&site, &theta, &f);
        let (mut bank, mut leaves) = (Bank::new(), Vec::new());
        for j in 0..experts {
            let down = leaf(&[8, DIM], 0.05, &format!("down {j}"), Kind::Float);
            let up = leaf(&[DIM, 8], 0.05, &format!("up {j}"), Kind::Float);
            leaves.extend([down.clone(), up.clone()]);
            bank.insert(format!("{j}"), Box::new(LowRank { down, up, scale: 2.0 })).unwrap();
        }
        let shape = Shape { experts, inner: 0, tokens, train: true, skewed: false };
        let weight = leaf(&[1, tokens, K], 1.0, "weights", Kind::Float);
        let index = choices(shape);
        let given = Given(Weights::Sparse { index, weight: weight.clone() });
        let layer = ModularLayer::new(bank, given, Sum(Base::Kept));
        let x = Signal::from(leaf(&[1, tokens, DIM], 1.0, "x", kind));
        let probe = draw(&[1, tokens, DIM], 1.0, "probe", kind);
        leaves.extend([weight, x.x.clone()]);
        let leaves: Vec<&Tensor> = leaves.iter().collect();
        let cx = Context::eval();
        let bytes = (experts * 2 * 8 * DIM * 4) as f64;
        // The gathered x, the thin inner products, the change, and their gradients.
        let routed =
            |copies: i64| (copies * K * tokens * DIM * kind.elt_size_in_bytes() as i64) as f64;
        let name = "64 LoRAs of rank 8 over 384 × 384";
        let (training, inference) = (format!("{name}, training"), format!("{name}, inference"));
        if self.wanted(&training) {
            self.compare(
                &training,
                3.0 * bytes,
                Some(Memory { routed: routed(4), gradients: bytes }),
                || backward(&host.call(&x, &cx).unwrap().x, &probe, &[&x.x]),
                || backward(&layer.forward(&host, &x, &cx).unwrap().x, &probe, &leaves),
            );
        }
        if self.wanted(&inference) {
            self.compare(
                &inference,
                bytes,
                Some(Memory { routed: routed(2), gradients: 0.0 }),
                || drop(no_grad(|| host.call(&x, &cx)).unwrap()),
                || drop(no_grad(|| layer.forward(&host, &x, &cx)).unwrap()),
            );
        }
    }
}
