//! One seed: everything is trained, then everything is tested. What is finished is on disk and is
//! not done again.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use modl_aggregate::{Average, Concat, WeightedSum};
use modl_compute::{Lora, peft};
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{
    Context, Device, Kind, Modular, Registry, RouterConfig, Seed, Targets, Tensor, no_grad,
};
use modl_models::{LoadOptions, open};
use modl_route::{Choice, Fixed, Scores, Soft, TopK};
use modl_train::{
    Batch, Dataset, Fanout, JsonLines, Objective, Regression, TrainConfig, Trainer, evaluate,
    sentence_vectors,
};

use super::data::{Corpus, DOMAINS};
use super::measures::{Clock, by_domain, count, mean_alpha, seconds, size};
use super::merging::merge;
use super::methods::Method;
use super::results::{Outcome, Seeds};
use super::setting::Setting;
use crate::progress::{Bars, bar};

/// The strength of the ridge, beside the number of texts.
const RIDGE: f64 = 1e-3;

/// Rows of a batch in evaluation.
const EVAL_BATCH: usize = 64;

pub(crate) struct Study<'a> {
    seed: u64,
    setting: &'a Setting,
    device: Device,
    registry: &'a Registry,
    model: PathBuf,
    folder: PathBuf,
    train: Dataset,
    test: Dataset,
    objective: Regression,
}

impl<'a> Study<'a> {
    pub(crate) fn new(
        seed: u64,
        setting: &'a Setting,
        device: Device,
        corpus: &Corpus,
        assets: &Path,
        folder: &Path,
        registry: &'a Registry,
    ) -> Result<Self> {
        let (train, test) = corpus.split(seed, setting)?;
        let model = assets.join("all-MiniLM-L6-v2");
        let folder = folder.join(format!("seed-{seed}"));
        let objective = Regression { head: "sentiment".into(), dim: 384 };
        Ok(Study { seed, setting, device, registry, model, folder, train, test, objective })
    }

    /// Trains and tests what is not finished yet.
    pub(crate) fn run(&self) -> Result<Seeds> {
        self.fit_head()?;
        self.train_module("all", &self.train)?;
        for domain in DOMAINS {
            self.train_module(domain, &self.train.of_task(domain)?)?;
        }
        self.train_router("soft", Box::new(Soft { scores: self.scores() }))?;
        let top1 = TopK { k: 1, straight_through: true, scores: self.scores(), ..TopK::default() };
        self.train_router("top1", Box::new(top1))?;
        self.merge_modules()?;
        let mut outcomes = Seeds::new();
        for method in Method::ALL {
            let path = self.folder.join("results").join(format!("{}.json", method.name()));
            let outcome = match std::fs::read_to_string(&path) {
                Ok(text) => serde_json::from_str(&text)
                    .with_context(|| format!("{}: remove it and start again", path.display()))?,
                Err(_) => {
                    let outcome = self.test(method)?;
                    let text = serde_json::to_string_pretty(&outcome)?;
                    checkpoint::write_whole(&path, text.as_bytes())?;
                    outcome
                }
            };
            outcomes.insert(method, outcome);
        }
        Ok(outcomes)
    }

    fn scores(&self) -> Scores {
        Scores { init_std: 0.02, ..Scores::default() }
    }

    fn head_file(&self) -> PathBuf {
        self.folder.join("head.safetensors")
    }

    fn module_folder(&self, name: &str) -> PathBuf {
        self.folder.join("modules").join(name)
    }

    fn routing_file(&self, name: &str) -> PathBuf {
        self.folder.join("routing").join(format!("{name}.safetensors"))
    }

    /// The frozen backbone with an untrained head. Modules start from `path` and the seed.
    fn backbone(&self, path: &str) -> Result<Modular> {
        let options = LoadOptions {
            kind: Some(self.setting.kind()),
            device: self.device,
            ..LoadOptions::default()
        };
        let mut model =
            Modular::from_box(open(&self.model, &options)?, Seed(self.seed).child(path))?;
        self.objective.setup(&mut model)?;
        Ok(model)
    }

    /// The backbone with the fitted head.
    fn base(&self, path: &str) -> Result<Modular> {
        let model = self.backbone(path)?;
        let head = Checkpoint::open(self.head_file())?.tensors(Device::Cpu)?;
        for (name, value) in head {
            let mut t = model.params().get(&name)?.clone();
            no_grad(|| t.copy_from(&value))?;
        }
        Ok(model)
    }

    /// The backbone with the head and the four modules of the domains, all from their files.
    fn with_domains(&self, path: &str) -> Result<Modular> {
        let mut model = self.base(path)?;
        for domain in DOMAINS {
            peft::load(&mut model, self.module_folder(domain), Some(domain))?;
        }
        model.aggregate(Box::new(WeightedSum::default()))?;
        Ok(model)
    }

