//! Hypernetworks in training on real sentences of four domains, and what is baked of them.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_aggregate::WeightedSum;
use modl_compute::hyper::bake;
use modl_compute::{Condition, HyperFormerPlusPlus, HyperLora, Lora, Nested, peft, register};
use modl_core::{Context, Modular, ModuleConfig, Registry, Seed, no_grad};
use modl_models::{LoadOptions, Tokenizer, open};
use modl_route::Fixed;
use modl_train::{
    Batch, Dataset, Example, Objective, Regression, TrainConfig, Trainer, evaluate, read_tsv,
    sample,
};

const DOMAINS: [&str; 4] = ["tweets", "amazon", "movies", "nyt"];

fn assets(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

fn texts() -> Dataset {
    let tokenizer = Tokenizer::open(assets("all-MiniLM-L6-v2")).unwrap();
    let mut examples = Vec::new();
    for task in DOMAINS {
        let rows = read_tsv(assets("sentiment").join(format!("{task}.tsv"))).unwrap();
        for row in sample(rows, 24, 0) {
            let mut ids = tokenizer.encode_one(&row.text).unwrap();
            ids.truncate(24);
            let ids = ids.into();
            examples.push(Example { id: row.id, task: task.into(), ids, target: row.score / 4.0 });
        }
    }
    Dataset::new(examples).unwrap()
}

fn objective() -> Regression {
    Regression { head: "sentiment".into(), dim: 384 }
}

fn model() -> Modular {
    let options = LoadOptions { dropout: Some(0.0), ..LoadOptions::default() };
    let backbone = open(assets("all-MiniLM-L6-v2"), &options).unwrap();
    let mut model = Modular::from_box(backbone, Seed(3)).unwrap();
    objective().setup(&mut model).unwrap();
    model
}

fn loss(model: &Modular, data: &Dataset) -> f64 {
    let said = evaluate(model, &objective(), data, 16, &Batch::describe).unwrap();
    said.iter().map(|p| (p.prediction - p.target).powi(2)).sum::<f64>() / said.len() as f64
}

/// The loss with mixed batches before and after forty steps.
fn train(config: impl ModuleConfig + 'static, lr: f64) -> (Modular, f64, f64) {
    let (mut model, data) = (model(), texts());
    let targets = config.usual_targets();
    model.attach("hyper", Box::new(config), &targets).unwrap();
    model.aggregate(Box::new(WeightedSum::default())).unwrap();
    model.route(Box::new(Fixed::modules(["hyper"])), false).unwrap();
    let before = loss(&model, &data);
    let steps = TrainConfig {
        train: vec!["modules.*".into()],
        steps: Some(40),
        batch_size: 16,
        lr,
        ..TrainConfig::default()
    };
    let task = objective();
    let mut trainer = Trainer::new("hyper", &model, &task, steps, Seed(5)).unwrap();
    trainer.train(&data, &Batch::describe, &mut ()).unwrap();
    let after = loss(&model, &data);
    (model, before, after)
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn hyperformer_plus_plus_learns_four_domains_at_once() {
    let config =
        HyperFormerPlusPlus { tasks: Condition::names(DOMAINS), ..HyperFormerPlusPlus::default() };
    // The learning rate of the paper.
    let (_, before, after) = train(config, 3e-4);
    println!("HyperFormer++: {before} to {after}");
    assert!(after < 0.8 * before, "{before} to {after}");
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn hyper_lora_learns_and_its_lora_for_tweets_is_a_folder_of_peft() {
    let config = HyperLora {
        config: Nested::new(Lora { r: 4, alpha: 4.0, ..Lora::default() }),
        tasks: Condition::names(DOMAINS),
        skills: 8,
    };
    let (model, before, after) = train(config, 2e-3);
    println!("HyperLoRA: {before} to {after}");
    assert!(after < 0.8 * before, "{before} to {after}");
    let tweets = texts().of_task("tweets").unwrap();
    let said = |model: &Modular| {
        let said = evaluate(model, &objective(), &tweets, 16, &Batch::describe).unwrap();
        said.iter().map(|p| p.prediction).collect::<Vec<_>>()
    };
    let generated = said(&model);
    // Saved, and loaded into a model of its own, where it can be baked.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hyper.safetensors");
    model.save_module("hyper", &file).unwrap();
    let mut other = self::model();
    other.load_module(&file, None, &Registry::new().with(register).unwrap()).unwrap();
    bake(&mut other, "hyper", &Context::eval().with_tasks(["tweets"]), "tweets").unwrap();
    peft::save(&other, "tweets", folder.path().join("peft")).unwrap();
    let mut last = self::model();
    let head = model.params().iter().filter(|(n, _)| n.starts_with("heads."));
    for (name, p) in head {
        let mut own = last.params().get(name).unwrap().clone();
        no_grad(|| own.copy_from(p.tensor())).unwrap();
    }
    peft::load(&mut last, folder.path().join("peft"), Some("tweets")).unwrap();
    last.merge("tweets").unwrap();
    last.detach("tweets").unwrap();
    for (a, b) in said(&last).iter().zip(&generated) {
        assert!((a - b).abs() < 1e-5 + 1e-5 * b.abs(), "{a} {b}");
    }
}
