//! modl's side of `cargo xtask bench --peers`: one step of work for each line on stdin, its
//! milliseconds on stdout. The Python side is `benches/peers/compare.py`.
//!
//! usage: peer_step MODEL forward|train f32|bf16 DROPOUT THREADS

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use modl_aggregate::WeightedSum;
use modl_compute::Lora;
use modl_core::{
    Context, Device, Init, Kind, Modular, Seed, Select, Targets, Tensor, Tensors, no_grad,
};
use modl_models::LoadOptions;
use modl_route::Fixed;
use modl_train::Optimizer;
use modl_train::optim::{AdamW, AdamWConfig};

const BATCH: i64 = 16;
const SEQ: i64 = 128;
const CLASSES: i64 = 4;

struct Work {
    model: Modular,
    inputs: Tensors,
    labels: Tensor,
    optimizer: AdamW,
    train: bool,
    step: u64,
}

impl Work {
    fn new(args: &[String], ids: &[i64]) -> Result<Self> {
        let [model, work, dtype, dropout, _] = args else { bail!("see the head of peer_step.rs") };
        let train = work == "train";
        let kind = if dtype == "bf16" { Kind::BFloat16 } else { Kind::Float };
        let options = LoadOptions {
            kind: Some(kind),
            dropout: Some(dropout.parse()?),
            ..LoadOptions::default()
        };
        let mut model = Modular::from_box(modl_models::open(model, &options)?, Seed(0))?;
        if train {
            let lora = Lora { r: 8, alpha: 16.0, ..Lora::default() };
            model.attach("lora", Box::new(lora), &Targets::names(["query", "value"]))?;
            model.route(Box::new(Fixed::modules(["lora"])), false)?;
            model.aggregate(Box::new(WeightedSum::default()))?;
            let mut head = model.scope("heads.classes");
            head.param("weight", &[CLASSES, 384], Init::Kaiming)?;
            head.param("bias", &[CLASSES], Init::Zeros)?;
            model.train_only(&Select::any(["modules.*", "heads.*"]))?;
        }
        let inputs = Tensors::new()
            .with("input_ids", Tensor::from_slice(ids, &[BATCH, SEQ], Device::Cpu)?)
            .with("attention_mask", Tensor::ones(&[BATCH, SEQ], Kind::Int64, Device::Cpu)?);
        let labels: Vec<i64> = (0..BATCH).map(|i| i % CLASSES).collect();
        let labels = Tensor::from_slice(&labels, &[BATCH], Device::Cpu)?;
        Ok(Work {
            model,
            inputs,
            labels,
            optimizer: AdamW::new(AdamWConfig::default())?,
            train,
            step: 0,
        })
    }

    fn run(&mut self) -> Result<()> {
        if !self.train {
            no_grad(|| self.model.forward(&self.inputs, &Context::eval()))?;
            return Ok(());
        }
        self.step += 1;
        let cx = Context::train(Seed(0), self.step);
        let out = self.model.forward(&self.inputs, &cx)?;
        let cls = out.need("last_hidden_state")?.select(1, 0)?.to_kind(Kind::Float)?;
        let head = self.model.params();
        let logits =
            cls.linear(head.get("heads.classes.weight")?, Some(head.get("heads.classes.bias")?))?;
        let loss = logits.cross_entropy(&self.labels)?;
        let params = self.model.trainable();
        let tensors: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
        let grads = loss.gradients(&tensors, false)?;
        self.optimizer.step(&params, &grads, 1e-4)?;
        loss.item()?;
        Ok(())
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads = args.last().context("see the head of peer_step.rs")?.parse()?;
    modl_core::set_threads(threads);
    // As the `modl` program does.
    modl_core::keep_freed_memory();
    let mut lines = std::io::stdin().lock().lines();
    let first = lines.next().context("no ids")??;
    let ids: Vec<i64> =
        first.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    let mut work = Work::new(&args, &ids)?;
    println!("ready");
    for line in lines {
        line?;
        let start = Instant::now();
        work.run()?;
        println!("{}", start.elapsed().as_secs_f64() * 1e3);
        std::io::stdout().flush()?;
    }
    Ok(())
}
