//! What stands beside an adapter in a PEFT folder: whole modules, rows of the embeddings, LoRA of
//! experts. PEFT's own folders are read in `peft_deterministic.rs`.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::{Form, Full, Ia3, Lora, Part, TrainableTokens, Union, peft};
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum, perturb};
use modl_core::{
    Context, Device, Kind, Modular, ModuleConfig, Seed, Select, Targets, Tensor, Tensors, no_grad,
};
use modl_models::{LoadOptions, open};
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn on(base: &str, kind: Option<Kind>) -> Modular {
    let options = LoadOptions { kind, ..LoadOptions::default() };
    Modular::from_box(open(fixture(base), &options).unwrap(), Seed(1)).unwrap()
}

fn inputs(base: &str) -> Tensors {
    let file = Checkpoint::open(fixture(base).join("inputs.safetensors")).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn output(model: &mut Modular, base: &str) -> Tensor {
    if model.layer(&model.modular_sites()[0]).is_some() {
        model.aggregate(Box::new(Sum::default())).unwrap();
        model.route(Given::only(0), false).unwrap();
    }
    model.forward(&inputs(base), &Context::eval()).unwrap().need("logits").unwrap().clone()
}

fn lora() -> Lora {
    Lora { r: 2, ..Lora::default() }
}

fn saved(name: &str) -> Part {
    Part::new(Targets::names([name]), Full { form: Form::Copy })
}

/// Attaches a union where its parts stand, far from where it starts.
fn attach(model: &mut Modular, union: Union) {
    let targets = union.usual_targets();
    model.attach("a", Box::new(union), &targets).unwrap();
    perturb(model, &Select::new("modules.*"), 0.1, Seed(3)).unwrap();
}

#[test]
fn a_union_made_in_code_is_pefts_fields_and_comes_back() {
    let base = "deterministic_llama";
    let mut model = on(base, None);
    let parts = [
        saved("lm_head"),
        Part::new(Targets::names(["q_proj", "v_proj"]), lora()),
        Part::new(Targets::pattern("all-embedding"), TrainableTokens::new([3, 8])),
        saved("model.norm"),
    ];
    attach(&mut model, Union::new(parts));
    let dir = tempfile::tempdir().unwrap();
    peft::save(&model, "a", dir.path()).unwrap();
    let text = std::fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["modules_to_save"], json!(["lm_head", "model.norm"]));
    assert_eq!(config["trainable_token_indices"], json!([3, 8]));
    assert_eq!(config["target_modules"], json!(["q_proj", "v_proj"]));
    let mut again = on(base, None);
    peft::load(&mut again, dir.path(), Some("b")).unwrap();
    assert!(output(&mut again, base).bit_equal(&output(&mut model, base)).unwrap());
}

#[test]
fn what_peft_cannot_have_is_refused() {
    let attention = || Targets::names(["q_proj"]);
    let experts = |lora| Part::new(Targets::names(["mlp.experts"]), lora);
    let stacks = || vec!["mlp.experts.down_proj".to_owned()];
    let tokens = Part::new(Targets::pattern("all-embedding"), TrainableTokens::new([3]));
    let cases: [(Union, &str); 4] = [
        (
            Union::new([
                Part::new(attention(), lora()),
                Part::new(Targets::names(["k_proj"]), lora()),
            ]),
            "several adapters",
        ),
        (Union::new([saved("lm_head")]), "without an adapter"),
        (
            Union::new([Part::new(attention(), Ia3::default()), tokens]),
            "`trainable_token_indices` beside IA3",
        ),
        (
            Union::new([
                Part::new(attention(), lora()),
                experts(Lora { r: 3, target_parameters: stacks(), ..lora() }),
            ]),
            "other settings",
        ),
    ];
    for (union, problem) in cases {
        let mut model = on("deterministic_mixtral", None);
        attach(&mut model, union);
        let dir = tempfile::tempdir().unwrap();
        let e = peft::save(&model, "a", dir.path()).unwrap_err().to_string();
        assert!(e.contains(problem), "{problem}: {e}");
    }
}

