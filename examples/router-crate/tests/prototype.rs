//! The router against a closed form, in training, and in the guide.

use modl_core::testing::{Given, Sum, TinyBackbone, standins};
use modl_core::{
    Context, Device, Kind, Modular, Registry, Result, Seed, Select, Targets, Tensor, Weights,
    no_grad,
};
use serde_json::json;

fn registry() -> Result<Registry> {
    Registry::new().with(modl_router_prototype::register)
}

/// A backbone with two modules at the queries.
fn model() -> Result<Modular> {
    let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Float)?, Seed(2))?;
    for name in ["small", "large"] {
        model.attach(name, Box::new(standins::Scale), &Targets::names(["query"]))?;
    }
    modl_core::testing::perturb(&model, &Select::new("modules.*"), 0.5, Seed(3))?;
    model.route(Given::only(0), false)?;
    model.aggregate(Box::new(Sum::default()))?;
    Ok(model)
}

#[test]
fn a_recipe_names_it_and_it_learns_which_module_was_used() -> Result<()> {
    let mut model = model()?;
    let inputs = TinyBackbone::inputs(4, 5, Seed(4))?;
    let target = model.forward(&inputs, &Context::eval())?.need("logits")?.detach()?;
    let recipe = json!({ "type": "prototype", "temperature": 0.5 });
    model.route(registry()?.routers.parse(&recipe)?, false)?;
    model.train_only(&Select::new("routers.*"))?;
    let loss = |model: &Modular| {
        model.forward(&inputs, &Context::train(Seed(5), 0))?.need("logits")?.mse(&target)
    };
    let before = loss(&model)?.item()?;
    for _ in 0..200 {
        let parameters = model.trainable();
        let leaves: Vec<&Tensor> = parameters.iter().map(|(_, t)| t).collect();
        for (leaf, g) in leaves.iter().zip(loss(&model)?.gradients(&leaves, false)?) {
            let Some(g) = g else { continue };
            let step = g.mul_scalar(-20.0)?;
            no_grad(|| (*leaf).clone().add_in_place(&step))?;
        }
    }
    let after = loss(&model)?.item()?;
    assert!(after < 0.5 * before, "{before} → {after}");
    Ok(())
}

#[test]
fn a_row_that_points_at_a_prototype_has_its_weight_in_closed_form() -> Result<()> {
    let registry = registry()?;
    let mut model = model()?;
    model.route(
        registry.routers.parse(&json!({ "type": "prototype", "temperature": 1.0 }))?,
        false,
    )?;
    let site = &model.modular_sites()[0];
    let layer = model.layer(site).unwrap();
    let mut prototypes = model.params().get("routers.layer.0.query.prototypes")?.clone();
    let axes: Vec<f32> = (0..16).map(|i| if i == 0 || i == 9 { 3.0 } else { 0.0 }).collect();
    no_grad(|| prototypes.copy_from(&Tensor::from_slice(&axes, &[2, 8], Device::Cpu)?))?;
    let x = Tensor::from_slice(&axes[..8], &[1, 1, 8], Device::Cpu)?;
    let routing = layer.router().route(&x.into(), &layer.bank, &Context::eval())?;
    let Weights::Dense(alpha) = &routing.weights else { panic!("{routing:?}") };
    let e = std::f64::consts::E;
    assert!((alpha.to_vec::<f64>()?[0] - e / (e + 1.0)).abs() < 1e-6);
    Ok(())
}

#[test]
fn the_guide_shows_this_code() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let code = ["src/lib.rs", "tests/laws.rs", "examples/modl.rs"].map(read).concat();
    let guide = read("../../docs/write-a-router.md");
    let shown = guide.split("\n```rust\n").skip(1).filter_map(|part| part.split("\n```").next());
    let mut blocks = 0;
    for block in shown {
        assert!(code.contains(block), "not in the code:\n{block}");
        blocks += 1;
    }
    assert_eq!(blocks, 7);
}
