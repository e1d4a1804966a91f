//! Aggregators with parameters of their own learn over modules that stay as they are: the LoRAs of
//! four domains over MiniLM, each trained on its domain alone and frozen with the base, then the
//! aggregator over all four, for texts whose domain nobody tells.
//!
//! On these texts the loss falls below that of where it starts, nearly the mean of the four. The sign
//! of texts that were held out stays right more often than that of the more frequent sign; that their
//! loss falls, too, is not asked: a fusion has 443,136 numbers for 480 texts, and AdapterFusion's
//! authors train it on tens of thousands. Files of modules and routing give the same predictions bit
//! for bit.

use modl_core::{Modular, Result, Select, Tensor};
use modl_train::Passes;
use serde_json::{Value, json};

use super::Said;
use super::sentiment::{ABOVE, DOMAINS, MAJORITY, Trials, trials};

const LEARNED: [&str; 4] = ["fusion", "scalar_mix", "gated", "module_attention"];

/// What training gives is to be below this share of what it was; that of `scalar_mix`, which has five
/// numbers, moves the least.
const FALLS_BELOW: f64 = 0.99;

/// Copies of all that `of` takes.
fn copies(model: &Modular, of: &str) -> Result<Vec<(String, Tensor)>> {
    let select = Select::new(of);
    let own = model.params().select(&select);
    own.map(|(n, t)| Ok((n.to_owned(), t.detach()?.copy()?))).collect()
}

/// What is said of the texts to train on before and after training, and of those held out after it.
fn put(trials: &Trials, aggregator: &Value) -> Result<[Said; 3]> {
    let mut model = trials.model()?;
    trials.decide(&mut model, &json!({"type": "fixed"}), "weighted_sum")?;
    trials.train_at(1e-2, "modules", &model, &["modules.*"], Passes::default())?;
    let all = json!({"type": "fixed", "modules": DOMAINS});
    model.route(trials.registry.routers.parse(&all)?, false)?;
    model.aggregate(trials.registry.aggregators.parse(aggregator)?)?;
    let (modules, start) = (copies(&model, "modules.*")?, copies(&model, "aggregators.*")?);
    let before = trials.say_of(&model, &trials.train)?;
    let name = aggregator["type"].as_str().unwrap();
    trials.train_at(1e-3, name, &model, &["aggregators.*"], Passes::default())?;
    for (name, t) in modules {
        assert!(model.params().get(&name)?.bit_equal(&t)?, "`{name}` is frozen");
    }
    // The bias of the keys does not change a softmax.
    for (name, t) in start.iter().filter(|(n, _)| !n.ends_with("key.bias")) {
        assert!(!model.params().get(name)?.bit_equal(t)?, "`{name}` is trained");
    }
    let (after, held_out) = (trials.say_of(&model, &trials.train)?, trials.say(&model)?);
    let again = trials.again(name, &model)?;
    assert_eq!(trials.say(&again)?.all, held_out.all, "{name} says something else from its files");
    Ok([before, after, held_out])
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn learned_aggregators_learn_over_frozen_modules_of_four_domains_and_survive_their_files() {
    let trials = trials();
    let (mut table, mut wrong) = (String::new(), Vec::new());
    for name in LEARNED {
        let [before, after, held_out] = put(&trials, &json!({"type": name})).unwrap();
        let line = format!(
            "{name:<18} loss {:.3} → {:.3}; held out {:.3}, right {:.3}\n",
            before.loss, after.loss, held_out.loss, held_out.right
        );
        if !(after.loss < FALLS_BELOW * before.loss && held_out.right > MAJORITY + ABOVE) {
            wrong.push(line.clone());
        }
        table += &line;
    }
    println!("{table}");
    assert!(wrong.is_empty(), "{}\n\n{table}", wrong.join("\n"));
}