    /// The head of all methods: ridge regression on frozen sentence vectors of all domains,
    /// w = (XᵀX + λnI)⁻¹ Xᵀy with a column of ones for the intercept.
    fn fit_head(&self) -> Result<()> {
        if self.head_file().is_file() {
            return Ok(());
        }
        let clock = Instant::now();
        let model = self.backbone("head")?;
        let progress = bar(self.train.len() as u64, &format!("seed {} head", self.seed));
        let mut order: Vec<usize> = (0..self.train.len()).collect();
        order.sort_by_key(|i| self.train.examples().get(*i).map(|e| e.ids.len()));
        let width = self.objective.dim + 1;
        let mut gram = Tensor::zeros(&[width, width], Kind::Double, Device::Cpu)?;
        let mut moment = Tensor::zeros(&[width, 1], Kind::Double, Device::Cpu)?;
        for rows in order.chunks(EVAL_BATCH) {
            let batch = self.train.batch(rows, self.device)?;
            let outputs = no_grad(|| model.forward_base(&batch.inputs, &Context::eval()))?;
            let x = no_grad(|| sentence_vectors(&outputs, &batch))?;
            let x = x.to_device(Device::Cpu)?.to_kind(Kind::Double)?;
            let ones = Tensor::ones(&[x.len_of(0), 1], Kind::Double, Device::Cpu)?;
            let x = Tensor::cat(&[x, ones], 1)?;
            let y = batch.targets.to_device(Device::Cpu)?.to_kind(Kind::Double)?.unsqueeze(1)?;
            gram.add_in_place(&x.t()?.matmul(&x)?)?;
            moment.add_in_place(&x.t()?.matmul(&y)?)?;
            progress.inc(rows.len() as u64);
        }
        progress.finish_and_clear();
        let eye = Tensor::eye(width, Kind::Double, Device::Cpu)?;
        let ridge = gram.add(&eye.mul_scalar(RIDGE * self.train.len() as f64)?)?;
        let w = ridge.solve(&moment)?.to_kind(Kind::Float)?.reshape(&[1, -1])?;
        let weight = w.narrow(1, 0, width - 1)?.contiguous()?;
        let bias = w.narrow(1, width - 1, 1)?.reshape(&[1])?.contiguous()?;
        let seconds = clock.elapsed().as_secs_f64();
        let tensors = [("heads.sentiment.weight", &weight), ("heads.sentiment.bias", &bias)];
        checkpoint::save(self.head_file(), tensors, [seconds_of(seconds)].into())?;
        Ok(())
    }

    /// One LoRA on queries and values, after the fact: backbone and head are frozen.
    fn train_module(&self, name: &str, data: &Dataset) -> Result<()> {
        let folder = self.module_folder(name);
        if folder.join("seconds").is_file() {
            return Ok(());
        }
        let mut model = self.base(name)?;
        let lora = Lora { r: self.setting.rank, alpha: self.setting.alpha, ..Lora::default() };
        model.attach(name, Box::new(lora), &Targets::names(["query", "value"]))?;
        model.route(Box::new(Fixed::modules([name])), false)?;
        model.aggregate(Box::new(WeightedSum::default()))?;
        let seconds = self.fit(&format!("LoRA {name}"), &model, &self.setting.module, data)?;
        peft::save(&model, name, &folder)?;
        checkpoint::write_whole(folder.join("seconds"), seconds.to_string().as_bytes())?;
        self.forget(name_of(&format!("LoRA {name}")))
    }

    /// One router for all sites, with the modules frozen, on texts whose domain it is not told.
    fn train_router(&self, name: &str, config: Box<dyn RouterConfig>) -> Result<()> {
        let file = self.routing_file(name);
        let done = file.with_extension("seconds");
        if done.is_file() {
            return Ok(());
        }
        let mut model = self.with_domains(name)?;
        model.route(config, true)?;
        let seconds =
            self.fit(&format!("router {name}"), &model, &self.setting.router, &self.train)?;
        model.save_routing(&file)?;
        checkpoint::write_whole(done, seconds.to_string().as_bytes())?;
        self.forget(name_of(&format!("router {name}")))
    }

    /// Trains with progress, events and saved states; the seconds that it took this time.
    fn fit(
        &self,
        title: &str,
        model: &Modular,
        config: &TrainConfig,
        data: &Dataset,
    ) -> Result<f64> {
        let work = self.folder.join("work").join(name_of(title));
        std::fs::create_dir_all(&work).with_context(|| work.display().to_string())?;
        let mut bars = Bars::new(format!("seed {} ", self.seed));
        let mut lines = JsonLines::append(self.folder.join("events.jsonl"))?;
        let mut time = Clock::default();
        let seed = Seed(self.seed).child(title);
        let mut trainer =
            Trainer::new(title, model, &self.objective, config.clone(), seed)?.keep_in(&work);
        let mut sink = Fanout(vec![&mut bars, &mut lines, &mut time]);
        trainer.train(data, &Batch::describe_without_tasks, &mut sink)?;
        Ok(time.seconds)
    }

