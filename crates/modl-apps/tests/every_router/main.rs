//! Every router of the registry learns: the sentiment of real texts, alone and with its modules, and
//! which rule a point follows. A router that is new to the registry is tested with its defaults; what
//! is particular to one is a line of [`particular`]. Aggregators that learn have a test of their own.
#![allow(clippy::unwrap_used, clippy::panic)]

mod aggregators;
mod last_layer;
mod rules;
mod sentiment;

use modl_core::{Registry, Result};
use modl_train::{Combine, Passes};
use serde_json::{Value, json};

fn registry() -> Registry {
    let registry = Registry::new().with(modl_compute::register).unwrap();
    let registry = registry.with(modl_route::register).unwrap();
    registry.with(modl_aggregate::register).unwrap()
}

/// What a model gives for what was held out.
#[derive(Debug, Clone)]
struct Said {
    loss: f64,
    /// The share of what is right.
    right: f64,
    all: Vec<f64>,
}

/// Puts every router to a test, before and after, and prints a table. A test says why it does not
/// fit a router.
///
/// # Panics
/// With the routers whose loss does not fall below a share of what it was, or that are not right
/// more often than `above`.
fn every_router(
    falls_below: f64,
    above: impl Fn(&str) -> f64,
    put: impl Fn(&'static str) -> std::result::Result<Result<(Said, Said)>, &'static str>,
) {
    let (mut table, mut wrong) = (String::new(), Vec::new());
    for entry in registry().routers.entries() {
        let name = entry.name;
        match put(name) {
            Err(reason) => table += &format!("{name:<18} {reason}\n"),
            Ok(Err(e)) => wrong.push(format!("{name}: {e}")),
            Ok(Ok((before, after))) => {
                let line = format!(
                    "{name:<18} loss {:.3} → {:.3}, right {:.3} → {:.3}\n",
                    before.loss, after.loss, before.right, after.right
                );
                if !(after.loss < falls_below * before.loss && after.right > above(name)) {
                    wrong.push(line.clone());
                }
                table += &line;
            }
        }
    }
    println!("{table}");
    assert!(wrong.is_empty(), "{}\n\n{table}", wrong.join("\n"));
}

/// How a router is put to the test.
#[derive(Debug)]
struct Trial {
    settings: Value,
    aggregator: &'static str,
    passes: Passes,
    /// Whether modules are trained for their domains before this router is made, and stay then.
    after_the_fact: bool,
    /// Whether all modules start as the first one does.
    alike: bool,
}

/// Why a router is not tested here, or what is particular to it.
fn particular(name: &str, tasks: &[&str]) -> std::result::Result<Trial, &'static str> {
    let usual = || Trial {
        settings: json!({}),
        aggregator: "weighted_sum",
        passes: Passes::default(),
        after_the_fact: false,
        alike: false,
    };
    let with = |settings: Value| Trial { settings, ..usual() };
    let passed = |count: u64, combine: Combine| Trial {
        passes: Passes { count, combine, ..Passes::default() },
        ..usual()
    };
    let tasks = json!({"tasks": tasks});
    Ok(match name {
        "sub_network" => {
            return Err("is taken out of a trained `task_moe`: modl-route's tests/task.rs");
        }
        "hash" => with(json!({"vocab": 30522})),
        // Modules were trained with gates that were half open.
        "concrete_bernoulli" => with(json!({"evaluation": "probability"})),
        "thor" => passed(2, Combine::Consistent(1.0)),
        // What starts at different places cannot be averaged in parameters after a few steps.
        "adamix" => {
            Trial { aggregator: "average", alike: true, ..passed(2, Combine::Consistent(1.0)) }
        }
        "modular_network" => passed(10, Combine::Best),
        "routing_network" | "polytropon" | "task_moe" => with(tasks),
        "prompt_pool" => with(json!({"k": 1, "label": "task"})),
        "multi_head" => Trial { aggregator: "multi_head", ..with(tasks) },
        "path_net" => with(json!({"population": 8, "evaluate_for": 4, "average": true})),
        // Made for modules that are there.
        "arrow" | "phatgoose" | "x_lora" => Trial { after_the_fact: true, ..usual() },
        _ => usual(),
    })
}
