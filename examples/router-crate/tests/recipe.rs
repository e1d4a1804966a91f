//! A recipe names the router; it is trained, saved and restored like modl's own.

use modl_core::testing::TinyBackbone;
use modl_core::{Kind, Modular, Result, Seed, Tensor};
use modl_train::{Dataset, Example, Methods, Recipe, Regression, restore, run};

const RECIPE: &str = r#"
[backbone]
path = "toy"

[data]
tasks = { plus = "plus.tsv", minus = "minus.tsv" }

[modules.plus]
type = "lora"
targets = ["query", "value"]

[modules.minus]
type = "lora"
targets = ["query", "value"]

[router]
type = "prototype"
temperature = 0.5

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "all"
strategy = "joint"
train = ["modules.*", "routers.*", "heads.*"]
steps = 8
lr = 0.05
"#;

/// The target is the share of even tokens, positive or negative by the first token.
fn data() -> Result<Dataset> {
    let example = |i: usize| {
        let task = ["plus", "minus"][i % 2];
        let ids: Vec<i64> = (0..2 + i % 5).map(|k| ((i * 7 + k * 3) % 16) as i64).collect();
        let even = ids.iter().filter(|k| **k % 2 == 0).count() as f32 / ids.len() as f32;
        let target = if i.is_multiple_of(2) { even } else { -even };
        Example { id: i.to_string(), task: task.into(), ids: ids.into(), target }
    };
    Dataset::new((0..20).map(example).collect())
}

fn fresh(recipe: &Recipe) -> Result<Modular> {
    Modular::new(TinyBackbone::new(Seed(1), Kind::Float)?, Seed(recipe.seed))
}

fn prototypes(model: &Modular) -> Result<Tensor> {
    model.params().get("routers.layer.0.query.prototypes")?.copy()
}

#[test]
fn a_run_trains_the_router_and_a_restored_model_has_it() -> Result<()> {
    let methods = Methods::new(modl_apps::builtin()?.with(modl_router_prototype::register)?)?;
    let recipe = Recipe::parse(RECIPE, "recipe.toml", &methods)?;
    let head = Regression { head: "score".into(), dim: 8 };
    let folder = tempfile::tempdir().unwrap();
    let mut model = fresh(&recipe)?;
    run(&recipe, &methods, &mut model, &head, &data()?, folder.path(), &mut ())?;
    let mut again = fresh(&recipe)?;
    restore(&recipe, &methods, &mut again, &head, folder.path())?;
    assert!(prototypes(&again)?.bit_equal(&prototypes(&model)?)?);

    // The same start, not trained.
    let mut start = fresh(&recipe)?;
    for m in ["plus", "minus"] {
        let config = serde_json::json!({ "type": "lora" });
        let targets = modl_core::Targets::names(["query", "value"]);
        start.attach(m, methods.registry.modules.parse(&config)?, &targets)?;
    }
    start.route(Box::new(modl_router_prototype::Prototype { temperature: 0.5 }), false)?;
    assert!(prototypes(&start)?.max_abs_diff(&prototypes(&model)?)? > 0.01);
    Ok(())
}
