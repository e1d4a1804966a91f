//! Every kind of module in the registry learns: on the real all-MiniLM-L6-v2 and real sentences the
//! loss of the batch falls, θ stays as it was bit for bit, and the module's file gives the same
//! outputs bit for bit.
//!
//! A method that is new to the registry is tested as it is by default. What is particular to one
//! (a learning rate, settings that it has no defaults for, other sites) is a line of [`particular`].
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use modl_aggregate::WeightedSum;
use modl_core::{
    Backbone, Context, Device, Error, Modular, Registry, Result, Seed, Select, Targets, Tensor,
    no_grad,
};
use modl_models::{LoadOptions, Tokenizer, open};
use modl_route::Fixed;
use modl_train::{Batch, Dataset, Example, Objective, Regression, TrainConfig, Trainer, read_tsv};
use serde_json::{Value, json};

const STEPS: u64 = 5;

const DOMAINS: [&str; 2] = ["tweets", "nyt"];

/// What a module is before it is trained.
#[derive(Debug, Clone, Copy)]
enum Start {
    /// f_θ, bit for bit.
    Exact,
    /// f_θ within this.
    Within(f64),
    /// Something else.
    Other,
}

/// How a method is put to the test.
struct Trial {
    settings: Value,
    /// Where it stands, if not at its usual sites.
    targets: Option<&'static str>,
    lr: f64,
    lr_scale: BTreeMap<String, f64>,
    optimizer: &'static str,
    start: Start,
}

/// Why a method is not tested here, or what is particular to it.
fn particular(name: &str) -> std::result::Result<Trial, &'static str> {
    use Start::{Exact, Other, Within};
    let lr = |lr: f64| Trial {
        settings: json!({}),
        targets: None,
        lr,
        lr_scale: BTreeMap::new(),
        optimizer: "adamw",
        start: Exact,
    };
    let some = |lr_of: f64, start: Start| Trial { start, ..lr(lr_of) };
    let names = json!(DOMAINS);
    let tasks = json!({"tasks": DOMAINS});
    // Methods with as many parameters as weights stand in one layer, to keep the test short.
    let in_one_layer = Some(r"encoder\.layer\.5\..*dense");
    let sgd = |t: Trial| Trial { optimizer: "sgd", ..t };
    let with = |t: Trial, settings: Value| Trial { settings, ..t };
    let wide = |t: Trial| Trial { targets: in_one_layer, ..t };
    Ok(match name {
        // Parameter composition: low rank.
        "adalora" => lr(5e-2),
        "vera" => lr(5e-2),
        "fourierft" => some(5e-2, Other),
        "intrinsic" => wide(lr(1e-2)),
        "ia3" => lr(5e-2),
        // Parameter composition: sparse.
        "bitfit" => lr(5e-3),
        "ln_tuning" => lr(2e-2),
        "full" | "fish_mask" => wide(lr(1e-3)),
        "lottery_ticket" => wide(lr(3e-4)),
        "lt_sft" => with(wide(lr(5e-4)), json!({"density": 0.2, "choose_at": 0.2})),
        "diff_pruning" => with(wide(lr(5e-4)), json!({"density": 0.2, "fix_at": 0.2})),
        "pack_net" => with(wide(lr(1e-3)), json!({"prune": 0.1, "prune_at": 0.2})),
        // Masks flip for the largest gradients only where a step is as large as its gradient.
        "piggyback" => sgd(wide(lr(0.3))),
        "edge_popup" => sgd(wide(some(0.05, Other))),
        "sup_sup" => sgd(wide(some(0.3, Other))),
        // The marks before and behind a text.
        "trainable_tokens" => with(lr(5e-2), json!({"token_indices": [101, 102]})),
        // Input composition.
        "retrieval" => return Err("has nothing to train: documents are a file"),
        "knn_lm" => return Err("stands at a language model's output: modl-compute's retrieval.rs"),
        "prompt_tuning" | "p_tuning" | "prefix_tuning" => some(5e-2, Other),
        // Function composition.
        "bottleneck" | "compacter" | "invertible" | "adapter_drop" | "gated" => {
            some(5e-3, Within(0.4))
        }
        "reft" => some(1e-2, Other),
        // It takes the place of a layer's feed-forward network.
        "feed_forward" => {
            Trial { targets: Some(r"encoder\.layer\.5\.output"), ..some(1e-3, Other) }
        }
        "residual_adapter" => {
            return Err("stands at convolutions: modl-compute's image_sites.rs trains it");
        }
        // MiniLM has no head of its own: behind its last layer.
        "task_heads" => Trial { settings: tasks, targets: Some(r"encoder\.layer\.5"), ..lr(1e-3) },
        "cross_stitch" | "sluice" => Trial {
            settings: tasks,
            lr_scale: [(format!("modules.{name}.*alpha"), 100.0)].into(),
            start: Within(1e-4),
            ..lr(5e-4)
        },
        "progressive" => return Err("stands at rows of one token: modl-compute's progressive.rs"),
        // Hypernetworks.
        "hyper_network" => wide(some(1e-4, Other)),
        "cpg" => with(lr(5e-3), json!({"config": {"type": "lora"}, "languages": names})),
        "hyperformer" | "hyperformer_plus_plus" | "hyper_lora" => with(lr(3e-3), tasks),
        "hyper_x" => with(lr(3e-4), json!({"tasks": names, "languages": names})),
        "mad_g" => with(lr(3e-4), json!({"languages": names})),
        "union" => Trial {
            settings: json!({"parts": [
                {"targets": {"names": ["query"], "exclude": null, "layers": null,
                             "layers_pattern": []}, "config": {"type": "lora"}},
                {"targets": {"names": "all-norm", "exclude": null, "layers": null,
                             "layers_pattern": []}, "config": {"type": "bitfit"}},
            ]}),
            ..lr(5e-3)
        },
        _ => lr(5e-3),
    })
}

