//! The README's example: four modules, a router that is not told the domain, an adapter for PEFT.
//!
//! `cargo xtask assets`, then `cargo run --release -p modl-apps --example four_domains`.

use modl_aggregate::WeightedSum;
use modl_compute::{Lora, peft};
use modl_core::{Modular, Result, Seed, Targets};
use modl_models::{LoadOptions, Tokenizer, open};
use modl_route::{Fixed, Soft};
use modl_train::{
    Batch, Dataset, Example, Objective, Regression, TrainConfig, Trainer, evaluate, read_tsv,
    sample, scores,
};

const DOMAINS: [&str; 4] = ["tweets", "amazon", "movies", "nyt"];

fn main() -> Result<()> {
    let task = Regression { head: "sentiment".into(), dim: 384 };
    let (train, test) = texts(300)?.split(0, 0.25)?;
    let backbone = open("assets/all-MiniLM-L6-v2", &LoadOptions::default())?;
    let mut model = Modular::from_box(backbone, Seed(0))?; // the backbone is frozen
    task.setup(&mut model)?;
    for domain in DOMAINS {
        model.attach(domain, Box::new(Lora::default()), &Targets::names(["query", "value"]))?;
    }
    model.aggregate(Box::new(WeightedSum::default()))?;
    let fit = |model: &Modular, patterns: &[&str], lr: f64| {
        let train_only = patterns.iter().map(|p| p.to_string()).collect();
        let config = TrainConfig { train: train_only, lr, ..TrainConfig::default() };
        Trainer::new("fit", model, &task, config, Seed(0))?.train(&train, &Batch::describe, &mut ())
    };
    model.route(Box::new(Fixed::default()), false)?; // each row to the module of its domain
    fit(&model, &["modules.*", "heads.*"], 2e-3)?;
    model.route(Box::new(Soft::default()), true)?; // one router that is not told the domain
    fit(&model, &["routers.*"], 5e-2)?;
    let said = evaluate(&model, &task, &test, 64, &Batch::describe)?;
    println!("{:?}", scores(&said, 0.0)); // accuracy, Spearman's ρ, mean absolute error
    peft::save(&model, "tweets", "runs/tweets") // a folder that Hugging Face PEFT reads
}

fn texts(of_each: usize) -> Result<Dataset> {
    let tokenizer = Tokenizer::open("assets/all-MiniLM-L6-v2")?;
    let mut examples = Vec::new();
    for task in DOMAINS {
        let rows = read_tsv(format!("assets/sentiment/{task}.tsv"))?;
        for row in sample(rows, of_each, 0) {
            let ids = tokenizer.encode_one(&row.text)?.into();
            examples.push(Example { id: row.id, task: task.into(), ids, target: row.score });
        }
    }
    Dataset::new(examples)
}