fn of_experts() -> Lora {
    let names = ["mlp.experts.gate_up_proj", "experts.down_proj"];
    Lora { target_parameters: names.map(str::to_owned).to_vec(), ..lora() }
}

#[test]
fn lora_of_experts_starts_as_nothing_and_its_gradients_are_the_differences() {
    let base = "deterministic_mixtral";
    let experts = Targets::names(["experts"]);
    let mut model = on(base, Some(Kind::Double));
    let plain = model.forward_base(&inputs(base), &Context::eval()).unwrap();
    model.attach("a", Box::new(of_experts()), &experts).unwrap();
    // A of 4 experts of rank 2 by 32 and 24 wide vectors, B of 48 and 32, in two layers.
    let n: usize = model.params().iter().map(|(_, p)| p.tensor().numel()).sum();
    assert_eq!(n, 2 * 8 * (32 + 48 + 24 + 32));
    assert!(output(&mut model, base).bit_equal(plain.need("logits").unwrap()).unwrap());
    perturb(&model, &Select::new("modules.*"), 0.3, Seed(3)).unwrap();
    model.train_only(&Select::new("modules.*")).unwrap();
    let loss = |model: &mut Modular| output(model, base).square().unwrap().sum().unwrap();
    let phi = model.trainable();
    let tensors: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
    let found = loss(&mut model).gradients(&tensors, false).unwrap();
    for ((name, t), gradient) in phi.iter().zip(found) {
        let direction = modl_core::Init::Normal(1.0)
            .tensor(&t.size(), Seed(7).child(name), Kind::Double, Device::Cpu)
            .unwrap();
        let mut at = |by: f64| {
            let step = direction.mul_scalar(by).unwrap();
            no_grad(|| {
                t.clone().add_in_place(&step).unwrap();
                let value = loss(&mut model).item().unwrap();
                t.clone().add_in_place(&step.neg().unwrap()).unwrap();
                value
            })
        };
        let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
        let analytic = gradient.unwrap().mul(&direction).unwrap().sum().unwrap().item().unwrap();
        assert!(
            (analytic - numeric).abs() < 1e-6 * (1.0 + numeric.abs()),
            "{name}: {analytic} {numeric}"
        );
    }
}

#[test]
fn rows_have_experts_of_their_own() {
    let base = "deterministic_olmoe";
    let mut model = on(base, None);
    for name in ["a", "b"] {
        model.attach(name, Box::new(of_experts()), &Targets::names(["experts"])).unwrap();
    }
    perturb(&model, &Select::all(), 0.3, Seed(3)).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    let mut run = |router| {
        model.route(router, false).unwrap();
        model.forward(&inputs(base), &Context::eval()).unwrap().need("logits").unwrap().clone()
    };
    let (a, b, mixed) =
        (run(Given::only(0)), run(Given::only(1)), run(Given::rows(&[Some(1), Some(0)])));
    for (row, alone) in [(0, &b), (1, &a)] {
        let (found, wanted) = (mixed.select(0, row).unwrap(), alone.select(0, row).unwrap());
        assert!(found.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{row}");
    }
    assert!(a.max_abs_diff(&b).unwrap() > 1e-3);
}

#[test]
fn lora_of_experts_says_what_it_does_not_do() {
    let mut model = on("deterministic_mixtral", None);
    let mut refused = |lora: Lora, site: &str| {
        let config: Box<dyn ModuleConfig> = Box::new(lora);
        model.attach("a", config, &Targets::names([site])).unwrap_err().to_string()
    };
    assert!(refused(lora(), "experts").contains("target_parameters"));
    assert!(refused(Lora { dropout: 0.1, ..of_experts() }, "experts").contains("dropout"));
    assert!(refused(Lora { lora_bias: true, ..of_experts() }, "experts").contains("bias"));
    assert!(refused(of_experts(), "q_proj").contains("Linear"));
    let typo = Lora { target_parameters: vec!["mlp.experts.up_proj".into()], ..lora() };
    assert!(refused(typo, "experts").contains("gate_up_proj"));
}