fn assets(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

fn base() -> Box<dyn Backbone> {
    let options = LoadOptions { dropout: Some(0.0), ..LoadOptions::default() };
    open(assets("all-MiniLM-L6-v2"), &options).unwrap()
}

/// What the batch knows; domains are languages, too.
fn describe(batch: &Batch, cx: Context) -> Result<Context> {
    Ok(batch.describe(cx)?.with_labels("language", &batch.tasks))
}

/// The first short sentences of two domains.
fn sentences() -> Dataset {
    let tokenizer = Tokenizer::open(assets("all-MiniLM-L6-v2")).unwrap();
    let mut examples = Vec::new();
    for task in DOMAINS {
        let rows = read_tsv(assets("sentiment").join(format!("{task}.tsv"))).unwrap();
        let short = rows.into_iter().filter(|row| row.text.len() < 40).take(2);
        examples.extend(short.map(|row| Example {
            id: row.id,
            task: task.to_owned(),
            ids: tokenizer.encode_one(&row.text).unwrap().into(),
            target: row.score,
        }));
    }
    assert_eq!(examples.len(), 4);
    Dataset::new(examples).unwrap()
}

/// The whole data as one batch, and what a pass is told of it in evaluation.
struct Trials {
    data: Dataset,
    batch: Batch,
    head: Regression,
    registry: Registry,
    folder: tempfile::TempDir,
}

impl Trials {
    fn pass(&self, model: &Modular) -> Result<Tensor> {
        let cx = describe(&self.batch, Context::eval())?;
        let outputs = no_grad(|| model.forward(&self.batch.inputs, &cx))?;
        outputs.need("last_hidden_state").cloned()
    }

    fn loss(&self, model: &Modular) -> Result<f64> {
        let cx = describe(&self.batch, Context::eval())?;
        no_grad(|| self.head.loss(model, &self.batch, &cx))?.item()
    }

    /// A model with the frozen head that every method has to serve.
    fn model(&self) -> Result<Modular> {
        let mut model = Modular::from_box(base(), Seed(3))?;
        self.head.setup(&mut model)?;
        // The start is a head that sees something: it is not trained here.
        let weight = model.params().get("heads.score.weight")?.clone();
        no_grad(|| weight.clone().mul_scalar_in_place(4.0))?;
        Ok(model)
    }

    fn decide(model: &mut Modular, name: &str) -> Result<()> {
        model.route(Box::new(Fixed::modules([name])), false)?;
        model.aggregate(Box::new(WeightedSum::default()))
    }

    /// What is wrong with a method, and its loss before and after.
    fn put(
        &self,
        name: &str,
        trial: &Trial,
        model: &mut Modular,
        again: &mut Modular,
    ) -> Result<(f64, f64)> {
        let wrong = |problem: String| Err(Error::invalid(name, problem));
        let base = no_grad(|| {
            let cx = describe(&self.batch, Context::eval())?;
            model.forward_base(&self.batch.inputs, &cx)?.need("last_hidden_state").cloned()
        })?;
        let mut recipe = trial.settings.clone();
        recipe["type"] = name.into();
        let config = self.registry.modules.parse(&recipe)?;
        let targets = match trial.targets {
            Some(pattern) => Targets::pattern(pattern),
            None => config.usual_targets(),
        };
        model.attach(name, config, &targets)?;
        Self::decide(model, name)?;
        let fresh = self.pass(model)?;
        match trial.start {
            Start::Exact if !fresh.bit_equal(&base)? => {
                return wrong("is not the base at the start, bit for bit".into());
            }
            Start::Within(bound) if fresh.max_abs_diff(&base)? > bound => {
                return wrong(format!("is {} from the base", fresh.max_abs_diff(&base)?));
            }
            _ => {}
        }

        let before = self.loss(model)?;
        let config = TrainConfig {
            train: vec![format!("modules.{name}.*")],
            steps: Some(STEPS),
            batch_size: self.data.len(),
            lr: trial.lr,
            lr_scale: trial.lr_scale.clone(),
            optimizer: modl_core::from_json("optimizer", json!({"type": trial.optimizer}))?,
            ..TrainConfig::default()
        };
        let theta: Vec<Tensor> =
            again.backbone().params().iter().map(|(_, p)| p.tensor().clone()).collect();
        Trainer::new(name, model, &self.head, config, Seed(7))?.train(
            &self.data,
            &describe,
            &mut (),
        )?;
        let after = self.loss(model)?;
        for ((n, p), t) in model.backbone().params().iter().zip(&theta) {
            if !p.tensor().bit_equal(t)? {
                return wrong(format!("has changed `{n}` of the backbone"));
            }
        }

        let path = self.folder.path().join(format!("{name}.safetensors"));
        model.train_only(&Select::none())?;
        model.save_module(name, &path)?;
        again.load_module(&path, None, &self.registry)?;
        Self::decide(again, name)?;
        let (loaded, saved) = (self.pass(again)?, self.pass(model)?);
        if !loaded.bit_equal(&saved)? {
            let apart = loaded.max_abs_diff(&saved)?;
            return wrong(format!("gives something else from its file: {apart} apart"));
        }
        std::fs::remove_file(&path).map_err(|e| Error::file(&path, e))?;
        again.detach(name)?;
        model.detach(name)?;
        Ok((before, after))
    }
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn every_kind_of_module_learns_from_real_sentences_and_survives_its_file() {
    let registry = Registry::new().with(modl_compute::register).unwrap();
    let data = sentences();
    let rows: Vec<usize> = (0..data.len()).collect();
    let trials = Trials {
        batch: data.batch(&rows, Device::Cpu).unwrap(),
        data,
        head: Regression { head: "score".into(), dim: 384 },
        registry,
        folder: tempfile::tempdir().unwrap(),
    };
    let (mut model, mut again) = (trials.model().unwrap(), trials.model().unwrap());
    let (mut table, mut wrong) = (String::new(), Vec::new());
    for entry in trials.registry.modules.entries() {
        let name = entry.name;
        let trial = match particular(name) {
            Ok(trial) => trial,
            Err(reason) => {
                table += &format!("{name:<18} {reason}\n");
                continue;
            }
        };
        let clock = Instant::now();
        match trials.put(name, &trial, &mut model, &mut again) {
            Ok((before, after)) => {
                let seconds = clock.elapsed().as_secs_f64();
                table += &format!("{name:<18} {before:>9.4} → {after:>9.4}  {seconds:.1} s\n");
                let falls = after < 0.8 * before;
                if !falls {
                    wrong.push(format!("{name}: the loss goes from {before} to {after}"));
                }
            }
            Err(e) => {
                wrong.push(format!("{name}: {e}"));
                (model, again) = (trials.model().unwrap(), trials.model().unwrap());
            }
        }
    }
    println!("{table}");
    assert!(wrong.is_empty(), "{}\n\n{table}", wrong.join("\n"));
}
