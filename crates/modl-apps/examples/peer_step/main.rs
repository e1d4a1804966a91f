//! modl's side of `cargo xtask bench --peers`: one step of work for each line on stdin, its
//! milliseconds on stdout. The Python side is in `benches/peers`.
//!
//! usage: peer_step MODEL WORK f32|bf16 DROPOUT THREADS
//!
//! WORK is `forward` (the backbone alone), `lora` or `dora` (forward with one such module), `train`
//! (a step of training a LoRA) or `checkpointed` (the same with activation checkpointing); or,
//! without a backbone, `mixture:EXPERTS:INNER:TOKENS:train|infer`, a mixture of experts,
//! `merge:COMBINATION`, eight LoRAs merged into one, or `rebasin:FILE`, Git Re-Basin of the networks
//! `a.*` and `b.*` in a file of tensors.

mod adapters;
mod mixture;
mod rebasin;

use std::io::{BufRead, Write};
use std::time::Instant;

use adapters::Adapters;
use anyhow::{Context as _, Result, bail};
use mixture::Mixture;
use modl_aggregate::WeightedSum;
use modl_compute::{Dora, Lora};
use modl_core::{
    ActivationCheckpoints, Context, Device, Init, Kind, Modular, ModuleConfig, Seed, Select,
    Targets, Tensor, Tensors, no_grad,
};
use modl_models::LoadOptions;
use modl_route::Fixed;
use modl_train::optim::{AdamW, AdamWConfig};
use modl_train::{Batch, Optimizer};
use rebasin::Pair;

const CLASSES: i64 = 4;

struct Work {
    model: Modular,
    batches: Vec<Batch>,
    optimizer: AdamW,
    train: bool,
    checkpointed: bool,
    step: u64,
}

impl Work {
    fn new(args: &[String], batches: Vec<Batch>) -> Result<Self> {
        let [model, work, dtype, dropout, _] = args else { bail!("see the head of peer_step.rs") };
        let checkpointed = work == "checkpointed";
        let train = work == "train" || checkpointed;
        let kind = if dtype == "bf16" { Kind::BFloat16 } else { Kind::Float };
        let options = LoadOptions {
            kind: Some(kind),
            dropout: Some(dropout.parse()?),
            ..LoadOptions::default()
        };
        let mut model = Modular::from_box(modl_models::open(model, &options)?, Seed(0))?;
        if work != "forward" {
            let lora = Lora { r: 8, alpha: 16.0, ..Lora::default() };
            let module: Box<dyn ModuleConfig> =
                if work == "dora" { Box::new(Dora(lora)) } else { Box::new(lora) };
            model.attach("module", module, &Targets::names(["query", "value"]))?;
            model.route(Box::new(Fixed::modules(["module"])), false)?;
            model.aggregate(Box::new(WeightedSum::default()))?;
        }
        if train {
            let mut head = model.scope("heads.classes");
            head.param("weight", &[CLASSES, 384], Init::Kaiming)?;
            head.param("bias", &[CLASSES], Init::Zeros)?;
            model.train_only(&Select::any(["modules.*", "heads.*"]))?;
        }
        let optimizer = AdamW::new(AdamWConfig::default())?;
        Ok(Work { model, batches, optimizer, train, checkpointed, step: 0 })
    }

    fn run(&mut self) -> Result<()> {
        let turn = self.step as usize % self.batches.len();
        let batch = self.batches.get(turn).context("no batches")?;
        self.step += 1;
        if !self.train {
            no_grad(|| self.model.forward(&batch.inputs, &Context::eval()))?;
            return Ok(());
        }
        let mut loss: Option<Tensor> = None;
        let kept = ActivationCheckpoints::new();
        for (i, part) in (0..).zip(batch.by_length()?) {
            let mut cx = Context::train(Seed(i), self.step);
            if self.checkpointed {
                cx = cx.with_activation_checkpoints(kept.clone());
            }
            let out = self.model.forward(&part.inputs, &cx)?;
            let cls = out.need("last_hidden_state")?.select(1, 0)?.to_kind(Kind::Float)?;
            let head = self.model.params();
            let (weight, bias) =
                (head.get("heads.classes.weight")?, head.get("heads.classes.bias")?);
            let own = cls.linear(weight, Some(bias))?;
            let own = own.cross_entropy(&part.targets.to_kind(Kind::Int64)?)?;
            let share = part.tasks.len() as f64 / batch.tasks.len() as f64;
            let own = own.mul_scalar(share)?;
            loss = Some(loss.map_or(Ok(own.clone()), |l| l.add(&own))?);
        }
        let loss = loss.context("an empty batch")?;
        let params = self.model.trainable();
        let tensors: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
        let grads = match self.checkpointed {
            true => kept.gradients(&self.model, &loss, &tensors)?,
            false => loss.gradients(&tensors, false)?,
        };
        self.optimizer.step(&params, &grads, &|_| 1e-4)?;
        loss.item()?;
        Ok(())
    }
}

/// The number of rows, then the ids of all of them; 0 is padding.
fn batch(numbers: &[i64]) -> Result<Batch> {
    let (rows, ids) = numbers.split_first().context("an empty line")?;
    let shape = [*rows, ids.len() as i64 / rows];
    let mask: Vec<i64> = ids.iter().map(|i| i64::from(*i != 0)).collect();
    let labels: Vec<f32> = (0..*rows).map(|i| (i % CLASSES) as f32).collect();
    Ok(Batch {
        inputs: Tensors::new()
            .with("input_ids", Tensor::from_slice(ids, &shape, Device::Cpu)?)
            .with("attention_mask", Tensor::from_slice(&mask, &shape, Device::Cpu)?),
        targets: Tensor::from_slice(&labels, &[*rows], Device::Cpu)?,
        tasks: vec![String::new(); *rows as usize],
        ids: vec![String::new(); *rows as usize],
        features: Tensors::new(),
    })
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads = args.last().context("see the head of peer_step.rs")?.parse()?;
    modl_core::set_threads(threads);
    // As the `modl` program does.
    modl_core::keep_freed_memory();
    let mut lines = std::io::stdin().lock().lines();
    let mut batches = Vec::new();
    for line in lines.by_ref() {
        let line = line?;
        let Some(numbers) = line.strip_prefix("batch ") else { break };
        let numbers: Vec<i64> =
            numbers.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        batches.push(batch(&numbers)?);
    }
    let mut step: Box<dyn FnMut() -> Result<()>> = match args.get(1) {
        Some(work) if work.starts_with("mixture:") => {
            let bf16 = args.get(2).is_some_and(|dtype| dtype == "bf16");
            let mixture = Mixture::new(work, if bf16 { Kind::BFloat16 } else { Kind::Float })?;
            Box::new(move || mixture.run())
        }
        Some(work) if work.starts_with("merge:") => {
            let adapters = Adapters::new(work)?;
            Box::new(move || adapters.run())
        }
        Some(work) if work.starts_with("rebasin:") => {
            let mut pair = Pair::open(work.trim_start_matches("rebasin:"))?;
            Box::new(move || pair.run())
        }
        _ => {
            let mut work = Work::new(&args, batches)?;
            Box::new(move || work.run())
        }
    };
    println!("ready");
    for line in lines {
        line?;
        let start = Instant::now();
        step()?;
        println!("{}", start.elapsed().as_secs_f64() * 1e3);
        std::io::stdout().flush()?;
    }
    Ok(())
}
