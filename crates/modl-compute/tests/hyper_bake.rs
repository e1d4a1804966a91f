//! Rows of different tasks in one batch, and what is generated for one of them as a module of its
//! own.
#![allow(clippy::unwrap_used)]

use modl_compute::hyper::bake;
use modl_compute::{
    Bottleneck, Condition, Cpg, Form, Full, HyperFormer, HyperFormerPlusPlus, HyperLora,
    HyperNetwork, HyperX, Lora, MadG, Nested, peft, register,
};
use modl_core::testing::{Given, Sum, TinyBackbone, perturb};
use modl_core::{
    Context, Device, Init, Kind, Modular, ModuleConfig, Registry, Seed, Select, Targets, Tensor,
};

const SEED: Seed = Seed(9);
const TASKS: [&str; 4] = ["one", "two", "one", "three"];
const LANGUAGES: [&str; 4] = ["en", "en", "de", "de"];

fn model(config: impl ModuleConfig + 'static, targets: &str) -> Modular {
    let backbone = TinyBackbone::new(SEED, Kind::Float).unwrap();
    let mut model = Modular::new(backbone, SEED.child("modules")).unwrap();
    model.attach("hyper", Box::new(config), &Targets::pattern(targets)).unwrap();
    perturb(&model, &Select::new("modules.*"), 0.2, SEED).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model
}

fn typology() -> Tensor {
    let t = Init::Normal(1.0).tensor(&[2, 5], SEED, Kind::Float, Device::Cpu).unwrap();
    // Two languages in four rows.
    t.index_select(0, &Tensor::from_slice(&[0i64, 1, 1, 0], &[4], Device::Cpu).unwrap()).unwrap()
}

fn context() -> Context {
    let cx = Context::eval().with_tasks(TASKS).with_labels("language", LANGUAGES);
    cx.with_feature("typology", typology())
}

fn logits(model: &Modular, cx: &Context) -> Tensor {
    let inputs = TinyBackbone::inputs(4, 6, SEED).unwrap();
    model.forward(&inputs, cx).unwrap().need("logits").unwrap().clone()
}

/// Each row of a mixed batch is what the module baked for it gives, as an ordinary module.
fn check(config: impl ModuleConfig + 'static, targets: &str) -> Modular {
    let mut model = model(config, targets);
    for row in 0..4 {
        let cx = context().select_rows(&[row]).unwrap();
        bake(&mut model, "hyper", &cx, &format!("row{row}")).unwrap();
    }
    model.route(Given::only(0), false).unwrap();
    let mixed = logits(&model, &context());
    for row in 0..4 {
        model.route(Given::only(1 + row as usize), false).unwrap();
        // An ordinary module asks nothing of the context.
        let alone = logits(&model, &Context::eval()).select(0, row).unwrap();
        let found = mixed.select(0, row).unwrap();
        assert!(found.all_close(&alone, 1e-5, 1e-5).unwrap(), "row {row}");
    }
    let base = model.forward_base(&TinyBackbone::inputs(4, 6, SEED).unwrap(), &Context::eval());
    let base = base.unwrap().need("logits").unwrap().clone();
    assert!(base.max_abs_diff(&mixed).unwrap() > 1e-3, "the test can fail");
    model
}

fn tasks() -> Condition {
    Condition::names(["one", "two", "three"])
}

fn lora() -> Nested {
    Nested::new(Lora { r: 2, alpha: 4.0, ..Lora::default() })
}

fn adapter() -> Nested {
    Nested::new(Bottleneck { reduction_factor: 2.0, ..HyperFormer::adapter() })
}