    /// The states of a training that is done.
    fn forget(&self, work: String) -> Result<()> {
        let folder = self.folder.join("work").join(work);
        std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())
    }

    fn merge_modules(&self) -> Result<()> {
        for (name, aggregator) in [
            ("average", &Average::default() as &dyn modl_core::Aggregator),
            ("exact", &Concat::default()),
        ] {
            let folder = self.module_folder(&format!("merged-{name}"));
            if !folder.join("adapter_config.json").is_file() {
                let model = self.with_domains("merge")?;
                merge(&model, &DOMAINS, aggregator, || self.base("merge"), &folder)?;
            }
        }
        Ok(())
    }

    fn test(&self, method: Method) -> Result<Outcome> {
        let by_table = |shift: usize| {
            let pair = |i: usize| {
                let module = DOMAINS[(i + shift) % DOMAINS.len()];
                (DOMAINS[i].to_owned(), Choice::One(module.to_owned()))
            };
            let table = (0..DOMAINS.len()).map(pair).collect();
            Box::new(Fixed { table: Some(table), ..Fixed::default() })
        };
        let single = |name: &str| -> Result<Modular> {
            let mut model = self.base("test")?;
            peft::load(&mut model, self.module_folder(name), Some("only"))?;
            model.aggregate(Box::new(WeightedSum::default()))?;
            model.route(Box::new(Fixed::modules(["only"])), false)?;
            Ok(model)
        };
        let routed = |name: &str| -> Result<Modular> {
            let mut model = self.with_domains("test")?;
            model.load_routing(self.routing_file(name), self.registry)?;
            Ok(model)
        };
        let model = match method {
            Method::LinearHead => self.base("test")?,
            Method::OneForAll => single("all")?,
            Method::KnownDomain | Method::WrongDomain => {
                let mut model = self.with_domains("test")?;
                let shift = usize::from(method == Method::WrongDomain);
                model.route(by_table(shift), false)?;
                model
            }
            Method::SoftRouter => routed("soft")?,
            Method::Top1Router => routed("top1")?,
            Method::MergedAverage => single("merged-average")?,
            Method::MergedExact => single("merged-exact")?,
        };
        let learned = matches!(method, Method::SoftRouter | Method::Top1Router);
        let batches = self.test.len().div_ceil(EVAL_BATCH) as u64;
        let progress = bar(batches, &format!("seed {} test: {}", self.seed, method.title()));
        let traces = RefCell::new(Vec::new());
        let describe = |batch: &Batch, cx: Context| {
            let cx =
                if learned { batch.describe_without_tasks(cx)? } else { batch.describe(cx)? };
            traces.borrow_mut().push((batch.tasks.clone(), cx.clone()));
            progress.inc(1);
            Ok(cx)
        };
        let predictions = evaluate(&model, &self.objective, &self.test, EVAL_BATCH, &describe)?;
        progress.finish_and_clear();
        let (files, trainings) = self.needs(method);
        Ok(Outcome {
            scores: by_domain(&predictions)?,
            routing: if learned { Some(mean_alpha(&traces.into_inner())?) } else { None },
            parameters: files.iter().map(|f| count(f)).sum::<Result<usize>>()?,
            bytes: files.iter().map(|f| size(f)).sum::<Result<u64>>()?,
            // An empty sum of floats is −0.
            seconds: trainings.iter().map(|f| seconds(f)).sum::<Result<f64>>()? + 0.0,
        })
    }

    /// The tensor files that a method needs at test, and the times of the trainings behind them.
    fn needs(&self, method: Method) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let file = |name: &str| self.module_folder(name).join("adapter_model.safetensors");
        let time = |name: &str| self.module_folder(name).join("seconds");
        let mut times: Vec<PathBuf> = DOMAINS.iter().map(|d| time(d)).collect();
        let mut files: Vec<PathBuf> = DOMAINS.iter().map(|d| file(d)).collect();
        match method {
            Method::LinearHead => (vec![], vec![]),
            Method::OneForAll => (vec![file("all")], vec![time("all")]),
            Method::KnownDomain | Method::WrongDomain => (files, times),
            Method::MergedAverage => (vec![file("merged-average")], times),
            Method::MergedExact => (vec![file("merged-exact")], times),
            Method::SoftRouter | Method::Top1Router => {
                let name = if method == Method::SoftRouter { "soft" } else { "top1" };
                let routing = self.routing_file(name);
                times.push(routing.with_extension("seconds"));
                files.push(routing);
                (files, times)
            }
        }
    }
}

fn seconds_of(seconds: f64) -> (String, String) {
    ("seconds".to_owned(), seconds.to_string())
}

fn name_of(title: &str) -> String {
    title.replace(' ', "-").to_lowercase()
}