#[test]
fn rows_of_different_tasks_are_as_each_alone() {
    let tasks_of = tasks;
    check(HyperLora { config: lora(), tasks: tasks(), skills: 4 }, "all-linear");
    let standard = HyperFormer::default();
    check(HyperFormer { config: adapter(), tasks: tasks_of(), ..standard }, "all-sublayer");
    let standard = HyperFormerPlusPlus::default();
    check(HyperFormerPlusPlus { config: lora(), tasks: tasks(), ..standard }, "all-linear");
    let languages = || Condition::names(["en", "de"]);
    let standard = HyperX::default();
    let hyper_x = HyperX { tasks: tasks(), languages: languages(), ..standard };
    check(HyperX { config: adapter(), ..hyper_x }, "all-sublayer");
    let typology = Condition::feature("typology", 5);
    check(MadG { config: adapter(), languages: typology, ..MadG::default() }, "all-sublayer");
    let config = Nested::new(Full { form: Form::Delta });
    check(Cpg { config, languages: languages(), ..Cpg::default() }, "all-norm|all-conv");
    check(HyperNetwork { tile: 4, ..HyperNetwork::default() }, "layer.0.query|head");
}

#[test]
fn what_is_baked_merges_and_is_a_folder_of_peft() {
    let config = HyperLora { config: lora(), tasks: tasks(), skills: 4 };
    let targets = r"layer\.0\.(query|value)";
    let mut model = check(config, targets);
    model.route(Given::only(2), false).unwrap();
    let attached = logits(&model, &Context::eval());
    let folder = tempfile::tempdir().unwrap();
    peft::save(&model, "row1", folder.path()).unwrap();
    model.merge("row1").unwrap();
    let inputs = TinyBackbone::inputs(4, 6, SEED).unwrap();
    let merged = model.forward_base(&inputs, &Context::eval()).unwrap();
    assert!(merged.need("logits").unwrap().all_close(&attached, 1e-5, 1e-5).unwrap());
    let backbone = TinyBackbone::new(SEED, Kind::Float).unwrap();
    let mut again = Modular::new(backbone, Seed(1)).unwrap();
    peft::load(&mut again, folder.path(), Some("two")).unwrap();
    again.aggregate(Box::new(Sum::default())).unwrap();
    again.route(Given::only(0), false).unwrap();
    assert!(logits(&again, &Context::eval()).all_close(&attached, 1e-5, 1e-5).unwrap());
}

#[test]
fn baking_is_refused_where_there_is_not_one_module_to_bake() {
    let config = HyperLora { config: lora(), tasks: tasks(), skills: 4 };
    let mut model = model(config, "layer.0.query");
    let e = bake(&mut model, "hyper", &context(), "x").unwrap_err().to_string();
    assert!(e.contains("layer.0.query") && e.contains("different modules"), "{e}");
    let unknown = Context::eval().with_tasks(["thre"]);
    let e = bake(&mut model, "hyper", &unknown, "x").unwrap_err().to_string();
    assert!(e.contains("did you mean `three`"), "{e}");
    assert_eq!(model.modules(), ["hyper"]);
    let one = Context::eval().with_tasks(["one"]);
    bake(&mut model, "hyper", &one, "x").unwrap();
    let e = bake(&mut model, "x", &one, "y").unwrap_err().to_string();
    assert!(e.contains("no hypernetwork"), "{e}");
    let e = bake(&mut model, "hyper", &one, "x").unwrap_err().to_string();
    assert!(e.contains("exists already"), "{e}");
}

#[test]
fn a_recipe_in_text_is_the_same_as_in_code() {
    let registry = Registry::new().with(register).unwrap();
    let recipe = serde_json::json!({
        "type": "hyper_x",
        "tasks": ["pos", "ner"],
        "languages": { "feature": "typology", "width": 289 },
        "config": { "type": "lora", "r": 4 },
    });
    let config = registry.modules.parse(&recipe).unwrap().to_json().unwrap();
    assert_eq!(config["languages"]["width"], 289);
    assert_eq!((&config["config"]["r"], &config["tasks"][1]), (&4.into(), &"ner".into()));
    let wrong =
        serde_json::json!({ "type": "mad_g", "languages": { "features": "t", "width": 2 } });
    assert!(registry.modules.parse(&wrong).is_err());
}
